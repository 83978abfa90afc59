"""Scores are drawn in a process of their own: what ends it is one bad row, and costs no other."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipelines.prepare.formats.rows import Bad, BadRow, Draft
from pipelines.prepare.scores import draw, marks
from pipelines.prepare.scores.score import MOST_VOICES, read_score
from pipelines.prepare.scores.worker import Ended, Worker
from tests.prepare.music import FIRST, note, score
from tests.prepare.through import read
from trainer.errors import UsageError

GOOD = score([FIRST + note("G4", 16)])


def test_a_score_that_ends_verovio_is_one_bad_row_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """verovio divides by a meter's zero. score.py refuses that one: here it is let through, as another one may be."""
    monkeypatch.setattr(marks, "METER", re.compile(".*"))
    (tmp_path / "a.musicxml").write_text(GOOD.replace("<beat-type>4", "<beat-type>0"))
    (tmp_path / "b.musicxml").write_text(GOOD)
    [bad] = read("musicxml", tmp_path / "a.musicxml")
    assert isinstance(bad, Bad) and bad.reason == "crashed" and bad.fault and "SIGFPE" in bad.got
    assert bad.where == f"{tmp_path}/a.musicxml, page 1"
    [good] = read("musicxml", tmp_path / "b.musicxml")
    assert isinstance(good, Draft)


def test_one_process_draws_one_score_after_the_other_and_a_fork_has_its_own():
    [first] = draw.pages_of(ET.fromstring(GOOD))
    idle = list(draw.WORKERS.idle.queue)
    running = [worker._process.pid for worker in idle if worker._process is not None]
    assert draw.pages_of(ET.fromstring(GOOD)) == [first]
    assert [worker._process.pid for worker in idle if worker._process is not None] == running and running
    child = os.fork()
    if child == 0:
        os._exit(0 if all(worker._process is None for worker in draw.WORKERS.idle.queue) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_that_ends_or_does_not_answer_is_started_again():
    ends = Worker("os", "_exit", limit_s=30)
    with pytest.raises(Ended, match="with exit code 3"):
        ends.call(3)
    sleeps = Worker("time", "sleep", limit_s=0.3)
    with pytest.raises(Ended, match=r"no answer within 0\.3 s"):
        sleeps.call(60)
    assert sleeps.call(0) is None
    sleeps.stop()
    with pytest.raises(UsageError, match="does not start"):
        Worker("no_such_module", "f", limit_s=1).call()


def test_a_part_of_more_voices_than_music_has_is_refused():
    """Every voice has every bar: as many voices as notes would take the square of the file."""

    def of_voices(count: int) -> ET.Element:
        back = "<backup><duration>16</duration></backup>"
        return ET.fromstring(score([FIRST + back.join(note("G4", 16, voice=n + 1) for n in range(count))]))

    assert len(read_score(of_voices(MOST_VOICES)).voices) == MOST_VOICES
    with pytest.raises(BadRow, match="unsupported: expected at most 64 voices in a part, got 65 in part P1"):
        read_score(of_voices(MOST_VOICES + 1))
