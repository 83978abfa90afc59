"""A draft and its files become a Sample: bytes are read, checked (decoded, or by their structure), measured and named
by digest; geometry becomes pixels of the original. Pure but for reading; runs inside Daft's row functions."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import av
from pydantic import ValidationError

from pipelines.prepare import embedded, fetching, pdf_pages
from pipelines.prepare.engine import Answer, Engine, blocks
from pipelines.prepare.formats.rows import WRONG, Bad, Draft, MediaRef, told
from pipelines.prepare.scores.address import is_score_page
from pipelines.prepare.whole import is_whole
from trainer import storage
from trainer.data import media, video
from trainer.data.sample import Media, Sample, to_json
from trainer.errors import DataError, MediaError, StorageError, UsageError

GROUP_ROWS = 64
"""Rows whose media are read at the same time, where these lie elsewhere; they are in memory with their block anyway."""
LENGTH_SHARE, LENGTH_S = 0.02, 1.0
"""By which a video's length may differ from what its annotation says, together: players and containers round."""
SPILL = 0.02
"""Share of a side by which a box may lie outside its picture (rounding); it is cut there."""


def draft_to_json(draft: Draft, *, source: str, kind: str, split: str, media_root: str, verify: str = "decode") -> str:
    facts = {"source": source, "kind": kind, "split": split, "media_root": media_root, "verify": verify}
    return json.dumps({"draft": asdict(draft), **facts}, ensure_ascii=False)


def inspect(row: str) -> tuple[str, list[bytes]]:
    """JSON {"sample": text} with the files, or {"bad": fields} without."""
    return _inspected(json.loads(row), _read)


def inspect_group(rows: str) -> tuple[str, list[bytes]]:
    """`inspect` of several rows, given as a JSON list, whose media are read at the same time: a JSON list of [text,
    number of its files], and the files of all."""
    entries = [json.loads(row) for row in json.loads(rows)]
    uris = [item["uri"] for entry in entries for item in entry["draft"]["media"]]
    with fetching.read_ahead(uris, _read) as read:
        found = [_inspected(entry, read) for entry in entries]
    return json.dumps([[text, len(files)] for text, files in found]), [data for _, files in found for data in files]


def inspect_groups(rows: list[str], engine: Engine) -> list[Answer]:
    """`inspect` of a block of rows, in order, of which some have media that lie elsewhere."""
    size = min(GROUP_ROWS, -(-len(rows) // engine.partitions))
    found: list[Answer] = []
    for text, files in engine.map(inspect_group, [json.dumps(group) for group in blocks(rows, size)]):
        for answer, count in json.loads(text):
            found.append((answer, files[:count]))
            files = files[count:]
    return found


def is_far(draft: Draft) -> bool:
    """Whether a medium of it comes over a network."""
    return any(fetching.is_remote(ref.uri) for ref in draft.media)


def _inspected(entry: dict[str, Any], read: Callable[[str], bytes]) -> tuple[str, list[bytes]]:
    draft = Draft(**{**entry["draft"], "media": [MediaRef(**item) for item in entry["draft"]["media"]]})
    found = _sample(draft, entry, read)
    if isinstance(found, Bad):
        return json.dumps({"bad": asdict(found)}), []
    sample, files = found
    return json.dumps({"sample": to_json(sample)}), files


def _sample(draft: Draft, facts: dict[str, str], read: Callable[[str], bytes]) -> tuple[Sample, list[bytes]] | Bad:
    files: list[bytes] = []
    described: list[Media] = []
    for ref in draft.media:
        try:
            data = read(ref.uri)
            described.append(describe(data, ref, facts["media_root"], header_only=facts["verify"] == "header"))
        except FileNotFoundError:
            return Bad(draft.where, f"the {ref.kind} {_shown(ref.uri)}", "no such file", "missing-media")
        except MediaError as error:
            return Bad(
                draft.where, f"a whole {ref.kind}: {_shown(ref.uri)}", f"{error.what}: {error.got}", "damaged-media"
            )
        except (StorageError, UsageError, DataError, *WRONG) as error:
            return Bad(draft.where, f"the {ref.kind} {_shown(ref.uri)}", told(error), "unreachable-media")
        files.append(data)
    try:
        scale = _scales(draft, described)
        content = {
            "id": draft.id,
            "source": facts["source"],
            "kind": facts["kind"],
            "split": facts["split"],
            "messages": _scaled(draft.messages, scale, 0),
            "chosen": _scaled(draft.chosen, scale, 0),
            "rejected": _scaled(draft.rejected, scale, 0),
            "media": [item.model_dump() for item in described],
            "key": _scaled_key(draft.key, scale),
            "scores": draft.scores,
            "meta": draft.notes,
        }
        return Sample.model_validate(content), files
    except ValidationError as error:
        first = error.errors()[0]
        return Bad(draft.where, "a sample", f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "wrong-form")
    except _Outside as error:
        return Bad(draft.where, error.expected, error.got, error.reason)
    except WRONG as error:
        return Bad(draft.where, "geometry and sizes in numbers", told(error), "wrong-form")


def _shown(uri: str) -> str:
    return uri if len(uri) < 160 else f"{uri[:60]}... ({len(uri)} characters)"


def _read(uri: str) -> bytes:
    if uri.startswith("data:"):
        head, _, body = uri.partition(",")
        try:
            return base64.b64decode(body, validate=True) if head.endswith(";base64") else body.encode()
        except ValueError as error:
            raise MediaError("a data: URI that is not base64", got=str(error)) from None
    try:
        if embedded.is_embedded(uri):
            return embedded.read(uri)
        if pdf_pages.is_page(uri):
            return pdf_pages.page_png(uri)
        if is_score_page(uri):
            from pipelines.prepare.scores.draw import page_png  # verovio: only where there are scores

            return page_png(uri)
        local = storage.local_path(uri)
        if local is not None and not os.path.isfile(local) and os.path.exists(local) and not os.path.isdir(local):
            raise DataError("not a regular file", got="a pipe, device or socket, which may have no end")
        with fetching.host_of(uri):
            return storage.read_bytes(uri)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(uri) from error


def describe(data: bytes, ref: MediaRef, media_root: str = "", *, header_only: bool = False) -> Media:
    """Digest and header facts of a file's bytes. An image is decoded once: a header alone does not show truncation.
    With `header_only` its structure is walked instead (whole.py); what seems damaged, or is of a format that is not
    known there, is decoded all the same.

    `origin` is relative to the media folder where it lies below: samples do not depend on where a copy of it is.
    """
    origin = (
        "data:"
        if ref.uri.startswith("data:")
        else ref.uri.removeprefix(media_root.rstrip("/") + "/").lstrip("/")
        if media_root
        else ref.uri
    )
    common = {"digest": media.digest_of(data), "kind": ref.kind, "size_bytes": len(data), "origin": origin}
    if ref.kind == "image":
        header = media.image_header(data, where=ref.uri)
        if not (header_only and is_whole(data)):
            media.upright(data, where=ref.uri)
        return Media(**common, suffix=header.suffix, width=header.width, height=header.height)
    clip = video.video_header(data, where=ref.uri)
    if (lack := missing_part(data)) is not None:
        raise MediaError("the video is truncated", where=ref.uri, expected="a whole file", got=lack)
    if clip.num_frames < 2:
        raise MediaError("a video of one frame", where=ref.uri, expected="2 or more frames", got=clip.num_frames)
    facts = {name: getattr(clip, name) for name in ("suffix", "width", "height", "num_frames", "fps", "duration_s")}
    return Media(**common, **facts)


def missing_part(data: bytes) -> str | None:
    """What a video file lacks, None when it is whole. A file whose table lies at its beginning opens without complaint
    when its end is missing: the table lists more frames than there are, or the last one is cut short."""
    found = 0
    with av.open(io.BytesIO(data), "r") as container:
        stream = video.main_stream(container, None)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                return f"frame {found} is cut short"
            found += bool(packet.size)
        return f"{found} of {stream.frames} frames" if stream.frames > found else None


# ---------------------------------------------------------------- geometry


class _Outside(ValueError):
    def __init__(self, expected: str, got: object, reason: str = "outside-picture"):
        self.expected, self.got, self.reason = expected, str(got), reason
        super().__init__(expected)


Scale = tuple[float, float, int, int, float]
"""x and y factor to pixels, width and height, and a video's seconds."""


def _scales(draft: Draft, described: list[Media]) -> list[Scale]:
    found = []
    for number, item in enumerate(described):
        across, down = 1.0, 1.0
        if draft.units != "pixels":
            per = 1000.0 if draft.units == "thousand" else 1.0
            across, down = item.width / per, item.height / per
        elif number == 0 and draft.meta.get("stated_size"):
            across, down = _stated(draft.meta["stated_size"], item)
        elif draft.meta.get("stated_sizes"):
            across, down = _stated(draft.meta["stated_sizes"][number], item)
        if item.kind == "video" and draft.meta.get("stated_duration_s"):
            _same_length(draft.meta["stated_duration_s"], item)
        found.append((across, down, item.width, item.height, item.duration_s))
    return found


def _stated(stated: list[float], item: Media) -> tuple[float, float]:
    """Boxes that were drawn on a copy of another size are scaled; another shape means another picture."""
    width, height = stated
    if not width or not height or abs(item.width * height / (item.height * width) - 1) > 0.03:
        raise _Outside(f"a picture shaped {width}x{height}, as the annotation says", f"{item.width}x{item.height}")
    return item.width / width, item.height / height


def _same_length(stated_s: float, item: Media) -> None:
    """Times were written for a video of another length: it is another video, or a part of it."""
    if abs(stated_s - item.duration_s) > LENGTH_SHARE * stated_s + LENGTH_S:
        told = f"a video of {stated_s:g} s, as the annotation says"
        raise _Outside(told, f"{item.duration_s:.2f} s", "outside-video")


def _scaled(value: Any, scales: list[Scale], medium: int) -> Any:
    """Messages with every geometry in pixels of the original. A part's `media` says which medium it is about."""
    if isinstance(value, list):
        return [_scaled(item, scales, medium) for item in value]
    if not isinstance(value, dict):
        return value
    medium = value.get("media", medium) if isinstance(value.get("media", medium), int) else medium
    if value.get("shape") in ("box", "mask", "point"):
        return _scaled_shape(value, scales[medium])
    if value.get("shape") == "span":
        return _span(value, scales[medium][4])
    if value.get("part") == "action" and value.get("coordinates"):
        points = {name: _pair(point, scales[medium]) for name, point in value["coordinates"].items()}
        return {**value, "coordinates": points}
    return {name: _scaled(item, scales, medium) for name, item in value.items()}


def _scaled_shape(shape: dict, scale: Scale) -> dict:
    if shape["shape"] == "point":
        return {**shape, "xy": _pair(shape["xy"], scale)}
    found = {**shape, "xyxy": _box(shape["xyxy"], scale)}
    same = scale[0] == scale[1] == 1.0
    if shape.get("polygons"):
        found["polygons"] = [_ring(ring, scale) for ring in shape["polygons"]]
    if shape.get("rle") and (not same or sum(shape["rle"]) != scale[2] * scale[3]):
        raise _Outside(f"run lengths that add up to {scale[2]}x{scale[3]} pixels", sum(shape["rle"]))
    return found


def _ring(ring: list[float], scale: Scale) -> list[float]:
    """A polygon that lies in its picture as boxes do. What spills stays: masks are cut at the picture's sides."""
    values = ring if scale[0] == scale[1] == 1.0 else [value * scale[n % 2] for n, value in enumerate(ring)]
    for x, y in zip(values[::2], values[1::2], strict=True):
        _inside(x, scale[2])
        _inside(y, scale[3])
    return values


def _span(span: dict, duration_s: float) -> dict:
    """A part of the video, cut at its end where it goes a little beyond."""
    start, end = span["start_s"], span["end_s"]
    if not 0 <= start < end <= duration_s * (1 + LENGTH_SHARE) + LENGTH_S or start >= duration_s:
        raise _Outside(f"0 <= start < end <= {duration_s:.2f} s", f"{start:g} to {end:g} s", "outside-video")
    return {**span, "end_s": min(end, duration_s)}


def _pair(point: list[float], scale: Scale) -> list[float]:
    x, y = point[0] * scale[0], point[1] * scale[1]
    return [_inside(x, scale[2]), _inside(y, scale[3])]


def _box(xyxy: list[float], scale: Scale) -> list[float]:
    box = [*_pair(xyxy[:2], scale), *_pair(xyxy[2:], scale)]
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _Outside("a box with left < right and top < bottom", xyxy)
    return box


def _inside(value: float, side: int) -> float:
    if not -SPILL * side <= value <= (1 + SPILL) * side:
        raise _Outside(f"a coordinate between 0 and {side}", round(value, 2))
    return min(max(value, 0.0), float(side))


def _scaled_key(key: dict | None, scales: list[Scale]) -> dict | None:
    if key is None or key["task"] not in ("box", "point") or not scales:
        return key
    convert = _box if key["task"] == "box" else _pair
    return {**key, "value": convert([float(value) for value in key["value"]], scales[0])}
