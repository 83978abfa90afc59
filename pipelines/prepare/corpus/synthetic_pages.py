"""Pages of the built-in corpus that synthetic.py sets: scores with their ABC, molecules with their SMILES, formulas and
charts, handwriting (a font's), Chinese, Japanese and Arabic. A corpus of its own, corpus://synthetic/pages.jsonl, in
the format `layout`, made only where a recipe names it.

Held out: tunes of another seed, and molecules, countries, formulas, texts and tables that no page of training has; the
sentences of languages.py and the fonts are in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipelines.prepare.corpus import languages
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.molecules import MOLECULES
from pipelines.prepare.corpus.pages import tables
from pipelines.prepare.corpus.sources import SourceFile, Split, draw_split, package_folder, sha256
from pipelines.prepare.corpus.synthetic import FONTS, HANDWRITING, Language, Part, Style, pages_of, row, score_part
from pipelines.prepare.corpus.texts import chunks
from pipelines.prepare.corpus.tunes import tune
from pipelines.prepare.formats.tables import Cell

COUNTS = {"train": 240, "held_out": 40}
HEIGHTS_PT = (210, 252, 294)
STYLE = Style(width_pt=210, height_pt=252, size_pt=8, margin_pt=14)
"""Sides are multiples of 14 pt, which are 28 pixels: what Qwen2.5-VL merges into one token."""
FORMULAS = (
    ("Pythagoras", "a^2 + b^2 = c^2"),
    ("Roots of a quadratic equation", r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}"),
    ("Euler's identity", r"e^{i\pi} + 1 = 0"),
    ("Energy at rest", "E = mc^2"),
    ("Gravitation", r"F = G\frac{m_1 m_2}{r^2}"),
    ("Sum of the first numbers", r"\sum_{k=1}^{n} k = \frac{n(n+1)}{2}"),
    ("Geometric series", r"\sum_{k=0}^{\infty} q^k = \frac{1}{1-q}"),
    ("The derivative", r"f'(x) = \lim_{h \to 0} \frac{f(x+h) - f(x)}{h}"),
    ("The normal density", r"\frac{1}{\sigma\sqrt{2\pi}} e^{-\frac{(x-\mu)^2}{2\sigma^2}}"),
    ("Bayes' theorem", r"P(A|B) = \frac{P(B|A)\,P(A)}{P(B)}"),
    ("Ideal gas", "pV = nRT"),
    ("Ohm's law", "U = R I"),
    ("Uncertainty", r"\Delta x \, \Delta p \geq \frac{\hbar}{2}"),
    ("Integration by parts", r"\int u\,dv = uv - \int v\,du"),
    ("Binomial coefficient", r"\binom{n}{k} = \frac{n!}{k!\,(n-k)!}"),
    ("Law of cosines", r"c^2 = a^2 + b^2 - 2ab\cos\gamma"),
)
FONT_LICENCES = {
    "matplotlib": "Bitstream Vera and public domain (DejaVu)",
    "matplotlib_fontja": "IPA Font License v1.0",
    "notojp_matplotlib": "OFL-1.1",
    "fontpkg_caveat": "OFL-1.1",
}


@dataclass(frozen=True)
class _Found:
    """What pages of one split are made of."""

    rng: random.Random
    seed: int
    split: Split
    words: list[str]
    """Paragraphs of English."""

    def choice(self, items: tuple) -> tuple:
        """Of named things, one of this split."""
        split_of = draw_split((name for name, *_ in items), 0.15, self.seed)
        return self.rng.choice([item for item in items if split_of[item[0]] == self.split])


def write_synthetic(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("synthetic", split)
    words = [chunk for file in found.texts for chunk in chunks(file.text, 160)]
    given = _Found(rng, folder.seed, split, words)
    rows = []
    for number in range(folder.count(COUNTS[split], len(KINDS))):
        kind = list(KINDS)[number % len(KINDS)]
        style = replace(STYLE, height_pt=rng.choice(HEIGHTS_PT))
        parts, style = KINDS[kind](given, style)
        pages = pages_of(parts, style)
        name = f"{kind}-{split}-{number:04d}"
        images = [folder.media(f"synthetic/{name}-{at}.png", page.png) for at, page in enumerate(pages)]
        rows.append(row(name, images, pages, style))
    folder.jsonl("pages", split, rows)


def font_files() -> list[SourceFile]:
    """Fonts of these pages; they count as training's, and are in both splits."""
    found = []
    for path in sorted({path for _, path in (*FONTS.values(), HANDWRITING)}):
        package, _, inside = path.partition("/")
        data = (package_folder(package) / inside).read_bytes()
        found.append(SourceFile(path, "font", inside.rpartition("/")[2], FONT_LICENCES[package], sha256(data), "train"))
    return found


# ---------------------------------------------------------------- kinds of pages

Made = tuple[list[Part], Style]


def _score(found: _Found, style: Style) -> Made:
    made = tune(found.rng)
    parts = [Part("h2", made.title), score_part(made.musicxml, style)]
    return [*parts, Part("p", found.rng.choice(found.words))], style


def _molecule(found: _Found, style: Style) -> Made:
    name, formula, smiles = found.choice(MOLECULES)
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import CalcExactMolWt

    molecule = Chem.MolFromSmiles(smiles)
    facts = (("Formula", formula), ("Exact mass", f"{CalcExactMolWt(molecule):.3f}"),
             ("Rings", str(molecule.GetRingInfo().NumRings())))  # fmt: skip
    table = Part("table", rows=[(Cell(about, heading=True), Cell(value)) for about, value in facts])
    drawn = [Part("chemical formula", smiles), table]
    found.rng.shuffle(drawn)
    return [Part("h2", name), *drawn], style


def _formulas(found: _Found, style: Style) -> Made:
    name, latex = found.choice(FORMULAS)
    table = found.rng.choice(tables(found.seed, found.split))
    columns = sorted(found.rng.sample(range(len(table.columns)), 3))
    means = [(Cell(str(at)), Cell(f"{table.values[:, at].mean():.2f}")) for at in columns]
    bars = Part("chart", rows=[(Cell(f"column of {table.name}"), Cell("mean")), *means])
    named = [Part("li", f"{at}: {table.columns[at]}") for at in columns]
    return [Part("h2", name), Part("formula", latex), bars, *named], style


def _handwriting(found: _Found, style: Style) -> Made:
    parts = [Part("p", words) for words in found.rng.sample(found.words, 2)]
    return parts, replace(style, size_pt=found.rng.choice((11, 12, 14)), height_pt=HEIGHTS_PT[-1], handwriting=True)


def _language(language: Language) -> Callable[[_Found, Style], Made]:
    def page(found: _Found, style: Style) -> Made:
        rng, titles = found.rng, languages.TITLES[language]
        codes = rng.sample(languages.territories(found.seed, found.split), 5)
        named = {code: languages.name_of(language, code) for code in codes}
        kind = rng.randrange(len(titles))
        if kind == 0:
            head = tuple(Cell(word, heading=True) for word in languages.HEADS[language])
            rows = [(Cell(named[code]), Cell(languages.currency_of(language, code))) for code in codes]
            parts = [Part("table", rows=[head, *rows])]
        elif kind == 1:
            parts = [Part("li", languages.date_of(language, rng)) for _ in range(5)]
        elif kind == 2:
            order = rng.sample(languages.TEXTS[language], 6)
            between = " " if language == "ar" else ""
            parts = [Part("p", between.join(order[at : at + 2])) for at in (0, 2, 4)]
        else:
            says = languages.SAYS[language]
            parts = [Part("p", says.format(named[code], languages.languages_of(language, code))) for code in codes]
        return [Part("h2", titles[kind]), *parts], replace(style, language=language, size_pt=9)

    return page


KINDS: dict[str, Callable[[_Found, Style], Made]] = {
    "score": _score,
    "molecule": _molecule,
    "formulas": _formulas,
    "handwriting": _handwriting,
    "chinese": _language("zh"),
    "japanese": _language("ja"),
    "arabic": _language("ar"),
}
"""Kinds of pages, in turn."""
