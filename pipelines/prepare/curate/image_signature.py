"""What two pictures are compared by: 256 bits of a perceptual hash, their LSH bands, and a thumbnail for verification.

The hash is the sign of the 16 x 16 lowest frequencies of the picture's cosine transform (64 x 64 grey values) against
their median, as in pHash (Zauner 2010); a band is 16 of the bits, drawn once by seed, and 48 bands become 48 keys.
Verification lays one thumbnail over the other, searching for the part that the other shows (up to 15 % cut away), and
looks at the worst of 64 areas: pictures of one scene with another object in it agree nearly everywhere but there.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter
from scipy.fft import dctn

from pipelines.prepare.curate.text_signature import band_keys
from trainer.data import media

VERSION = 1
SIDE = 64
HASH_SIDE = 16
NUM_BITS = HASH_SIDE**2
NUM_BANDS, BAND_BITS = 48, 16
AREAS = 8
CUT = 0.15
STEPS = (SIDE / 32, SIDE / 64, SIDE / 128, SIDE / 256)
TURNS = 6
SOFT = 0.7
"""Pixels of the thumbnail by which it is blurred: fine texture does not survive a crop."""
LEAST = 0.3
"""Of a picture's deviation: what an area without texture may differ by."""
FLAT = 4.0
"""Grey levels added to the deviation, so that noise of a flat picture is not blown up."""
_BITS_OF_BAND = np.stack(
    [np.random.default_rng([1, band]).choice(NUM_BITS, BAND_BITS, replace=False) for band in range(NUM_BANDS)]
)

SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("images", pa.list_(pa.uint64())),
        ("hashes", pa.list_(pa.binary())),
        ("thumbs", pa.list_(pa.binary())),
    ]
)
"""place: a uid without its folder; images: identity by content digest."""


def image_id(digest: str) -> int:
    """uint64 from a medium's sha256."""
    return int(digest[:16], 16)


def image_signature(data: bytes, *, where: object = None) -> tuple[bytes, bytes]:
    """(32 bytes of hash, 4096 bytes of thumbnail) of a file. Raises MediaError."""
    grey = _small(media.upright(data, where=where).convert("L"))
    values = np.asarray(grey, np.float32)
    low = np.asarray(dctn(values, norm="ortho"))[:HASH_SIDE, :HASH_SIDE].ravel()
    return np.packbits(low > np.median(low)).tobytes(), grey.tobytes()


def _small(image: Image.Image) -> Image.Image:
    """64 x 64; where pixels are many they are averaged first, which is what makes a large picture cheap."""
    kind = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BICUBIC
    return image.resize((SIDE, SIDE), kind)


def bands_of(hashes: np.ndarray) -> np.ndarray:
    """uint8[N, 32] -> uint64[N, 48]"""
    bits = np.unpackbits(hashes, axis=1)[:, _BITS_OF_BAND.ravel()].reshape(-1, NUM_BANDS, BAND_BITS)
    values = np.packbits(bits, axis=2).astype(np.uint64)  # [N, 48, 2]
    return band_keys(values)


# ---------------------------------------------------------------- verification


def difference(left: bytes, right: bytes) -> float:
    """Mean difference of the worst of 8 x 8 areas after alignment, over what varies in that area; 0: the same. Texture
    (gravel, grass) differs everywhere when it is cut, another object where there was little (README)."""
    soft = ImageFilter.GaussianBlur(SOFT)
    one, other = (Image.frombytes("L", (SIDE, SIDE), data).filter(soft) for data in (left, right))
    tried = [(_aligned(image, target), target) for image, target in ((one, other), (other, one))]
    error, target = min(tried, key=lambda pair: float(pair[0].mean()))
    values = _normal(target)
    varies = np.sqrt(np.maximum(_areas(values * values) - _areas(values) ** 2, 0))
    return float((_areas(error) / (LEAST + varies)).max())


def _areas(values: np.ndarray) -> np.ndarray:
    """float32[8, 8]: means."""
    side = SIDE // AREAS
    return values.reshape(AREAS, side, AREAS, side).mean((1, 3))


def _normal(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float32)
    values = values - values.mean()
    return values / (values.std() + FLAT)


def _aligned(image: Image.Image, target: Image.Image) -> np.ndarray:
    """float32[64, 64]: differences of `target` to the part of `image` that comes closest. Coordinate descent over the
    part's four sides, from coarse to fine."""
    wanted = _normal(target)

    def error(box: list[float]) -> np.ndarray:
        part = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3]))
        return np.abs(_normal(part) - wanted)

    best = [0.0, 0.0, float(SIDE), float(SIDE)]
    found = error(best)
    cost = found.mean()
    for step in STEPS:
        for _ in range(TURNS):
            moved = False
            for side in range(4):
                for sign in (step, -step):
                    box = [value + sign * (at == side) for at, value in enumerate(best)]
                    if not _allowed(box):
                        continue
                    tried = error(box)
                    if tried.mean() < cost - 1e-6:
                        best, found, cost, moved = box, tried, tried.mean(), True
            if not moved:
                break
    return found


def _allowed(box: list[float]) -> bool:
    least = SIDE * (1 - CUT)
    inside = min(box) >= 0 and max(box) <= SIDE
    return inside and box[2] - box[0] >= least and box[3] - box[1] >= least
