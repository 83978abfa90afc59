"""The tokenizer trained on the corpus: exact size, Qwen's special tokens, loadable by Hugging Face, the same bytes."""

from __future__ import annotations

import pytest

from pipelines.prepare.tokenizer import prepare_tokenizer, train
from tests.prepare.builders import small_recipe
from trainer import storage
from trainer.data.tokenizer import Tokenizer
from trainer.errors import RecipeError
from trainer.models.config import family_of

TEXTS = [
    "there is a red anchor on the left.",
    'naïve 日本 \U0001f600\r\n\t  {"bbox_2d":[1,22,333,4]} <|im_end|> <tool_call>',
    "",
]


@pytest.fixture(scope="module")
def trained(prepared: str) -> Tokenizer:
    return Tokenizer.load(storage.join(prepared, "data", "tokenizer"))


def test_it_has_exactly_the_size_asked_for_and_the_familys_tokens(trained: Tokenizer, prepared: str):
    family = family_of(small_recipe(), prepared)
    assert trained.vocab_size == 1024
    ids = [trained.id(token) for token in family.special_tokens]
    assert ids == list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_and_gives_no_special_token(trained: Tokenizer, text: str, prepared: str):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    special = {trained.id(token) for token in family_of(small_recipe(), prepared).special_tokens}
    assert not special & set(ids)


def test_digits_stand_alone_and_colours_are_one_token(trained: Tokenizer):
    assert len(trained.encode("2026")) == 4
    for colour in ("red", "green", "blue", "yellow", "pink", "cyan", "white", "black"):
        assert len(trained.encode(f" {colour}")) == 1, colour


def test_hugging_face_reads_it_and_gives_the_same_ids(trained: Tokenizer, prepared: str):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(storage.join(prepared, "data", "tokenizer"))
    for text in (TEXTS[0], "What colour is the icon? 12:30"):
        assert theirs(text)["input_ids"] == trained.encode(text)
    chat = theirs.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat


def test_it_is_trained_once_and_only_again_for_other_text(prepared: str, capsys: pytest.CaptureFixture[str]):
    prepare_tokenizer(small_recipe(), prepared)
    assert "already there" in capsys.readouterr().out


def test_the_same_text_gives_the_same_bytes_and_too_little_text_is_an_error(prepared: str):
    family = family_of(small_recipe(), prepared)
    texts = [f"the number {number} and the word {number * 7}" for number in range(200)]
    assert train(texts, 280, family).to_str() == train(texts, 280, family).to_str()
    with pytest.raises(RecipeError, match="the corpus gives"):
        train(texts, 5000, family)
