"""Scores as files: the whole way of their pages to tokens and back, packed and broken ones."""

from __future__ import annotations

import html
import io
import xml.etree.ElementTree as ET
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli.main import main
from pipelines.prepare.formats import format_of
from pipelines.prepare.formats.rows import Bad, BadRow, Draft
from pipelines.prepare.scores import draw
from pipelines.prepare.scores.address import address
from tests.prepare.music import FIRST, Sound, heard, note, score
from tests.prepare.test_page_formats import learnt, told
from tests.prepare.test_scores import CASES, HEAD, direction, lyric, same_music
from tests.prepare.through import made, only, read
from trainer.errors import DataError, MediaError


def packed(text: str, *, container: str | None = None) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        named = '<container><rootfiles><rootfile full-path="score.xml"/></rootfiles></container>'
        archive.writestr("META-INF/container.xml", container or named)
        archive.writestr("score.xml", text)
    return sink.getvalue()


def damaged(archive: bytes) -> bytes:
    """The compressed bytes of the score are others; the directory of the archive is whole."""
    begin = archive.index(b"score.xml") + len(b"score.xml")
    return archive[:begin] + bytes(byte ^ 0x5A for byte in archive[begin : begin + 40]) + archive[begin + 40 :]


LONG = score([FIRST + note("G4", 8) + note("A4", 8), *[note("B4", 2) * 8] * 119, note("D5", 16)])


def test_the_pages_of_a_score_go_all_the_way_to_tokens_and_their_abc_is_that_of_their_bars(tmp_path: Path):
    (tmp_path / "long.musicxml").write_text(LONG)
    rows = read("musicxml", tmp_path / "long.musicxml")
    assert len(rows) == 2 and [row.id for row in rows if isinstance(row, Draft)] == [
        "long.musicxml#score=1", "long.musicxml#score=2",
    ]  # fmt: skip
    bars = []
    for row in made(rows, "document"):
        assert not isinstance(row, Bad), row
        sample, files = row
        [(role, box, text)] = told(sample)
        picture = np.asarray(Image.open(io.BytesIO(files[0])))
        left, top, right, bottom = map(int, box)
        assert role == "music sheet" and picture.shape == (sample.media[0].height, sample.media[0].width)  # type: ignore[union-attr]
        inside = picture[top:bottom, left:right]
        assert max(inside[0].min(), inside[-1].min(), inside[:, 0].min(), inside[:, -1].min()) < 250
        outside = picture.copy()
        outside[top:bottom, left:right] = 255
        assert outside.min() >= 250
        bars += heard(text, "abc")
        for [page] in learnt(sample, files, tmp_path / str(len(bars))):
            assert (page.name, page.kind) == ("div", "music sheet abc notation")
            assert heard(page.text, "abc") == heard(text, "abc")
    assert same_music(bars, heard(LONG, "xml")) and len(bars) == 121


def test_a_packed_score_is_the_same_as_a_plain_one(tmp_path: Path):
    text = score(CASES["marks"][0])
    (tmp_path / "a.musicxml").write_text(text)
    (tmp_path / "b.mxl").write_bytes(packed(text))
    (tmp_path / "c.xml").write_text(text)
    found = [only(read("musicxml", tmp_path / name), "document") for name in ("a.musicxml", "b.mxl", "c.xml")]
    assert len({told(sample)[0] for sample, _ in found}) == 1 and len({files[0] for _, files in found}) == 1
    assert told(found[0][0])[0][2] == HEAD + CASES["marks"][1]
    assert {format_of("auto", str(tmp_path / name)) for name in ("a.musicxml", "b.mxl", "c.xml")} == {"musicxml"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad-xml"),
        (score(CASES["beams"][0]).encode()[:-40], "bad-xml"),
        (b"<html/>", "wrong-form"),
        (score(CASES["beams"][0]).replace("score-partwise", "score-timewise").encode(), "wrong-form"),
        (b"<score-partwise><part-list/></score-partwise>", "wrong-form"),
        (packed(score(CASES["beams"][0]))[:-30], "bad-score"),
        (damaged(packed(score(CASES["beams"][0]))), "bad-score"),
        (packed("", container="<container/>"), "bad-score"),
        (packed("", container='<container><rootfile full-path="no.xml"/></container>'), "bad-score"),
        (score([FIRST + note("G4", 16)], [FIRST + note("G4", 16)] * 2).encode(), "wrong-form"),
        (score([FIRST + direction("<words>\ue000</words>") + note("G4", 16)]).encode(), "no-glyph"),
        (score([FIRST + direction("<words>a \ue0a4 b</words>") + note("G4", 16)]).encode(), "no-glyph"),
    ],
)
def test_a_broken_score_is_one_bad_row(data: bytes, reason: str, tmp_path: Path):
    (tmp_path / "a.mxl").write_bytes(data)
    [row] = read("musicxml", tmp_path / "a.mxl")
    assert isinstance(row, Bad) and row.reason == reason, row


def test_a_page_is_the_same_in_every_thread():
    """Rows are described in threads, and verovio forgets in them where its fonts are."""
    [page] = draw.pages_of(ET.fromstring(score(CASES["marks"][0])))
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: draw.pages_of(ET.fromstring(score(CASES["marks"][0]))), range(8)))
    assert others == [[page]] * 8


def test_scores_become_shards_that_a_person_can_check(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.musicxml").write_text(score(CASES["marks"][0]))
    (tmp_path / "in" / "b.mxl").write_bytes(packed(LONG))
    assert main(["data", "ingest", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    assert main(["data", "preview", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    shown = (tmp_path / "page.html").read_text()
    assert "music sheet" in shown and CASES["marks"][1].split(" |")[0] in html.unescape(shown)


def test_a_score_too_large_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draw, "LARGEST_BYTES", 10_000)
    with pytest.raises(BadRow, match=r"at most 10000 bytes in score\.xml"):
        draw.score_xml(packed("<a>" + " " * 20_000 + "</a>"))


def test_words_of_songs_are_drawn_in_latin_and_chinese():
    latin, chinese = (
        draw.pages_of(ET.fromstring(score([FIRST + note("G4", 16, lyric(word))])))[0] for word in ("là", "春天")
    )
    silent = draw.pages_of(ET.fromstring(score([FIRST + note("G4", 16)])))[0]
    assert latin.ink[3] > silent.ink[3] and chinese.ink[3] > silent.ink[3] and latin.png != chinese.png


def test_no_such_file_and_no_such_page(tmp_path: Path):
    with pytest.raises(DataError, match="no such annotation file"):
        read("musicxml", tmp_path / "none.musicxml")
    (tmp_path / "a.musicxml").write_text(score(CASES["beams"][0]))
    with pytest.raises(MediaError, match="no such page"):
        draw.page_png(f"{tmp_path}/a.musicxml#score=2")
    (tmp_path / "b.musicxml").write_text("<html/>")
    with pytest.raises(MediaError):
        draw.page_png(f"{tmp_path}/b.musicxml#score=1")


@pytest.mark.parametrize(
    ("old", "new", "got"),
    [
        ("<beat-type>4", "<beat-type>0", "4/0"),
        ("<part-list>", f"<work>{'<a>' * 50_000}{'</a>' * 50_000}</work><part-list>", "RecursionError"),
    ],
)
def test_a_row_of_another_format_that_names_a_score_that_is_refused_is_no_end(
    old: str, new: str, got: str, tmp_path: Path
):
    text = score(CASES["beams"][0])
    assert text.count(old) == 1
    (tmp_path / "a.xml").write_text(text.replace(old, new))
    with pytest.raises(MediaError, match=got):
        draw.page_png(address(str(tmp_path / "a.xml"), 1))


def test_what_verovio_hears_tells_notes_apart():
    [(bar, _, _)] = heard(score([FIRST + note("G4", 8) + note("r", 8)]), "xml")
    assert bar == [
        Sound("note", "g4", ("2", ""), "", "", False, ()), Sound("rest", "", ("2", ""), "", "", False, ()),
    ]  # fmt: skip
