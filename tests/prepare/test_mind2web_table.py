"""Multimodal-Mind2Web as its hub has it: Parquet with the columns of its card, screenshots in cells."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli import data
from pipelines.prepare.formats import mind2web_table
from pipelines.prepare.formats.rows import Bad, Draft
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.test_agent_formats import BOXED, MIND2WEB, actions_of
from tests.prepare.through import made, only, read, trained
from trainer.data.shards import Source
from trainer.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("action_uid", "raw_html", "cleaned_html", "operation")),
        *((name, pa.list_(pa.string())) for name in ("pos_candidates", "neg_candidates")),
        *((name, pa.string()) for name in ("website", "domain", "subdomain", "annotation_id", "confirmed_task")),
        ("screenshot", IMAGE),
        ("action_reprs", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("target_action_index", "target_action_reprs")),
    ]
)
"""The features of the data set's card, in its order."""


def rows_of(
    episode: str = "a1", count: int = len(MIND2WEB), size: tuple[int, int] = (300, 200)
) -> list[dict[str, Any]]:
    found = []
    for number, action in enumerate(MIND2WEB[:count]):
        facts = {name: action[name] for name in ("operation", "pos_candidates", "confirmed_task")}
        shown = a_picture(size[0], size[1] + number, kind="JPEG")
        facts |= {"annotation_id": episode, "action_uid": f"{episode}-{number}", "target_action_index": str(number)}
        facts |= {"screenshot": {"bytes": shown, "path": f"{episode}-{number}.jpg"}, "raw_html": "<html>" * 50}
        facts |= {"action_reprs": [f"[a] x -> {n}" for n in range(count)], "neg_candidates": [BOXED] * 3}
        found.append(facts)
    return found


def table(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=group)
    return path


def test_a_table_is_the_same_trajectory_as_lines_with_files(tmp_path: Path):
    rows = rows_of()
    sample, files = only(read("mind2web", table(tmp_path / "train.parquet", rows)), "agent")
    for row in rows:
        (tmp_path / row["screenshot"]["path"]).write_bytes(row["screenshot"]["bytes"])
    lines = [{**row, "screenshot": row["screenshot"]["path"]} for row in rows]
    same, others = only(read("mind2web", write_lines(tmp_path / "lines.jsonl", lines)), "agent")
    assert files == others == [row["screenshot"]["bytes"] for row in rows]
    assert (sample.id, sample.messages) == (same.id, same.messages) and len(actions_of(sample)) == 8
    assert [item.digest for item in sample.media] == [item.digest for item in same.media]
    for found in trained(sample, files, tmp_path / "through"):
        assert found.targets.count('"left_click"') == 3


def test_pages_html_is_never_read_and_screenshots_not_before_they_are_described(tmp_path: Path, monkeypatch):
    asked: list[Any] = []
    own = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: asked.append(k["columns"]) or own(self, *a, **k)
    )
    [draft] = read("mind2web", table(tmp_path / "train.parquet", rows_of()))
    assert isinstance(draft, Draft) and {name for columns in asked for name in columns} == set(mind2web_table.READ)
    assert [ref.uri.partition("#")[2] for ref in draft.media] == [f"cell={n // 2}/{n % 2}/screenshot" for n in range(5)]


def test_an_episode_that_goes_on_in_the_next_files_is_read_where_it_begins(tmp_path: Path):
    rows = [*rows_of("a"), *rows_of("b"), *rows_of("c", 2)]
    cut = (rows[:6], rows[6:8], rows[8:11], rows[11:])
    paths = [table(tmp_path / f"train-{n:05d}-of-00004.parquet", part) for n, part in enumerate(cut)]
    found = [read("mind2web", path) for path in paths]
    told = [[row.id if isinstance(row, Draft) else row.reason for row in rows] for rows in found]
    before = "in-the-file-before"
    assert told == [["a", "b"], [before] * 2, [before] * 2 + ["c"], [before]]
    assert all(not row.fault for rows in found for row in rows if isinstance(row, Bad))
    samples = [item for rows in found for item in made(rows, "agent") if not isinstance(item, Bad)]
    assert [len(actions_of(sample)) for sample, _ in samples] == [8, 8, 2]
    assert [files for _, files in samples][1] == [row["screenshot"]["bytes"] for row in rows[5:10]]
    out = str(tmp_path / "shards")
    assert data.main(["data", "ingest", str(tmp_path / "train-*.parquet"), "--out", out]) == 0
    assert Source.open(out).num_samples == 3
    assert json.loads(Path(out, "input.json").read_text())["funnel"]["bad"] == {before: 5}


def test_an_empty_row_group_at_the_end_of_the_file_before_changes_nothing(tmp_path: Path):
    rows = pa.Table.from_pylist(rows_of(), SCHEMA)
    with pq.ParquetWriter(tmp_path / "t-00000-of-00002.parquet", SCHEMA) as file:
        file.write_table(rows)
        file.write_table(rows.slice(0, 0))
    pq.write_table(rows.slice(1), tmp_path / "t-00001-of-00002.parquet")
    found = list(read("mind2web", tmp_path / "t-00001-of-00002.parquet"))
    assert found and {row.reason for row in found if isinstance(row, Bad)} == {"in-the-file-before"}


def test_auto_knows_the_table_and_leaves_others_to_the_reader_of_tables(tmp_path: Path):
    path = table(tmp_path / "train.parquet", rows_of())
    assert data.main(["data", "ingest", str(path), "--out", str(tmp_path / "shards")]) == 0
    sample = Source.open(str(tmp_path / "shards")).sample(0, 0)
    assert sample.kind == "agent" and sample.id == "a1"
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="without columns that are needed"):
        read("mind2web", tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("change", "reason", "got"),
    [
        ({"screenshot": None}, "wrong-form", "fields"),
        ({"operation": "{"}, "wrong-form", "JSONDecodeError"),
        ({"pos_candidates": []}, "no-target", "none of its candidates"),
        ({"target_action_index": "4"}, "wrong-order", "4"),
        ({"action_reprs": ["one"]}, "wrong-order", "2"),
        ({"screenshot": {"bytes": a_picture()[:40], "path": None}}, "damaged-media", "image"),
        ({"screenshot": {"bytes": None, "path": "nowhere.png"}}, "missing-media", "no such file"),
    ],
)
def test_a_row_that_cannot_be_used_costs_its_episode_and_no_other(tmp_path: Path, change: dict, reason: str, got: str):
    bad = rows_of("bad", 2)
    bad[0] |= change
    rows = read("mind2web", table(tmp_path / "train.parquet", [*rows_of("a"), *bad, *rows_of("b")]))
    found = made(rows, "agent")
    assert [item.reason if isinstance(item, Bad) else item[0].id for item in found] == ["a", reason, "b"]
    assert isinstance(found[1], Bad) and got in found[1].got and "row 5" in found[1].where


def test_a_damaged_row_group_is_told_and_the_others_are_read(tmp_path: Path):
    path = tmp_path / "train.parquet"
    episodes = [*rows_of("a", 2), *rows_of("b", 2)]
    pq.write_table(pa.Table.from_pylist(episodes, SCHEMA), path, row_group_size=2, write_page_checksum=True,
                   compression="none")  # fmt: skip
    content = bytearray(path.read_bytes())
    place = content.index(b"Book a table")
    content[place : place + 4] = b"Cook"
    path.write_bytes(content)
    found = read("mind2web", path)
    assert [row.reason if isinstance(row, Bad) else row.id for row in found] == ["damaged-parquet", "b"]


def test_a_file_that_is_no_table_is_one_error(tmp_path: Path):
    path = tmp_path / "train.parquet"
    path.write_bytes(io.BytesIO(b"PAR1 nothing").getvalue())
    with pytest.raises(DataError, match="not a Parquet file"):
        read("mind2web", path)
