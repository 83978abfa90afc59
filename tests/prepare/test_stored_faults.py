"""What stored samples say and what cannot be: times outside their clip, masks of another size; and where shards are
looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli.main import main
from pipelines.prepare.grounding.masks import decompressed
from pipelines.prepare.preview.page import card
from pipelines.prepare.stored import sample_problems, sources_below
from tests.prepare.builders import a_picture
from tests.prepare.curate.builders import a_document, write_source
from trainer.data.masks import from_run_lengths
from trainer.data.sample import Mask, Media, Message, Object, Objects, Sample, Span
from trainer.errors import ShardError, UsageError

IMAGE = Media(digest="a", kind="image", suffix="png", size_bytes=1, width=60, height=40)
CLIP = Media(
    digest="a", kind="video", suffix="mp4", size_bytes=1, width=60, height=40, num_frames=40, fps=4, duration_s=10
)


def a_sample(at: Mask | Span, item: Media) -> Sample:
    shown = Message(role="user", parts=({"part": item.kind, "media": 0},))  # type: ignore[arg-type]
    said = Message(role="assistant", parts=(Objects(media=0, objects=(Object(label="it", at=at),)),))
    return Sample(id="1", source="s", kind="grounding", media=(item,), messages=(shown, said))


@pytest.mark.parametrize(
    ("start", "end", "problems"), [(0, 10, 0), (9.5, 10, 0), (500, 900, 1), (9, 10.5, 1), (-1, 2, 1)]
)
def test_a_span_ends_within_its_clip(start: float, end: float, problems: int):
    found = list(sample_problems(a_sample(Span(start_s=start, end_s=end), CLIP)))
    assert len(found) == problems and all("in a video of 10.000 s" in one for one in found)


def test_folders_with_a_dot_in_their_name_are_looked_into(tmp_path: Path):
    folders = [write_source(tmp_path / "v1.5", [a_document("a", "A text.")], name=name) for name in ("llava.v2", "b")]
    assert [source.uri for source in sources_below(str(tmp_path / "v1.5"))] == sorted(folders)
    (tmp_path / "v1.5/data/sources").rename(tmp_path / "v1.5/data/sources.tar")
    with pytest.raises(UsageError, match="no shards"):
        sources_below(str(tmp_path / "v1.5"))


OTHER_SIZES = [(0, 10**12), (2**63 - 1, 2**63 - 1, 2 + 2400), (0, 10**30), (-1, 2401), (2401, -1), ()]


@pytest.mark.parametrize("rle", OTHER_SIZES)
def test_run_lengths_of_another_size_are_refused_before_they_take_memory(rle: tuple[int, ...]):
    with pytest.raises(ValueError, match="run lengths of 60x40"):
        from_run_lengths(rle, 60, 40)
    shown = card(a_sample(Mask(xyxy=(0, 0, 1, 1), rle=rle), IMAGE), [a_picture()])
    assert "a mask that cannot be drawn" in shown and "<svg" not in shown
    good = card(a_sample(Mask(xyxy=(0, 0, 1, 1), rle=(2400,)), IMAGE), [a_picture()])
    assert "<svg" in good and "cannot be drawn" not in good, "negative control"


def test_compressed_run_lengths_take_no_more_memory_than_their_text():
    """One run of 2^37 pixels in eight characters, of a size that agrees."""
    assert decompressed("PPPPPPP4", [2**20, 2**17]) == (2**37,)


@pytest.mark.parametrize("content", [b'{"format": 1, "dig', b"null", b"[1]", b"", b"\xff\xfe", b'{"format": 1}'])
def test_a_damaged_manifest_is_one_problem_and_the_other_sources_are_looked_at(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sound, cut = (write_source(tmp_path, [a_document("a", "A text.")], name=name) for name in ("b", "a"))
    Path(cut, "source.json").write_bytes(content)
    assert main(["data", "check", str(tmp_path)]) == 64
    told = capsys.readouterr()
    assert f"{sound}: 1 samples in 1 shards; every byte" in told.out
    assert f"{cut}: not looked into; 1 problem\n" in told.out
    assert "1 problem in stored data" in told.err and f"{cut}/source.json: the source's manifest" in told.err
    assert main(["data", "stats", str(tmp_path)]) == ShardError.code
    assert f"where: {cut}/source.json" in capsys.readouterr().err


def test_a_damaged_note_of_what_shards_were_made_from_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n')
    words = ["data", "ingest", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    for content in (b"", b"null", b"{}", b'{"key": "'):
        (tmp_path / "out/input.json").write_bytes(content)
        assert main(words) == UsageError.code
        told = capsys.readouterr()
        assert f"{tmp_path}/out/input.json is damaged" in told.out and "--replace" in told.err
    assert main([*words, "--replace"]) == 0 and main(words) == 0
    assert "is already there" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"null", b'{"key": 1}'])
def test_a_damaged_decision_of_curation_is_one_error(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_source(tmp_path, [a_document("a", "A text.")])
    Path(folder, "curation.json").write_bytes(content)
    assert main(["data", "stats", folder]) == ShardError.code
    told = capsys.readouterr().err
    assert f"where: {folder}/curation.json" in told and "do: remove the file" in told


THREADS = """
import os, sys
import pyarrow.parquet
from trainer.data.shards import Source
threads = lambda: set(os.listdir("/proc/self/task"))
before = threads()
assert Source.open(sys.argv[1]).index(0).num_rows == 1
print(len(threads() - before))
"""


def test_reading_an_index_begins_no_threads_that_the_process_would_be_aborted_of_at_its_exit(tmp_path: Path):
    """`data check` ended with 134 in 8 of 40 runs on a folder without its shard; in none without Arrow's threads."""
    folder = write_source(tmp_path, [a_document("a", "A text.")])
    told = subprocess.run([sys.executable, "-c", THREADS, folder], capture_output=True, text=True, check=True)
    assert int(told.stdout) <= 1, "the allocator's own; Arrow's pools would be two more and above"
