"""How styles write objects: text, special tokens and what is a target."""

from __future__ import annotations

import pytest

from trainer.data.coordinates import Convention
from trainer.data.objects import Pen, TaggedObjects, read_tagged
from trainer.data.pieces import Piece
from trainer.data.sample import Box, Mask, Media, Object, Objects, Point, Sample, Span

QWEN2_VL = TaggedObjects()
QWEN_VL = TaggedObjects("<ref>", "</ref>", "<box>", "</box>")
BOX = Box(xyxy=(10, 20, 60, 200))


def written(style: TaggedObjects, *things: Object, form: str = "any", target: bool = True) -> list[Piece]:
    file = Media(digest="0" * 64, kind="image", suffix="png", size_bytes=1, width=100, height=400)
    sample = Sample(id="a", source="s", kind="grounding", messages=(), media=(file,))
    pen = Pen(sample, 0, Convention("thousand"), lambda _: (50, 200))
    return style.write(Objects(media=0, objects=things, form=form), pen, target)  # type: ignore[arg-type]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("thing", "want"),
    [
        (Object(label="cat", at=BOX), "<ref>cat</ref><box>(100,50),(600,500)</box>"),
        (Object(label="", at=BOX), "<box>(100,50),(600,500)</box>"),
        (Object(label="m", at=Mask(xyxy=BOX.xyxy, rle=(0, 5))), "<ref>m</ref><box>(100,50),(600,500)</box>"),
        (Object(label="dot", at=Point(xy=(10, 20))), "<ref>dot</ref><box>(100,50)</box>"),
        (Object(label="text", at=BOX, role="p", content="Hi"), "<ref>text</ref><box>(100,50),(600,500)</box>Hi"),
        (Object(label="fall", at=Span(start_s=1, end_s=2.5)), "<ref>fall</ref>1.0 seconds - 2.5 seconds"),
    ],
)
def test_every_geometry_has_words_between_tags(thing, want):
    assert text_of(written(QWEN_VL, thing)) == want
    longer = {"<ref>": "<|object_ref_start|>", "</ref>": "<|object_ref_end|>"}
    longer |= {"<box>": "<|box_start|>", "</box>": "<|box_end|>"}
    for short, long in longer.items():
        want = want.replace(short, long)
    assert text_of(written(QWEN2_VL, thing)) == want


def test_tags_are_special_tokens_and_what_somebody_wrote_is_text():
    pieces = written(QWEN2_VL, Object(label="<|box_start|>", at=BOX), Object(label="b", at=BOX))
    assert [piece.kind for piece in pieces] == ["special", "text", "special"] * 4
    assert all(piece.target for piece in pieces)
    assert not any(piece.target for piece in written(QWEN2_VL, Object(label="b", at=BOX), target=False))


def test_pages_and_bare_coordinates_are_the_same_in_every_style():
    page = written(QWEN2_VL, Object(label="x", at=BOX, role="p", content="T & t"), form="html")
    assert [piece.kind for piece in page] == ["text"]
    assert '<p data-bbox="100 50 600 500">T &amp; t</p>' in page[0].text
    assert text_of(written(QWEN2_VL, Object(label="x", at=BOX), form="plain")) == "100, 50, 600, 500"


@pytest.mark.parametrize("style", [QWEN2_VL, QWEN_VL])
def test_what_a_style_wrote_is_read_again(style):
    things = (Object(label="cat, 2", at=BOX), Object(label="", at=BOX), Object(label="dot", at=Point(xy=(10, 20))))
    want = [
        {"label": "cat, 2", "at": {"shape": "box", "xyxy": [100, 50, 600, 500]}},
        {"label": "", "at": {"shape": "box", "xyxy": [100, 50, 600, 500]}},
        {"label": "dot", "at": {"shape": "point", "xy": [100, 50]}},
    ]
    tagged = text_of(written(style, *things))
    objects = {"part": "objects", "media": 0, "objects": want}
    before, after = ({"part": "text", "text": words} for words in ("See ", " and rest."))
    assert read_tagged(tagged + "\n") == [objects]
    assert read_tagged(f"See {tagged} and rest.") == [before, objects, after]
    assert read_tagged(f"See {tagged} and rest.{tagged}") == [before, objects, after, objects]


@pytest.mark.parametrize("text", ["A cat.", "<ref>cat</ref>", "<box>(1,2),(3,4)", "<box>a</box>", " <box>(1)</box>"])
def test_other_text_is_not_read_as_objects(text):
    assert read_tagged(text) == [{"part": "text", "text": text}]
    assert read_tagged("") == []
