"""Trajectories on disk for the tests of reasoning."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image as Pil
from PIL import ImageDraw

from tests.prepare.builders import a_recipe, a_source
from trainer import storage
from trainer.data import media
from trainer.data.sample import Action, Sample
from trainer.data.shards import ShardReader, ShardWriter, Source
from trainer.recipe import Recipe

SIZE = (120, 200)
Made = tuple[Sample, list[bytes]]
Call = tuple[str, dict[str, Any], dict[str, tuple[float, float]]]
"""Action, arguments, coordinates."""
CLICK: Call = ("click", {}, {"coordinate": (30, 50)})
WRITE: Call = ("type", {"text": "Rome"}, {})
SWIPE: Call = ("swipe", {}, {"coordinate": (60, 150), "coordinate2": (60, 50)})
END: Call = ("terminate", {"status": "success"}, {})
WALK = (CLICK, WRITE, SWIPE, END)
QUERY = "Book a table for two people in Rome on Friday evening"


def a_screen(number: int, size: tuple[int, int] = SIZE) -> bytes:
    """A picture of its own for each number, nowhere magenta."""
    picture = Pil.new("RGB", size, (230, 240, 235))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((10, 10 + number, 60, 30 + number), fill=(40, 90, 160))
    pen.text((12, 60), f"screen {number}", fill=(0, 0, 0))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def an_action(call: Call, number: int = 0, tool: str = "mobile_use") -> Action:
    name, arguments, coordinates = call
    return Action(media=number, tool=tool, action=name, arguments=arguments, coordinates=coordinates)  # type: ignore[arg-type]


def a_walk(
    identity: str, calls: Sequence[Call] = WALK, *, words: Sequence[str] = (), query: str = QUERY, **more: Any
) -> Made:
    """A trajectory of mobile_use: a screenshot before every call; `words` stand before the calls."""
    files = [a_screen(number + 10 * len(identity) + sum(map(ord, identity))) for number in range(len(calls))]
    messages: list[dict[str, Any]] = []
    for number, call in enumerate(calls):
        asked = [{"part": "text", "text": query}] if number == 0 else []
        role = "user" if number == 0 else "tool"
        messages.append({"role": role, "parts": [{"part": "image", "media": number}, *asked]})
        said = [{"part": "text", "text": f"{words[number]}\n"}] if number < len(words) and words[number] else []
        messages.append({"role": "assistant", "parts": [*said, an_action(call, number).model_dump()]})
    about = {"kind": "image", "suffix": "png", "width": SIZE[0], "height": SIZE[1]}
    listed = [{**about, "digest": media.digest_of(data), "size_bytes": len(data)} for data in files]
    facts = {"id": identity, "source": "walks", "kind": "agent", "messages": messages, "media": listed}
    return Sample.model_validate({**facts, **more}), files


def stored(out: str, made: Sequence[Made], name: str = "walks", split: str = "train") -> str:
    uri = storage.join(out, "data", "sources", name, split)
    storage.remove_tree(uri)
    writer = ShardWriter(uri, shard_bytes=10**6)
    for sample, files in made:
        writer.add(sample, files)
    writer.close(source=name, split=split)
    return uri


def read_back(uri: str) -> list[Made]:
    source = Source.open(uri)
    reader = ShardReader(source)
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    return [(source.sample(*place), list(reader.media(*place))) for place in places]


def a_reasoning_recipe(reasoning: dict[str, Any], *overrides: str, **more: Any) -> Recipe:
    """The source `walks`, and `reasoned` from it."""
    made = {"format": "reasoning", "path": "source://walks", "kind": "agent", "rendering": "chat", **more}
    walks = a_source("agent", "unread.json").model_dump(mode="json", exclude_none=True)
    sources = json.dumps({"mine": walks, "walks": walks, "reasoned": {**made, "reasoning": reasoning}})
    return a_recipe(a_source("agent"), f"prepare.sources={sources}", *overrides)
