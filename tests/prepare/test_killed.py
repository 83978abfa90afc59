"""Preparation that is killed (SIGKILL) at seeded moments and started again gives the same bytes as one that is left
alone, and goes on after its last whole shard."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.prepare import ingest, resumable, swap
from pipelines.prepare.describe import inspect
from pipelines.prepare.ingest import prepare_data
from tests.prepare.builders import a_caption, a_picture, a_recipe, a_source, write_lines
from trainer import storage
from trainer.data.shards import Source
from trainer.errors import StorageError

ROWS, PICTURES = 1000, 40
SMALL = "prepare.shard_bytes=40000"
PROGRAM = """
import json, sys
from pipelines.prepare.ingest import prepare_data
from pipelines.prepare.stage import prepare_stage
from trainer.resolve import load_recipe
recipe = load_recipe("tiny", json.loads(sys.argv[1]))
print("begun", flush=True)
prepare_data(recipe, sys.argv[2])
prepare_stage(recipe, "stage1", sys.argv[2])
"""


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file by its name; what begins with .tmp- belongs to nobody."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(storage.TEMPORARY)
    }


def some_data(folder: Path, rows: int = ROWS) -> list[str]:
    """Captions that are curated, annotated pictures, copies pasted into them, questions about those: the overrides."""
    for number in range(PICTURES):
        (folder / f"{number}.png").write_bytes(a_picture(64 + number, 64, ("red", "green", "blue")[number % 3]))
    write_lines(folder / "rows.jsonl", [a_caption(n, image=f"{n % PICTURES}.png") for n in range(rows)])
    images = [{"id": n, "file_name": f"{n}.png", "width": 64 + n, "height": 64} for n in range(PICTURES)]
    ring = [8.0, 8.0, 40.0, 8.0, 40.0, 44.0, 8.0, 44.0]
    things = [{"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [8, 8, 32, 36], "segmentation": [ring]}
              for n in range(PICTURES)]  # fmt: skip
    names = [{"id": 1, "name": "field"}, {"id": 2, "name": "square"}]
    coco = {"images": images, "annotations": things, "categories": names}
    (folder / "coco.json").write_text(json.dumps(coco))
    base = "kind: grounding, rendering: chat"
    clean = "{clean: {min_words: 3, max_characters: 1000}}"
    sources = [
        f"mine: {{format: llava, path: {folder}/rows.jsonl, kind: caption, rendering: document, curate: {clean}}}",
        f"boxes: {{format: coco, path: {folder}/coco.json, {base}}}",
        f'pasted: {{format: grounding, path: "source://boxes", {base}, '
        "grounding: {copy_paste: {samples: 120, complete: vocabulary, encode: png}}}",
        f'asked: {{format: grounding, path: "source://pasted", {base}, '
        "grounding: {questions: {complete: vocabulary}}}",
    ]
    return [
        f"prepare.sources={{{', '.join(sources)}}}",
        "model.pretrain.sources={text: [mine], pairs: [mine]}",
        "stages.stage1.data={mine: 1, asked: 1}",
        *(f"stages.{stage}=null" for stage in ("stage2", "stage3", "sft", "dpo")),
        "model.vocab_size=400",
        SMALL,
    ]


def start(overrides: list[str], out: Path, log: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, json.dumps(overrides), str(out)]
    return subprocess.Popen(words, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(begun: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while "begun" not in log.read_text() and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.extended
def test_a_whole_preparation_that_is_killed_again_and_again_gives_the_same_bytes(tmp_path: Path):
    data, log = tmp_path / "data", tmp_path / "log"
    data.mkdir()
    overrides = some_data(data)
    process = start(overrides, tmp_path / "whole", log)
    wait_for(process, log)
    assert process.wait() == 0, log.read_text()
    draw, whole_shards, went_on, killed = random.Random(5), {}, [], 0
    while True:
        process = start(overrides, tmp_path / "killed", log)
        wait_for(process, log)
        least = len(whole_shards) + draw.randint(0, 4)  # it is killed when it has written so many
        while process.poll() is None and (killed == 6 or len(shards_beside(tmp_path / "killed")) < least):
            time.sleep(draw.uniform(0.001, 0.02))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        code = process.wait()
        went_on += map(int, re.findall(r"goes on after (\d+) rows", log.read_text()))
        if code != -signal.SIGKILL:
            break
        whole_shards |= shards_beside(tmp_path / "killed")
    assert code == 0, log.read_text()
    assert killed >= 2 and whole_shards and went_on and max(went_on) > 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in whole_shards} == whole_shards, "none of them was written again"
    sources = tmp_path / "killed" / "data" / "sources"
    assert not list(sources.rglob(".tmp-new")), "what was half-written is gone"
    assert Source.open(str(sources / "mine" / "train")).num_shards > 20


def shards_beside(out: Path) -> dict[Path, int]:
    """Where the whole shards that a killed run has left will lie -> inode, which stays where only the name changes."""
    found = {}
    for note in out.rglob(f"{swap.NEW}/{resumable.PROGRESS}/*.json"):
        tar = note.parents[1] / f"{note.stem}.tar"
        if tar.exists():
            found[note.parents[2] / tar.name] = tar.stat().st_ino
    return found


# ---------------------------------------------------------------- what is made again, and what is not


def described(monkeypatch: pytest.MonkeyPatch, *, breaks_at: int | None = None) -> list[str]:
    """Rows that are described from now on; at the one with that number storage fails."""
    seen: list[str] = []

    def one(row: str) -> tuple[str, list[bytes]]:
        return inspect(row)

    real = ingest.Engine.map

    def counted(self, function, rows):
        if breaks_at is not None and len(seen) + len(rows) > breaks_at:
            raise StorageError("the store is gone")
        seen.extend(rows)
        return real(self, function, rows)

    monkeypatch.setattr(ingest.Engine, "map", counted)
    return seen


def test_only_what_lies_in_no_whole_shard_is_described_again(media: Path, monkeypatch: pytest.MonkeyPatch):
    rows: list = [a_caption(number) for number in range(1000)]
    rows[3] = rows[600] = '{"id": '
    recipe = a_recipe(
        a_source("llava", write_lines(media / "rows.jsonl", rows)),
        "model.tokenizer=nowhere", SMALL, "prepare.max_bad_fraction=0.01",
    )  # fmt: skip
    prepare_data(recipe, str(media / "whole"))
    with monkeypatch.context() as patched:
        described(patched, breaks_at=700)
        with pytest.raises(StorageError):
            prepare_data(recipe, str(media / "out"))
    with monkeypatch.context() as patched:
        seen = described(patched)
        prepare_data(recipe, str(media / "out"))
    assert 0 < len(seen) < 600, "256 and 512 rows were there, but for the last, open shard of them"
    whole, again = files_of(media / "whole"), files_of(media / "out")
    assert whole == again and len(whole) > 20
    funnel = storage.read_json(str(media / "out" / "data" / "funnel.json"))["mine"]["train"]
    assert (
        funnel["bad"] == {"bad-json": 2} and "line 4" in funnel["examples"][0] and "line 601" in funnel["examples"][1]
    )


def test_what_a_kill_left_after_the_shards_took_their_place_is_gone(media: Path):
    recipe = a_recipe(a_source("llava", write_lines(media / "rows.jsonl", [a_caption(0)])), "model.tokenizer=nowhere")
    prepare_data(recipe, str(media / "out"))
    before = files_of(media / "out")
    new = swap.beside(ingest.source_uri(str(media / "out"), "mine", "train"))
    storage.write_bytes(storage.join(new, swap.CLEARED), b"")
    storage.write_json(storage.join(new, resumable.PROGRESS, "00000.json"), {})
    prepare_data(recipe, str(media / "out"))
    assert files_of(media / "out") == before


def test_another_input_begins_anew_and_so_does_a_shard_that_is_not_whole(media: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_lines(media / "rows.jsonl", [a_caption(number) for number in range(800)])
    recipe = a_recipe(a_source("llava", path), "model.tokenizer=nowhere", SMALL)

    def broken() -> Path:
        with monkeypatch.context() as patched:
            described(patched, breaks_at=600)
            with pytest.raises(StorageError):
                prepare_data(recipe, str(media / "out"))
        return Path(swap.beside(ingest.source_uri(str(media / "out"), "mine", "train")))

    broken()
    write_lines(path, [a_caption(number, id=f"other{number}") for number in range(800)])
    with monkeypatch.context() as patched:
        seen = described(patched)
        prepare_data(recipe, str(media / "out"))
    assert len(seen) == 800, "another input"
    write_lines(path, [a_caption(number) for number in range(800)])
    (broken() / "00001.tar").write_bytes(b"cut")
    with monkeypatch.context() as patched:
        seen = described(patched)
        prepare_data(recipe, str(media / "out"))
    source = Source.open(ingest.source_uri(str(media / "out"), "mine", "train"))
    assert 800 - len(seen) == source.manifest["shards"][0]["num_samples"], "the first shard stayed, the second did not"
    assert [source.sample_id(0, row) for row in range(2)] == ["c0", "c1"] and source.num_samples == 800
