"""The built-in corpus: real, licensed, split by source file, true by construction, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.prepare.corpus.build import WRITERS, build_corpus, ingredients, write_kinds
from pipelines.prepare.corpus.draw import COLOURS
from pipelines.prepare.corpus.folder import Folder
from pipelines.prepare.corpus.names import FILES, corpus_problem
from pipelines.prepare.corpus.sources import draw_split
from tests.prepare.builders import small_recipe
from trainer import storage
from trainer.data.shards import Source
from trainer.resolve import resolved

KINDS = {"photo": 20, "icon": 500, "video": 4, "text": 40, "table": 4, "screenshot": 20}


@pytest.fixture(scope="module")
def corpus(prepared: str) -> Path:
    return Path(prepared) / "data" / "corpus" / "small"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sources_are_listed_with_count_licence_sha256_and_split(corpus: Path):
    listed = json.loads((corpus / "sources.json").read_text())
    assert set(listed["kinds"]) == set(KINDS)
    for kind, at_least in KINDS.items():
        counts = listed["kinds"][kind]
        assert counts["count"] >= at_least, kind
        assert counts["train"] and counts["held_out"], kind
        assert counts["count"] == sum(counts["licences"].values())
    assert all(len(file["sha256"]) == 64 and file["licence"] for file in listed["files"])
    icons = [file["name"] for file in listed["files"] if file["kind"] == "icon"]
    assert len(set(icons)) == len(icons) >= 500


def test_no_source_file_and_no_medium_lies_in_both_parts(corpus: Path):
    listed = json.loads((corpus / "sources.json").read_text())["files"]
    parts = {split: {file["sha256"] for file in listed if file["split"] == split} for split in ("train", "held_out")}
    assert not parts["train"] & parts["held_out"]
    names = {split: {f["name"] for f in listed if f["split"] == split and f["kind"] == "icon"} for split in parts}
    said = {
        split: {caption["conversations"][1]["value"] for caption in json.loads((corpus / name).read_text())}
        for split, name in (("train", "captions.json"), ("held_out", "captions.held_out.json"))
    }
    for split, other in (("train", "held_out"), ("held_out", "train")):
        words = {word for text in said[split] if "there is" in text for word in text.split()}
        assert not words & (names[other] - {"seat", "left", "right", "top"}), split


def test_the_split_does_not_depend_on_order_and_has_the_share_asked_for():
    names = [f"file {number}" for number in range(100)]
    split = draw_split(names, 0.25, 7)
    assert split == draw_split(reversed(names), 0.25, 7)
    assert sum(part == "held_out" for part in split.values()) == 25
    assert split != draw_split(names, 0.25, 8), "negative control: the seed matters"


def test_every_kind_has_a_source_in_both_parts(prepared: str):
    for name in FILES:
        for split in ("train", "held_out"):
            uri = storage.join(prepared, "data", "sources", name, split)
            assert Source.open(uri).num_samples >= 4, (name, split)


def test_captions_name_the_colour_that_is_in_the_picture(corpus: Path):
    rows = [
        row
        for row in json.loads((corpus / "captions.json").read_text())
        if "there is" in row["conversations"][1]["value"]
    ]
    for row in rows[:60]:
        colour = next(word for word in row["conversations"][1]["value"].split() if word in COLOURS)
        pixels = np.asarray(Image.open(corpus / row["image"]).convert("RGB"), int)
        near = {name: (np.abs(pixels - np.array(rgb)).max(-1) < 28).mean() for name, rgb in COLOURS.items()}
        assert near[colour] > 0.03, (row["id"], near)
        assert near[colour] == max(near.values()), (row["id"], near)


def test_boxes_and_masks_lie_on_the_icons(corpus: Path):
    found = json.loads((corpus / "grounding.json").read_text())
    names = {category["id"]: category["name"] for category in found["categories"]}
    images = {image["id"]: image for image in found["images"]}
    for annotation in found["annotations"][:40]:
        image = images[annotation["image_id"]]
        pixels = np.asarray(Image.open(corpus / image["file_name"]).convert("RGB"), int)
        assert pixels.shape[:2] == (image["height"], image["width"])
        runs = annotation["segmentation"]["counts"]
        mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(image["width"], image["height"]).T.astype(bool)
        left, top, width, height = annotation["bbox"]
        assert mask.sum() == mask[top : top + height, left : left + width].sum() == annotation["area"] > 50
        colour = np.array(COLOURS[names[annotation["category_id"]].split()[0]])
        assert np.median(np.abs(pixels[mask] - colour).max(-1)) < 40


def test_pages_have_ink_in_every_box_and_nowhere_else(corpus: Path):
    for row in lines(corpus / "documents.jsonl")[:12]:
        for page in row["pages"]:
            ink = np.asarray(Image.open(corpus / page["image"]).convert("L"), int) < 128
            covered = np.zeros_like(ink)
            for block in page["blocks"]:
                left, top, right, bottom = block["bbox"]
                assert ink[top:bottom, left:right].any(), (row["id"], block)
                covered[top:bottom, left:right] = True
            assert not (ink & ~covered).any(), row["id"]


def test_screenshots_are_small_and_their_elements_lie_inside():
    folder = Path(__file__).parents[2] / "pipelines" / "prepare" / "screenshots"
    found = json.loads((folder / "screens.json").read_text())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert {screen["file"] for screen in found["screens"]} == {path.name for path in folder.glob("*.png")}
    for screen in found["screens"]:
        assert Image.open(folder / screen["file"]).size == (screen["width"], screen["height"])
        for element in screen["elements"]:
            left, top, right, bottom = element["box"]
            assert 0 <= left < right <= screen["width"] and 0 <= top < bottom <= screen["height"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path):
    found = ingredients(5)

    def content(name: str, seed: int) -> dict[str, str]:
        root = tmp_path / name
        root.mkdir()
        write_kinds(Folder(root, seed, 0.004), found)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first, second, other = content("one", 5), content("two", 5), content("other", 6)
    assert first == second
    assert first["captions.json"] != other["captions.json"]


def test_a_finished_corpus_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sources.json").write_text(json.dumps({"format": 1, "seed": 5, "scale": 0.1}))
    build_corpus(str(tmp_path), seed=5, scale=0.1)
    assert "already there" in capsys.readouterr().out


def test_a_corpus_that_is_there_is_recognised_without_importing_what_builds_it(prepared: str, tmp_path: Path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(resolved(small_recipe())))
    script = (
        "import sys; from pipelines.prepare.ingest import prepare_corpus; from trainer.resolve import load_recipe;"
        f"prepare_corpus(load_recipe({str(recipe)!r}), {prepared!r});"
        "print([name for name in ('sklearn', 'scipy', 'matplotlib', 'skimage', 'resvg_py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "already there" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    import_all = (
        "import sys, pipelines.prepare.corpus.build; print('sklearn' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", import_all], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False", "what builds it imports them where a table is read or drawn"


def test_the_names_of_the_corpus_are_those_that_are_written(corpus: Path):
    assert list(FILES) == list(WRITERS)
    for name, suffix in FILES.items():
        for file in (f"{name}.{suffix}", f"{name}.held_out.{suffix}"):
            assert (corpus / file).exists()
            assert corpus_problem(f"corpus://small/{file}") is corpus_problem(f"corpus://{file}") is None
    assert "did you mean captions.json" in (corpus_problem("corpus://caption.json") or "")
    assert corpus_problem("s3://b/caption.json") is None
