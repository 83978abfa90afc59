"""Pictures in synthetic pages, each drawn from the very text that the page's HTML has: formulas from LaTeX and charts
from tables by matplotlib, molecules from SMILES by RDKit, scores from MusicXML by verovio (whose ABC is the text).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.formats.tables import Cell

PT = 2
"""Pixels a point of molecules and scores: those of the page."""
BOND_PX = 26
SCORE_SCALE = 40


def formula(latex: str) -> bytes:
    """matplotlib's subset of LaTeX. Raises ValueError: outside of it, or a character that its fonts may lack."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not latex.isascii():
        raise ValueError(f"a formula in other characters than LaTeX has: {latex!r}")
    figure = Figure(figsize=(0.1, 0.1))
    FigureCanvasAgg(figure)
    figure.text(0, 0, f"${latex}$", fontsize=14)
    sink = io.BytesIO()
    figure.savefig(sink, dpi=200, bbox_inches="tight", pad_inches=0.03)
    return sink.getvalue()


def chart(rows: Sequence[Sequence[Cell]], font: Path | None) -> bytes:
    """Bars from a table: a heading row, then names and numbers. `font`: None is matplotlib's own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure(figsize=(3.2, 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heading, *body = rows
    axes.bar([cells[0].content for cells in body], [float(cells[1].content) for cells in body])
    axes.set_xlabel(heading[0].content)
    axes.set_ylabel(heading[1].content)
    if font is not None:
        named = FontProperties(fname=str(font))
        for label in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_fontproperties(named)
    sink = io.BytesIO()
    figure.savefig(sink, dpi=160)
    return sink.getvalue()


def molecule(smiles: str) -> bytes:
    """A structural formula in black, every bond of one length. Raises ValueError: no SMILES that RDKit reads."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.Draw import rdMolDraw2D

    with rdBase.BlockLogs():
        found = Chem.MolFromSmiles(smiles)
    if found is None or not found.GetNumAtoms():
        raise ValueError(f"no SMILES that RDKit reads: {smiles!r}")
    canvas = rdMolDraw2D.MolDraw2DCairo(-1, -1)
    options = canvas.drawOptions()
    options.useBWAtomPalette()
    options.fixedBondLength = BOND_PX
    options.bondLineWidth = 2
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, found)
    canvas.FinishDrawing()
    return _cropped(canvas.GetDrawingText())


def score(musicxml: str, width_pt: float) -> tuple[str, bytes]:
    """(ABC, picture at most that wide). Raises ValueError: what scores/score.py refuses, or more than one page."""
    from pipelines.prepare.scores import draw
    from pipelines.prepare.scores.abc import abc_of
    from pipelines.prepare.scores.score import read_score

    root = draw.score_xml(musicxml.encode())
    found = read_score(root)
    pages = draw.pages_of(root, width=round(width_pt * PT * 100 / SCORE_SCALE), scale=SCORE_SCALE)
    if len(pages) > 1:
        raise BadRow("bad-score", "a score of one page", f"{len(pages)} pages")
    return abc_of(found, pages[0].systems), _cropped(pages[0].png)


def _cropped(png: bytes) -> bytes:
    """To its ink: the box of the picture is that of what is drawn."""
    picture = Image.open(io.BytesIO(png)).convert("L")
    inked = np.asarray(picture) < 250
    down, across = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    sink = io.BytesIO()
    picture.crop((int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)).save(sink, "PNG")
    return sink.getvalue()
