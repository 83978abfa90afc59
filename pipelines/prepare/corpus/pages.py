"""Document pages with their layout, and interleaved documents with charts.

Documents: real READMEs, licences and data-set descriptions, typeset here with exact boxes (layout JSONL).
Interleaved: descriptions of scikit-learn's data sets with charts of their tables, and sequences of pictures, as
OBELICS writes them: `images` and `texts` of one length, one of the two null at each place.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from pipelines.prepare.corpus.draw import COLOURS, article, jpeg, one_icon, png
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.sources import SourceFile, Split, draw_split, package_folder, sha256
from pipelines.prepare.corpus.texts import chunks
from pipelines.prepare.corpus.typeset import Block, Laid, blocks_of, pages_of

PAGE_SIZES = ((224, 224), (196, 252), (252, 196))
TABLES = {
    "iris": ("iris.csv", "load_iris"),
    "wine": ("wine_data.csv", "load_wine"),
    "breast cancer": ("breast_cancer.csv", "load_breast_cancer"),
    "diabetes": ("diabetes_data_raw.csv.gz", "load_diabetes"),
    "linnerud": ("linnerud_exercise.csv", "load_linnerud"),
}
"""Name -> its file, and the function of sklearn.datasets that reads it."""
CHART_COLOURS = ("red", "green", "blue", "pink", "cyan", "black")


@dataclass(frozen=True)
class Table:
    name: str
    columns: list[str]
    values: np.ndarray
    """float64[rows, columns]"""
    description: str


def table_files(seed: int) -> list[SourceFile]:
    split_of = draw_split(TABLES, 0.25, seed)
    folder = package_folder("sklearn") / "datasets" / "data"
    return [
        SourceFile(
            f"sklearn/datasets/data/{file}",
            "table",
            name,
            "BSD-3-Clause",
            sha256((folder / file).read_bytes()),
            split_of[name],
        )
        for name, (file, _) in TABLES.items()
    ]


@cache
def _table(name: str) -> Table:
    from sklearn import datasets  # 2 s: only where a corpus is made

    found = getattr(datasets, TABLES[name][1])()
    return Table(name, [str(column) for column in found.feature_names], np.asarray(found.data, float), found.DESCR)


def tables(seed: int, split: Split) -> list[Table]:
    return [_table(file.name) for file in table_files(seed) if file.split == split]


def chart(rng: random.Random, table: Table, width: int, height: int) -> tuple[Image.Image, str]:
    """A bar chart, histogram or scatter plot in one colour, and the sentence that says what it shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colour, kind = rng.choice(CHART_COLOURS), rng.choice(("bar", "histogram", "scatter"))
    figure = Figure(figsize=(width / 84, height / 84), dpi=84)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ink = "#{:02x}{:02x}{:02x}".format(*COLOURS[colour])
    first, second = rng.sample(range(len(table.columns)), 2)
    if kind == "bar":
        chosen = sorted(rng.sample(range(len(table.columns)), min(4, len(table.columns))))
        axes.bar([str(number + 1) for number in range(len(chosen))], table.values[:, chosen].mean(0), color=ink)
        text = f"a bar chart in {colour}: the mean of {', '.join(table.columns[column] for column in chosen)}."
    elif kind == "histogram":
        axes.hist(table.values[:, first], bins=12, color=ink)
        text = f"a histogram in {colour}: how often each {table.columns[first]} occurs."
    else:
        axes.scatter(table.values[:, first], table.values[:, second], s=6, color=ink)
        text = f"a scatter plot in {colour}: {table.columns[second]} over {table.columns[first]}."
    axes.tick_params(labelsize=6, length=2, pad=1)
    figure.tight_layout(pad=0.3)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB").resize((width, height)), text


# ---------------------------------------------------------------- documents


def write_documents(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("documents", split)
    count = folder.count(280 if split == "train" else 40, 8)
    pages: list[tuple[str, Image.Image, list[Laid]]] = []
    for file in rng.sample(found.texts, len(found.texts)):
        if len(pages) >= 2 * count:
            break
        width, height = rng.choice(PAGE_SIZES)
        blocks = list(blocks_of(file.text))[:12]
        if split == "train" or file.file.path.endswith(".rst"):
            blocks = _with_chart(rng, blocks, tables(folder.seed, split))
        pages += [(file.file.path, page, laid) for page, laid in pages_of(blocks, width, height)]
    rng.shuffle(pages)
    rows: list[dict] = []
    while pages and len(rows) < count:
        name, image, laid = pages.pop()
        group = [(image, laid)]
        if len(rows) % 8 == 7 and pages:  # a document of two pages
            group.append(pages.pop()[1:])
        identity = f"{split}-{len(rows):04d}"
        rows.append(
            {
                "id": f"page-{identity}",
                "document": name,
                "pages": [
                    {
                        "image": folder.media(f"documents/{identity}-{number}.png", png(page.quantize(64))),
                        "width": page.width,
                        "height": page.height,
                        "blocks": [item.as_json() for item in blocks],
                    }
                    for number, (page, blocks) in enumerate(group)
                ],
            }
        )
    folder.jsonl("documents", split, rows)


def _with_chart(rng: random.Random, blocks: list[Block], found: list[Table]) -> list[Block]:
    """One chart somewhere among the blocks of every third document."""
    if not found or rng.random() > 0.34:
        return blocks
    picture, text = chart(rng, rng.choice(found), 140, 84)
    at = rng.randint(0, len(blocks))
    return [*blocks[:at], Block("chart", text, picture), *blocks[at:]]


# ---------------------------------------------------------------- interleaved


def write_interleaved(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("interleaved", split)
    charted = tables(folder.seed, split)
    texts = {table.name: list(chunks(table.description, 200)) for table in charted}
    rows = []
    for number in range(folder.count(320 if split == "train" else 40, 8)):
        identity = f"{split}-{number:04d}"
        parts: list[Image.Image | str] = []
        if number % 3 == 0:
            table = rng.choice(charted)
            parts.append(rng.choice(texts[table.name]))
            for _ in range(rng.choice((1, 2))):
                picture, text = chart(rng, table, 168, 126)
                parts += [picture, text]
        else:
            for order in ("first", "then", "last")[: rng.choice((2, 3))]:
                picture, placed, _ = one_icon(rng, found.photos, found.icons, side=84, share=(0.5, 0.65))
                parts += [picture, f"{order} comes {article(placed.label)}."]
        images = [
            None if isinstance(part, str) else folder.media(f"interleaved/{identity}-{place}.jpg", jpeg(part))
            for place, part in enumerate(parts)
        ]
        written = [part if isinstance(part, str) else None for part in parts]
        rows.append({"id": f"interleaved-{identity}", "images": images, "texts": written})
    folder.jsonl("interleaved", split, rows)
