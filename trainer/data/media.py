"""Images: header without decoding, and pixels at the size that the grid asks for.

Strict: a truncated file is an error (PIL would fill it with grey if told to), a header that promises more pixels than
MAX_PIXELS is refused before anything is decoded (a 258 kB PNG can open as 88 MP without a warning). EXIF orientation is
applied; palettes and transparency are laid on white. Resizing is PIL's bicubic on uint8, which is what Hugging Face's
Qwen2VLImageProcessorPil does; its torchvision processor differs by a few levels of 255 (tests/data measures both).
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from trainer.errors import MediaError

MAX_PIXELS = 64 * 1024**2
"""Of one image file or video frame: 8192 x 8192. Larger originals are resized before they are ingested."""

ORIENTATION = 0x0112
SWAPS_SIDES = (5, 6, 7, 8)
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Where a PNG can say it: a file without any of these words says nothing."""


@dataclass(frozen=True)
class ImageHeader:
    """Size after EXIF orientation; `suffix` as files of this format are usually called."""

    width: int
    height: int
    suffix: str


SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "MPO": "jpg"}
READ = [name for name in SUFFIXES if name != "MPO"]
"""MPO (phones' pairs of JPEGs) is opened by the JPEG reader, which gives its first picture."""


def digest_of(data: bytes) -> str:
    """sha256 in hex: how media are named."""
    return hashlib.sha256(data).hexdigest()


def image_header(data: bytes, *, where: object = None) -> ImageHeader:
    """Raises MediaError: not an image, of a format that is not read, or larger than MAX_PIXELS."""
    image = _open(data, where)
    width, height = image.size
    # asked for a PNG's orientation, Pillow decodes all of it, in case the chunk stands at the end
    plain = image.format == "PNG" and not any(name in data for name in PNG_ORIENTATION)
    if not plain and _orientation(image) in SWAPS_SIDES:
        width, height = height, width
    return ImageHeader(width, height, SUFFIXES[str(image.format)])


def decode_image(
    data: bytes, width: int, height: int, *, original: tuple[int, int] | None = None, where: object = None
) -> np.ndarray:
    """uint8[height, width, 3] of the upright picture. Raises MediaError with `where` for a damaged file, or one that is
    not of the size `original` that counts were made for."""
    image = upright(data, where=where)
    check_size(image.size, original, where)
    return np.asarray(resize(image, width, height))


def check_size(found: tuple[int, int], original: tuple[int, int] | None, where: object) -> None:
    if original is not None and found != original:
        raise MediaError(
            "the picture has another size than the sample says",
            where=where,
            expected=f"{original[0]}x{original[1]}",
            got=f"{found[0]}x{found[1]}",
            do="prepare the source again: counts were made for the size in the sample",
        )


def upright(data: bytes, *, where: object = None) -> Image.Image:
    """The whole picture as RGB, turned as its EXIF says, transparency on white."""
    image = _open(data, where)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images must stay errors"
    try:
        image.load()
        orientation = _orientation(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(
            "the image cannot be decoded",
            where=where,
            expected=f"a whole {image.format} of {image.size[0]}x{image.size[1]}",
            got=f"{error} ({len(data)} bytes)",
            do="replace the file, or take the sample out of the source",
        ) from error
    return _turned(_rgb(image), orientation)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _open(data: bytes, where: object) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=READ)
    except Image.DecompressionBombError as error:
        raise _too_large(where, str(error)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise MediaError(
            "not an image that can be read",
            where=where,
            expected=f"one of {', '.join(sorted(set(SUFFIXES)))}",
            got=f"{len(data)} bytes beginning {data[:8].hex()}",
            do="check the path in the annotation; convert other formats first",
        ) from error
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise _too_large(where, f"{image.size[0]}x{image.size[1]}")
    return image


def _too_large(where: object, got: str) -> MediaError:
    return MediaError(
        "the header promises more pixels than are read",
        where=where,
        expected=f"at most {MAX_PIXELS} pixels",
        got=got,
        do="make the file smaller before it is ingested",
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels: PIL raises many kinds
        return 1


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency on white (a plain convert("RGB") shows whatever colour lies under it, often black)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit greys: convert() would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
