"""From rows to shards: what is refused is counted, nothing half-written stays, a second run does nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines.prepare import describe, ingest
from pipelines.prepare.formats.rows import MediaRef
from pipelines.prepare.ingest import prepare_data, source_uri
from tests.prepare.builders import a_caption, a_picture, a_recipe, a_source, small_recipe, write_lines
from trainer import storage
from trainer.data.shards import ShardReader, Source
from trainer.errors import DataError

NO_TOKENIZER = "model.tokenizer=nowhere"


def prepare(folder: Path, rows: list, *overrides: str, out: str = "out") -> str:
    path = write_lines(folder / "rows.jsonl", rows)
    prepare_data(a_recipe(a_source("llava", path), NO_TOKENIZER, *overrides), str(folder / out))
    return str(folder / out)


def test_rows_become_shards_with_their_media(media: Path):
    out = prepare(media, [a_caption(number) for number in range(5)])
    source = Source.open(source_uri(out, "mine", "train"))
    assert source.num_samples == 5
    assert [source.sample(0, row).id for row in range(5)] == [f"c{row}" for row in range(5)]
    assert ShardReader(source).media(0, 3) == [(media / "red.png").read_bytes()]
    assert source.sample(0, 0).media[0].origin == "red.png"


FAULTS = {
    "missing-media": a_caption(7, image="gone.png"),
    "damaged-media": a_caption(7, image="cut.png"),
    "placeholder-without-media": a_caption(7, image=None),
    "bad-json": '{"id": ',
    "duplicate-id": a_caption(0),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_one_faulty_row_ends_the_step_with_one_message_and_nothing_half_written(reason: str, media: Path):
    rows = [a_caption(0), FAULTS[reason], a_caption(1)]
    with pytest.raises(DataError) as error:
        prepare(media, rows)
    message = str(error.value)
    assert error.value.code == 64
    assert f"rows.jsonl, line 2: {reason}" in message and "expected" in message and "max_bad_fraction" in message
    assert not storage.exists(source_uri(str(media / "out"), "mine", "train"))


@pytest.mark.parametrize("reason", FAULTS)
def test_faulty_rows_within_the_allowed_share_are_counted_and_left_out(reason: str, media: Path):
    out = prepare(media, [a_caption(0), FAULTS[reason], a_caption(1)], "prepare.max_bad_fraction=0.4")
    funnel = storage.read_json(storage.join(out, "data", "funnel.json"))["mine"]["train"]
    assert (funnel["read"], funnel["kept"], funnel["bad"]) == (3, 2, {reason: 1})
    assert "line 2" in funnel["examples"][0]
    assert Source.open(source_uri(out, "mine", "train")).num_samples == 2


def test_a_source_without_rows_or_files_is_an_error(media: Path):
    with pytest.raises(DataError, match="without rows"):
        prepare(media, [])
    with pytest.raises(DataError, match="no annotation file"):
        prepare_data(a_recipe(a_source("llava", media / "gone*.json"), NO_TOKENIZER), str(media / "out"))


def test_folders_and_globs_are_read_in_order(media: Path):
    for number in (2, 1):
        write_lines(media / "many" / f"{number}.jsonl", [a_caption(number, image=str(media / "red.png"))])
    for path in (media / "many", media / "many" / "*.jsonl"):
        out = str(media / f"out-{path.name.strip('*')}")
        prepare_data(a_recipe(a_source("llava", path), NO_TOKENIZER), out)
        source = Source.open(source_uri(out, "mine", "train"))
        assert [source.sample(0, row).id for row in range(2)] == ["c1", "c2"]


def test_a_second_run_reads_no_media_and_a_change_is_noticed(media: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [a_caption(number) for number in range(3)]
    out = prepare(media, rows)
    first = Source.open(source_uri(out, "mine", "train")).digest
    calls: list[str] = []
    inspect = describe.inspect
    monkeypatch.setattr(ingest, "inspect", lambda row: calls.append(row) or inspect(row))
    prepare(media, rows)
    assert calls == []
    prepare(media, [*rows, a_caption(9)])
    assert len(calls) == 4, "negative control: a changed annotation file is read again"
    assert Source.open(source_uri(out, "mine", "train")).digest != first
    calls.clear()
    time.sleep(0.01)
    (media / "red.png").write_bytes(a_picture(colour="blue"))
    prepare(media, [*rows, a_caption(9)])
    assert len(calls) == 4, "a changed picture is read again"


def moved(folder: Path, to: str) -> Path:
    return folder.rename(folder.with_name(to))


def test_an_output_or_a_data_folder_that_was_moved_is_recognised(media: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    inspect = describe.inspect
    monkeypatch.setattr(ingest, "inspect", lambda row: calls.append(row) or inspect(row))
    (media / "data").mkdir()
    (media / "red.png").rename(media / "data" / "red.png")
    prepare(media / "data", [a_caption(0), a_caption(1)], out="../one")
    assert len(calls) == 2
    moved(media / "one", "two")
    prepare(media / "data", [a_caption(0), a_caption(1)], out="../two")
    assert len(calls) == 2, "the output was renamed"
    moved(media / "data", "elsewhere")
    prepare(media / "elsewhere", [a_caption(0), a_caption(1)], out="../two")
    assert len(calls) == 2, "the data were renamed"
    (media / "elsewhere" / "red.png").write_bytes(a_picture(colour="blue"))
    prepare(media / "elsewhere", [a_caption(0), a_caption(1)], out="../two")
    assert len(calls) == 4, "negative control: another picture under the old name"


def test_a_corpus_inside_an_output_moves_with_it(tmp_path: Path):
    """Its paths are below OUT/data/corpus, wherever OUT lies."""
    recipe = small_recipe()
    source = recipe.prepare.sources["captions"]
    keys = []
    for out in ("one", "two/deeper"):
        folder = tmp_path / out / "data" / "corpus" / "small"
        folder.mkdir(parents=True)
        (folder / "red.png").write_bytes(a_picture())
        os.utime(folder / "red.png", (1, 1))
        (folder / "captions.json").write_text("[]")
        row = ingest.Draft("where", "id", [], [MediaRef(str(folder / "red.png"), "image")])
        files = [str(folder / "captions.json")]
        keys.append(ingest.input_key(source, recipe.prepare, files, [row], below=(str(folder), str(tmp_path / out))))
    assert keys[0] == keys[1]


def test_the_same_rows_give_the_same_shards_wherever_they_lie(media: Path):
    rows = [a_caption(number) for number in range(600)]  # more than one block
    first = prepare(media, rows, "prepare.shard_bytes=100000", out="one")
    write_lines(media / "elsewhere" / "rows.jsonl", rows)
    (media / "elsewhere" / "red.png").write_bytes((media / "red.png").read_bytes())
    second = prepare(media / "elsewhere", rows, "prepare.shard_bytes=100000", out="two")
    one, two = (Source.open(source_uri(out, "mine", "train")) for out in (first, second))
    assert one.num_shards > 2
    assert one.digest == two.digest


def test_what_is_held_out_lies_in_a_split_of_its_own(media: Path):
    train = write_lines(media / "rows.jsonl", [a_caption(0)])
    held = write_lines(media / "held.jsonl", [a_caption(1), a_caption(2)])
    prepare_data(a_recipe(a_source("llava", train, held_out=str(held)), NO_TOKENIZER), str(media / "out"))
    source = Source.open(source_uri(str(media / "out"), "mine", "held_out"))
    assert source.num_samples == 2 and source.sample(0, 0).split == "held_out"
