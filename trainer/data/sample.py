"""Sample: one family-neutral record. Messages of typed parts, media by digest, geometry in pixels of the original file.

Rendering into a family's chat template, coordinate convention and time format happens at encode time
(trainer/data/render.py), so one corpus trains every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import DataError
from trainer.recipe import Kind

FORMAT = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Media(Record):
    """One image or video file. Dimensions are those of the file after its EXIF orientation is applied."""

    digest: str
    """sha256 of the file's bytes, hex."""
    kind: Literal["image", "video"]
    suffix: str
    """File name ending without the dot: png, jpg, mp4."""
    size_bytes: int
    width: int
    height: int
    num_frames: int = 1
    fps: float = 0.0
    """Frames per second of the file (average); 0 for an image."""
    duration_s: float = 0.0
    origin: str = ""
    """Where the bytes came from: path or URI, for messages to people."""


class Box(Record):
    shape: Literal["box"] = "box"
    xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the original; right and bottom are exclusive."""


class Point(Record):
    shape: Literal["point"] = "point"
    xy: tuple[float, float]


class Mask(Record):
    """Run lengths in column-major order as COCO writes them (uncompressed), or polygons; with its bounding box."""

    shape: Literal["mask"] = "mask"
    xyxy: tuple[float, float, float, float]
    rle: tuple[int, ...] | None = None
    polygons: tuple[tuple[float, ...], ...] | None = None


class Span(Record):
    """A part of a video."""

    shape: Literal["span"] = "span"
    start_s: float
    end_s: float


Geometry = Annotated[Box | Point | Mask | Span, Field(discriminator="shape")]


class Object(Record):
    label: str
    at: Geometry
    role: str | None = None
    """UI or layout role: button, paragraph, table, h1, ..."""
    content: str | None = None
    """The text inside (documents, UI), HTML for tables."""


class Text(Record):
    part: Literal["text"] = "text"
    text: str


class Image(Record):
    part: Literal["image"] = "image"
    media: int
    """Index in Sample.media."""


class Video(Record):
    part: Literal["video"] = "video"
    media: int


class Objects(Record):
    """Objects of one medium, written out in the family's coordinate convention, in the form that the variant picks."""

    part: Literal["objects"] = "objects"
    media: int
    objects: tuple[Object, ...]
    form: Literal["any", "json", "xml", "html", "plain"] = "any"
    """html: the document as QwenVL HTML; plain: just the coordinates."""


class Action(Record):
    """One agent action: a tool call whose coordinates are pixels of the original screenshot."""

    part: Literal["action"] = "action"
    media: int
    tool: Literal["computer_use", "mobile_use"]
    action: str
    arguments: dict[str, Any] = {}
    """Without coordinates."""
    coordinates: dict[str, tuple[float, float]] = {}
    """Argument name (coordinate, coordinate2) -> x, y."""


class Tools(Record):
    """The tool schema of a system message; the screen size it states is the resized one."""

    part: Literal["tools"] = "tools"
    media: int
    tool: Literal["computer_use", "mobile_use"]


Part = Annotated[Text | Image | Video | Objects | Action | Tools, Field(discriminator="part")]


class Message(Record):
    role: Literal["system", "user", "assistant", "tool", "document"]
    """`document` is content without a speaker: captions, interleaved documents, plain text."""
    parts: tuple[Part, ...]


class Key(Record):
    """The known answer of a task: what rejection sampling and evaluation compare with."""

    task: Literal[
        "colour", "count", "name", "choice", "text", "exact", "latex", "number", "box", "point", "time", "html"
    ]
    value: Any
    """text, exact, latex: str; count, number: a number; box: [x1,y1,x2,y2] of the original; time: [start_s, end_s]."""


class Sample(Record):
    format: Literal[1] = FORMAT
    id: str
    """Unique in its source."""
    source: str
    kind: Kind
    messages: tuple[Message, ...]
    chosen: tuple[Message, ...] = ()
    """Preference only: the preferred continuation of `messages`, assistant messages."""
    rejected: tuple[Message, ...] = ()
    media: tuple[Media, ...] = ()
    key: Key | None = None
    split: Literal["train", "held_out"] = "train"
    scores: dict[str, float] = {}
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _media_exist(self) -> Sample:
        for part in parts_of(self):
            index = getattr(part, "media", None)
            if index is None:
                continue
            if not 0 <= index < len(self.media):
                raise ValueError(f"part {part.part} refers to media {index}, the sample has {len(self.media)}")
            if part.part in ("image", "video") and self.media[index].kind != part.part:
                raise ValueError(f"part {part.part} refers to media {index}, which is a {self.media[index].kind}")
        if (self.kind == "preference") != bool(self.chosen and self.rejected):
            raise ValueError("a preference has a chosen and a rejected answer, and nothing else has them")
        return self


def parts_of(sample: Sample) -> Iterator[Part]:
    """Every part in reading order: prompt, chosen, rejected."""
    for message in (*sample.messages, *sample.chosen, *sample.rejected):
        yield from message.parts


def to_json(sample: Sample) -> str:
    """One line of JSON; fields that are None are left out.

    Raises:
        DataError: meta, key or arguments hold what JSON cannot: half of a surrogate pair, or nesting without end.
    """
    try:
        return sample.model_dump_json(exclude_none=True)
    except (ValueError, RecursionError) as error:  # PydanticSerializationError is a ValueError
        raise DataError(
            "a sample cannot be written as JSON",
            where=ascii(f"{sample.source}/{sample.id}"),
            expected="Unicode text and values nested some hundred levels at most, in meta, key and arguments, too",
            got=ascii(str(error))[:300],
            do="repair the row that it was read from",
        ) from None


def from_json(text: str | bytes, *, where: str = "a stored sample") -> Sample:
    """
    Raises:
        DataError: not JSON (lone surrogates and endless nesting included), or not a Sample; names the field.
    """
    try:
        return Sample.model_validate_json(text)
    except (ValidationError, UnicodeError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        at = ".".join(map(str, first["loc"]))
        raise DataError(
            "not a sample of this format",
            where=where,
            expected=f"JSON of format {FORMAT} (trainer/data/sample.py)",
            got=ascii(f"{at}: {first['msg']}" if at else first["msg"])[:300],
            do="prepare the source again",
        ) from None
