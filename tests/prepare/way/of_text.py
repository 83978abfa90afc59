"""Rows of text-and-image formats: conversations, captions, documents, pairs, tables and tars."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare.grounding.phrases import POINT, pick
from tests.prepare import test_formats, test_text_formats
from tests.prepare.builders import a_caption, a_picture, write_lines
from tests.prepare.test_containers import a_tar
from tests.prepare.test_text_formats import ALPACA, MMC4, QWEN_VL, SHAREGPT, SWIFT
from tests.prepare.way.row import IMAGE, SECOND, VIDEO, Row, box, objects, point, want, with_media
from trainer.recipe import Rendering

FAULTY = [(*row[:3],) for row in (*test_formats.BAD, *test_text_formats.BAD)]
"""(format, row, reason): the tables that the tests of readers go through one by one."""


def lines(*rows: Any) -> Callable[[Path], Path]:
    return partial(_lines, rows=rows)


def _lines(folder: Path, rows: tuple) -> Path:
    return write_lines(with_media(folder) / "rows.jsonl", rows)


def faulty(format: str, kind: str = "") -> list[tuple[Any, str]]:
    """Rows of that format with the reason each is refused for. Those that hold pairs are of the kind preference."""
    found = [(row, reason) for name, row, reason in FAULTY if name == format]
    pairs = [one for one in found if isinstance(one[0], dict) and "chosen" in one[0]]
    return found if format == "preference" else pairs if kind == "preference" else [f for f in found if f not in pairs]


def row(format: str, good: tuple, wanted: list, *, kind: str, rendering: Rendering = "chat", **more: Any) -> Row:
    """A format of JSON lines; its adverse file has every faulty row of the tables."""
    listed = faulty(format, kind)
    reasons = Counter(reason for _, reason in listed)
    bad = lines(*(_renamed(content, number) for number, (content, _) in enumerate(listed)))
    return Row(more.pop("name", format), kind, rendering, lines(*good), wanted, bad, reasons, **more)


def _renamed(content: Any, number: int) -> Any:
    """With an id of its own: a second time the same would be a fault of another kind."""
    return {**content, "id": f"bad-{number}"} if isinstance(content, dict) else content


TALK = {
    "id": "t",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "Where?"}],
        },
        {"role": "assistant", "content": '[{"bbox_2d": [6, 8, 30, 20], "label": "it"}]'},
    ],
    "key": {"task": "box", "value": [6, 8, 30, 20]},
}
FILM = {
    "id": "film",
    "video": "clip.mp4",
    "conversations": [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}],
}
CONVERSATIONS = [
    row(
        "llava",
        (a_caption(3), FILM),
        [
            want("c3", [("user", [IMAGE]), ("assistant", ["picture number 3"])], "red.png 60x40"),
            want("film", [("user", [VIDEO, "What is it?"]), ("assistant", ["Noise."])], "clip.mp4 56x56"),
        ],
        kind="caption",
        quick=True,
    ),
    row(
        "openai",
        (TALK,),
        [
            want(
                "t",
                [
                    ("system", ["Be brief."]),
                    ("user", [IMAGE, "Where?"]),
                    ("assistant", [objects(box("it", 6, 8, 30, 20), form="json")]),
                ],
                "red.png 60x40",
                key=("box", [6, 8, 30, 20]),
            )
        ],
        kind="instruction",
    ),
    row(
        "ms_swift",
        (SWIFT,),
        [
            want(
                "good/rows.jsonl#1",
                [
                    ("system", ["You are a helpful assistant."]),
                    ("user", [IMAGE, "Describe the image."]),
                    (
                        "assistant",
                        [
                            objects(box("a dog", 3.5, 7.4, 28.5, 15.8)),
                            " and ",
                            objects(box("a woman", 30.5, 6.8, 50, 14.4)),
                            " are playing on the beach",
                        ],
                    ),
                ],
                "red.png 60x40",
            )
        ],
        kind="instruction",
    ),
    row(
        "llama_factory",
        (ALPACA, SHAREGPT),
        [
            want(
                "good/rows.jsonl#1",
                [
                    ("system", ["Be brief."]),
                    ("user", ["Hello?"]),
                    ("assistant", ["Yes."]),
                    ("user", [IMAGE, "Name it.\nIn one word."]),
                    ("assistant", ["Red."]),
                ],
                "red.png 60x40",
            ),
            want(
                "good/rows.jsonl#2",
                [
                    (
                        "system",
                        [
                            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
                            "provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
                            '{"type": "function", "function": {"name": "weigh", "description": "", "parameters": {}}}'
                            "\n</tools>\n\nFor each function call, return a json object with function name and "
                            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
                            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
                        ],
                    ),
                    ("user", [IMAGE, "What does it weigh?"]),
                    ("assistant", ['<tool_call>\n{"name": "weigh", "arguments": {"unit": "kg"}}\n</tool_call>']),
                    ("tool", ["3"]),
                    ("assistant", ["3 kg."]),
                ],
                "red.png 60x40",
            ),
        ],
        kind="instruction",
    ),
    row(
        "qwen_vl",
        (QWEN_VL,),
        [
            want(
                "identity_0",
                [
                    ("user", [IMAGE, SECOND, "框出图中的格子衬衫"]),
                    ("assistant", [objects(box("格子衬衫", 50, 50, 75, 100), media=1)]),
                    ("user", ["And the two dogs?"]),
                    (
                        "assistant",
                        [
                            "Here: ",
                            objects(box("dogs", 0, 0, 10, 20), box("dogs", 90, 180, 100, 200), media=1),
                            ".",
                        ],
                    ),
                ],
                "red.png 60x40",
                "blue.jpg 100x200",
            )
        ],
        kind="grounding",
    ),
]

SEEN = {"image": "red.png", "caption": "a red field"}
ASKED = {"id": "q", "image": "red.png", "question": "Which colour?", "answers": ["red", "crimson"]}
TOLD = {
    "info": {"year": 2017},
    "images": [{"id": 1, "file_name": "red.png"}, {"id": 2, "file_name": "blue.jpg"}],
    "annotations": [
        {"image_id": 1, "id": 10, "caption": "a red field"},
        {"image_id": 2, "id": 11, "caption": "a sea"},
        {"image_id": 1, "id": 12, "caption": "all red"},
    ],
}
UNTOLD = {
    "images": [
        {"id": 101, "file_name": "red.png"},
        {"id": 102, "file_name": "gone.png"},
        {"id": 103, "file_name": "red.png"},
        {"id": 104},
        {"id": 105, "file_name": "red.png"},
    ],
    "annotations": [
        {"image_id": 102, "id": 10, "caption": "gone"},
        {"image_id": 103, "id": 11, "caption": " "},
        {"image_id": 104, "id": 12, "caption": "nothing"},
        {"image_id": 105, "id": 13},
        {"image_id": 109, "id": 14, "caption": "nobody"},
    ],
}


def _object(folder: Path, content: dict) -> Path:
    (with_media(folder) / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


DOCUMENTS = [
    row(
        "captions",
        (SEEN, ASKED),
        [
            want("good/rows.jsonl#1", [("document", [IMAGE, "a red field"])], "red.png 60x40"),
            want("q", [("document", [IMAGE, "Which colour?\n", "red"])], "red.png 60x40"),
        ],
        kind="caption",
        rendering="document",
    ),
    Row(
        "coco_captions",
        "caption",
        "document",
        partial(_object, content=TOLD),
        [
            want("1", [("document", [IMAGE, "a red field", "\n", "all red"])], "red.png 60x40"),
            want("2", [("document", [IMAGE, "a sea"])], "blue.jpg 100x200"),
        ],
        partial(_object, content=UNTOLD),
        {"no-captions": 1, "unknown-image": 1, "missing-media": 1, "empty-text": 1, "wrong-form": 2},
    ),
    row(
        "interleaved",
        (
            {
                "id": "i",
                "images": [None, "red.png", None, "blue.jpg"],
                "texts": ["A field, ", None, " then a sea: ", None],
            },
        ),
        [want("i", [("document", ["A field, ", IMAGE, " then a sea: ", SECOND])], "red.png 60x40", "blue.jpg 100x200")],
        kind="interleaved",
        rendering="document",
        quick=True,
    ),
    row(
        "mmc4",
        (MMC4,),
        [
            want(
                "good/rows.jsonl#1",
                [("document", [IMAGE, "First sentence. Second one.", SECOND, "Third."])],
                "blue.jpg 100x200",
                "red.png 60x40",
            )
        ],
        kind="interleaved",
        rendering="document",
    ),
    row(
        "text",
        ({"id": "w", "text": "Plain words,\nover two lines."},),
        [want("w", [("document", ["Plain words,\nover two lines."])])],
        kind="text",
        rendering="document",
    ),
]

# ---------------------------------------------------------------- pairs

RED, BLUE = [("assistant", ["red"])], [("assistant", ["blue"])]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
TRL = {
    "id": "p",
    "images": ["red.png"],
    "prompt": QUESTION,
    "chosen": [{"role": "assistant", "content": "red"}],
    "rejected": [{"role": "assistant", "content": "blue"}],
}
RANKED = {"id": "r", "instruction": "<image>What?", "chosen": "red", "rejected": "blue", "images": ["red.png"]}
SWIFT_PAIR = {
    "id": "s",
    "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
    "rejected_response": "blue",
    "images": ["red.png"],
}


def a_pair(identity: str) -> dict[str, Any]:
    return want(identity, [("user", [IMAGE, "What?"])], "red.png 60x40", chosen=RED, rejected=BLUE)


PAIRS = [
    row(
        "preference",
        (TRL, {"id": "q", "prompt": "1 + 1?", "chosen": "2", "rejected": "3"}),
        [
            a_pair("p"),
            want("q", [("user", ["1 + 1?"])], chosen=[("assistant", ["2"])], rejected=[("assistant", ["3"])]),
        ],
        kind="preference",
        quick=True,
    ),
    row("llama_factory", (RANKED,), [a_pair("r")], kind="preference", name="llama_factory-pairs"),
    Row(
        "ms_swift-pairs",
        "preference",
        "chat",
        lines(SWIFT_PAIR),
        [a_pair("s")],
        lines({**SWIFT_PAIR, "id": "a", "rejected_response": "red"}, {**SWIFT_PAIR, "id": "b", "images": ["cut.png"]}),
        {"equal-answers": 1, "damaged-media": 1},
    ),
]

# ---------------------------------------------------------------- containers


def tar_of(files: dict[str, bytes], *, torn: bool = False) -> Callable[[Path], Path]:
    return partial(_tar_of, files=files, torn=torn)


def _tar_of(folder: Path, files: dict[str, bytes], torn: bool) -> Path:
    """`torn`: without the zeros that a tar ends with."""
    folder.mkdir(parents=True, exist_ok=True)
    path = a_tar(folder / "000.tar", files)
    if torn:
        data = path.read_bytes().rstrip(b"\0")
        path.write_bytes(data + b"\0" * (-len(data) % 512))
    return path


def table(columns: dict[str, list]) -> Callable[[Path], Path]:
    return partial(_table, columns=columns)


def _table(folder: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), with_media(folder) / "train.parquet")
    return folder / "train.parquet"


RED_PNG = a_picture()
POINTS = b'{"label": "dot", "points": [{"x": 25, "y": 50}], "count": 1}'
TARRED = {"a/1.png": RED_PNG, "a/1.txt": b"a red field", "b/2.0.png": RED_PNG, "b/2.1.png": a_picture(80, 60),
          "b/2.json": b'{"caption": "two of them"}',
          "b/3.png": RED_PNG, "b/3.cls": b"4", "b/3.txt": b"again"}  # fmt: skip
TORN = {"1.png": RED_PNG, "1.json": b"{", "2.png": RED_PNG, "3.txt": b"words", "4.png": b"no", "4.txt": b"x",
        "5.png": RED_PNG, "5.txt": b"\xff"}  # fmt: skip
CONTAINERS = [
    Row(
        "webdataset",
        "caption",
        "document",
        tar_of(TARRED),
        [
            want("good/000.tar/a/1", [("document", [IMAGE, "a red field"])], "000.tar 60x40"),
            want("good/000.tar/b/2", [("document", [IMAGE, SECOND, "two of them"])], "000.tar 60x40", "000.tar 80x60"),
            want("good/000.tar/b/3", [("document", [IMAGE, "again"])], "000.tar 60x40"),
        ],
        tar_of(TORN, torn=True),
        {"bad-json": 1, "wrong-form": 2, "damaged-media": 1, "not-utf8": 1, "damaged-tar": 1},
    ),
    Row(
        "parquet",
        "grounding",
        "chat",
        table({"image": [RED_PNG], "label": ["dot"], "points": [[{"x": 25.0, "y": 50.0}]], "id": ["d"]}),
        [
            want(
                "d",
                [
                    ("user", [IMAGE, pick(POINT, "points", "d").format("dot")]),
                    ("assistant", [objects(point("dot", 15, 20))]),
                ],
                "image 60x40",
                key=("point", [15, 20]),
            )
        ],
        table({"image": [b"", RED_PNG[:50], None], "question": ["what?"] * 3, "answer": ["red"] * 3}),
        {"damaged-media": 2, "wrong-form": 1},
    ),
]
ROWS = [*CONVERSATIONS, *DOCUMENTS, *PAIRS, *CONTAINERS]
