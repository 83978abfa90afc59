"""Checking pictures when they are ingested: headers, structure and digest (prepare.verify_media: header) against
sha256 and a full Pillow decode, over the same files on the same number of processes in alternating order, warm cache;
and what a whole ingest of a tenth of them and of all of them holds in memory.

Files: crops of the corpus' photographs, 70 % JPEG (quality 75 to 95) and 30 % PNG, median 640x480, seeded, each
another.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

from PIL import Image

from pipelines.prepare.corpus.sources import package_folder, photos
from pipelines.prepare.describe import describe
from pipelines.prepare.formats.rows import MediaRef
from tests.bench._processes import taken_by

FILES, QUICK_FILES = 100_000, 10_000
CHUNK = 100
PROCESSES = 2
SIZE = (640, 480)


def figures(quick: bool) -> dict[str, float]:
    count = QUICK_FILES if quick else FILES
    folder = Path(tempfile.mkdtemp(prefix="ingest-"))
    try:
        with ProcessPoolExecutor(PROCESSES) as pool:
            made = list(pool.map(partial(_make, folder), range(0, count, CHUNK)))
            times = list(pool.map(partial(_compare, folder), range(0, count, CHUNK)))
        header_s, decode_s = (sum(pair[at] for pair in times) for at in (0, 1))
        return {
            "files": float(count),
            "mb": sum(made) / 1e6,
            "header_ms_per_file": 1000 * header_s / count,
            "decode_ms_per_file": 1000 * decode_s / count,
            "speedup_vs_full_decode": decode_s / header_s,
            f"pss_{count // 10000}k_mb": _ingest_pss_mb(folder, count // 10),
            f"pss_{count // 1000}k_mb": _ingest_pss_mb(folder, count),
        }
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- files


def _name(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.{'png' if number % 10 in (2, 5, 8) else 'jpg'}"


@cache
def photographs() -> list[Image.Image]:
    """The corpus' photographs in the size of their files."""
    found = []
    for photo in photos(0):
        module, _, inside = photo.file.path.partition("/")
        found.append(Image.open(package_folder(module) / inside).convert("RGB"))
    return found


def _make(folder: Path, start: int) -> int:
    """One chunk of files, seeded by its number; bytes written."""
    shown = photographs()
    written = 0
    for number in range(start, start + CHUNK):
        draw = random.Random(number)
        photo = draw.choice(shown)
        area = math.exp(draw.gauss(0, 0.35))  # log-normal: the median is SIZE
        width, height = (round(side * area) for side in (SIZE if draw.random() < 0.7 else SIZE[::-1]))
        across = int(min(photo.width, photo.height * width / height) * draw.uniform(0.4, 1))
        down = min(photo.height, int(across * height / width))
        left, top = draw.randint(0, photo.width - across), draw.randint(0, photo.height - down)
        crop = photo.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
        path = folder / _name(number)
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            crop.save(path, compress_level=1)  # the slow levels take most of the time that this benchmark has
        else:
            crop.save(path, quality=draw.randint(75, 95))
        written += path.stat().st_size
    return written


# ---------------------------------------------------------------- time


def _compare(folder: Path, start: int) -> tuple[float, float]:
    """Seconds of one chunk (by header, by decoding); every second chunk decodes first."""
    paths = [folder / _name(number) for number in range(start, start + CHUNK)]
    for path in paths:  # warm cache
        path.read_bytes()
    if start // CHUNK % 2:
        decode_s = _timed(_decode, paths)
        return _timed(_header, paths), decode_s
    return _timed(_header, paths), _timed(_decode, paths)


def _timed(function, paths: list[Path]) -> float:
    began = time.perf_counter()
    for path in paths:
        function(path)
    return time.perf_counter() - began


def _header(path: Path) -> None:
    describe(path.read_bytes(), MediaRef(str(path), "image"), header_only=True)


def _decode(path: Path) -> None:
    data = path.read_bytes()
    hashlib.sha256(data).hexdigest()
    Image.open(io.BytesIO(data)).load()


# ---------------------------------------------------------------- memory


def _ingest_pss_mb(folder: Path, count: int) -> float:
    """Most memory (PSS) that the processes of `qwenvl data ingest` hold together, over the first `count` files."""
    rows = folder / f"{count}.jsonl"
    with rows.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"id": str(number), "image": _name(number), "caption": "a picture"}) + "\n")
    out = folder / f"out-{count}"
    words = ["data", "ingest", str(rows), "--out", str(out), "--verify-media", "header"]
    most = taken_by([sys.executable, "-m", "pipelines.cli.main", *words]).most_mb
    shutil.rmtree(out)
    return most
