"""Pictures and videos: strict, upright, on white, by presentation time."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image as Picture

from tests.data.builders import a_video, an_image, saved
from trainer.data import media, video
from trainer.errors import MediaError


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_truncated_image_is_an_error_with_its_place(form):
    whole = an_image(form=form)
    assert media.decode_image(whole, 56, 56).shape == (56, 56, 3)  # negative control
    with pytest.raises(MediaError, match=r"cannot be decoded|not an image") as told:
        media.decode_image(whole[: len(whole) // 2], 56, 56, where="source/7")
    assert "source/7" in str(told.value) and told.value.code == 65


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", a_video()[:40]])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(MediaError, match="not an image"):
        media.image_header(data)


def test_the_header_is_turned_by_exif_and_so_are_the_pixels():
    picture = Picture.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))  # blue on the left
    exif = Picture.Exif()
    exif[media.ORIENTATION] = 6  # the camera was turned: the top is on the right
    turned = saved(picture, exif=exif)
    header = media.image_header(turned)
    assert (header.width, header.height) == (20, 40)
    pixels = media.decode_image(turned, 20, 40)
    assert pixels[5, 10].tolist() == [0, 0, 255] and pixels[35, 10].tolist() == [255, 0, 0]
    plain = media.image_header(saved(picture))  # negative control
    assert (plain.width, plain.height) == (40, 20)


def test_transparency_lies_on_white_and_palettes_become_colours():
    clear = Picture.new("RGBA", (8, 8), (0, 0, 0, 0))
    half = Picture.new("LA", (8, 8), (0, 128))
    palette = Picture.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    want = {"clear": (clear, [255] * 3), "half": (half, [127] * 3), "palette": (palette, [10, 200, 30])}
    for picture, colour in want.values():
        assert media.decode_image(saved(picture), 8, 8)[4, 4].tolist() == colour
    see_through = saved(palette, transparency=1)
    assert media.decode_image(see_through, 8, 8)[4, 4].tolist() == [255] * 3
    assert np.asarray(clear.convert("RGB"))[4, 4].tolist() == [0] * 3  # negative control: what convert() shows


def test_sixteen_bit_greys_are_scaled_and_not_clipped():
    picture = Picture.fromarray(np.full((8, 8), 32768, np.uint16))
    assert media.decode_image(saved(picture), 8, 8)[0, 0].tolist() == [127] * 3


def a_bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_header_that_promises_too_many_pixels_is_refused_before_decoding():
    for size in [(9000, 9000), (60000, 60000)]:
        with pytest.raises(MediaError, match="more pixels"):
            media.image_header(a_bomb(*size))
    assert media.image_header(a_bomb(8192, 8192)).width == 8192  # negative control: at the limit


# ---------------------------------------------------------------- video


def test_a_videos_header_counts_frames_and_measures_the_rate():
    header = video.video_header(a_video(num_frames=21, fps=7))
    assert (header.width, header.height, header.num_frames) == (64, 48, 21)
    assert header.fps == pytest.approx(7, rel=1e-3) and header.duration_s == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    "num_frames, fps, sample_fps, want",
    [
        (100, 25, 2.0, 8),
        (100, 25, 1.0, 4),
        (1000, 25, 2.0, 16),  # max_frames
        (7, 25, 2.0, 4),  # min_frames
        (3, 25, 2.0, 2),
        (1, 25, 2.0, 2),  # one frame twice
    ],
)
def test_frame_counts_are_even_and_within_limits(num_frames, fps, sample_fps, want):
    count = video.num_selected(num_frames, fps, sample_fps=sample_fps, min_frames=4, max_frames=16)
    found = video.select_frames(num_frames, fps, count)
    assert len(found.numbers) == want
    assert max(found.numbers) < num_frames and list(found.numbers) == sorted(found.numbers)
    assert found.seconds_per_grid == pytest.approx(2 * num_frames / fps / want)


@pytest.mark.parametrize("both_ends, want", [(False, (0, 2, 4, 6)), (True, (0, 2, 5, 7))])
def test_frames_are_spread_over_equal_parts_or_from_end_to_end(both_ends, want):
    """Qwen2-VL's and Qwen3-VL's processors."""
    assert video.select_frames(8, 4.0, 4, both_ends=both_ends).numbers == want
    assert video.select_frames(1, 4.0, 2, both_ends=both_ends).numbers == (0, 0)


def level(frame: np.ndarray) -> int:
    return round(float(frame.mean()) / 10)


def test_the_chosen_frames_are_the_ones_decoded():
    data = a_video(num_frames=20, fps=10)
    numbers = (0, 3, 11, 19)
    frames = video.decode_video(data, numbers, 10.0, 56, 28)
    assert frames.shape == (4, 28, 56, 3) and frames.dtype == np.uint8
    assert [level(frame) for frame in frames] == list(numbers)


def test_a_repeated_frame_is_given_twice():
    frames = video.decode_video(a_video(num_frames=2, fps=10), (0, 0, 1, 1), 10.0, 28, 28)
    assert [level(frame) for frame in frames] == [0, 0, 1, 1]


def test_a_variable_rate_is_read_by_presentation_time_and_not_by_counting():
    """Frames shown at 0.0, 0.1, 0.2 and then 1.0 ... 1.6 s: at 0.5 s the third is still on the screen."""
    sink = io.BytesIO()
    moments = [0, 1, 2, 10, 11, 12, 13, 14, 15, 16]
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts = moment
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = video.decode_video(sink.getvalue(), (0, 5, 12), 10.0, 28, 28)
    assert [level(frame) for frame in found] == [0, 2, 5]
    # negative control: counting frames would give 0, 5 and nothing
    assert level(np.full((2, 2), 10 * 5)) != 2


def test_a_video_of_another_size_than_counted_is_an_error():
    data = a_video(4)
    assert len(video.decode_video(data, (0, 1), 10.0, 28, 28, original=(64, 48))) == 2
    with pytest.raises(MediaError, match="another size"):
        video.decode_video(data, (0, 1), 10.0, 28, 28, original=(48, 64))


def test_a_truncated_video_is_an_error_with_its_place():
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = sink.getvalue()
    assert len(video.decode_video(data, (0, 19), 10.0, 28, 28)) == 2  # negative control
    with pytest.raises(MediaError, match=r"ends before|cannot be decoded") as told:
        video.decode_video(data[: len(data) // 2], (0, 19), 10.0, 28, 28, where="source/7")
    assert "source/7" in str(told.value)
    with pytest.raises(MediaError):
        video.video_header(a_video()[:200])
