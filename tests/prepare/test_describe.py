"""What is told of a file: where it lies below the media folder, and whether its frames are all there."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipelines.prepare.describe import describe, missing_part
from pipelines.prepare.formats.rows import MediaRef
from tests.prepare.builders import a_picture


@pytest.mark.parametrize(
    ("uri", "root", "want"),
    [
        ("/data/images/a.png", "/data/images", "a.png"),
        ("/data/images/a.png", "/data/images/", "a.png"),
        ("/data/images/a.png", "/data/im", "data/images/a.png"),
        ("s3://bucket/images/a.png", "s3://bucket/im", "s3://bucket/images/a.png"),
        ("images/a.png", "", "images/a.png"),
    ],
)
def test_origin_counts_from_the_folder_and_not_from_one_whose_name_begins_alike(uri: str, root: str, want: str):
    assert describe(a_picture(), MediaRef(uri, "image"), root).origin == want


def a_clip_behind_a_cover(path: Path, num_frames: int = 8) -> bytes:
    """MP4 with the cover as its first video stream: where its box (udta) stands before those of the tracks."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        cover, clip = (container.add_stream(codec, rate=8) for codec in ("mjpeg", "mpeg4"))
        for stream, pixels in ((cover, "yuvj420p"), (clip, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(a_frame(0)))
        for number in range(num_frames):
            container.mux(clip.encode(a_frame(20 * number)))
        container.mux(cover.encode())
        container.mux(clip.encode())
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    boxes, place = [], at + 8
    while place < at + size:
        length = int.from_bytes(data[place : place + 4], "big")
        boxes.append(data[place : place + length])
        place += length
    boxes.sort(key=lambda box: {b"mvhd": 0, b"udta": 1}.get(box[4:8], 2))
    return data[: at + 8] + b"".join(boxes) + data[at + size :]


def a_frame(level: int) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))


def test_frames_are_counted_in_the_clip_and_not_in_its_cover(tmp_path: Path):
    data = a_clip_behind_a_cover(tmp_path / "clip.mp4")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert missing_part(data) is None
    assert missing_part(data[:-40]) is not None, "its last frames are gone"
