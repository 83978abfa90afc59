"""From rows to shards: what is refused is counted, nothing half-written stays, a second run does nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare import describe, ingest, swap
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


# ---------------------------------------------------------------- what shards depend on


def refcoco(folder: Path) -> Path:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]}
    instances = {"images": [{"id": 1, "file_name": "red.png"}], "annotations": [box]}
    storage.write_json(str(folder / "instances.json"), {**instances, "categories": [{"id": 1, "name": "field"}]})
    said = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [{"sent_id": 1, "sent": "it"}]}
    return write_lines(folder / "refs.json", [said])


def corrected_box(folder: Path) -> None:
    found = storage.read_json(str(folder / "instances.json"))
    found["annotations"][0]["bbox"] = [2, 2, 20, 20]
    storage.write_json(str(folder / "instances.json"), found)


def alpaca(folder: Path) -> Path:
    columns = {"prompt": "one", "response": "two"}
    storage.write_json(str(folder / "dataset_info.json"), {"mine": {"file_name": "rows.json", "columns": columns}})
    row = {"one": "first", "two": "second", "three": "third"}
    (folder / "rows.json").write_text(json.dumps([row]))
    return folder / "rows.json"


def another_column(folder: Path) -> None:
    columns = {"prompt": "one", "response": "three"}
    storage.write_json(str(folder / "dataset_info.json"), {"mine": {"file_name": "rows.json", "columns": columns}})


def a_table_without_bytes(folder: Path) -> Path:
    cells = pa.array([{"bytes": None, "path": "red.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": cells, "caption": ["x"]}), folder / "t.parquet")
    return folder / "t.parquet"


def another_picture(folder: Path) -> None:
    (folder / "red.png").write_bytes(a_picture(colour="blue"))


@pytest.mark.parametrize(
    ("format", "write", "change"),
    [
        ("refcoco", refcoco, corrected_box),
        ("llama_factory", alpaca, another_column),
        ("parquet", a_table_without_bytes, another_picture),
    ],
)
def test_what_rows_take_from_other_files_is_part_of_what_shards_are_made_from(
    format: str, write: Callable[[Path], Path], change: Callable[[Path], None], media: Path
):
    source = a_source(format, write(media), kind="grounding" if format == "refcoco" else "instruction")
    digests, times = [], []
    for act in (None, None, change):
        if act is not None:
            act(media)
        prepare_data(a_recipe(source, NO_TOKENIZER), str(media / "out"))
        shards = source_uri(str(media / "out"), "mine", "train")
        digests.append(Source.open(shards).digest)
        times.append(Path(shards, "source.json").stat().st_mtime_ns)
    assert times[0] == times[1], "nothing changed: nothing is written"
    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- ids of several files


def test_rows_without_ids_in_files_of_one_name_are_told_apart_by_their_folders(media: Path):
    row = a_caption(0, id=None, image=str(media / "red.png"))
    for name in ("a", "b"):
        write_lines(media / name / "train.jsonl", [row, {**row, "id": f"own-{name}"}])
    prepare_data(a_recipe(a_source("llava", media / "*" / "train.jsonl"), NO_TOKENIZER), str(media / "out"))
    source = Source.open(source_uri(str(media / "out"), "mine", "train"))
    ids = [source.sample_id(0, row) for row in range(4)]
    assert ids == ["a/train.jsonl#1", "own-a", "b/train.jsonl#1", "own-b"]


def test_tars_with_the_same_keys_are_told_apart_by_their_names_and_an_id_of_a_row_is_not(media: Path):
    (media / "tars").mkdir()
    for name in ("0", "1"):
        with tarfile.open(media / "tars" / f"{name}.tar", "w") as archive:
            words = b'{"caption": "y", "id": "mine"}'
            files = {"000.png": a_picture(), "000.txt": b"x", "001.png": a_picture(), "001.json": words}
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    tars = a_source("webdataset", media / "tars", kind="caption", rendering="document")
    with pytest.raises(DataError, match=r"1\.tar, 001: duplicate-id.*'mine' for the second time"):
        prepare_data(a_recipe(tars, NO_TOKENIZER), str(media / "out"))
    prepare_data(a_recipe(tars, NO_TOKENIZER, "prepare.max_bad_fraction=0.3"), str(media / "out"))
    source = Source.open(source_uri(str(media / "out"), "mine", "train"))
    assert [source.sample_id(0, row) for row in range(3)] == ["0.tar/000", "mine", "1.tar/000"]


@pytest.mark.parametrize(("kind", "more"), [("instruction", {"rejected_response": "No."}), ("preference", {})])
def test_pairs_in_a_source_of_another_kind_say_which_kind_is_meant(kind: Any, more: dict, media: Path):
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    path = write_lines(media / "rows.jsonl", [{"id": "1", "messages": messages, **more}])
    place = ingest.Place("mine", "train", str(media / "out"), "SOURCE", str(media))
    source = a_source("ms_swift", path, kind=kind, rendering="chat")
    with pytest.raises(DataError, match=rf"wrong-kind: .*--kind .*the kind {kind}"):
        ingest.write_source(small_recipe().prepare, source, place, [str(path)], None, [])


def test_other_samples_of_one_id_get_ids_from_what_they_say_and_a_repeat_is_refused(media: Path):
    """LLaVA's files call every conversation about a picture after that picture."""
    turns = [{"from": "human", "value": "<image>Again?"}, {"from": "gpt", "value": "Yes."}]
    rows = [a_caption(0), a_caption(0, conversations=turns), a_caption(1), a_caption(0, image="blue.jpg"), a_caption(0)]
    (media / "blue.jpg").write_bytes(a_picture(50, 50, "blue", "JPEG"))
    moved = media / "moved"
    shutil.copytree(media, moved)
    found = []
    for folder, order in ((media, rows), (moved, [rows[0], rows[3], rows[2], rows[1], rows[4]])):
        out = prepare(folder, order, "prepare.max_bad_fraction=0.2")
        funnel = storage.read_json(storage.join(out, "data", "funnel.json"))["mine"]["train"]
        assert (funnel["kept"], funnel["bad"], funnel["noted"]) == (4, {"duplicate-id": 1}, {"renamed-id": 2})
        assert "line 5: duplicate-id" in funnel["examples"][0]
        source = Source.open(source_uri(out, "mine", "train"))
        samples = [source.sample(0, row) for row in range(4)]
        found.append({sample.media[0].origin + str(sample.messages): sample.id for sample in samples})
    assert found[0] == found[1] and len(set(found[0].values())) == 4
    assert sorted(identity.partition("#")[0] for identity in found[0].values()) == ["c0", "c0", "c0", "c1"]
    assert "c0" in found[0].values()


# ---------------------------------------------------------------- what is there while new shards are made


def test_shards_stay_until_new_ones_are_whole(media: Path):
    out = prepare(media, [a_caption(0)])
    before = Source.open(source_uri(out, "mine", "train")).digest
    rows = [*(a_caption(number) for number in range(300)), a_caption(999, image="gone.png")]
    with pytest.raises(DataError, match="missing-media"):
        prepare(media, rows, "prepare.shard_bytes=20000")  # several shards are written before the last row is seen
    source = Source.open(source_uri(out, "mine", "train"))
    assert source.digest == before and ShardReader(source).media(0, 0) == [(media / "red.png").read_bytes()]
    assert sorted(os.listdir(source.uri)) == ["00000.index.parquet", "00000.tar", "input.json", "source.json"]
    prepare(media, rows[:-1], "prepare.shard_bytes=20000")
    assert Source.open(source.uri).num_samples == 300


LAST = ("input.json", "source.json")


@pytest.mark.parametrize("calls", range(1, 13))
def test_a_swap_that_was_killed_anywhere_is_finished_by_the_next_run(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every call that changes files is, in its turn, the one before which the process dies."""
    folder = tmp_path / "train"
    old = {"00000.tar": b"old", "00001.tar": b"old", "00000.counts.parquet": b"old", **dict.fromkeys(LAST, b"old")}
    new = {"00000.tar": b"new", "00000.index.parquet": b"new", **dict.fromkeys(LAST, b"new")}
    for place, files in ((folder, old), (Path(swap.beside(str(folder))), new)):
        for name, data in files.items():
            storage.write_bytes(str(place / name), data)
    done: list[str] = []

    def dying(act: Callable[..., None]) -> Callable[..., None]:
        def called(*given: Any) -> None:
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(act.__name__)
            act(*given)

        return called

    with monkeypatch.context() as patched:
        for name in ("move", "remove", "remove_tree", "write_bytes"):
            patched.setattr(storage, name, dying(getattr(storage, name)))
        with pytest.raises(KeyboardInterrupt):
            swap.take(str(folder), last=LAST)
    seen = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "source.json" not in seen or seen in (old, new), "what looks finished is whole"
    swap.settle(str(folder), last=LAST)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == new


# ---------------------------------------------------------------- what is in memory at a time


def test_json_lines_are_read_one_by_one_also_to_recognise_them(media: Path):
    """200 MB of rows are recognised and read below a tenth of that."""
    row = json.dumps({"id": "x", "text": "a" * 100_000}) + "\n"
    path = media / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(2000):
            file.write(row)
    program = (
        "import sys; from tests.memory import peak_kb; from pipelines.prepare.formats import recognise; "
        "from pipelines.prepare.formats.rows import json_entries; "
        "base = peak_kb(); "
        "name, _ = recognise(sys.argv[1], ('text', 'llava', 'coco')); "
        "count = sum(1 for _ in json_entries(sys.argv[1])); "
        "print(name, count, peak_kb() - base)"
    )
    words = [sys.executable, "-c", program, str(path)]
    name, count, grown_kb = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert (name, count) == ("text", "2000") and int(grown_kb) < 20_000


def test_blocks_of_rows_are_bounded_by_the_bytes_of_their_media(media: Path, monkeypatch: pytest.MonkeyPatch):
    size = (media / "red.png").stat().st_size
    monkeypatch.setattr(ingest, "BLOCK_BYTES", 10 * size)

    def rows(uri: str, count: int, kind: str = "image") -> list[ingest.Row]:
        return [ingest.Draft("", str(number), [], [MediaRef(uri, kind)]) for number in range(count)]  # type: ignore[arg-type]

    def lengths(given: list[ingest.Row]) -> list[int]:
        return [len(block) for block in ingest._blocks(given)]

    assert lengths(rows(str(media / "red.png"), 25)) == [10, 10, 5]
    assert lengths(rows(f"a.tar#bytes=512-{512 + 5 * size}", 5)) == [2, 2, 1]
    assert lengths(rows("https://far/away.mp4", 2, "video")) == [1, 1], "a row that is too large goes alone"
    assert lengths([ingest.Draft("", str(number), []) for number in range(300)]) == [256, 44]
