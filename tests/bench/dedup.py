"""Near-duplicates: pairs of texts against exact Jaccard similarity, pairs of pictures against how they were made.

text_recall, text_precision    pairs (before components) of Jaccard similarity 0.8 and more on the 5-grams of words,
                               found exactly by prefix filtering; documents are edited copies, unrelated ones, and
                               unrelated ones that share a third to two thirds of boilerplate
text_purity                    share of the documents of a component whose whole component is one family of copies
image_recall                   of pairs (picture, changed picture), over JPEG quality 60, half size and a crop of 2 %
recall_by_transform.NAME       the same by change; a crop of p % takes p % off width and height, at a drawn place
image_precision                of all pairs found, those of one picture's versions. The others are unrelated: parts of
                               photographs in eight orientations, pictures of two such halves, and look-alikes of one
                               scene: the same part with another icon, two parts that share six sevenths less one,
                               frames of a clip a second apart
image_precision_hash_only      the same without verification
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from itertools import combinations

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipelines.prepare.corpus import sources
from pipelines.prepare.corpus.draw import COLOURS, paste
from pipelines.prepare.curate import image_signature, pairs
from pipelines.prepare.curate.components import components
from pipelines.prepare.curate.text_signature import text_signatures
from pipelines.prepare.engine import Engine, blocks

SIMILARITY = 0.8
RADIUS, DIFFERENCE = 56, 0.4
"""The values of trainer.curation's examples and default."""
ASKED = ("jpeg_60", "half_size", "crop_2")
SEED = 7
FLAT = 12.0
"""Grey levels of deviation below which a part of a photograph counts as flat."""


def figures(quick: bool) -> dict[str, float]:
    engine = Engine("native")
    return {
        **text_figures(engine, 2_000 if quick else 100_000),
        **image_figures(engine, *(300, 60) if quick else (20_000, 1_000)),
    }


# ---------------------------------------------------------------- text


def text_figures(engine: Engine, num: int) -> dict[str, float]:
    texts, family = documents(num)
    began = time.perf_counter()
    signed = [row for block in blocks(texts, 4096) for row in text_signatures(engine.daft, block)]
    frame = engine.daft.from_arrow(
        pa.table(
            {
                "uid": pa.array(range(num), pa.int64()),
                "bands": pa.array([row["bands"] for row in signed], pa.list_(pa.uint64())),
                "shingles": pa.array([row["shingles"] for row in signed], pa.list_(pa.uint64())),
            }
        )
    )
    found = pairs.text_pairs(engine.daft, frame)
    took = time.perf_counter() - began
    similar = found.filter(pc.field("similarity") >= SIMILARITY)
    mine = set(zip(similar["a"].to_pylist(), similar["b"].to_pylist(), strict=True))
    true = exact_pairs([row["shingles"] for row in signed], SIMILARITY)
    whole = components(num, np.array(sorted(mine), np.int64).reshape(-1, 2))
    members: dict[int, set[int]] = {}
    for document, component in enumerate(whole.tolist()):
        members.setdefault(component, set()).add(document)
    grouped = [group for group in members.values() if len(group) > 1]
    pure = sum(len(group) for group in grouped if len({family[document] for document in group}) == 1)
    return {
        "documents": num,
        "text_pairs": len(true),
        "text_recall": len(mine & true) / len(true),
        "text_precision": len(mine & true) / len(mine),
        "text_purity": pure / sum(map(len, grouped)),
        "text_documents_per_s": num / took,
    }


def documents(num: int) -> tuple[list[str], list[int]]:
    """(texts, family of copies of each), in seeded order. Words are those of this installation's documents, drawn by
    how often they come."""
    rng = random.Random(SEED)
    words = [word for text in sources.texts(SEED)[:40] for word in text.text.split()]
    notices = [[rng.choice(words) for _ in range(rng.randint(60, 160))] for _ in range(20)]
    found: list[tuple[str, int]] = []
    while len(found) < num:
        body = [rng.choice(words) for _ in range(rng.randint(40, 300))]
        if rng.random() < 0.4:
            notice = rng.choice(notices)
            body = notice + body[: rng.randint(len(notice) // 2, 2 * len(notice))]
        number = len(found)
        copies = rng.choice((0, 0, 1, 1, 2, 4))
        for text in [body, *(edited(rng, body, words) for _ in range(copies))]:
            found.append((" ".join(text), number))
    found = found[:num]
    rng.shuffle(found)
    return [text for text, _ in found], [number for _, number in found]


def edited(rng: random.Random, body: list[str], words: list[str]) -> list[str]:
    """A copy with up to 8 % of its words changed, taken out or put in, alone or in a run: similarities 0.4 to 1."""
    text = list(body)
    left = int(len(body) * rng.choice((0.005, 0.01, 0.02, 0.04, 0.08)))
    while left > 0:
        at, run = rng.randrange(len(text)), rng.randint(1, max(1, left))
        change = rng.choice(("change", "out", "in"))
        text[at : at if change == "in" else at + run] = (
            [] if change == "out" else [rng.choice(words) for _ in range(run)]
        )
        left -= run
    return text or list(body)


def exact_pairs(shingles: list[np.ndarray], least: float) -> set[tuple[int, int]]:
    """All pairs a < b of this Jaccard similarity, without LSH: two sets that similar share one of the rarest
    |x| - ceil(least |x|) + 1 elements of each (prefix filtering, Bayardo et al. 2007)."""
    every, inverse = np.unique(np.concatenate(shingles), return_inverse=True)
    often = np.bincount(inverse, minlength=len(every))
    ends = np.cumsum([len(one) for one in shingles])
    holders: dict[int, list[int]] = {}
    for document, numbers in enumerate(np.split(inverse, ends[:-1])):
        ordered = numbers[np.lexsort((numbers, often[numbers]))]
        for number in ordered[: len(ordered) - int(np.ceil(least * len(ordered))) + 1].tolist():
            if often[number] > 1:
                holders.setdefault(number, []).append(document)
    tried = {pair for held in holders.values() for pair in combinations(held, 2)}
    sets = [set(one.tolist()) for one in shingles]
    return {(a, b) for a, b in tried if len(sets[a] & sets[b]) >= least * len(sets[a] | sets[b])}


# ---------------------------------------------------------------- images


def image_figures(engine: Engine, num: int, changed: int) -> dict[str, float]:
    labels: list[tuple[int, str]] = []
    """Of each file: the picture that it is a version of, and how it was changed."""
    rows = []
    began = time.perf_counter()
    for picture, change, data in pictures(num, changed):
        signed = image_signature.image_signature(data)
        rows.append((len(labels), *signed))
        labels.append((picture, change))
    ids, hashes, thumbs = zip(*rows, strict=True)
    bands = image_signature.bands_of(np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1))
    frame = engine.daft.from_arrow(
        pa.table(
            {
                "uid": pa.array(ids, pa.uint64()),
                "bands": pa.array(bands.tolist(), pa.list_(pa.uint64())),
                "hash": pa.array(hashes, pa.binary()),
                "thumb": pa.array(thumbs, pa.binary()),
            }
        )
    )
    found = pairs.image_pairs(engine.daft, frame).to_pylist()
    took = time.perf_counter() - began
    close = [(row["a"], row["b"], row["difference"]) for row in found if row["distance"] <= RADIUS]
    same = {(a, b) for a, b, difference in close if difference <= DIFFERENCE}
    right = {pair for pair in same if labels[pair[0]][0] == labels[pair[1]][0]}
    original = {picture: at for at, (picture, change) in enumerate(labels) if change == "original"}
    by_change: dict[str, list[bool]] = {}
    for at, (picture, change) in enumerate(labels):
        if change != "original":
            by_change.setdefault(change, []).append((original[picture], at) in same)
    asked = [hit for change in ASKED for hit in by_change[change]]
    hash_only = [labels[a][0] == labels[b][0] for a, b, _ in close]
    return {
        "pictures": len(labels),
        "image_recall": sum(asked) / len(asked),
        "image_precision": len(right) / len(same),
        "image_precision_hash_only": sum(hash_only) / len(hash_only),
        "image_false_pairs": len(same) - len(right),
        **{f"recall_by_transform.{change}": sum(hits) / len(hits) for change, hits in by_change.items()},
        "pictures_per_s": len(labels) / took,
    }


def pictures(num: int, changed: int) -> Iterator[tuple[int, str, bytes]]:
    """(picture, change, file): `num` unrelated pictures, `changed` of them also in their versions, then look-alikes."""
    rng = random.Random(SEED)
    cells = parts()
    rng.shuffle(cells)
    alike, cells = cells[: len(cells) // 4], cells[len(cells) // 4 :]
    number = 0
    for number in range(num):
        picture = cells[number] if number < min(len(cells), num // 2) else halves(rng, cells)
        yield number, "original", encoded(rng, picture)
        if number % (num // changed) == 0:
            for change in (*ASKED, "crop_5", "crop_10"):
                yield number, change, transformed(rng, picture, change)
    for look_alike in look_alikes(rng, alike, changed):
        number += 1
        yield number, "original", encoded(rng, look_alike)


def parts() -> list[Image.Image]:
    """Cells of 1, 4, 9 and 16 a photograph, in eight orientations; 96 to 384 pixels. Of photographs of one take (stereo
    pairs), one; without cells that are nearly flat (black sky), which nothing tells apart."""
    found = []
    listed = [(f"skimage/data/{name}", group) for name, _, _, group in sources.SKIMAGE_PHOTOS]
    listed += [(place, group) for place, _, _, group in sources.OTHER_PHOTOS]
    for place in {group: place for place, group in reversed(listed)}.values():
        package, _, name = place.partition("/")
        photo = Image.open(sources.package_folder(package) / name).convert("RGB")
        for cut in (1, 2, 3, 4):
            width, height = photo.width // cut, photo.height // cut
            if min(width, height) < 96:
                continue
            for left, top in ((x * width, y * height) for x in range(cut) for y in range(cut)):
                cell = photo.crop((left, top, left + width, top + height))
                cell.thumbnail((384, 384), Image.Resampling.BICUBIC)
                if np.asarray(cell.convert("L")).std() >= FLAT:
                    found += [cell, *(cell.transpose(turn) for turn in Image.Transpose)]
    return found


def halves(rng: random.Random, cells: list[Image.Image]) -> Image.Image:
    """Two cells side by side or one above the other; pictures that share one of them differ in the other half."""
    one, other = rng.sample(cells, 2)
    width, height = one.size
    found, other = one.copy(), other.resize(one.size, Image.Resampling.BILINEAR)
    at = rng.uniform(0.4, 0.6)
    box = (round(width * at), 0, width, height) if rng.random() < 0.5 else (0, round(height * at), width, height)
    found.paste(other.crop(box), box[:2])
    return found


def encoded(rng: random.Random, picture: Image.Image) -> bytes:
    return _file(picture, "JPEG", quality=90) if rng.random() < 0.7 else _file(picture, "PNG", compress_level=1)


def _file(picture: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def transformed(rng: random.Random, picture: Image.Image, change: str) -> bytes:
    width, height = picture.size
    if change == "jpeg_60":
        return _file(picture, "JPEG", quality=60)
    if change == "half_size":
        return encoded(rng, picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC))
    share = int(change.removeprefix("crop_")) / 100
    less = (max(1, round(width * share)), max(1, round(height * share)))
    left, top = (rng.randint(0, gone) for gone in less)
    return encoded(rng, picture.crop((left, top, left + width - less[0], top + height - less[1])))


def look_alikes(rng: random.Random, cells: list[Image.Image], num: int) -> Iterator[Image.Image]:
    """Two at a time, of one scene and yet different."""
    icons = sources.icons(SEED)
    for cell in rng.sample(cells, min(len(cells), num)):
        for _ in range(2):
            picture = cell.copy()
            side = round(min(picture.size) * rng.uniform(0.25, 0.5))
            paste(picture, rng.choice(icons), rng.choice(list(COLOURS)), side, (rng.random(), rng.random()))
            yield picture
        shift = cell.width // 7
        yield cell.crop((0, 0, cell.width - shift, cell.height))
        yield cell.crop((shift, 0, cell.width, cell.height))
    yield from later_frames()


def later_frames() -> Iterator[Image.Image]:
    """Frames of the corpus' clips a second apart; of two clips of the same take, one."""
    for clip in sources.clips():
        if "distorted" not in clip.local.name:
            with av.open(str(clip.local)) as container:
                last = -1.0
                for frame in container.decode(video=0):
                    if frame.time is not None and frame.time >= last + 1:
                        last = frame.time
                        yield frame.to_image()
