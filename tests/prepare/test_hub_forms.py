"""Forms that tables and folders of a hub have: choices, numbered pictures, several captions or questions, pictures by
name, pairs on a question. Nothing of a row vanishes, and what is not read is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.formats import format_of, reader, usual
from pipelines.prepare.formats.choices import ASKS
from pipelines.prepare.formats.rows import Bad
from tests.prepare.builders import a_picture, a_source, write_lines
from tests.prepare.test_text_formats import folder, good, one, rows_of, said
from tests.prepare.through import made, trained

__all__ = ["folder"]  # a fixture
ASKED = {"image": "red.png", "question": "Which?", "options": ["red", "blue"], "answer": "B"}
WHICH = f"Which?\n\n(A) red\n(B) blue\n\n{ASKS}"


def a_table(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def a_cell(colour: str = "red") -> dict:
    return {"bytes": a_picture(colour=colour), "path": f"{colour}.png"}


CHOICES = [
    ({}, WHICH, "B"),
    ({"options": "['red', \"it's blue\"]"}, WHICH.replace("blue", "it's blue"), "B"),
    ({"options": None, "choices": ["red", "blue"], "answer": 1}, WHICH, "B"),
    ({"answer": "red"}, WHICH, "A"),
    ({"answer": "0"}, WHICH, "A"),
    ({"answer": "(A)"}, WHICH, "A"),
    ({"options": None, "A": "red", "B": "blue", "C": None, "hint": "nan"}, WHICH, "B"),
    ({"options": None, "choice_a": "red", "choice_b": "blue", "hint": "Look."}, f"Look.\n{WHICH}", "B"),
    ({"options": "[]", "answer": "['7', '7.0']"}, "Which?", "7"),
]


@pytest.mark.parametrize(("changes", "asked", "answer"), CHOICES)
def test_choices_stand_under_the_question_and_the_answer_is_a_letter(
    changes: dict, asked: str, answer: str, folder: Path
):
    sample, files = good(one("captions", folder, {**ASKED, **changes}))
    assert said(sample) == [("user", [("image", 0), asked]), ("assistant", [answer])]
    assert answer in trained(sample, files, folder)[0].targets


WRONG_CHOICES = [
    ({"answer": "C"}, "wrong-answer", "'C'"),
    ({"answer": "?"}, "wrong-answer", "'?'"),
    ({"answer": 2}, "wrong-answer", "2"),
    ({"answer": -1}, "wrong-answer", "-1"),
    ({"answer": True}, "wrong-answer", "True"),
    ({"options": ["B", "A"], "answer": "A"}, "wrong-answer", "several"),
    ({"options": "red, blue"}, "wrong-form", "red, blue"),
    ({"options": {"A": "red"}}, "wrong-form", "red"),
    ({"options": [str(n) for n in range(27)]}, "unsupported", "27"),
    ({"question": "Which? <image 2>"}, "placeholder-without-media", "1 of them"),
    ({"question": "<image>?", "image": ["red.png", "red.png"]}, "media-without-placeholder", "1 of them"),
    ({"image": None, "image_1": "red.png", "image_3": "red.png"}, "wrong-form", "image_3"),
]


@pytest.mark.parametrize(("changes", "reason", "got"), WRONG_CHOICES)
def test_choices_that_cannot_be_asked_are_refused(changes: dict, reason: str, got: str, folder: Path):
    found = one("captions", folder, {**ASKED, **changes})
    assert isinstance(found, Bad) and found.reason == reason and got in found.got, found


def test_numbered_pictures_stand_where_the_question_and_its_choices_name_them(folder: Path):
    row = {"image_1": "red.png", "image_2": "blue.jpg", "image_3": None, "question": "Is <image 2> like\n<image 1>?"}
    row |= {"options": "['yes', 'no, as <image 2>']", "answer": "B"}
    sample, files = good(one("captions", folder, row))
    [(_, asked), _] = said(sample)
    tail = "?\n\n(A) yes\n(B) no, as "
    assert asked == ["Is ", ("image", 1), " like", ("image", 0), tail, ("image", 1), f"\n\n{ASKS}"[1:]]
    assert [item.width for item in sample.media] == [60, 100]
    assert trained(sample, files, folder)[0].targets.startswith("B")


def test_a_table_of_mmmu_keeps_its_choices_and_its_pictures(tmp_path: Path):
    path = a_table(
        tmp_path / "mmmu.parquet",
        id=["v1", "v2"],
        question=["<image 1> Which?", "Which of <image 1> <image 2>?"],
        options=["['red', 'blue']"] * 2,
        image_1=[a_cell(), a_cell()],
        image_2=[None, a_cell("blue")],
        answer=["A", "B"],
    )
    first, second = made(rows_of("parquet", path), "instruction")
    assert said(good(first)[0])[0] == ("user", [("image", 0), f" {WHICH}"])
    assert said(good(second)[0])[0][1][:4] == ["Which of ", ("image", 0), " ", ("image", 1)]
    assert said(good(second)[0])[1] == ("assistant", ["B"])


def test_questions_and_answers_of_the_cauldron_are_turns_of_one_conversation(tmp_path: Path):
    texts = [{"user": "Colour?", "assistant": "Red.", "source": "x"}, {"user": "Shape?", "assistant": "None."}]
    columns = {"images": [[a_cell(), a_cell("blue")]], "texts": [texts]}
    path = a_table(tmp_path / "t.parquet", **columns)
    want = [("user", [("image", 0), ("image", 1), "Colour?"]), ("assistant", ["Red."])]
    [found] = made(rows_of("parquet", path), "instruction")
    assert said(good(found)[0]) == [*want, ("user", ["Shape?"]), ("assistant", ["None."])]
    [found] = made(rows_of("parquet", path, "caption", "document"), "caption")
    parts = [("image", 0), ("image", 1), "Colour?\n", "Red.", "\n", "Shape?\n", "None."]
    assert said(good(found)[0]) == [("document", parts)]


def test_every_caption_of_a_picture_is_kept(tmp_path: Path):
    path = a_table(tmp_path / "t.parquet", image=[a_cell()], caption=[["one", "two"]], filename=["a.jpg"])
    [found] = made(rows_of("parquet", path, "caption", "document"), "caption")
    assert said(good(found)[0]) == [("document", [("image", 0), "one", "\n", "two"])]
    [found] = made(rows_of("parquet", path), "instruction")
    again = [("user", ["Describe it in other words."]), ("assistant", ["two"])]
    assert said(good(found)[0])[1:] == [("assistant", ["one"]), *again]


VQA = [
    ([{"answer": "a", "answer_id": 1}, {"answer": "b"}, {"answer": "b"}], None, "b"),
    ([{"answer": "a", "answer_id": 1}, {"answer": "b"}, {"answer": "b"}], "a", "a"),
]


@pytest.mark.parametrize(("answers", "chosen", "want"), VQA)
def test_of_ten_peoples_answers_the_stated_or_most_frequent_one_is_taken(
    answers: list, chosen: str | None, want: str, folder: Path
):
    row = {"image": "red.png", "question": "?", "answers": answers, "multiple_choice_answer": chosen}
    sample, _ = good(one("captions", folder, row))
    assert said(sample)[1] == ("assistant", [want])


def test_pairs_on_a_question_have_their_picture_before_it(tmp_path: Path):
    columns = {"image": [a_cell()], "question": ["What?"], "chosen": ["red"], "rejected": ["blue"], "ds_name": ["x"]}
    path = a_table(tmp_path / "t.parquet", **columns)
    assert usual("parquet", str(path)) == ("preference", "chat")
    [found] = made(rows_of("parquet", path, "preference"), "preference")
    sample = good(found)[0]
    assert said(sample) == [("user", [("image", 0), "What?"])]
    assert [message.parts[0].text for message in (*sample.chosen, *sample.rejected)] == ["red", "blue"]  # type: ignore[union-attr]
    row = {"image": "red.png", "question": "Is\n<image>\nred?", "chosen": "yes", "rejected": "no"}
    (tmp_path / "red.png").write_bytes(a_picture())
    assert said(good(one("preference", tmp_path, row, "preference"))[0]) == [("user", ["Is", ("image", 0), "red?"])]


# ---------------------------------------------------------------- pictures that vanished


PICTURED: list[tuple[dict[str, Any], str | None]] = [
    ({"file_name": "red.png", "text": "a red field"}, "captions"),
    ({"file_name": "clip.MP4", "text": "noise"}, "captions"),
    ({"file_name": "red.png", "caption": "a red field"}, "captions"),
    ({"picture": "sub/red.JPG", "text": "a red field"}, None),
    ({"file_name": "notes.pdf", "text": "words"}, "text"),
    ({"url": "https://example.org/a.jpg", "text": "words"}, "text"),
    ({"title": "see a.jpg", "text": "words", "version": "1.2"}, "text"),
]


@pytest.mark.parametrize(("row", "want"), PICTURED)
def test_a_row_that_names_a_picture_is_no_text(row: dict, want: str | None, folder: Path):
    path = write_lines(folder / "metadata.jsonl", [row])
    if want is None:
        with pytest.raises(Exception, match="is not recognised"):
            format_of("auto", str(path))
    else:
        assert format_of("auto", str(path)) == want
    found = one("text", folder, row, "text", "document")
    assert isinstance(found, Bad) == (want != "text"), found
    if isinstance(found, Bad) and "text" in row:
        assert found.reason == "unsupported" and "format: captions" in found.expected, found


def test_a_folder_of_pictures_with_metadata_is_captions(folder: Path):
    sample, _ = good(one("captions", folder, {"file_name": "red.png", "text": "a field"}, "caption", "document"))
    assert said(sample) == [("document", [("image", 0), "a field"])]


# ---------------------------------------------------------------- nothing to learn, one way only


NOTHING = [{"images": [], "texts": []}, {"images": ["red.png"], "texts": [None]}, {"images": [None], "texts": ["  "]}]


@pytest.mark.parametrize("row", NOTHING)
def test_documents_without_words_are_refused(row: dict, folder: Path):
    found = one("interleaved", folder, row, "interleaved", "document")
    assert isinstance(found, Bad) and found.reason == "empty-text", found


@pytest.mark.parametrize(
    ("content", "want"), [(b"", "empty-text"), (b" \n", "empty-text"), (b"\xef\xbb\xbfwords", "words")]
)
def test_a_text_file_without_words_is_refused_and_a_mark_of_its_encoding_is_no_word(
    content: bytes, want: str, tmp_path: Path
):
    (tmp_path / "a.TXT").write_bytes(content)
    source = a_source("text", tmp_path / "a.TXT")
    [row] = made(list(reader("text", "mine")(str(tmp_path / "a.TXT"), str(tmp_path), source)), "text")
    assert row.reason == want if isinstance(row, Bad) else said(row[0]) == [("document", [want])]


def test_a_table_of_documents_is_read_as_documents_without_being_told(tmp_path: Path):
    path = a_table(tmp_path / "t.parquet", images=[["a.jpg", None]], texts=[[None, "words"]], metadata=["[]"])
    assert usual("parquet", str(path)) == ("interleaved", "document")
    assert usual("parquet", str(a_table(tmp_path / "w.parquet", text=["words"]))) == ("text", "document")
    assert usual("parquet", str(a_table(tmp_path / "e.parquet", text=pa.array([], pa.string())))) == usual("parquet")
    [found] = rows_of("parquet", path)
    assert isinstance(found, Bad) and "--kind interleaved --rendering document" in found.expected
