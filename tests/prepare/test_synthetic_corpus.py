"""Synthetic pages of the built-in corpus: made where a recipe names them, true to their sources, and the whole way."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from pipelines.prepare.corpus import figures, languages
from pipelines.prepare.corpus.build import build_corpus
from pipelines.prepare.corpus.molecules import MOLECULES
from pipelines.prepare.corpus.names import corpus_problem
from pipelines.prepare.corpus.synthetic import FONTS, Language, Page, Style, check_glyphs
from pipelines.prepare.corpus.synthetic_pages import FORMULAS, KINDS
from pipelines.prepare.formats.rows import Bad
from pipelines.prepare.ingest import prepare_data
from pipelines.prepare.stored import sources_below
from tests.prepare.builders import a_recipe, a_source
from tests.prepare.music import heard
from tests.prepare.test_page_formats import learnt, told
from tests.prepare.test_synthetic import assert_boxes_hold_the_ink
from tests.prepare.through import made, read
from trainer import storage


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    build_corpus(str(folder), seed=7, scale=0.1, synthetic=True)
    return folder


def rows_of(corpus: Path, split: str) -> list[dict]:
    name = "pages.jsonl" if split == "train" else "pages.held_out.jsonl"
    return [json.loads(line) for line in (corpus / name).read_text().splitlines()]


def test_every_page_goes_all_the_way_to_tokens_and_its_sources_can_be_read_back(corpus: Path, tmp_path: Path):
    seen: defaultdict[str, int] = defaultdict(int)
    for row in made(read("layout", corpus / "pages.jsonl"), "document"):
        assert not isinstance(row, Bad), row
        sample, files = row
        if len(files) == 1:
            for found in learnt(sample, files, tmp_path / sample.id):
                assert [tag.text for tag in found if tag.name in ("p", "h2", "li")] == [
                    content for role, _, content in told(sample) if role in ("p", "h2", "li")
                ]
        for role, _, content in told(sample):
            seen[role] += 1
            if role == "chemical formula":
                assert Chem.MolFromSmiles(content) is not None
            if role == "music sheet" and "V:" not in content:
                assert all(bar for bar, *_ in heard(content, "abc"))
    assert {"h2", "p", "li", "table", "formula", "chart", "music sheet", "chemical formula"} <= set(seen)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_boxes_hold_the_ink_of_every_page(corpus: Path, split: str):
    rows = rows_of(corpus, split)
    assert {row["id"].partition("-")[0] for row in rows} == set(KINDS)
    for page in (page for row in rows for page in row["pages"]):
        data = (corpus / page["image"]).read_bytes()
        assert Image.open(io.BytesIO(data)).size == (page["width"], page["height"])
        assert page["width"] % 28 == 0 and page["height"] % 28 == 0
        assert_boxes_hold_the_ink(Page(data, page["blocks"]))


def test_a_wrong_box_would_be_noticed(corpus: Path):
    page = rows_of(corpus, "train")[0]["pages"][0]
    data = (corpus / page["image"]).read_bytes()
    page["blocks"][0]["bbox"][3] -= 12
    with pytest.raises(AssertionError):
        assert_boxes_hold_the_ink(Page(data, page["blocks"]))


def test_the_same_seed_gives_the_same_bytes_another_seed_others(corpus: Path, tmp_path: Path):
    build_corpus(str(tmp_path / "again"), seed=7, scale=0.1, synthetic=True)
    one, other = ({str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
                  for root in (corpus, tmp_path / "again"))  # fmt: skip
    assert one == other and len(one) > 30
    build_corpus(str(tmp_path / "other"), seed=8, scale=0.1, synthetic=True)
    assert (tmp_path / "other" / "pages.jsonl").read_bytes() != (corpus / "pages.jsonl").read_bytes()


def test_held_out_pages_have_no_molecule_formula_country_or_tune_of_training(corpus: Path):
    def facts(split: str) -> set[str]:
        blocks = [block for row in rows_of(corpus, split) for page in row["pages"] for block in page["blocks"]]
        return {block["text"] for block in blocks if block["type"] in ("chemical formula", "formula", "music sheet")}

    assert facts("train") and facts("held_out") and not facts("train") & facts("held_out")
    train, held_out = (set(languages.territories(7, split)) for split in ("train", "held_out"))
    assert not train & held_out and train | held_out == set(languages.TERRITORIES)


def test_fonts_are_listed_with_their_licences(corpus: Path):
    listed = json.loads((corpus / "sources.json").read_text())
    fonts = {file["name"]: file["licence"] for file in listed["files"] if file["kind"] == "font"}
    assert fonts == {
        "mpl-data/fonts/ttf/DejaVuSans.ttf".rpartition("/")[2]: "Bitstream Vera and public domain (DejaVu)",
        "ipaexg.ttf": "IPA Font License v1.0",
        "NotoSansCJKjp-Regular.otf": "OFL-1.1",
        "Caveat[wght].ttf": "OFL-1.1",
    }


def test_a_recipe_takes_its_pages_from_there_and_only_then_are_they_made(tmp_path: Path):
    path, held_out = "corpus://small/synthetic/pages.jsonl", "corpus://small/synthetic/pages.held_out.jsonl"
    prepare_data(a_recipe(a_source("layout", path, held_out=held_out)), str(tmp_path))
    assert not storage.exists(str(tmp_path / "data" / "corpus" / "small" / "sources.json"))
    assert storage.exists(str(tmp_path / "data" / "corpus" / "small" / "synthetic" / "sources.json"))
    kept = {source.manifest["split"]: source.num_samples for source in sources_below(str(tmp_path))}
    assert kept == {"train": 24, "held_out": 7}
    assert corpus_problem("corpus://synthetic/pages.jsonl") is None
    assert "did you mean synthetic/pages.jsonl" in (corpus_problem("corpus://synthetic/page.jsonl") or "")


# ---------------------------------------------------------------- what they are made from


@pytest.mark.parametrize(("name", "formula", "smiles"), MOLECULES)
def test_a_molecule_has_the_formula_that_it_is_known_by(name: str, formula: str, smiles: str):
    molecule = Chem.MolFromSmiles(smiles)
    assert CalcMolFormula(molecule) == formula
    picture = np.asarray(Image.open(io.BytesIO(figures.molecule(smiles))))
    assert (picture < 140).any() and picture.shape[1] < 2 * Style().column_pt


def test_molecules_are_there_once():
    assert len({name for name, *_ in MOLECULES}) == len(MOLECULES)
    assert len({Chem.CanonSmiles(smiles) for *_, smiles in MOLECULES}) == len(MOLECULES)


@pytest.mark.parametrize(("name", "latex"), FORMULAS)
def test_every_formula_can_be_drawn(name: str, latex: str):
    assert (np.asarray(Image.open(io.BytesIO(figures.formula(latex))).convert("L")) < 140).any()


@pytest.mark.parametrize("language", sorted(languages.TEXTS))
def test_every_name_and_sentence_can_be_set_in_the_font_of_its_language(language: Language):
    texts = [*languages.TEXTS[language], *languages.TITLES[language], *languages.HEADS[language]]
    for code in languages.TERRITORIES:
        texts += [languages.name_of(language, code), languages.currency_of(language, code)]
        texts.append(languages.languages_of(language, code))
    assert all(text.strip() for text in texts) and language in FONTS
    check_glyphs(texts, Style(language=language))


def test_names_of_countries_are_those_of_the_language():
    assert [languages.name_of(language, "JP") for language in ("zh", "ja", "ar")] == ["日本", "日本", "اليابان"]
    assert [languages.currency_of(language, "US") for language in ("zh", "ja")] == ["美元", "米ドル"]
    assert languages.languages_of("zh", "CH") == "德语、瑞士德语、法语和意大利语"
