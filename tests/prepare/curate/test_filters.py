"""Every filter of clean: a sample that it keeps and one that it drops, and a planted set with recall and precision."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.prepare.curate.filters import SIGNAL_OF, clean_verdicts, signals_asked
from pipelines.prepare.curate.signals import language_of, lists, signals
from pipelines.prepare.curate.step import SIGNALS_SCHEMA, curate
from tests.prepare.curate.builders import a_document, a_photo, a_recipe, prose, write_source
from trainer.curation import Clean
from trainer.data.sample import Sample

Document = tuple[Sample, list[bytes]]
GOOD = prose(1)
LINES = "\n".join(f"{line.strip()}." for line in prose(2, 200).split(".") if line.strip())
PARAGRAPHS = "\n\n".join(prose(seed, 30) for seed in range(8))
FRENCH = "Le petit chat dort sur la table de la cuisine pendant que les enfants jouent dans le jardin. " * 3
CHINESE = "今天天气很好,我们一起去公园散步。孩子们在湖边喂鸭子,老人们在树下下棋,大家都很高兴。"


def text(content: str, **meta: Any) -> Document:
    return a_document("x", content, **meta)


def shown(*pictures: bytes) -> Document:
    return a_document("x", GOOD, pictures)


CASES: dict[str, tuple[Any, Document, Document]] = {
    "languages": (["en", "zh"], text(GOOD), text(FRENCH)),
    "min_language_probability": (0.9, text(GOOD), text("la 1 2 3 on 4")),
    "min_characters": (40, text(GOOD), text("Too short.")),
    "max_characters": (2000, text(GOOD), text(GOOD * 10)),
    "min_words": (50, text(GOOD), text("Only five words are here.")),
    "max_words": (500, text(GOOD), text(GOOD * 10)),
    "min_mean_word_length": (3, text(GOOD), text("a b c d e f " * 30)),
    "max_mean_word_length": (10, text(GOOD), text("incomprehensibilities internationalisation " * 30)),
    "max_symbol_ratio": (0.1, text(GOOD), text("#tag ... word # " * 30)),
    "max_bullet_lines": (0.9, text(LINES), text("\n".join(f"- {line}" for line in LINES.splitlines()))),
    "max_ellipsis_lines": (0.3, text(LINES), text(LINES.replace(".\n", "...\n"))),
    "min_alphabetic_words": (0.8, text(GOOD), text("12 345 word 99.5 17 2024 " * 20)),
    "min_stop_words": (2, text(GOOD), text("cheap shoes buy now best price online shop " * 10)),
    "min_sentences": (3, text(GOOD), text("word " * 60)),
    "min_terminal_lines": (0.5, text(LINES), text(LINES.replace(".", ""))),
    "max_boilerplate_lines": (0.2, text(LINES), text("Please enable Javascript\nAccept all cookies\nThe end.")),
    "max_placeholder_text": (0, text(GOOD), text(f"{GOOD} Lorem ipsum dolor sit amet.")),
    "max_braces": (0, text(GOOD), text(f"{GOOD} function() {{ return 1 }}")),
    "max_duplicate_lines": (0.3, text(LINES), text(f"{LINES}\n{LINES}")),
    "max_duplicate_line_characters": (0.2, text(LINES), text(f"{LINES}\n{LINES}")),
    "max_duplicate_paragraphs": (0.3, text(PARAGRAPHS), text(f"{PARAGRAPHS}\n\n{PARAGRAPHS}")),
    "max_duplicate_paragraph_characters": (0.2, text(PARAGRAPHS), text(f"{PARAGRAPHS}\n\n{PARAGRAPHS}")),
    "max_top_ngram": ({2: 0.2, 3: 0.18, 4: 0.16}, text(GOOD), text("buy now and save money " * 20)),
    "max_duplicate_ngram": ({5: 0.15, 10: 0.1}, text(GOOD), text(f"{GOOD} {GOOD}")),
    "max_blocked_words": (0, text(f"{GOOD} Pornographer"), text(f"{GOOD} Hardcore  SEX.")),
    "max_blocked_urls": (
        0,
        text(f"{GOOD} https://notblocked.example/a and https://blocked.example.org/"),
        text(f"{GOOD} https://www.Blocked.example/a?b=c"),
    ),
    "min_images": (1, shown(a_photo(1)), text(GOOD)),
    "max_images": (2, shown(a_photo(1), a_photo(2)), shown(a_photo(1), a_photo(2), a_photo(3))),
    "min_image_side": (100, shown(a_photo(1)), shown(a_photo(1), a_photo(2, 200, 99))),
    "max_image_side": (300, shown(a_photo(1)), shown(a_photo(1, 301, 200))),
    "max_image_aspect": (2, shown(a_photo(1)), shown(a_photo(1), a_photo(2, 250, 100))),
    "max_repeated_images": (0.4, shown(a_photo(1), a_photo(2), a_photo(1)), shown(a_photo(1), a_photo(1))),
}  # fmt: skip


def curated(out: Path, curate_yaml: str, documents: list[Document], **more: Any) -> dict[str, Any]:
    renamed = [(sample.model_copy(update={"id": f"d{n}"}), files) for n, (sample, files) in enumerate(documents)]
    write_source(out, renamed, **more)
    return curate(a_recipe(curate_yaml), str(out))["web"]


@pytest.mark.parametrize("name", CASES)
def test_a_filter_keeps_and_drops(name: str, tmp_path: Path):
    threshold, good, bad = CASES[name]
    found = curated(tmp_path, f"{{clean: {{{name}: {threshold}}}}}", [good, bad])
    assert found["read"] == 2 and found["kept"] == 1, found
    dropped = {filter_: count for filter_, count in found["dropped"].items() if count}
    assert len(dropped) == 1 and next(iter(dropped)).startswith(f"clean.{name}")
    [example] = found["examples"][next(iter(dropped))]
    assert example["id"] == "d1" and example["threshold"]
    assert found["kept_examples"] == ["d0"]


def test_every_filter_has_a_case_and_a_column():
    fields = set(Clean.model_fields) - {"blocked_words", "blocked_urls", "max_documents_of_image"}
    assert set(CASES) == fields
    for field, column in SIGNAL_OF.items():
        sizes = {"max_top_ngram": "_2", "max_duplicate_ngram": "_5"}
        assert field == "max_documents_of_image" or f"{column}{sizes.get(field, '')}" in SIGNALS_SCHEMA.names


def test_the_columns_are_what_signals_gives():
    assert set(signals(a_document("x", GOOD)[0], lists(None, None))) == set(SIGNALS_SCHEMA.names)


def test_an_image_of_many_documents_is_a_logo(tmp_path: Path):
    documents = [a_document("x", GOOD, [a_photo(99)] if n < 4 else [a_photo(n)]) for n in range(6)]
    found = curated(tmp_path, "{clean: {max_documents_of_image: 3}}", documents)
    assert found["dropped"] == {"clean.max_documents_of_image": 4} and found["kept_examples"] == ["d4", "d5"]


def test_lists_of_ones_own_take_the_place_of_the_shipped_ones(tmp_path: Path):
    (tmp_path / "words.txt").write_text("# mine\nriver bank  # two words\n")
    asked = f"{{clean: {{max_blocked_words: 0, blocked_words: {tmp_path / 'words.txt'}}}}}"
    found = curated(tmp_path, asked, [text("The river bank."), text("The river, a bank."), text("hardcore sex")])
    assert found["dropped"] == {"clean.max_blocked_words": 1}
    assert found["examples"]["clean.max_blocked_words"][0]["id"] == "d0"


@pytest.mark.parametrize(
    ("content", "want"),
    [(GOOD, "en"), (FRENCH, "fr"), (CHINESE, "zh"), ("Die Kinder spielen im Garten und der Hund schläft.", "de")],
)
def test_languages_are_told_apart(content: str, want: str):
    assert language_of(content)[0] == want


def test_what_has_no_letters_has_no_language():
    assert language_of("123 456 !!") == ("", 0.0)


def test_characters_are_words_where_words_are_not_separated(tmp_path: Path):
    found = curated(tmp_path, "{clean: {min_words: 30, languages: [zh]}}", [text(CHINESE), text("你好。")])
    assert found["kept"] == 1


PLANTED = "{clean: {languages: [en], min_words: 50, max_words: 1000, min_mean_word_length: 3, max_mean_word_length: 10, max_symbol_ratio: 0.1, min_alphabetic_words: 0.8, min_stop_words: 2, max_boilerplate_lines: 0.3, max_placeholder_text: 0, max_braces: 0, max_top_ngram: {2: 0.2, 3: 0.18, 4: 0.16}, max_duplicate_ngram: {5: 0.15}, max_blocked_words: 0, max_blocked_urls: 0, min_image_side: 100, max_image_aspect: 2, max_repeated_images: 0.4}}"  # noqa: E501


def test_planted_defects_are_found_and_nothing_else(tmp_path: Path):
    """Recall and precision over 300 documents, a third of them with one defect of fourteen kinds."""
    rng = random.Random(5)
    defects = {
        "languages": lambda: (FRENCH + FRENCH, []),
        "min_words": lambda: (prose(rng.randrange(999), 12)[:80], []),
        "max_words": lambda: (" ".join(prose(n, 150) for n in rng.sample(range(999), 9)), []),
        "max_symbol_ratio": lambda: (prose(rng.randrange(999)) + " #a ..." * 20, []),
        "min_alphabetic_words": lambda: (prose(rng.randrange(999), 60) + " 12 44" * 15, []),
        "max_boilerplate_lines": lambda: (prose(1, 60) + "\nEnable Javascript\nAll rights reserved", []),
        "max_placeholder_text": lambda: (prose(rng.randrange(999)) + " lorem ipsum", []),
        "max_braces": lambda: (prose(rng.randrange(999)) + " {x}", []),
        "max_duplicate_ngram": lambda: (" ".join([prose(rng.randrange(999), 60)] * 2), []),
        "max_blocked_words": lambda: (prose(rng.randrange(999)) + " hentai", []),
        "max_blocked_urls": lambda: (prose(rng.randrange(999)) + " http://a.blocked.example", []),
        "min_image_side": lambda: (prose(rng.randrange(999)), [a_photo(rng.randrange(999), 90, 60)]),
        "max_image_aspect": lambda: (prose(rng.randrange(999)), [a_photo(rng.randrange(999), 450, 110)]),
        "max_repeated_images": lambda: (prose(rng.randrange(999)), [a_photo(7)] * 2),
    }
    documents, planted = [], {}
    for number in range(300):
        if number % 3 == 0:
            name = list(defects)[(number // 3) % len(defects)]
            content, pictures = defects[name]()
            planted[f"d{number}"] = name
        else:
            content, pictures = prose(1000 + number, rng.randint(70, 300)), [a_photo(1000 + number)]
        documents.append(a_document("x", content, pictures))
    found = curated(tmp_path, PLANTED, documents, shard_bytes=400_000)
    dropped = found["read"] - found["kept"]
    from trainer.data import kept
    from trainer.data.shards import Source

    source = Source.open(str(tmp_path / "data/sources/web/train"))
    assert source.num_shards > 1
    reasons = [one for shard in range(source.num_shards) for one in kept.reasons(source, shard)]
    right = [row for row, reason in enumerate(reasons) if reason and f"d{row}" in planted]
    assert len(right) / len(planted) == 1.0, "recall"
    assert len(right) / dropped == 1.0, "precision"
    named = sum(reasons[row].startswith(f"clean.{planted[f'd{row}']}") for row in right)
    assert named / len(right) > 0.95, "the filter that was meant is the one that is named"


class Read(dict):
    """Columns of one sample that say which of them were looked at."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __missing__(self, name: str) -> np.ndarray:
        self.names.add(name)
        return np.array(["en"] if name == "language" else [1.0])


UNASKED = {f"duplicate_ngram_{size}" for size in (6, 7, 8, 9)}
"""Columns that no case has a threshold for."""


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ((), set()),
        (("languages",), {"language", "characters"}),
        (("min_words", "max_words"), {"words"}),
        (("min_image_side", "max_top_ngram"), {"image_min_side", "images", *(f"top_ngram_{n}" for n in (2, 3, 4))}),
        (tuple(CASES), set(SIGNALS_SCHEMA.names) - UNASKED),
    ],
)
def test_only_the_columns_that_a_threshold_is_about_are_held(names: tuple[str, ...], want: set[str]):
    clean, columns = Clean.model_validate({name: CASES[name][0] for name in names}), Read()
    assert len(list(clean_verdicts(clean, columns))) >= len(names)
    assert columns.names == set(signals_asked(clean)) == want < set(SIGNALS_SCHEMA.names)
