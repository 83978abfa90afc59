"""QwenVL HTML: the words of every role, parsed again."""

from __future__ import annotations

import pytest

from tests.prepare.through import tags
from trainer.data.page import ROLES, page_html
from trainer.data.sample import Box, Object


def a_block(role: str, box: tuple[float, float, float, float], content: str | None = None) -> Object:
    return Object(label=role, at=Box(xyxy=box), role=role, content=content)


def written(*objects: Object) -> str:
    return page_html(objects, lambda thing: thing.at.xyxy, lambda box: " ".join(f"{value:.0f}" for value in box))  # type: ignore[union-attr]


def test_every_role_is_written_as_the_report_has_it():
    table = '<table class="x"><tr><td colspan="2">a &lt; b</td></tr></table>'
    page = written(
        a_block("h1", (0, 0, 9, 1), "T & t"),
        a_block("li", (1, 1, 5, 2), "one"),
        a_block("li", (0, 2, 9, 3), "<two>"),
        a_block("table", (0, 3, 9, 4), table),
        a_block("chart", (0, 4, 9, 5), table),
        a_block("chart", (0, 5, 9, 6), "bars"),
        a_block("image caption", (0, 6, 9, 7), "a cat"),
        a_block("image ocr", (0, 7, 9, 8), "EXIT"),
        a_block("formula", (0, 8, 9, 9), "a<b"),
        a_block("music sheet", (0, 9, 9, 10), "X:1\nK:C\nCDE"),
        a_block("chemical formula", (0, 10, 9, 11), "CCO"),
        a_block("image caption", (0, 11, 9, 12)),
    )
    want = """<html><body>
<h1 data-bbox="0 0 9 1">T &amp; t</h1>
<ul data-bbox="0 1 9 3">
<li data-bbox="1 1 5 2">one</li>
<li data-bbox="0 2 9 3">&lt;two&gt;</li>
</ul>
<table data-bbox="0 3 9 4"><tr><td colspan="2">a &lt; b</td></tr></table>
<div class="chart" data-bbox="0 4 9 5"><img data-bbox="0 4 9 5"/><table><tr><td colspan="2">a &lt; b</td></tr>\
</table></div>
<div class="chart" data-bbox="0 5 9 6"><img data-bbox="0 5 9 6"/><p>bars</p></div>
<div class="image caption" data-bbox="0 6 9 7"><img data-bbox="0 6 9 7"/><p>a cat</p></div>
<div class="image ocr" data-bbox="0 7 9 8"><img data-bbox="0 7 9 8"/><p>EXIT</p></div>
<div class="formula" data-bbox="0 8 9 9"><img data-bbox="0 8 9 9"/><div>a&lt;b</div></div>
<div class="music sheet" format="abc notation" data-bbox="0 9 9 10"><img data-bbox="0 9 9 10"/><div>X:1
K:C
CDE</div></div>
<div class="chemical formula" format="smile" data-bbox="0 10 9 11"><img data-bbox="0 10 9 11"/><div>CCO</div></div>
<div class="image caption" data-bbox="0 11 9 12"><img data-bbox="0 11 9 12"/></div>
</body></html>"""
    assert page == want
    found = tags(page)
    assert [(tag.kind, tag.text) for tag in found if tag.name == "div"][4:6] == [
        ("formula", "a<b"),
        ("music sheet abc notation", "X:1\nK:C\nCDE"),
    ]


@pytest.mark.parametrize("role", ROLES)
def test_what_looks_like_html_in_a_text_stays_text(role):
    found = tags(written(a_block(role, (0, 0, 9, 9), '</p><script>&amp;"</script>')))
    assert '</p><script>&amp;"</script>' in [tag.text for tag in found]


def test_a_role_without_words_is_an_error():
    with pytest.raises(ValueError, match="'button'"):
        written(a_block("button", (0, 0, 9, 9), "x"))
