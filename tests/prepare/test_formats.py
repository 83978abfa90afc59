"""Readers: good rows of every format, and every fault as one Bad with file, line, expected and got."""

from __future__ import annotations

import base64
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.prepare.describe import missing_part
from pipelines.prepare.formats import FORMATS, reader
from pipelines.prepare.formats.rows import Bad, Draft
from tests.prepare.builders import a_caption, a_clip, a_picture, a_source, write_lines
from tests.prepare.through import made
from trainer.data.sample import Box, Mask, Objects, Point, Sample
from trainer.errors import DataError, RecipeError


def read(format: str, path: Path, **changes) -> list[Draft | Bad]:
    source = a_source(format, path, **changes)
    return list(reader(format, "mine")(str(path), str(path.parent), source))


def samples(rows: list[Draft | Bad], kind: str) -> list[Sample | Bad]:
    return [row if isinstance(row, Bad) else row[0] for row in made(rows, kind)]


def one(format: str, folder: Path, row: object, **changes) -> Sample | Bad:
    path = write_lines(folder / "rows.jsonl", [row])
    source = a_source(format, path, **changes)
    return samples(read(format, path, **changes), source.kind)[0]


ASK = {"role": "user", "content": "what is it?"}
SAY = {"role": "assistant", "content": "a picture"}
IMAGE = {"type": "image_url", "image_url": {"url": "red.png"}}
HUMAN = {"from": "human", "value": "<image>what?"}
GPT = {"from": "gpt", "value": "this"}
BLOCK = {"type": "paragraph", "bbox": [1, 1, 9, 9], "text": "words"}
STEP = {"screenshot": "red.png", "action": "left_click", "coordinate": [10, 20]}
PAIR = {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "that"}, "images": ["red.png"]}

GOOD = {
    "llava": a_caption(),
    "openai": {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}, SAY]},
    "interleaved": {"images": [None, "red.png"], "texts": ["see", None]},
    "layout": {"pages": [{"image": "red.png", "width": 60, "height": 40, "blocks": [BLOCK]}]},
    "agent": {"instruction": "click", "steps": [STEP], "schema": True},
    "text": {"text": "words"},
    "preference": PAIR,
}


@pytest.mark.parametrize("format", sorted(GOOD))
def test_a_good_row_becomes_a_sample(format: str, media: Path):
    found = one(format, media, GOOD[format])
    assert isinstance(found, Sample), found
    assert len(found.media) == (0 if format == "text" else 1)
    if found.media:
        assert (found.media[0].width, found.media[0].height) == (60, 40)


def test_every_format_has_a_reader_of_the_same_shape():
    for format in FORMATS:
        assert callable(reader(format, "mine"))
    with pytest.raises(RecipeError, match="no such format 'webp'"):
        reader("webp", "mine")


BOSS = {"from": "system", "value": "be brief"}
DEEP = '{"id": "1", "text": ' + "[" * 90 + "]" * 90 + "}"
BEYOND = '{"id": "1", "text": ' + "[" * 200_000 + "]" * 200_000 + "}"
LONE = '{"id": "1", "text": "half of a \\ud83d pair"}'
INLINE = {"type": "image", "image": "data:image/png;base64,%%"}
BAD = [
    ("llava", a_caption(image=None), "placeholder-without-media", "0 of them"),
    ("llava", a_caption(images=["red.png", "red.png"], image=None), "media-without-placeholder", "1 of them"),
    ("llava", a_caption(image="gone.png"), "missing-media", "no such file"),
    ("llava", a_caption(image="cut.png"), "damaged-media", "decoded"),
    ("llava", a_caption(image="cut.jpg"), "damaged-media", "decoded"),
    ("llava", a_caption(image="empty.png"), "damaged-media", "0 bytes"),
    ("llava", a_caption(image="text.png"), "damaged-media", "not an image"),
    ("llava", {"id": "1", "image": "red.png"}, "wrong-form", "fields"),
    ("llava", a_caption(conversations=[{"from": "robot", "value": "<image>"}]), "wrong-form", "robot"),
    ("llava", a_caption(conversations=[]), "wrong-form", "empty"),
    ("llava", '{"id": "1", "image": ', "bad-json", "column"),
    ("llava", "[1", "bad-json", ""),
    ("llava", "7", "wrong-form", "int"),
    ("openai", {"messages": [{"role": "user", "content": "<image>?"}, SAY]}, "placeholder-without-media", "0 of them"),
    ("openai", {"messages": [ASK, SAY], "images": ["red.png"]}, "media-without-placeholder", "0 of them"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "wrong-form", "audio"),
    ("openai", {"messages": [{"role": "boss", "content": "?"}]}, "wrong-form", "boss"),
    ("openai", {"messages": [{"role": "user", "content": [INLINE]}, SAY]}, "damaged-media", "base64"),
    ("openai", {"messages": [ASK, SAY], "key": {"task": "guess", "value": 1}}, "wrong-form", "guess"),
    ("interleaved", {"images": [None], "texts": ["a", "b"]}, "wrong-form", "2"),
    ("interleaved", {"images": [None], "texts": [None]}, "wrong-form", "neither"),
    ("layout", {"image": "red.png", "blocks": [{**BLOCK, "bbox": [9, 1, 1, 9]}]}, "empty-box", "[9, 1, 1, 9]"),
    ("layout", {"image": "red.png", "blocks": [{**BLOCK, "type": "poem"}]}, "wrong-form", "poem"),
    ("layout", {"image": "red.png", "blocks": [{**BLOCK, "bbox": [1, 1, 900, 9]}]}, "outside-picture", "900"),
    ("layout", {"image": "red.png", "width": 40, "height": 60, "blocks": [BLOCK]}, "outside-picture", "60x40"),
    ("layout", {"image": "red.png", "width": 60, "blocks": [BLOCK]}, "wrong-form", "60 and None"),
    ("agent", {"instruction": "click", "steps": [{**STEP, "coordinate": [1, 2, 3]}]}, "wrong-form", "3"),
    ("agent", {"instruction": "click", "steps": [{**STEP, "coordinate": [10, 400]}]}, "outside-picture", "400"),
    ("agent", {"instruction": "click", "steps": []}, "wrong-form", "none"),
    ("text", {"text": "  "}, "empty-text", "'  '"),
    ("preference", {**PAIR, "rejected": GPT}, "equal-answers", "twice"),
    ("preference", {**PAIR, "images": []}, "placeholder-without-media", "0 of them"),
    ("text", LONE, "not-unicode", "\\ud83d"),
    ("text", DEEP, "too-deep", "more"),
    ("text", BEYOND, "too-deep", "more"),
    ("text", '{"text": "n", "id": ' + "9" * 5000 + "}", "bad-json", "digits"),
    ("llava", {"conversations": [HUMAN, GPT, GPT], "image": "red.png"}, "wrong-order", "user, assistant, assistant"),
    ("llava", {"conversations": [HUMAN, GPT, HUMAN], "images": ["red.png"] * 2}, "wrong-order", "assistant, user"),
    ("llava", {"conversations": [HUMAN, GPT, BOSS], "image": "red.png"}, "wrong-order", "assistant, system"),
    ("llava", {"conversations": [GPT, HUMAN, GPT], "image": "red.png"}, "wrong-order", "assistant, user"),
    ("llava", {"conversations": [BOSS], "image": None}, "wrong-order", "system"),
    ("llava", {"conversations": [HUMAN, {**GPT, "value": " \n"}], "image": "red.png"}, "empty-answer", "message 1"),
    ("llava", {"conversations": [{**HUMAN, "value": "?"}, {**GPT, "value": 7}]}, "wrong-form", "int"),
    ("openai", {"messages": [ASK]}, "wrong-order", "user"),
    ("openai", {"messages": [ASK, ASK, SAY]}, "wrong-order", "user, user, assistant"),
    ("openai", {"messages": [ASK, {**SAY, "content": ""}]}, "empty-answer", "message 1"),
    ("openai", {"messages": [ASK, {"role": "tool", "content": "7"}, SAY]}, "wrong-order", "user, tool"),
    ("preference", {**PAIR, "conversations": [HUMAN, GPT]}, "wrong-order", "user, assistant"),
    ("preference", {**PAIR, "rejected": {**GPT, "value": " "}}, "empty-answer", "' '"),
    ("preference", {**PAIR, "rejected": HUMAN}, "wrong-order", "human"),
]  # fmt: skip
CHAT = {"llava": {"rendering": "chat"}}


@pytest.mark.parametrize(
    ("format", "row", "reason", "got"), BAD, ids=[f"{f}-{r}-{i}" for i, (f, _, r, _) in enumerate(BAD)]
)
def test_a_faulty_row_says_where_expected_and_got(format: str, row: object, reason: str, got: str, media: Path):
    path = write_lines(media / "rows.jsonl", [GOOD[format], row])
    source = a_source(format, path)
    first, second = samples(read(format, path, **CHAT.get(format, {})), source.kind)
    assert isinstance(first, Sample)
    assert isinstance(second, Bad), second
    assert second.reason == reason
    assert second.where == f"{path}, line 2"
    assert got in second.got, second
    assert second.expected


def test_a_document_needs_text_and_no_order_of_roles(media: Path):
    assert isinstance(one("llava", media, {"conversations": [HUMAN], "image": "red.png"}), Sample)
    found = one("llava", media, {"conversations": [{**HUMAN, "value": "<image>"}], "image": "red.png"})
    assert isinstance(found, Bad) and found.reason == "empty-answer"


def test_system_first_and_several_tools_are_a_conversation(media: Path):
    tool = {"role": "tool", "content": "7"}
    rows = [{"role": "system", "content": "be brief"}, ASK, SAY, tool, tool, SAY]
    assert isinstance(one("openai", media, {"messages": rows}), Sample)


def test_one_unreadable_entry_of_a_list_costs_only_itself(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a, [b\\"], c"},\n ' + BEYOND + ',\n {"text": "last"}]')
    first, second, third = read("text", path)
    assert isinstance(first, Draft) and isinstance(third, Draft)
    assert first.messages[0]["parts"][0]["text"] == 'a, [b"], c'
    assert isinstance(second, Bad) and second.reason == "too-deep" and second.where == f"{path}, line 2, entry 1"


WRAPPED = {"data": [a_caption(0), a_caption(1)], "version": 1}
PRETTY = [
    (json.dumps(WRAPPED, indent=1), "jq .data"),
    ("\n".join(json.dumps(a_caption(number), indent=2) for number in range(3)), "jq -c"),
]


@pytest.mark.parametrize(("content", "do"), PRETTY)
def test_objects_over_several_lines_are_one_error_that_says_what_to_do(content: str, do: str, media: Path):
    path = media / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="neither JSON Lines nor a JSON list") as error:
        read("llava", path)
    assert do in str(error.value) and str(path) in str(error.value) and "fields" in str(error.value)


def test_a_pretty_printed_list_is_read_whatever_its_file_is_called(media: Path):
    path = media / "rows.jsonl"
    path.write_text(json.dumps([a_caption(0), a_caption(1)], indent=2))
    assert [row.id for row in read("llava", path) if isinstance(row, Draft)] == ["c0", "c1"]


def test_a_picture_is_read_over_http(media: Path):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(media))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        found = one("llava", media, a_caption(image=f"{host}/red.png"))
        gone = one("llava", media, a_caption(image=f"{host}/gone.png"))
        server.shutdown()
    assert isinstance(found, Sample) and (found.media[0].width, found.media[0].height) == (60, 40)
    assert isinstance(gone, Bad) and gone.reason == "missing-media"


def test_a_truncated_video_is_damaged(media: Path):
    found = one("llava", media, {"video": "cut.mp4", "conversations": [{"from": "human", "value": "<video>"}, GPT]})
    assert isinstance(found, Bad) and found.reason == "damaged-media"
    whole = a_clip(table_first=True)
    assert missing_part(whole) is None
    for length in (len(whole) // 2, len(whole) - 200):
        (media / "cut.mp4").write_bytes(whole[:length])
        found = one("llava", media, {"video": "cut.mp4", "conversations": [{"from": "human", "value": "<video>"}, GPT]})
        assert isinstance(found, Bad) and found.reason == "damaged-media" and "cut short" in found.got, found
    good = one("llava", media, {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>"}, GPT]})
    assert isinstance(good, Sample) and good.media[0].num_frames == 8 and good.media[0].duration_s == 2.0


def test_data_uris_and_paths_are_the_same_medium(media: Path):
    data = base64.b64encode(a_picture()).decode()
    inline = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    found = [one("openai", media, {"messages": [{"role": "user", "content": [part]}, SAY]}) for part in (IMAGE, inline)]
    assert isinstance(found[0], Sample) and isinstance(found[1], Sample)
    assert found[0].media[0].digest == found[1].media[0].digest


def test_several_pictures_go_to_their_placeholders_in_order(media: Path):
    (media / "blue.png").write_bytes(a_picture(28, 28, "blue"))
    turns = [{"from": "human", "value": "first <image> then\n<image>\ndone"}, GPT]
    found = one("llava", media, {"images": ["red.png", "blue.png"], "conversations": turns}, rendering="chat")
    assert isinstance(found, Sample)
    parts = found.messages[0].parts
    assert [part.part for part in parts] == ["text", "image", "text", "image", "text"]
    assert [getattr(part, "text", None) or part.media for part in parts] == ["first ", 0, " then", 1, "done"]
    assert [item.width for item in found.media] == [60, 28]


def test_a_wrong_key_is_told_without_the_words_of_a_library(media: Path):
    found = one("openai", media, {"messages": [ASK, SAY], "key": {"task": "guess", "value": 1, "more": 2}})
    assert isinstance(found, Bad) and found.expected == "key: {task, value}", found
    assert "guess" in found.got and "more" in found.got and "pydantic" not in found.got


@pytest.mark.parametrize("placeholder", ["<image>", "<video>"])
def test_a_video_stands_at_either_placeholder_where_there_are_only_videos(placeholder: str, media: Path):
    turns = [{"from": "human", "value": f"{placeholder}\nWhat happens?"}, GPT]
    row = {"id": "1", "video": "clip.mp4", "conversations": turns}
    found = one("llava", media, row, rendering="chat")
    assert isinstance(found, Sample), found
    assert [part.part for part in found.messages[0].parts] == ["video", "text"]
    twice = one("llava", media, {**row, "conversations": [{"from": "human", "value": "<image><video>?"}, GPT]})
    assert isinstance(twice, Bad) and twice.reason == "placeholder-without-media", twice
    both = one("llava", media, {**row, "image": "red.png"}, rendering="chat")
    assert isinstance(both, Bad) and both.reason == "media-without-placeholder", both


UNITS = [("pixels", [6, 8, 30, 20]), ("thousand", [100, 200, 500, 500]), ("unit", [0.1, 0.2, 0.5, 0.5])]


@pytest.mark.parametrize(("units", "box"), UNITS)
def test_coordinates_become_pixels_of_the_original(units: str, box: list[float], media: Path):
    answer = {"role": "assistant", "content": json.dumps([{"bbox_2d": box, "label": "it"}])}
    row = {
        "messages": [{"role": "user", "content": [IMAGE]}, answer],
        "coordinates": units,
        "key": {"task": "box", "value": box},
    }
    found = one("openai", media, row)
    assert isinstance(found, Sample)
    objects = found.messages[1].parts[0]
    assert isinstance(objects, Objects) and isinstance(objects.objects[0].at, Box)
    assert objects.objects[0].at.xyxy == pytest.approx((6, 8, 30, 20))
    assert found.key is not None and found.key.value == pytest.approx([6, 8, 30, 20])


def test_points_and_actions_are_rescaled_as_well(media: Path):
    answer = {"role": "assistant", "content": '[{"point_2d": [0.5, 0.5], "label": "it"}]'}
    found = one("openai", media, {"messages": [{"role": "user", "content": [IMAGE]}, answer], "coordinates": "unit"})
    assert isinstance(found, Sample)
    point = found.messages[1].parts[0].objects[0].at  # type: ignore[union-attr]
    assert isinstance(point, Point) and point.xy == (30, 20)
    row = {"instruction": "click", "coordinates": "thousand", "steps": [{**STEP, "coordinate": [500, 250]}]}
    acted = one("agent", media, row)
    assert isinstance(acted, Sample)
    assert acted.messages[1].parts[0].coordinates == {"coordinate": (30, 10)}  # type: ignore[union-attr]


def test_points_are_about_one_picture(media: Path):
    row = {"label": "x", "points": [{"x": 50, "y": 50}]}
    assert isinstance(one("points", media, {**row, "images": ["red.png"]}), Sample)
    for images in (["red.png", "red.png"], []):
        found = one("points", media, {**row, "images": images})
        assert isinstance(found, Bad) and found.reason == "wrong-form" and "of them" in found.got


def test_boxes_drawn_on_a_smaller_copy_are_scaled_to_the_file(media: Path):
    block = {**BLOCK, "bbox": [3, 3, 15, 10]}
    found = one("layout", media, {"image": "red.png", "width": 30, "height": 20, "blocks": [block]})
    assert isinstance(found, Sample)
    assert found.messages[0].parts[-1].objects[0].at.xyxy == (6, 6, 30, 20)  # type: ignore[union-attr]


def coco(**changes) -> dict:
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [6, 8, 20, 10], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "red.png", "width": 60, "height": 40}],
        "annotations": [annotation],
        "categories": [{"id": 3, "name": "cup"}],
    }
    return {**content, **changes}


def test_coco_boxes_masks_and_their_faults(media: Path):
    runs = [0, 40 * 6, 2, 40 * 60 - 40 * 6 - 2]
    mask = {
        "id": 2,
        "image_id": 1,
        "category_id": 3,
        "bbox": [6, 0, 1, 2],
        "segmentation": {"size": [40, 60], "counts": runs},
    }
    path = media / "coco.json"

    def first(content: dict) -> Sample | Bad:
        path.write_text(json.dumps(content))
        return samples(read("coco", path), "grounding")[0]

    found = first(coco(annotations=[*coco()["annotations"], mask]))
    assert isinstance(found, Sample)
    boxes = found.messages[1].parts[0].objects  # type: ignore[union-attr]
    assert boxes[0].at.xyxy == (6, 8, 26, 18) and isinstance(boxes[1].at, Mask)
    table = [
        (coco(annotations=[]), "no-objects"),
        (coco(categories=[]), "wrong-form"),
        (coco(annotations=[{**coco()["annotations"][0], "bbox": [1, 1, 0, 5]}]), "empty-box"),
        (coco(annotations=[{**mask, "segmentation": {"size": [40, 60], "counts": [1, 2]}}]), "outside-picture"),
        (coco(images=[{"id": 1, "file_name": "gone.png"}]), "missing-media"),
    ]
    for content, reason in table:
        refused = first(content)
        assert isinstance(refused, Bad) and refused.reason == reason, (reason, refused)
        assert refused.where == f"{path}, images[0]"


def test_a_file_that_is_no_json_is_an_error_and_not_rows(media: Path):
    path = media / "rows.json"
    path.write_text('[{"id": 1},\n {"id": ')
    with pytest.raises(DataError, match="line 2"):
        read("llava", path)
    with pytest.raises(DataError, match="no such annotation file"):
        read("llava", media / "gone.json")


def test_a_line_may_hold_any_character_that_json_allows_and_a_byte_order_mark(tmp_path: Path):
    rows = [{"id": "a", "text": "one\u2028line"}, {"id": "b", "text": "next\u0085line"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [row.id for row in read("text", tmp_path / "data.jsonl") if isinstance(row, Draft)] == ["a", "b"]


def test_rows_without_an_id_have_one_that_no_other_file_gives(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "words"}\n{"id": null, "text": "more"}\n')
    found = [row.id for name in ("one", "two") for row in read("text", tmp_path / f"{name}.jsonl")]
    assert found == ["one.jsonl#1", "one.jsonl#2", "two.jsonl#1", "two.jsonl#2"]
