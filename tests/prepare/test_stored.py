"""qwenvl data: ingest, check, stats, preview, prepare; what is planted wrong in stored bytes and samples is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.cli.data import funnel_table
from pipelines.cli.main import main
from pipelines.prepare.preview.page import card
from pipelines.prepare.stored import sample_problems, sources_below
from tests.prepare.builders import a_caption, a_clip, a_picture, write_lines
from tests.prepare.test_text_formats import SHEEP, SWIFT
from trainer import resolve, storage
from trainer.data.sample import Action, Box, Mask, Media, Message, Object, Objects, Point, Sample, Span, Text
from trainer.data.shards import Source
from trainer.errors import StorageError

ROWS = [{**SWIFT, "id": "swift"}, {**SHEEP, "id": "sheep"}, {**SHEEP, "id": "again"}]


def run(*words: object) -> int:
    return main(["data", *map(str, words)])


@pytest.fixture
def shards(media: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    write_lines(media / "rows.jsonl", ROWS)
    assert run("ingest", media / "rows.jsonl", "--out", media / "shards") == 0
    told = capsys.readouterr().out
    assert "of the format ms_swift" in told
    assert re.search(r"shards +train +3 +3 +-", told)
    return media / "shards"


# ---------------------------------------------------------------- ingest


def test_ingest_writes_shards_once(shards: Path, capsys: pytest.CaptureFixture[str]):
    source = Source.open(str(shards))
    assert (source.manifest["source"], source.sample(0, 1).kind, source.sample(0, 1).id) == (
        "shards",
        "instruction",
        "sheep",
    )
    assert run("ingest", shards.parent / "rows.jsonl", "--out", shards) == 0
    assert "already there" in capsys.readouterr().out


def test_ingest_counts_what_it_refuses_against_the_budget(media: Path, capsys: pytest.CaptureFixture[str]):
    path = write_lines(media / "rows.jsonl", [a_caption(0), a_caption(1, image="gone.png"), a_caption(2)])
    assert run("ingest", path, "--out", media / "out") == 64
    told = capsys.readouterr().err
    assert "line 2: missing-media" in told and "--max-bad-fraction" in told
    assert run("ingest", path, "--out", media / "out", "--max-bad-fraction", 0.4) == 0
    assert re.search(r"out +train +3 +2 +1 missing-media", capsys.readouterr().out)


@pytest.mark.parametrize("verify", ["decode", "header"])
def test_ingest_finds_truncation_in_either_mode(verify: str, media: Path):
    rows = [a_caption(number, image=name) for number, name in enumerate(("red.png", "cut.jpg", "cut.png"))]
    path = write_lines(media / "rows.jsonl", rows)
    words = ["ingest", path, "--out", media / verify, "--max-bad-fraction", 0.9, "--verify-media", verify]
    assert run(*words) == 0
    funnel = json.loads((media / verify / "input.json").read_text())["funnel"]
    assert funnel["bad"] == {"damaged-media": 2}


def test_ingest_never_empties_a_folder_that_holds_something_else(media: Path, capsys: pytest.CaptureFixture[str]):
    path = write_lines(media / "rows" / "rows.jsonl", [a_caption(0, image=str(media / "red.png"))])
    for out in (media, media / "rows"):
        assert run("ingest", path, "--out", out) == 2
        assert "not a folder of its own" in capsys.readouterr().err
    assert path.exists() and (media / "red.png").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"source.json": '{"name": "mine"}', "thesis.txt": "words", "sub/x": ""},
        {"source.json": '{"name": "mine"}'},
        {"thesis.txt": "words"},
        {"00000.notes": "words"},
    ],
)
@pytest.mark.parametrize("of_shards", [False, True])
def test_replace_never_empties_a_folder_with_files_of_somebody_else(
    files: dict[str, str], of_shards: bool, media: Path, capsys: pytest.CaptureFixture[str]
):
    rows = write_lines(media / "rows.jsonl", ROWS)
    out = media / "shards"
    if of_shards:
        assert run("ingest", rows, "--out", out) == 0
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    write_lines(rows, ROWS[:1])
    capsys.readouterr()
    for words in ((), ("--replace",)):
        assert run("ingest", rows, "--out", out, *words) == 2
        assert "--out is not a folder of its own" in capsys.readouterr().err
    assert {name: (out / name).read_text() for name in files} == files


def test_a_pipe_as_a_medium_is_one_bad_row(media: Path):
    """A writer stands ready, so that without the guard the row would be kept, and the test would not wait."""
    os.mkfifo(media / "pipe.png")
    Thread(target=lambda: (media / "pipe.png").write_bytes(a_picture()), daemon=True).start()
    rows = [a_caption(0), a_caption(1, image="pipe.png"), a_caption(2, image="/dev/null")]
    path = write_lines(media / "rows.jsonl", rows)
    assert run("ingest", path, "--out", media / "out", "--max-bad-fraction", 0.9) == 0
    assert json.loads((media / "out" / "input.json").read_text())["funnel"]["bad"] == {"unreachable-media": 2}


def test_ctrl_c_stops_ingest_at_once_in_one_word(media: Path):
    """The signal goes to the whole group, as a terminal's; Daft takes it too."""
    path = write_lines(media / "rows.jsonl", [a_caption(number) for number in range(4000)])
    words = ["data", "ingest", str(path), "--format", "llava", "--kind", "caption", "--out", str(media / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not list(media.glob("out/.tmp-new/.tmp-*")) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "stopped" and "Traceback" not in told and "Fatal" not in told


def test_ingest_replaces_shards_of_another_input_only_when_told(shards: Path, capsys: pytest.CaptureFixture[str]):
    before = Source.open(str(shards)).digest
    other = write_lines(shards.parent / "other.jsonl", [{**SWIFT, "id": "other"}])
    assert run("ingest", other, "--out", shards) == 2
    assert "shards of another input are there" in capsys.readouterr().err
    assert Source.open(str(shards)).digest == before
    assert run("ingest", other, "--out", shards, "--replace") == 0
    assert Source.open(str(shards)).num_samples == 1


def test_ingest_that_was_killed_is_done_by_the_same_command(media: Path):
    """SIGKILL after the first shards are written; nothing is to be removed by hand."""
    path = write_lines(media / "rows.jsonl", [a_caption(number) for number in range(3000)])
    out = media / "killed"
    words = ["data", "ingest", str(path), "--out", str(out)]
    small = "Prepare.model_fields['shard_bytes'].default = 4096; Prepare.model_rebuild(force=True)"
    program = f"from trainer.recipe import Prepare; {small}; from pipelines.cli.main import main; main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(media.glob("killed/**/00000.tar")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "source.json").exists() and list(out.rglob("*.tar"))
    assert main(words) == 0
    assert Source.open(str(out)).num_samples == 3000 and not list(out.glob(".tmp-*"))


def test_ingest_takes_several_files_and_says_what_does_not_go_together(media: Path, capsys: pytest.CaptureFixture[str]):
    one = write_lines(media / "a" / "one.jsonl", [a_caption(0, image="../red.png")])
    two = write_lines(media / "b" / "two.jsonl", [{"image": "../red.png", "caption": "x"}])
    assert run("ingest", one, two, "--out", media / "out") == 2
    assert "files of several kinds" in capsys.readouterr().err
    words = ["--out", media / "out", "--kind", "caption", "--rendering", "document", "--name", "mine"]
    assert run("ingest", one, two, *words) == 0
    source = Source.open(str(media / "out"))
    assert source.num_samples == 2 and source.sample(0, 1).source == "mine"
    assert run("ingest", one, "--out", media / "x", "--kind", "poem") == 2
    assert "kind" in capsys.readouterr().err
    assert run("ingest", one, "--out", media / "x", "--format", "lava") == 2
    assert "did you mean llava" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["ü".encode("latin-1"), '{"id": "é"}'.encode("utf-16"), bytes(range(256))])
def test_an_annotation_that_is_not_utf8_is_told_with_what_to_do(
    data: bytes, media: Path, capsys: pytest.CaptureFixture[str]
):
    (media / "rows.jsonl").write_bytes(data)
    assert run("ingest", media / "rows.jsonl", "--format", "llava", "--out", media / "out") == 64
    told = capsys.readouterr().err
    assert "is not UTF-8" in told and "expected: text in UTF-8" in told and "iconv" in told


def test_a_page_that_cannot_be_written_is_one_message(shards: Path, capsys: pytest.CaptureFixture[str]):
    for page in (shards / "no" / "page.html", shards):
        assert run("preview", shards, "--html", page) == StorageError.code
        told = capsys.readouterr().err
        assert told.startswith("error: a file could not be read or written") and f"where: {page}\n" in told


# ---------------------------------------------------------------- check


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def forged(folder: Path, change: Callable[[dict], Any], *, index_too: bool = False) -> None:
    """The first shard with a changed sample, all digests of shard, row, index and manifest made right again."""
    from trainer.data.shards import BLOCK, TAR_END, _member, _parquet

    index = pq.read_table(folder / "00000.index.parquet").to_pylist()
    tar, rows, at = (folder / "00000.tar").read_bytes(), [], 0
    for entry in index:
        sample = json.loads(entry["sample_json"])
        old = tar[entry["offset"] : entry["offset"] + entry["size"]]
        before = len(entry["sample_json"].encode())
        rest = old[BLOCK + before + -before % BLOCK :]
        change(sample)
        entry["sample_json"] = json.dumps(sample)
        entry["id"] = sample["id"] if index_too else entry["id"]
        row = _member("x.json", entry["sample_json"].encode()) + rest
        entry |= {"offset": at, "size": len(row), "digest": hashlib.sha256(row).hexdigest()}
        rows.append(row)
        at += len(row)
    data = b"".join(rows) + TAR_END
    (folder / "00000.tar").write_bytes(data)
    import pyarrow as pa

    from trainer.data.shards import INDEX_SCHEMA

    written = _parquet(pa.Table.from_pylist(index, INDEX_SCHEMA), {"format": "1"})
    (folder / "00000.index.parquet").write_bytes(written)
    manifest = storage.read_json(str(folder / "source.json"))
    facts = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["shards"][0] |= {**facts, "index_sha256": hashlib.sha256(written).hexdigest()}
    manifest.pop("digest")
    storage.write_json(str(folder / "source.json"), {**manifest, "digest": resolve.digest(manifest)})


def beyond(sample: dict) -> None:
    sample["messages"][-1]["parts"][0]["objects"][0]["at"]["xyxy"][2] = 61


def test_a_sound_folder_passes_and_is_counted(shards: Path, capsys: pytest.CaptureFixture[str]):
    forged(shards, lambda sample: None)
    assert run("check", shards) == 0
    assert "3 samples in 1 shards; every byte and every sample is right" in capsys.readouterr().out
    assert run("check", shards.parent) == 0, "negative control of the finder: a folder above"
    assert run("check", shards.parent / "nothing") == 2


BYTES = [
    (lambda folder: flip(folder / "00000.tar", 700), ["sha256", "row 0, sample swift"]),
    (lambda folder: flip(folder / "00000.index.parquet", 200), ["index is not what was written"]),
    (lambda folder: (folder / "00000.tar").unlink(), ["the shard is missing"]),
    (lambda folder: (folder / "00000.scores.parquet").write_bytes(b"no"), ["scores.parquet: a column that cannot be"]),
    (lambda folder: forged(folder, beyond), ["'a dog': box [3.5, 7.4, 61", "outside 60x40"]),
    (lambda folder: forged(folder, lambda s: s["media"][0].update(width=61)), ["says widths [60]", "file is 60x40"]),
    (lambda folder: forged(folder, lambda s: s["media"][0].update(digest="0" * 64)), ["expected sha256 0000"]),
    (lambda folder: forged(folder, lambda s: s.update(kind="poem")), ["not a sample of this format", "kind"]),
    (lambda folder: forged(folder, lambda s: s.update(id="same")), ["index says id again, the sample same"]),
    (lambda folder: forged(folder, lambda s: s.update(id="same"), index_too=True), ["id is that of shard 0, row 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "told"), BYTES, ids=[str(told[0])[:30] for _, told in BYTES])
def test_what_is_wrong_in_stored_data_is_named(
    plant: Callable[[Path], None], told: list[str], shards: Path, capsys: pytest.CaptureFixture[str]
):
    plant(shards)
    assert run("check", shards) == 64
    found = capsys.readouterr().err
    assert all(word in found for word in told), found
    assert not [line for line in found.splitlines() if line.count("sample swift") > 1], "a place is told once"


CLIP = Media(
    digest="a", kind="video", suffix="mp4", size_bytes=1, width=60, height=40, num_frames=8, fps=4, duration_s=2
)
IMAGE = Media(digest="a", kind="image", suffix="png", size_bytes=1, width=60, height=40)


def a_sample(at: Any, item: Media = IMAGE) -> Sample:
    part = Objects(media=0, objects=(Object(label="it", at=at),))
    return Sample(
        id="1", source="s", kind="grounding", media=(item,), messages=(Message(role="assistant", parts=(part,)),)
    )


PLACES = [
    (Box(xyxy=(0, 0, 60, 40)), None),
    (Box(xyxy=(5, 5, 4, 9)), "outside"),
    (Point(xy=(60.5, 1)), "outside"),
    (Mask(xyxy=(0, 0, 1, 1), rle=(2400,)), None),
    (Mask(xyxy=(0, 0, 1, 1), rle=(2399,)), "run lengths of 2399 pixels in 60x40"),
    (Mask(xyxy=(0, 0, 1, 1)), "without run lengths"),
    (Span(start_s=0, end_s=1), "in a image"),
]


@pytest.mark.parametrize(("at", "told"), PLACES)
def test_a_place_outside_its_medium_is_a_problem(at: Any, told: str | None):
    found = list(sample_problems(a_sample(at)))
    assert [told in problem for problem in found] == [True] if told else found == []


def test_spans_belong_to_clips_and_a_sample_teaches_something():
    assert list(sample_problems(a_sample(Span(start_s=0, end_s=2), CLIP))) == []
    assert list(sample_problems(a_sample(Span(start_s=2, end_s=1), CLIP)))
    empty = Sample(id="1", source="s", kind="text", messages=(Message(role="document", parts=(Text(text=" "),)),))
    assert list(sample_problems(empty)) == ["nothing to learn: no document, and no answer with content"]


# ---------------------------------------------------------------- stats, preview, prepare


def test_stats_count_what_is_there(shards: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert run("stats", shards, "--json") == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"instruction": 3} and found["splits"] == {"train": 3}
    assert found["roles"] == {"assistant": 3, "system": 1, "user": 3}
    assert found["shapes"] == {"box": 6} and found["media"]["used"] == 3 and found["media"]["distinct"] == 1
    assert found["labels"] == {"distinct": 3, "most": {"sheep": 4, "a dog": 1, "a woman": 1}}
    assert found["percentiles"]["width"] == {"0": 60, "50": 60, "95": 60, "100": 60}
    assert run("stats", shards) == 0
    assert '"sheep" 4' in capsys.readouterr().out


class Page(HTMLParser):
    """Open tags, with what may run or load anything from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.foreign: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href") and not (value or "").startswith("data:")):
                self.foreign.append(f"{tag} {name}={value}")


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> & 'quoted' \"twice\""


def test_preview_shows_every_kind_of_sample_and_escapes_its_text(media: Path):
    write_lines(media / "swift.jsonl", [{**SWIFT, "id": EVIL, "messages": [*SWIFT["messages"], *said(EVIL)]}])
    table = {"type": "table", "bbox": [1, 1, 30, 30], "html": f"<table><tr><td>{EVIL}</td></tr></table>"}
    page = {"image": "red.png", "width": 60, "height": 40, "blocks": [table]}
    write_lines(media / "layout.jsonl", [{"id": "p", "pages": [page]}])
    points = {"image": "red.png", "label": "dog", "points": [{"x": 50, "y": 50}]}
    write_lines(media / "points.jsonl", [points])
    pair = {"prompt": EVIL, "chosen": "<b>yes</b>", "rejected": "no"}
    write_lines(media / "pairs.jsonl", [pair])
    step = {"screenshot": "red.png", "action": "left_click", "coordinate": [10, 20], "thought": "think"}
    write_lines(media / "agent.jsonl", [{"instruction": "click", "steps": [step, step]}])
    write_lines(
        media / "clip.jsonl",
        [
            {
                "video": "clip.mp4",
                "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "it"}],
            }
        ],
    )
    for name in ("swift", "layout", "points", "pairs", "agent", "clip"):
        assert run("ingest", media / f"{name}.jsonl", "--out", media / "all" / name) == 0, name
    assert run("preview", media / "all", "--html", media / "page.html", "--samples", 3) == 0
    text = (media / "page.html").read_text()
    found = Page(text)
    assert found.foreign == []
    assert "script" not in found.tags
    assert found.tags.count("article") == 6
    assert {"svg", "circle", "rect", "line", "iframe", "figcaption", "details"} <= set(found.tags)
    assert "0.00 s" in text and "1.75 s" in text and "left_click" in text and "think" in text
    assert "&lt;script&gt;" in text and "&lt;b&gt;yes&lt;/b&gt;" in text


def said(words: str) -> list[dict]:
    return [{"role": "user", "content": words}, {"role": "assistant", "content": words}]


def test_preview_draws_in_pixels_of_the_original():
    mask = Mask(xyxy=(0, 0, 2, 40), rle=(0, 80, 2320))
    parts = (
        Objects(media=0, objects=(Object(label="box", at=Box(xyxy=(6, 8, 26, 18))), Object(label="mask", at=mask))),
        Action(media=0, tool="computer_use", action="left_click", coordinates={"coordinate": (10, 20)}),
    )
    shown = (Message(role="user", parts=({"part": "image", "media": 0},)), Message(role="assistant", parts=parts))  # type: ignore[arg-type]
    sample = Sample(id="1", source="s", kind="grounding", media=(IMAGE,), messages=shown)
    found = card(sample, [a_picture()])
    assert "viewBox='0 0 60 40'" in found
    assert "<rect x='6' y='8' width='20' height='10'" in found
    assert "<image href='data:image/png;base64," in found
    assert "x1='" in found and "cx='10' cy='20'" in found
    clip = Message(role="user", parts=({"part": "video", "media": 0},))  # type: ignore[arg-type]
    span = Message(
        role="assistant", parts=(Objects(media=0, objects=(Object(label="x", at=Span(start_s=0.5, end_s=1)),)),)
    )
    timed = card(Sample(id="1", source="s", kind="video", media=(CLIP,), messages=(clip, span)), [a_clip()])
    assert "left:25.00%;width:25.00%" in timed and "0.50 to 1.00 s" in timed


def test_prepare_writes_a_recipes_data_and_ends_with_the_funnel(media: Path, capsys: pytest.CaptureFixture[str]):
    write_lines(media / "rows.jsonl", [a_caption(number) for number in range(30)])
    source = f"{{format: auto, path: {media}/rows.jsonl, kind: caption, rendering: document}}"
    words = [
        f"prepare.sources={{mine: {source}}}", "model.pretrain.sources={text: [mine], pairs: [mine]}",
        "stages.stage1.data={mine: 1}", "stages.stage2=null", "stages.stage3=null", "stages.sft=null",
        "stages.dpo=null", "evaluate.sources=[]", "model.tokenizer=nowhere",
    ]  # fmt: skip
    sets = [word for one in words for word in ("--set", one)]
    code = run("prepare", "tiny", "--out", media / "out", *sets)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert re.search(r"mine +train +30 +30 +-", told.out)
    assert [source.num_samples for source in sources_below(str(media / "out"))] == [30]


def test_the_funnel_shows_reasons_and_what_was_curated():
    part = {"read": 1200, "kept": 1000, "bad": {"bad-json": 200}}
    dropped = {"kept": 900, "dropped": {"near-text": 100}}
    table = funnel_table({"web": {"train": {**part, "curated": dropped}}})
    assert re.search(r"web +train +1,200 +1,000 +200 bad-json\n +curated +900 +100 near-text", table)
