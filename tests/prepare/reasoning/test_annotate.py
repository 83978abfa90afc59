"""People's words: out as JSON Lines and a page, back into shards under the judge's filters; faults with their lines."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli import data
from pipelines.prepare.reasoning import annotate
from pipelines.prepare.reasoning.annotate import export, filters_of, take
from pipelines.prepare.reasoning.steps import steps_of, with_reasoning
from pipelines.prepare.stored import problems
from tests.prepare.builders import write_lines
from tests.prepare.reasoning.builders import WALK, a_walk, read_back, stored
from tests.prepare.through import trained
from trainer import storage
from trainer.data import kept
from trainer.data.shards import Source
from trainer.errors import DataError, UsageError

JUDGES = "The city is what I have to say first, so I tap its field."
OWN = "The calendar is closed and the city comes first: I tap the field for it."
TYPED = "The keyboard has come up; I enter the name of the town now."


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Two trajectories of four steps; the judge has written the first step of the first."""
    first, files = a_walk("w0")
    first = with_reasoning(first, {0: JUDGES}).model_copy(update={"meta": {"reasoning": ["judge m", "", "", ""]}})
    return Source.open(stored(str(tmp_path), [(first, files), a_walk("w1", query="Find a hotel <b>near</b> the port")]))


def exported(source: Source, folder: Path) -> list[dict[str, Any]]:
    export(source, str(folder), samples=10)
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def words(uri: str) -> list[list[str]]:
    return [[step.reasoning for step in steps_of(sample)] for sample, _ in read_back(uri)]


def bytes_of(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def answered(source: Source, folder: Path, **texts: str | None) -> Path:
    """The exported lines with other words: `w0_1` is the second step of w0."""
    lines = exported(source, folder / "steps")
    for line in lines:
        name = f"{line['sample']}_{line['step']}"
        line["reasoning"] = texts.pop(name) if name in texts else line["reasoning"]
    assert not texts
    return write_lines(folder / "answers.jsonl", lines)


# ---------------------------------------------------------------- there and back


def test_steps_go_out_with_what_stands_there_and_who_wrote_it(source: Source, tmp_path: Path):
    lines = exported(source, tmp_path / "out")
    assert [(line["sample"], line["step"]) for line in lines] == [(f"w{n}", step) for n in (0, 1) for step in range(4)]
    assert [line["reasoning"] for line in lines] == [JUDGES, *[""] * 7]
    assert lines[0]["by"] == "judge m" and lines[1]["call"] == 'type {"text": "Rome"}'
    assert len({line["digest"] for line in lines}) == 8


def test_answers_come_back_into_new_shards_and_everything_is_counted(source: Source, tmp_path: Path):
    path = answered(source, tmp_path, w0_0=OWN, w0_1=TYPED, w1_0=f"  {JUDGES}\n")
    out = str(tmp_path / "new")
    found = take(source, str(path), out)
    assert (found["read"], found["kept"], found["bad"]) == (8, 8, {})
    assert found["made"] == {
        "trajectories": 2, "steps": 8, "steps written": 3, "steps not answered": 5, "steps without reasoning": 5,
    }  # fmt: skip
    assert words(out) == [[OWN, TYPED, "", ""], [JUDGES, "", "", ""]]
    [(first, files), _] = read_back(out)
    assert first.meta["reasoning"] == ["person", "person", "", ""] and first.source == "walks"
    assert files == read_back(source.uri)[0][1] and list(problems(Source.open(out))) == []
    for found_as in trained(first, files, tmp_path / "through"):
        assert f"{OWN}\n<tool_call>" in found_as.targets and JUDGES not in found_as.targets


def test_what_was_exported_and_not_touched_changes_nothing(source: Source, tmp_path: Path):
    found = take(source, str(answered(source, tmp_path)), str(tmp_path / "new"))
    assert found["made"]["steps unchanged"] == 1 and found["made"]["steps not answered"] == 7
    assert [sample for sample, _ in read_back(str(tmp_path / "new"))] == [sample for sample, _ in read_back(source.uri)]


def test_an_export_that_failed_can_be_made_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(annotate, "write_page", full)
        export(source, str(tmp_path / "words"), samples=1)
    assert export(source, str(tmp_path / "words"), samples=1)["trajectories"] == 1
    with pytest.raises(UsageError, match="steps already"):
        export(source, str(tmp_path / "words"), samples=1)


def test_the_same_answers_twice_give_the_same_shards(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, out = str(answered(source, tmp_path, w0_1=TYPED)), str(tmp_path / "new")
    first = take(source, path, out)
    files = bytes_of(out)
    assert take(source, path, out) == first and bytes_of(out) == files
    assert "already there" in capsys.readouterr().out
    with open(path, "a") as file:
        file.write("no answer\n")
    assert take(source, path, out, max_bad_fraction=0.9)["bad"] == {"bad-json": 1} and bytes_of(out) == files
    again = take(Source.open(out), path, str(tmp_path / "again"), max_bad_fraction=0.9)
    assert again["made"]["steps unchanged"] == 2 and "steps written" not in again["made"]
    assert read_back(str(tmp_path / "again")) == read_back(out)


def test_null_takes_words_away_and_an_empty_answer_leaves_them(source: Source, tmp_path: Path):
    path = answered(source, tmp_path, w0_0=None)
    found = take(source, str(path), str(tmp_path / "new"))
    assert words(str(tmp_path / "new"))[0][0] == "" and found["made"]["steps whose words were taken away"] == 1
    path = write_lines(
        tmp_path / "b" / "answers.jsonl", [{**json.loads(path.read_text().splitlines()[0]), "reasoning": ""}]
    )
    found = take(source, str(path), str(tmp_path / "other"))
    assert words(str(tmp_path / "other"))[0][0] == JUDGES and found["made"]["steps not answered"] == 8


def test_what_curation_has_dropped_stays_out(source: Source, tmp_path: Path):
    path = answered(source, tmp_path, w0_1=TYPED)
    kept.write(source, np.array(["", "dedup.exact"], dtype=object), key="k" * 64, funnel={})
    assert {line["sample"] for line in exported(source, tmp_path / "left")} == {"w0"}
    with pytest.raises(DataError, match="unknown-step"):
        take(source, str(path), str(tmp_path / "new"))
    write_lines(path, [line for line in path.read_text().splitlines() if '"w0"' in line])
    found = take(source, str(path), str(tmp_path / "new"))
    assert found["made"]["trajectories"] == 1 and [one.id for one, _ in read_back(str(tmp_path / "new"))] == ["w0"]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("change", "reason", "got"),
    [
        ({"reasoning": "Tap."}, "too-short", "1 words"),
        ({"reasoning": "I scroll down to the list of all the towns."}, "inconsistent", "words of move"),
        ({"reasoning": "The field at (30, 50) is empty, so I tap it."}, "coordinates", "(30, 50)"),
        ({"reasoning": "I book a table for two people in Rome on Friday evening."}, "copied-query", "trigrams"),
        ({"reasoning": 7}, "wrong-form", "reasoning: Input should be a valid string"),
        ({"step": "0"}, "wrong-form", "step"),
        ({"sample": "w7"}, "unknown-step", "'w7'"),
        ({"step": 4}, "unknown-step", "step 4"),
        ({"digest": "0" * 64}, "other-step", "export the steps again"),
    ],
)
def test_an_answer_that_cannot_be_taken_is_an_error_with_its_line(
    source: Source, tmp_path: Path, change: dict[str, Any], reason: str, got: str
):
    line = {**exported(source, tmp_path / "steps")[0], "reasoning": OWN}
    path = write_lines(tmp_path / "answers.jsonl", [{**line, **change}])
    out = str(tmp_path / "new")
    with pytest.raises(DataError, match="answers that cannot be taken") as error:
        take(source, str(path), out)
    assert error.value.code == 64 and f"line 1: {reason}" in str(error.value) and got in str(error.value)
    assert not storage.list_dir(out)
    take(source, str(write_lines(tmp_path / "good.jsonl", [line])), out)
    assert words(out)[0][0] == OWN, "negative control: without the fault"


def test_lines_that_are_no_answers_are_told_one_by_one_and_a_share_of_them_may_pass(source: Source, tmp_path: Path):
    lines = exported(source, tmp_path / "steps")
    good, other = {**lines[0], "reasoning": OWN}, {**lines[0], "reasoning": TYPED}
    path = write_lines(tmp_path / "answers.jsonl", [good, "{", [], other, good])
    with pytest.raises(DataError) as error:
        take(source, str(path), str(tmp_path / "new"))
    for number, reason in ((2, "bad-json"), (3, "wrong-form"), (4, "second-answer")):
        assert re.search(rf"line {number}: {reason}", str(error.value))
    assert "3 of 5" in str(error.value)
    found = take(source, str(path), str(tmp_path / "new"), max_bad_fraction=0.6)
    assert found["bad"] == {"bad-json": 1, "second-answer": 1, "wrong-form": 1} and found["kept"] == 2
    assert found["made"]["answers for the second time"] == 1 and words(str(tmp_path / "new"))[0][0] == OWN


def test_an_empty_file_is_an_error(source: Source, tmp_path: Path):
    with pytest.raises(DataError, match="a file without answers"):
        take(source, str(write_lines(tmp_path / "answers.jsonl", [])), str(tmp_path / "new"))


def test_words_of_a_person_copied_from_an_earlier_step_are_refused(source: Source, tmp_path: Path):
    path = answered(source, tmp_path, w0_2=JUDGES.replace("tap its field", "tap its field, and scroll down"))
    with pytest.raises(DataError, match="copied-step"):
        take(source, str(path), str(tmp_path / "new"))


def test_filters_are_those_that_the_shards_were_made_with(tmp_path: Path):
    uri = stored(str(tmp_path), [a_walk("w0")])
    assert filters_of(Source.open(uri)).min_words == 6
    made = storage.read_json(f"{uri}/source.json")
    from trainer.data.shards import ShardWriter

    writer = ShardWriter(str(tmp_path / "made"), shard_bytes=10**6)
    for sample, files in read_back(uri):
        writer.add(sample, files)
    writer.close(source=made["source"], split="train", reasoning={"filters": {"min_words": 1, "max_words": 9}})
    source = Source.open(str(tmp_path / "made"))
    assert filters_of(source).min_words == 1
    take(source, str(answered(source, tmp_path, w0_0="I tap.")), str(tmp_path / "new"))
    assert filters_of(Source.open(str(tmp_path / "new"))).max_words == 9, "and they travel on"


# ---------------------------------------------------------------- commands and the page


def test_the_commands_export_and_import(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, new = str(tmp_path / "out"), str(tmp_path / "new")
    assert data.main(["data", "annotate", "export", source.uri, "--out", out, "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "1 of 2 trajectories, 4 steps, 3 without reasoning" in told and "1 more follow: --first 1" in told
    assert data.main(["data", "annotate", "import", source.uri, f"{out}/steps.jsonl", "--out", new]) == 0
    assert "7 steps not answered" in capsys.readouterr().out
    assert data.main(["data", "check", new]) == 0


def test_commands_refuse_what_would_be_lost(source: Source, tmp_path: Path):
    out, new = str(tmp_path / "out"), str(tmp_path / "new")
    data.main(["data", "annotate", "export", source.uri, "--out", out])
    with pytest.raises(UsageError, match="there are steps"):
        data.main(["data", "annotate", "export", source.uri, "--out", out])
    with pytest.raises(UsageError, match="not a folder of its own"):
        data.main(["data", "annotate", "import", source.uri, f"{out}/steps.jsonl", "--out", source.uri])
    data.main(["data", "annotate", "import", source.uri, f"{out}/steps.jsonl", "--out", new])
    other = write_lines(tmp_path / "answers.jsonl", [{**exported(source, tmp_path / "b")[0], "reasoning": OWN}])
    command = ["data", "annotate", "import", source.uri, str(other), "--out", new]
    with pytest.raises(UsageError, match="shards of another input"):
        data.main(command)
    assert data.main([*command, "--replace"]) == 0 and words(new)[0][0] == OWN


def test_shards_without_trajectories_have_nothing_to_write_about(tmp_path: Path):
    sample, files = a_walk("w0", WALK[:1])
    plain = sample.model_copy(update={"messages": sample.messages[:1]})
    uri = stored(str(tmp_path), [(plain, files)])
    with pytest.raises(UsageError, match="no trajectories"):
        export(Source.open(uri), str(tmp_path / "out"), samples=1)


def test_the_page_holds_everything_and_what_others_wrote_is_text(source: Source, tmp_path: Path):
    sample, files = a_walk("w2", query="</textarea><script>alert(1)</script>", words=["</textarea><img src=x>"])
    stored(str(tmp_path), [(sample, files)], "hostile")
    hostile = Source.open(storage.join(str(tmp_path), "data", "sources", "hostile", "train"))
    export(hostile, str(tmp_path / "out"), samples=1)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<script>") == 1 and "<img src=x>" not in page and "&lt;/textarea&gt;" in page
    assert not re.search(r"(?:src|href)='(?!data:)", page)
    assert page.count("<textarea") == 4 and page.count("data:image/jpeg") == 7, "four before, three after"
