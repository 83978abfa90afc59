"""Duplicates and contamination: each method keeps and drops, across shards and sources, whatever the partitions."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.prepare.corpus import sources
from pipelines.prepare.curate import image_signature, pairs
from pipelines.prepare.curate.columns import Work, place_of, uid_of
from pipelines.prepare.curate.components import components, duplicates
from pipelines.prepare.curate.step import curate
from pipelines.prepare.curate.text_signature import jaccard, shingles
from tests.prepare.curate.builders import WORDS, a_document, a_recipe, as_file, prose, write_source
from trainer.data import kept
from trainer.data.shards import Source


def photo(name: str = "skimage/data/astronaut.png") -> Image.Image:
    package, _, file = name.partition("/")
    return Image.open(sources.package_folder(package) / file).convert("RGB")


def kept_ids(out: Path, name: str = "web") -> list[str]:
    source = Source.open(str(out / "data/sources" / name / "train"))
    return [source.sample_id(shard, row) for shard in range(source.num_shards) for row in kept.rows(source, shard)]


def edited(text: str, changes: int, seed: int = 0) -> str:
    """A few words in one place replaced."""
    words = text.split()
    at = random.Random(seed).randrange(len(words) - changes)
    words[at : at + changes] = [f"{WORDS[n % len(WORDS)]}x" for n in range(changes)]
    return " ".join(words)


# ---------------------------------------------------------------- text and exact


def test_of_near_duplicate_texts_the_longest_stays_then_the_smallest_id(tmp_path: Path):
    base = prose(1, 200)
    documents = [
        a_document("b", base), a_document("a", base), a_document("z", f"{base} and more"),
        a_document("other", prose(2, 200)), a_document("half", " ".join(base.split()[:100])),
    ]  # fmt: skip
    write_source(tmp_path, documents)
    found = curate(a_recipe("{dedup: {text: 0.8}}"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["z", "other", "half"]
    assert found["dropped"] == {"dedup.text": 2}
    assert found["examples"]["dedup.text"][0] == {
        "id": "b", "value": "web/train/z", "threshold": "Jaccard similarity below 0.8"
    }  # fmt: skip
    write_source(tmp_path / "two", [document for document in documents if document[0].id != "z"])
    curate(a_recipe("{dedup: {text: 0.8}}"), str(tmp_path / "two"))
    assert kept_ids(tmp_path / "two") == ["a", "other", "half"]


def test_exact_copies_are_told_by_content_and_not_by_id_or_place(tmp_path: Path):
    picture = as_file(photo().resize((120, 120)))
    documents = [
        a_document("b", "A text.", [picture], url="one"),
        a_document("a", "A text.", [picture], origin="elsewhere.png"),
        a_document("c", "A text!", [picture]),
        a_document("d", "A text."),
    ]
    write_source(tmp_path, documents)
    found = curate(a_recipe("{dedup: {exact: true}}"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["a", "c", "d"] and found["dropped"] == {"dedup.exact": 1}


def test_a_dropped_sample_does_not_make_others_duplicates(tmp_path: Path):
    """a ~ b ~ c in a chain: where b is cleaned away, a and c are two."""
    base = prose(3, 200)
    middle = f"{edited(base, 9, 1)} {{}}"
    documents = [
        a_document("a", base),
        a_document("b", middle),
        a_document("c", edited(middle, 9, 4).replace("{}", "")),
    ]
    write_source(tmp_path, documents)
    curate(a_recipe("{dedup: {text: 0.8}}"), str(tmp_path))
    assert len(kept_ids(tmp_path)) == 1, "control: the chain is one"
    curate(a_recipe("{clean: {max_braces: 0}, dedup: {text: 0.8}}"), str(tmp_path))
    assert kept_ids(tmp_path) == ["a", "c"]


def test_texts_of_scripts_without_spaces_are_compared_too(tmp_path: Path):
    rng = random.Random(1)
    base = "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(300))
    other = "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(300))
    write_source(
        tmp_path, [a_document("a", base), a_document("b", base[:150] + "的" + base[151:]), a_document("c", other)]
    )
    curate(a_recipe("{dedup: {text: 0.8}}"), str(tmp_path))
    assert kept_ids(tmp_path) == ["a", "c"]


def test_empty_texts_are_no_duplicates(tmp_path: Path):
    pictures = [as_file(photo().crop((0, n * 100, 200, n * 100 + 200))) for n in range(2)]
    write_source(tmp_path, [a_document(str(n), "", [picture]) for n, picture in enumerate(pictures)])
    curate(a_recipe("{dedup: {text: 0.8, image: 56}}"), str(tmp_path))
    assert kept_ids(tmp_path) == ["0", "1"]


# ---------------------------------------------------------------- images


def test_pictures_are_the_same_after_compression_scaling_and_a_small_crop_and_not_with_another_object(tmp_path: Path):
    base = photo().resize((400, 400))
    stamped = base.copy()
    stamped.paste((0, 160, 60), (240, 240, 360, 360))
    pictures = {
        "original": as_file(base),
        "jpeg": as_file(base, "JPEG", 60),
        "half": as_file(base.resize((200, 200))),
        "crop": as_file(base.crop((4, 4, 396, 396))),
        "stamped": as_file(stamped),
        "mirrored": as_file(base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }
    write_source(tmp_path, [a_document(name, f"Text {name}", [data]) for name, data in pictures.items()])
    found = curate(a_recipe("{dedup: {image: 56}}"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["original", "stamped", "mirrored"]
    assert found["dropped"] == {"dedup.image": 3}
    one, other = (image_signature.image_signature(pictures[name])[1] for name in ("original", "stamped"))
    assert image_signature.difference(one, other) > 0.4 > image_signature.difference(one, one)


def test_documents_are_the_same_where_all_their_pictures_are(tmp_path: Path):
    one, two = (as_file(photo().crop((n * 200, 0, n * 200 + 256, 256))) for n in range(2))
    documents = [
        a_document("both", "a", [one, two]),
        a_document("one", "b", [one]),
        a_document("turned", "c", [two, one]),
    ]
    write_source(tmp_path, documents)
    curate(a_recipe("{dedup: {image: 56}}"), str(tmp_path))
    assert kept_ids(tmp_path) == ["both", "one"]


# ---------------------------------------------------------------- other sources


def test_what_another_source_keeps_goes_first_and_what_it_dropped_does_not_count(tmp_path: Path):
    texts = [prose(seed, 150) for seed in range(3)]
    write_source(tmp_path, [a_document("x0", texts[0]), a_document("x1", f"{texts[1]} {{}}")], name="books")
    write_source(tmp_path, [a_document(f"w{n}", f"{text} longer here") for n, text in enumerate(texts)])
    recipe = a_recipe("{dedup: {text: 0.8, against: [books]}}", books="{clean: {max_braces: 0}}")
    found = curate(recipe, str(tmp_path))
    assert kept_ids(tmp_path, "books") == ["x0"]
    assert kept_ids(tmp_path) == ["w1", "w2"], "w0 is in books; x1 was dropped there"
    assert found["web"]["examples"]["dedup.text"][0]["value"] == "books/train/x0"


def test_what_is_held_out_elsewhere_is_not_trained_on(tmp_path: Path):
    picture = photo().resize((300, 300))
    write_source(
        tmp_path,
        [a_document("h0", prose(1, 150)), a_document("h1", prose(2, 150), [as_file(picture)])],
        name="exam", split="held_out",
    )  # fmt: skip
    write_source(tmp_path, [a_document("e0", prose(9))], name="exam")
    documents = [
        a_document("copied", edited(prose(1, 150), 3)),
        a_document("shown", prose(5, 150), [as_file(photo().crop((0, 0, 200, 200))), as_file(picture, "JPEG", 60)]),
        a_document("fine", prose(6, 150), [as_file(photo().crop((300, 300, 500, 500)))]),
    ]
    write_source(tmp_path, documents)
    asked = "{decontaminate: {exact: true, text: 0.8, image: 56, against: [exam]}}"
    found = curate(a_recipe(asked, exam="null"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["fine"]
    assert found["dropped"] == {"decontaminate.exact": 0, "decontaminate.text": 1, "decontaminate.image": 1}
    assert found["examples"]["decontaminate.text"][0]["value"] == "exam/held_out/h0"
    assert found["examples"]["decontaminate.image"][0]["value"] == "exam/held_out/h1"


# ---------------------------------------------------------------- a planted set, partitions and runners

ALL = "{dedup: {exact: true, text: 0.8, image: 56}}"


def a_planted_set(num: int = 120) -> tuple[list, dict[str, int]]:
    """(documents, family of each id): a third has one to three copies, edited or with a changed picture."""
    rng = random.Random(11)
    cells = [(x, y) for x in range(0, 400, 100) for y in range(0, 400, 100)]
    names = ["astronaut", "coffee", "chelsea", "cat", "rocket", "hubble_deep_field", "immunohistochemistry", "retina"]
    pictures = []
    for name in names:
        file = next(sources.package_folder("skimage").glob(f"data/{name}.*"), None)
        if file is not None:
            picture = Image.open(file).convert("RGB").resize((500, 500))
            found = [picture.crop((x, y, x + 100, y + 100)).resize((160, 160)) for x, y in cells]
            pictures += [cell for cell in found if np.asarray(cell.convert("L")).std() > 8]  # README: flat pictures
    rng.shuffle(pictures)
    documents, family = [], {}
    for number in range(num):
        text, picture = prose(number, 150), pictures[number] if number < len(pictures) and number % 2 else None
        for copy in range(rng.randint(2, 4) if number % 3 == 0 else 1):
            identity = f"{rng.randrange(10**6):06d}-{number}-{copy}"
            said = edited(text, rng.randint(1, 5), copy) if copy and picture is None else text
            shown = picture if copy == 0 or picture is None else picture.crop((1, 1, 159, 159))
            said = said if picture is None or copy == 0 else prose(5000 + number * 9 + copy, 60)
            family[identity] = number
            documents.append(a_document(identity, said, [as_file(shown, "JPEG", 60 + 10 * copy)] if shown else []))
    rng.shuffle(documents)
    return documents, family


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, dict[str, int]]:
    out = tmp_path_factory.mktemp("planted")
    documents, family = a_planted_set()
    write_source(out, documents, shard_bytes=2**30)
    curate(a_recipe(ALL), str(out))
    return out, documents, family


def test_planted_duplicates_are_found_and_nothing_else(planted: tuple[Path, list, dict[str, int]]):
    out, documents, family = planted
    left = kept_ids(out)
    surplus = len(documents) - len(set(family.values()))
    dropped = len(documents) - len(left)
    lost = len(set(family.values())) - len({family[identity] for identity in left})
    assert surplus > 40
    assert (dropped - lost) / surplus >= 0.95, "recall"
    assert (dropped - lost) / dropped >= 0.99, "precision: no family is lost"


@pytest.mark.parametrize("shard_bytes", [40_000, 300_000])
def test_the_result_does_not_depend_on_partitions(shard_bytes: int, planted, tmp_path: Path):
    out, documents, _ = planted
    write_source(tmp_path, documents, shard_bytes=shard_bytes)
    source = Source.open(str(tmp_path / "data/sources/web/train"))
    assert source.num_shards > 1
    curate(a_recipe(ALL), str(tmp_path))
    assert kept_ids(tmp_path) == kept_ids(out)


RAY = """
import json, sys
from pathlib import Path
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.step import curate
from tests.prepare.curate.builders import a_recipe
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
work = Work("ray")
curate(a_recipe(sys.argv[2]), sys.argv[1], work)
import daft
print(json.dumps({"runner": daft.get_or_create_runner().name, "computed": work.computed}))
"""


@pytest.mark.slow
@pytest.mark.extended
def test_the_result_on_a_ray_cluster_is_the_same(planted, tmp_path: Path):
    out, documents, _ = planted
    write_source(tmp_path, documents, shard_bytes=300_000)
    env = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", RAY, str(tmp_path), ALL]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["runner"] == "ray" and told["computed"]["pairs_text"] == 1
    assert kept_ids(tmp_path) == kept_ids(out)


def test_another_threshold_computes_no_signature_and_no_pair(planted, tmp_path: Path):
    _, documents, _ = planted
    write_source(tmp_path, documents)
    works = []
    for asked in (ALL, "{dedup: {exact: true, text: 0.95, image: 20}}", ALL):
        works.append(Work("native"))
        curate(a_recipe(asked), str(tmp_path), works[-1])
    assert works[0].computed == {
        "near_text": len(documents),
        "near_image": len(documents),
        "pairs_text": 1,
        "pairs_image": 1,
    }
    assert works[1].computed == works[2].computed == {}


# ---------------------------------------------------------------- parts


def test_places_go_into_a_uid_and_come_back():
    for place in ((0, 0, 0), (3, 70_000, 5), (2**14, 2**20, 2**26)):
        assert place_of(uid_of(*place)) == place


def test_components_take_their_smallest_member():
    edges = np.array([[5, 1], [1, 3], [7, 6]])
    assert components(8, edges).tolist() == [0, 1, 2, 1, 4, 1, 6, 6]
    assert components(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]


def test_of_a_group_the_lowest_rank_is_no_duplicate():
    found = duplicates(np.array([0, 1, 0, 1, 2]), np.array([4, 3, 2, 1, 0]))
    assert found.tolist() == [True, True, False, False, False]


def test_a_large_group_is_tried_in_a_row_and_stays_connected():
    members = list(range(1000))
    tried = pairs.pairs_in(members)
    assert len(tried) < 1000 * (pairs.NEIGHBOURS + 1)
    assert len(set(components(1000, np.array(tried)).tolist())) == 1
    assert len(pairs.pairs_in(members[:50])) == 50 * 49 // 2


@pytest.mark.parametrize("at_once", [5, 36])
def test_bands_some_at_a_time_give_every_pair_once(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Negative control: without the last ones a pair is missing."""
    monkeypatch.setattr(pairs, "BANDS_AT_ONCE", at_once)
    keys = np.arange(5 * 36, dtype=np.uint64).reshape(5, 36)
    keys[1, 0] = keys[0, 0]  # one key in common
    keys[2, 35] = keys[0, 35]
    keys[3] = keys[0]  # all of them
    bands: list[list[int]] = [*keys.tolist(), []]
    daft = Work("native").daft
    frame = daft.from_pydict({"uid": list(range(6)), "bands": bands})

    def found(num_bands: int) -> set[tuple[int, int]]:
        table = pairs.candidates(daft, frame, daft.DataType.int64(), num_bands).to_pydict()
        assert len(table["a"]) == len(set(zip(table["a"], table["b"], strict=True)))
        return set(zip(table["a"], table["b"], strict=True))

    assert found(36) == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert at_once > 5 or found(35) == {(0, 1), (0, 3), (1, 3)}


def test_similarity_is_of_sets_of_five_words():
    one = shingles(list("abcdefg"))
    other = shingles(list("abcdefh"))
    assert len(one) == 3 and jaccard(one, other) == 2 / 4
    assert jaccard(one, shingles([])) == 0.0
    assert jaccard(shingles(["a"]), shingles(["a"])) == 1.0


def test_a_picture_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path):
    from trainer.errors import MediaError

    with pytest.raises(MediaError, match="cannot be decoded"):
        stream = io.BytesIO()
        photo().save(stream, "PNG")
        image_signature.image_signature(stream.getvalue()[:-2000], where="x")


def test_a_picture_that_only_decoding_refuses_is_compared_with_nothing_and_counted(tmp_path: Path):
    """What verify_media: header lets through: the header is whole, the pixels are not."""
    good, damaged = as_file(photo()), undecodable(photo())
    documents = [
        a_document("a", "One.", [good]), a_document("b", "Two.", [good]), a_document("c", "Three.", [damaged]),
        a_document("d", "Four.", [good, damaged]), a_document("e", "Five.", [undecodable(photo().rotate(90))]),
    ]  # fmt: skip
    write_source(tmp_path, documents)
    found = curate(a_recipe("{dedup: {image: 56}}"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["a", "c", "d", "e"], "what is not known to be the same stays"
    assert found["undecodable"] == 3
    write_source(tmp_path, [*documents, a_document("f", "Six.", [damaged])])
    found = curate(a_recipe("{dedup: {image: 56}}"), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["a", "c", "d", "e"] and found["undecodable"] == 4, "the same bytes are the same"
    write_source(tmp_path, documents[:2])
    assert "undecodable" not in curate(a_recipe("{dedup: {image: 56}}"), str(tmp_path))["web"], "negative control"


def undecodable(picture: Image.Image) -> bytes:
    """Bytes that differ for each picture, with the header of one."""
    data = as_file(picture)
    return data[: len(data) // 2]


def a_funnel(out: Path) -> dict[str, Any]:
    return json.loads((out / "data/sources/web/train/curation.json").read_text())["funnel"]


def test_the_funnel_adds_up(planted):
    funnel = a_funnel(planted[0])
    assert funnel["read"] == funnel["kept"] + sum(funnel["dropped"].values())
