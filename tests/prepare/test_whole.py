"""What the structure of a picture shows without decoding: every truncation, and what a decoder would also see."""

from __future__ import annotations

import io
import random
import zlib

import pytest
from PIL import Image, PngImagePlugin

from pipelines.prepare.corpus.sources import photos
from pipelines.prepare.describe import describe
from pipelines.prepare.formats.rows import MediaRef
from pipelines.prepare.whole import is_whole
from trainer.data.media import ORIENTATION, image_header, upright
from trainer.errors import MediaError


def picture(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    photos(0)[0].pixels.save(buffer, kind, **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG whose EXIF segment holds a whole JPEG: its end mark is not the picture's."""
    small = io.BytesIO()
    photos(0)[0].pixels.resize((40, 30)).save(small, "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + small.getvalue()
    data = picture("JPEG")
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


FILES = {
    "baseline": picture("JPEG"),
    "progressive": picture("JPEG", progressive=True, quality=95),
    "restarts": picture("JPEG", restart_marker_blocks=4),
    "thumbnail": with_thumbnail(),
    "grey": picture("JPEG", keep_rgb=False, subsampling=0),
    "png": picture("PNG"),
    "webp": picture("WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_whole_and_so_with_bytes_after_its_end(name: str):
    assert is_whole(FILES[name]) is True
    assert is_whole(FILES[name] + b"camera's own data \xff\xd8") is True


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_seen(name: str):
    data = FILES[name]
    lengths = {*random.Random(0).sample(range(16, len(data) - 2), 300), len(data) - 2, 20}
    assert [length for length in lengths if is_whole(data[:length])] == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("header_only", [True, False])
def test_a_truncated_file_is_refused_either_way(name: str, header_only: bool):
    ref = MediaRef("a", "image")
    assert describe(FILES[name], ref, header_only=header_only) == describe(FILES[name], ref)
    with pytest.raises(MediaError):
        describe(FILES[name][: len(FILES[name]) // 2], ref, header_only=header_only)


def test_damage_inside_a_png_is_seen_by_its_checksums():
    data = FILES["png"]
    for place in random.Random(1).sample(range(40, len(data) - 12), 50):
        assert is_whole(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is False


def test_other_formats_are_decoded(monkeypatch: pytest.MonkeyPatch):
    gif = picture("GIF")
    assert is_whole(gif) is None
    with pytest.raises(MediaError, match="decoded"):
        describe(gif[: len(gif) // 2], MediaRef("a", "image"), header_only=True)


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats of the images that are decoded from now on."""
    seen: list[str] = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: seen.append("PNG") or load(self))
    return seen


def test_the_header_of_a_png_decodes_nothing(monkeypatch: pytest.MonkeyPatch):
    seen = loads(monkeypatch)
    assert image_header(FILES["png"]).suffix == "png"
    describe(FILES["png"], MediaRef("a", "image"), header_only=True)
    assert seen == []
    describe(FILES["png"], MediaRef("a", "image"))
    assert seen, "negative control: decoding is noticed"


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


def test_a_png_that_is_turned_says_so_wherever_its_chunk_stands():
    wide = Image.new("RGB", (60, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    files = []
    for options in ({"exif": exif}, {"pnginfo": info}, {}):
        buffer = io.BytesIO()
        wide.save(buffer, "PNG", **options)
        files.append(buffer.getvalue())
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    late = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    files[2] = files[2][:-12] + late + files[2][-12:]  # after the pixels
    assert [(header.width, header.height) for header in map(image_header, files)] == [(40, 60)] * 3


def flipped_bits(data: bytes, first: int, last: int) -> tuple[int, int]:
    """Of 60 flipped bits: (refused by decoding, of those not suspected by structure)."""
    draw, refused, missed = random.Random(2), 0, 0
    for _ in range(60):
        at = draw.randrange(first, last)
        damaged = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        try:
            upright(damaged)
        except MediaError:
            refused += 1
            missed += is_whole(damaged) is True
    return refused, missed


def test_what_decoding_sees_of_flipped_bits_the_structure_sees_but_for_the_tables_of_a_jpeg():
    """The limit that README.md states: half a kilobyte of tables at the beginning of a JPEG has no checksum."""
    refused, missed = flipped_bits(FILES["png"], 40, len(FILES["png"]) - 12)
    assert refused > 30 and missed == 0
    _, missed = flipped_bits(FILES["baseline"], 700, len(FILES["baseline"]) - 2)
    assert missed == 0
    refused, missed = flipped_bits(FILES["baseline"], 160, 660)
    assert refused >= missed > 0
