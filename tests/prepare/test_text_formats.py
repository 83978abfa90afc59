"""Readers of text-and-image formats on files as their projects write them: the exact Sample, what the model learns to
say through plan and encode, and every fault as one Bad."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.formats import reader
from pipelines.prepare.formats.rows import Bad, Draft
from pipelines.prepare.grounding.phrases import NONE, REFER, pick
from tests.prepare.builders import a_clip, a_picture, a_source, write_lines
from tests.prepare.through import Made, made, trained
from trainer.data.sample import Sample
from trainer.errors import DataError

KINDS = {"preference": "preference", "points": "grounding", "refcoco": "grounding"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """red.png of 60x40, blue.jpg of 100x200, clip.mp4, cut.png."""
    (tmp_path / "red.png").write_bytes(a_picture())
    (tmp_path / "blue.jpg").write_bytes(a_picture(100, 200, "blue", "JPEG"))
    (tmp_path / "clip.mp4").write_bytes(a_clip())
    (tmp_path / "cut.png").write_bytes(a_picture()[:60])
    return tmp_path


def rows_of(format: str, path: Path, kind: str = "instruction", rendering: str = "chat") -> list[Draft | Bad]:
    source = a_source(format, path, kind=kind, rendering=rendering)
    return list(reader(format, "mine")(str(path), str(path.parent), source))


def one(format: str, folder: Path, row: Any, kind: str = "instruction", rendering: str = "chat") -> Made | Bad:
    [found] = made(rows_of(format, write_lines(folder / "rows.jsonl", [row]), kind, rendering), kind)
    return found


def good(found: Made | Bad) -> Made:
    assert not isinstance(found, Bad), found
    return found


def said(sample: Sample) -> list[tuple[str, list[Any]]]:
    """(role, parts) with parts short: text as it is, media as (kind, number), objects as (label, shape, numbers)."""
    return [(message.role, [_short(part) for part in message.parts]) for message in sample.messages]


def _short(part: Any) -> Any:
    if part.part == "text":
        return part.text
    if part.part in ("image", "video"):
        return (part.part, part.media)
    assert part.part == "objects"
    places = [
        (thing.label, tuple(round(v, 3) for v in getattr(thing.at, "xy", None) or thing.at.xyxy))
        for thing in part.objects
    ]
    return (part.media, part.form, places)


# ---------------------------------------------------------------- ms-swift

SWIFT = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>Describe the image."},
        {"role": "assistant", "content": "<ref-object><bbox> and <ref-object><bbox> are playing on the beach"},
    ],
    "images": ["red.png"],
    "objects": {"ref": ["a dog", "a woman"], "bbox": [[3.5, 7.4, 28.5, 15.8], [30.5, 6.8, 50, 14.4]]},
}
SHEEP = {
    "messages": [
        {"role": "user", "content": "<image>Find the <ref-object> in the image"},
        {"role": "assistant", "content": "<bbox><bbox>"},
    ],
    "images": ["red.png"],
    "objects": {"ref": ["sheep"], "bbox": [[0.1, 0.2, 0.5, 0.5], [0.5, 0.5, 1, 1]], "bbox_type": "norm1"},
}


def test_ms_swift_objects_go_to_their_places(folder: Path):
    sample, files = good(one("ms_swift", folder, SWIFT))
    dog, woman = ("a dog", (3.5, 7.4, 28.5, 15.8)), ("a woman", (30.5, 6.8, 50, 14.4))
    assert said(sample) == [
        ("system", ["You are a helpful assistant."]),
        ("user", [("image", 0), "Describe the image."]),
        ("assistant", [(0, "any", [dog]), " and ", (0, "any", [woman]), " are playing on the beach"]),
    ]
    for way in trained(sample, files, folder):
        (width, height), texts = way.grids[0], way.targets
        entries, _ = json.JSONDecoder().raw_decode(texts)
        across, down = width / 60, height / 40
        assert entries[0]["label"] == "a dog" and "are playing on the beach" in texts
        want = [3.5 * across, 7.4 * down, 28.5 * across, 15.8 * down]
        assert entries[0]["bbox_2d"] == pytest.approx(want, abs=1)


def test_ms_swift_boxes_of_a_question_take_its_ref_and_shares_become_pixels(folder: Path):
    sample, _ = good(one("ms_swift", folder, SHEEP))
    assert said(sample) == [
        ("user", [("image", 0), "Find the sheep in the image"]),
        ("assistant", [(0, "any", [("sheep", (6, 8, 30, 20)), ("sheep", (30, 20, 60, 40))])]),
    ]


def test_ms_swift_points_in_words_and_boxes_of_the_second_picture(folder: Path):
    turns = [
        {"role": "user", "content": "<image><image>Open it"},
        {"role": "assistant", "content": "click(start_box='<bbox>')"},
    ]
    objects = {"ref": [], "bbox": [[50, 150]], "image_id": [1]}
    row = {"messages": turns, "images": ["red.png", "blue.jpg"], "objects": objects}
    sample, files = good(one("ms_swift", folder, row))
    assert said(sample)[1] == ("assistant", ["click(start_box='", (1, "plain", [("", (50, 150))]), "')"])
    way = trained(sample, files, folder)[0]
    x, y = 50 * way.grids[1][0] / 100, 150 * way.grids[1][1] / 200
    assert f"start_box='{round(x)}, {round(y)}'" in way.targets


def test_ms_swift_pairs_tools_and_older_rows(folder: Path):
    asked = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    pair, _ = good(one("ms_swift", folder, {"messages": asked, "rejected_response": "3"}, "preference"))
    assert [message.role for message in pair.messages] == ["user"]
    assert (pair.chosen[0].parts[0].text, pair.rejected[0].parts[0].text) == ("2", "3")  # type: ignore[union-attr]
    other = [*asked[:1], {"role": "assistant", "content": "4"}]
    again, _ = good(one("ms_swift", folder, {"messages": asked, "rejected_messages": other}, "preference"))
    assert again.rejected[0].parts[0].text == "4"  # type: ignore[union-attr]
    calls = [
        asked[0],
        {"role": "assistant", "content": "I add."},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "tool_response", "content": "2"},
        asked[1],
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    sample, _ = good(one("ms_swift", folder, {"messages": calls, "tools": json.dumps(tools)}))
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in said(sample)[0][1][0]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert said(sample)[2][1] == ["I add.", "\n", call]
    old, _ = good(one("ms_swift", folder, {"query": "c?", "response": "d", "history": [["a?", "b"]], "system": "s"}))
    assert said(old) == [
        ("system", ["s"]),
        ("user", ["a?"]),
        ("assistant", ["b"]),
        ("user", ["c?"]),
        ("assistant", ["d"]),
    ]
    talk, _ = good(one("ms_swift", folder, {"conversation": [{"human": "a?", "assistant": "b"}]}))
    assert said(talk) == [("user", ["a?"]), ("assistant", ["b"])]


def with_objects(**objects: Any) -> dict:
    return {**SHEEP, "objects": {**SHEEP["objects"], **objects}}


# ---------------------------------------------------------------- LLaMA-Factory

ALPACA = {
    "instruction": "<image>Name it.",
    "input": "In one word.",
    "output": "Red.",
    "system": "Be brief.",
    "history": [["Hello?", "Yes."]],
    "images": ["red.png"],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>What does it weigh?"},
        {"from": "function_call", "value": '{"name": "weigh", "arguments": {"unit": "kg"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 kg."},
    ],
    "tools": '[{"name": "weigh", "description": "", "parameters": {}}]',
    "images": ["red.png"],
}


def test_llama_factory_alpaca_with_history(folder: Path):
    sample, files = good(one("llama_factory", folder, ALPACA))
    assert said(sample) == [
        ("system", ["Be brief."]),
        ("user", ["Hello?"]),
        ("assistant", ["Yes."]),
        ("user", [("image", 0), "Name it.\nIn one word."]),
        ("assistant", ["Red."]),
    ]
    assert [way.targets for way in trained(sample, files, folder)] == ["Yes.\nRed.\n"] * 2


def test_llama_factory_calls_and_observations(folder: Path):
    sample, _ = good(one("llama_factory", folder, SHAREGPT))
    assert [role for role, _ in said(sample)] == ["system", "user", "assistant", "tool", "assistant"]
    assert '"name": "weigh"' in said(sample)[0][1][0]
    assert said(sample)[2][1] == ['<tool_call>\n{"name": "weigh", "arguments": {"unit": "kg"}}\n</tool_call>']


def test_llama_factory_ranking_in_both_forms(folder: Path):
    plain = {"instruction": "<image>What?", "chosen": "red", "rejected": "blue", "images": ["red.png"]}
    turns = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue"},
        "images": ["red.png"],
    }
    found = [good(one("llama_factory", folder, row, "preference"))[0] for row in (plain, turns)]
    for sample in found:
        assert said(sample) == [("user", [("image", 0), "What?"])]
        assert (sample.chosen[0].parts[0].text, sample.rejected[0].parts[0].text) == ("red", "blue")  # type: ignore[union-attr]


def test_llama_factory_reads_columns_and_tags_of_dataset_info(folder: Path):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"}}
    (folder / "dataset_info.json").write_text(json.dumps({"other": {"file_name": "x"}, "mine": {**info, "tags": tags}}))
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    sample, _ = good(one("llama_factory", folder, {"talk": turns, "pics": ["red.png"]}))
    assert said(sample) == [("user", [("image", 0), "?"]), ("assistant", ["red"])]
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {**info, "columns": {"mesages": "talk"}}}))
    with pytest.raises(DataError, match="mesages"):
        one("llama_factory", folder, {"talk": turns})


def test_llama_factory_pretraining_rows_are_documents(folder: Path):
    (folder / "dataset_info.json").write_text(
        json.dumps({"c4": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}})
    )
    sample, _ = good(one("llama_factory", folder, {"text": "words"}, "text", "document"))
    assert said(sample) == [("document", ["words"])]


# ---------------------------------------------------------------- Qwen-VL v1

QWEN_VL = {
    "id": "identity_0",
    "conversations": [
        {"from": "user", "value": "Picture 1: <img>red.png</img>\nPicture 2: <img>blue.jpg</img>\n框出图中的格子衬衫"},
        {"from": "assistant", "value": "<ref>格子衬衫</ref><box>(500,250),(750,500)</box>"},
        {"from": "user", "value": "And the <ref>two dogs</ref>?"},
        {
            "from": "assistant",
            "value": "Here: <ref>dogs</ref><box>(0,0),(100,100)</box><box>(900,900),(1000,1000)</box>.",
        },
    ],
}


def test_qwen_vl_places_are_thousandths_of_the_last_picture(folder: Path):
    sample, files = good(one("qwen_vl", folder, QWEN_VL))
    assert sample.id == "identity_0"
    assert said(sample) == [
        ("user", [("image", 0), ("image", 1), "框出图中的格子衬衫"]),
        ("assistant", [(1, "any", [("格子衬衫", (50, 50, 75, 100))])]),
        ("user", ["And the two dogs?"]),
        ("assistant", ["Here: ", (1, "any", [("dogs", (0, 0, 10, 20)), ("dogs", (90, 180, 100, 200))]), "."]),
    ]
    way = trained(sample, files, folder)[0]
    width, height = way.grids[1]
    entry = json.JSONDecoder().raw_decode(way.targets)[0][0]
    assert entry["label"] == "格子衬衫"
    assert entry["bbox_2d"] == pytest.approx([width * 0.5, height * 0.25, width * 0.75, height * 0.5], abs=1)


def test_qwen_vl_goes_through_its_own_family_unchanged(folder: Path):
    """Round trip: the coordinates of the file come back in Qwen-VL's own convention and words."""
    from trainer.data.objects import TaggedObjects
    from trainer.models.qwen_vl import QwenVL

    sample, _ = good(one("qwen_vl", folder, QWEN_VL))
    from trainer.data.objects import Pen

    family_style = TaggedObjects("<ref>", "</ref>", "<box>", "</box>")
    pen = Pen(sample, 0, QwenVL.coordinates, lambda media: (448, 448))
    part = sample.messages[1].parts[0]
    written = "".join(piece.text for piece in family_style.write(part, pen, True))  # type: ignore[arg-type]
    assert written == QWEN_VL["conversations"][1]["value"]


# ---------------------------------------------------------------- captions, points, MMC4, TRL, OpenAI


def test_captions_as_document_and_as_chat_and_questions(folder: Path):
    caption = {"image": "red.png", "caption": "a red field"}
    sample, files = good(one("captions", folder, caption, "caption", "document"))
    assert said(sample) == [("document", [("image", 0), "a red field"])]
    assert "a red field" in trained(sample, files, folder, "document")[0].targets
    sample, _ = good(one("captions", folder, caption, "caption"))
    assert said(sample) == [("user", [("image", 0), "Describe the picture."]), ("assistant", ["a red field"])]
    asked = {"image": "red.png", "question": "Which colour?", "answers": ["red", "crimson"]}
    sample, _ = good(one("captions", folder, asked))
    assert said(sample) == [("user", [("image", 0), "Which colour?"]), ("assistant", ["red"])]


def test_points_in_percent_in_pixels_and_none(folder: Path):
    row = {"image": "blue.jpg", "label": "dog", "points": [{"x": 10.5, "y": 50.0}, {"x": 100, "y": 0}], "count": 2}
    sample, files = good(one("points", folder, row, "grounding"))
    assert said(sample)[1] == ("assistant", [(0, "any", [("dog", (10.5, 100)), ("dog", (100, 0))])])
    ways = trained(sample, files, folder)
    (width, height), x, y = ways[0].grids[0], 0.105, 0.5
    assert json.loads(ways[0].targets)[0]["point_2d"] == pytest.approx([x * width, y * height], abs=1)
    assert ways[1].targets.startswith('<points x1="')
    pixels = {**row, "coordinates": "pixels", "points": [{"x": 10.5, "y": 150}], "count": 1}
    sample, _ = good(one("points", folder, pixels, "grounding"))
    assert said(sample)[1][1] == [(0, "any", [("dog", (10.5, 150))])]
    assert sample.key is not None and sample.key.value == [10.5, 150]
    sample, _ = good(one("points", folder, {**row, "points": [], "count": 0}, "grounding"))
    assert said(sample)[1][1][0] in NONE and sample.meta["absent"] == ["dog"]


MMC4 = {
    "url": "https://example.org/a",
    "text_list": ["First sentence.", "Second one.", "Third."],
    "image_info": [
        {"image_name": "red.png", "matched_text_index": 2, "matched_sim": 0.3, "raw_url": "https://example.org/r.png"},
        {"image_name": "blue.jpg", "matched_text_index": 0, "matched_sim": 0.2},
    ],
    "similarity_matrix": [[0.1, 0.1, 0.3], [0.2, 0.1, 0.1]],
}


def test_mmc4_pictures_stand_before_their_sentence(folder: Path):
    sample, files = good(one("mmc4", folder, MMC4, "interleaved", "document"))
    assert said(sample) == [("document", [("image", 0), "First sentence. Second one.", ("image", 1), "Third."])]
    assert [item.origin.rpartition("/")[2] for item in sample.media] == ["blue.jpg", "red.png"]
    assert "Second one." in trained(sample, files, folder, "document")[0].targets


def test_trl_pairs_with_and_without_prompt(folder: Path):
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": word}]}] for word in ("red", "blue")]
    stated = {"images": ["red.png"], "prompt": asked, "chosen": answers[0], "rejected": answers[1]}
    implicit = {"images": ["red.png"], "chosen": asked + answers[0], "rejected": asked + answers[1]}
    for row in (stated, implicit):
        sample, files = good(one("preference", folder, row, "preference"))
        assert said(sample) == [("user", [("image", 0), "What?"])]
        assert (sample.chosen[0].parts[0].text, sample.rejected[0].parts[0].text) == ("red", "blue")  # type: ignore[union-attr]
        assert [way.targets for way in trained(sample, files, folder)] == ["red\nblue\n"] * 2
    plain, _ = good(one("preference", folder, {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "preference"))
    assert said(plain) == [("user", ["1 + 1?"])]


# ---------------------------------------------------------------- RefCOCO

REF = {
    "sent_ids": [0, 1], "file_name": "COCO_train2014_000000000001_7.jpg", "ann_id": 7, "ref_id": 3, "image_id": 1,
    "split": "train", "category_id": 3,
    "sentences": [
        {"tokens": ["left", "cup"], "raw": "Left cup.", "sent_id": 0, "sent": "left cup"},
        {"tokens": ["blue", "one"], "raw": "blue one", "sent_id": 1, "sent": "blue one"},
    ],
}  # fmt: skip
INSTANCES = {
    "images": [{"id": 1, "file_name": "red.png", "width": 60, "height": 40}],
    "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [6, 8, 20, 10], "iscrowd": 0}],
    "categories": [{"id": 3, "name": "cup"}],
}


def refs(folder: Path, listed: list, instances: dict = INSTANCES) -> Path:
    (folder / "instances.json").write_text(json.dumps(instances))
    path = folder / "refs.json"
    path.write_text(json.dumps(listed))
    return path


def test_refcoco_one_sample_an_expression(folder: Path):
    found = [good(item) for item in made(rows_of("refcoco", refs(folder, [REF]), "grounding"), "grounding")]
    assert [sample.id for sample, _ in found] == ["3-0", "3-1"]
    sample, files = found[0]
    assert said(sample) == [
        ("user", [("image", 0), pick(REFER, "refcoco", "3-0").format("left cup")]),
        ("assistant", [(0, "json", [("left cup", (6, 8, 26, 18))])]),
    ]
    assert sample.key is not None and sample.key.value == [6, 8, 26, 18]
    way = trained(sample, files, folder)[0]
    box = [6 * way.grids[0][0] / 60, 8 * way.grids[0][1] / 40, 26 * way.grids[0][0] / 60, 18 * way.grids[0][1] / 40]
    assert json.loads(way.targets)[0]["bbox_2d"] == pytest.approx(box, abs=1)


def test_refcoco_pickles_mixed_splits_and_lost_boxes(folder: Path):
    (folder / "refs(unc).p").write_bytes(pickle.dumps([REF]))
    with pytest.raises(DataError, match="pickled refs are not opened") as error:
        rows_of("refcoco", folder / "refs(unc).p", "grounding")
    assert "pickle.load" in str(error.value) and "refs(unc).p" in str(error.value)
    with pytest.raises(DataError, match="several splits"):
        rows_of("refcoco", refs(folder, [REF, {**REF, "split": "testA"}]), "grounding")
    [lost, _] = rows_of("refcoco", refs(folder, [{**REF, "ann_id": 9}]), "grounding")
    assert isinstance(lost, Bad) and lost.reason == "no-objects" and lost.got == "9"
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match="without the boxes"):
        rows_of("refcoco", folder / "refs.json", "grounding")


def test_the_way_to_convert_pickled_refs_works(folder: Path):
    """The command in the message, run as it stands."""
    import subprocess
    import sys

    (folder / "refs(unc).p").write_bytes(pickle.dumps([REF, {**REF, "split": "val"}]))
    with pytest.raises(DataError) as error:
        rows_of("refcoco", folder / "refs(unc).p", "grounding")
    command = str(error.value).partition("python -c ")[2].strip()
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=folder)
    assert json.loads((folder / "refs.train.json").read_text()) == [REF]
    assert json.loads((folder / "refs.val.json").read_text())[0]["split"] == "val"


# ---------------------------------------------------------------- faults

TURN = {"from": "user", "value": "<img>red.png</img>?"}


def boxed(box: str) -> dict:
    return {"conversations": [TURN, {"from": "assistant", "value": f"<ref>it</ref>{box}"}]}


BAD = [
    ("ms_swift", with_objects(bbox=[[1, 1, 2, 2]]), "placeholder-without-object", "1"),
    ("ms_swift", with_objects(ref=["a", "b"]), "object-without-placeholder", "1 of them"),
    ("ms_swift", with_objects(bbox_type="norm1000"), "wrong-form", "norm1000"),
    ("ms_swift", with_objects(image_id=[0, 1]), "wrong-form", "1"),
    ("ms_swift", with_objects(image_id=[0]), "wrong-form", "1"),
    ("ms_swift", with_objects(bbox=[[1, 1, 2], [1, 1, 2, 2]]), "wrong-form", "[1.0, 1.0, 2.0]"),
    ("ms_swift", with_objects(bbox=[[0, 0, 2, 2], [0, 0, 1, 1]]), "outside-picture", "120"),
    ("ms_swift", {**SWIFT, "images": []}, "placeholder-without-media", "0 of them"),
    ("ms_swift", {**SWIFT, "images": ["cut.png"]}, "damaged-media", "decoded"),
    ("ms_swift", {**SWIFT, "audios": ["a.wav"]}, "unsupported", "audio"),
    ("ms_swift", {**SWIFT, "label": True}, "unsupported", "KTO"),
    ("ms_swift", {**SWIFT, "tools": "{"}, "wrong-form", "column"),
    ("llama_factory", {**ALPACA, "kto_tag": True}, "unsupported", "KTO"),
    ("llama_factory", {**ALPACA, "images": []}, "placeholder-without-media", "0 of them"),
    ("llama_factory", {**ALPACA, "output": ""}, "empty-answer", "message 4"),
    ("llama_factory", {"conversations": [{"from": "boss", "value": "?"}]}, "wrong-form", "boss"),
    ("llama_factory", {"instruction": "?", "chosen": "a", "rejected": "a"}, "equal-answers", "twice"),
    ("llama_factory", {"instruction": "?", "chosen": "a"}, "empty-answer", "None"),
    ("llama_factory", {"output": "a"}, "wrong-form", "[]"),
    ("qwen_vl", boxed("<box>(1,2),(3)</box>"), "wrong-form", "(1,2),(3)"),
    ("qwen_vl", boxed("<box>(1,2),(1200,1300)</box>"), "outside-picture", "72"),
    ("qwen_vl", boxed("<box>(500,200),(100,300)</box>"), "outside-picture", "500"),
    ("qwen_vl", boxed("<quad>(1,2),(3,4),(5,6),(7,8)</quad>"), "unsupported", "quad"),
    ("qwen_vl", boxed("<box>(1,2),(3,4)"), "wrong-form", "<box>"),
    ("qwen_vl", {"conversations": [{**TURN, "value": "<box>(1,2),(3,4)</box>"}]}, "placeholder-without-media", "none"),
    ("captions", {"caption": "x"}, "wrong-form", "caption"),
    ("captions", {"image": "red.png", "caption": " "}, "empty-text", "' '"),
    ("captions", {"image": "gone.png", "caption": "x"}, "missing-media", "no such file"),
    ("points", {"image": "red.png", "label": "x", "points": [{"x": 101, "y": 3}]}, "outside-picture", "101.0, 3.0"),
    ("points", {"image": "red.png", "label": "x", "points": [], "count": 2}, "wrong-count", "2"),
    ("points", {"image": "red.png", "label": "x"}, "wrong-form", "NoneType"),
    ("mmc4", {**MMC4, "image_info": [{"image_name": "red.png", "matched_text_index": 3}]}, "wrong-form", "3"),
    ("mmc4", {"text_list": [" "], "image_info": []}, "empty-text", ""),
    ("preference", {"chosen": "a", "rejected": "b"}, "wrong-form", "chosen"),
    ("preference", {"chosen": [{"role": "user", "content": "?"}], "rejected": []}, "equal-answers", "twice"),
    ("preference", {"prompt": "?", "chosen": ["a", "b"], "rejected": "c"}, "wrong-form", "2 of them"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "reason", "got"), BAD, ids=[f"{n}-{b[0]}-{b[2]}" for n, b in enumerate(BAD)])
def test_a_faulty_row_says_where_expected_and_got(format: str, row: dict, reason: str, got: str, folder: Path):
    kind = "preference" if "chosen" in row else "instruction"
    rendering = "document" if format in ("mmc4", "captions") else "chat"
    found = one(format, folder, row, kind, rendering)
    assert isinstance(found, Bad), found
    assert (found.reason, found.where) == (reason, f"{folder / 'rows.jsonl'}, line 1"), found
    assert got in found.got and found.expected, found
