"""Conversations: domains by rules and by a judge, filters with thresholds of each domain, planted faults with recall
and precision, and what is kept beside the shards so that another threshold asks and computes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.curate import answer_rules
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.conversation_judge import CRITERIA, parse_label, parse_qualities
from pipelines.prepare.curate.domain_rules import classify
from pipelines.prepare.curate.instructions import RULES
from pipelines.prepare.curate.step import curate
from pipelines.prepare.stored import statistics, statistics_text
from tests.prepare.curate.builders import a_document, a_photo, a_recipe, prose, write_source
from tests.prepare.curate.conversations import (
    DEFECTS,
    PHOTO,
    Document,
    a_chat,
    asked_chats,
    freely_asked_chats,
    sound_answer,
)
from tests.prepare.curate.test_scores import Server, server  # noqa: F401 (a fixture)
from trainer.curation import Limits
from trainer.data import kept
from trainer.data.shards import Source
from trainer.domains import names, sub_domains
from trainer.errors import DataError, RecipeError

DOMAIN_OF = {one.name: one.domain for one in sub_domains()}
PROSE = prose(3, 40)


def curated(out: Path, instructions: str, documents: Iterable[Document], work: Work | None = None) -> dict[str, Any]:
    if not (out / "data").exists():
        renamed = [(sample.model_copy(update={"id": f"d{n}"}), files) for n, (sample, files) in enumerate(documents)]
        write_source(out, renamed, shard_bytes=200_000)
    return curate(a_recipe(f"{{instructions: {instructions}}}"), str(out), work)["web"]


def reasons(out: Path) -> list[str]:
    source = Source.open(str(out / "data/sources/web/train"))
    return [one for shard in range(source.num_shards) for one in kept.reasons(source, shard)]


# ---------------------------------------------------------------- domains


def test_there_are_eight_domains_and_thirty_sub_domains_and_the_published_names_are_marked():
    assert len(set(DOMAIN_OF.values())) == 8 and len(sub_domains()) == len(DOMAIN_OF) == 30
    assert len(set(names())) == 38
    published = {one.name for one in sub_domains() if one.published}
    assert published == {"Code_Debugging", "Code_Generation", "Code_Translation", "Code_Understanding"}
    assert {one.needs for one in sub_domains()} == {"", "image", "video"}
    assert all(one.about and one.words for one in sub_domains())


def accuracy(chats: list[tuple[str, Document]]) -> tuple[float, float]:
    """Share of right (sub-domains, domains)."""
    told = [(classify(sample), want) for want, (sample, _) in chats]
    return (
        sum(name == want for (_, name), want in told) / len(told),
        sum(domain == DOMAIN_OF[want] for (domain, _), want in told) / len(told),
    )


def test_words_tell_domains_where_questions_say_them_and_seldom_where_they_do_not(capsys: pytest.CaptureFixture[str]):
    expected, free = accuracy(asked_chats()), accuracy(freely_asked_chats())
    with capsys.disabled():
        print(f"\ndomain rules: of 60 {expected[0]:.0%} sub-domains; freely worded, of 30 {free[0]:.0%} sub-domains, "
              f"{free[1]:.0%} domains")  # fmt: skip
    assert expected[0] >= 0.95 and expected[1] >= 0.95
    assert 0.2 <= free[0] < 0.6 and free[1] >= 0.4, "the README says what the baseline is worth"


def test_what_a_sample_holds_counts_and_a_sub_domain_of_pictures_needs_one():
    assert classify(a_chat("x", "How many are there?", "Three.", pictures=[PHOTO])[0])[1] == "Counting"
    assert classify(a_chat("x", "How many are there?", "Three.")[0])[0] != "Vision"
    assert classify(a_chat("x", "And this?", "A walk.", video=True)[0])[1] == "Video_Understanding"
    assert classify(a_chat("x", "Please.", "```python\nx = 1\n```")[0])[1] == "Code_Generation"
    assert classify(a_chat("x", "这段代码有什么用?", "没有用。")[0])[1] == "Code_Understanding"
    assert classify(a_document("x", PROSE)[0]) == ("Conversation", "Small_Talk"), "nothing is asked"


# ---------------------------------------------------------------- rules

CASES: dict[str, tuple[Any, str, str]] = {
    "max_repetition": (0.2, PROSE, f"{PROSE} {PROSE}"),
    "max_incomplete": (0, PROSE, f"{PROSE} It was"),
    "max_malformed": (0, '{"a": [1, 2]}', '{"a": [1, 2}'),
    "max_harmful_words": (0, f"{PROSE} They killed the lights.", f"{PROSE} Just  kill YOURSELF."),
}


@pytest.mark.parametrize("name", CASES)
def test_a_filter_keeps_and_drops(name: str, tmp_path: Path):
    threshold, good, bad = CASES[name]
    documents = [a_chat("g", "Tell me.", good), a_chat("b", "Tell me.", "Yes.", "And then?", bad)]
    found = curated(tmp_path, f"{{limits: {{{name}: {threshold}}}}}", documents)
    assert found["kept_examples"] == ["d0"] and found["dropped"] == {f"instructions.{name}": 1}
    [example] = found["examples"][f"instructions.{name}"]
    assert example["id"] == "d1" and example["threshold"] == f"at most {threshold:g}"


def test_the_rows_of_a_table_are_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    looked = []
    cells = answer_rules._cells
    monkeypatch.setattr(answer_rules, "_cells", lambda row: looked.append(row) or cells(row))
    table = "|---|---|\n" * 2000
    assert answer_rules.malformed(table) == 0 and len(looked) <= 2001
    assert answer_rules.malformed(f"{table}\n{table}| a |\n") == 1, "the second one has a row of one cell"


def test_every_rule_has_a_case_and_planted_faults():
    assert set(CASES) == set(DEFECTS) == {f"max_{name}" for name in RULES} == set(Limits.model_fields) - {"min", "max"}


ALL = "{limits: {max_repetition: 0.2, max_incomplete: 0, max_malformed: 0, max_harmful_words: 0}}"


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_faults_are_found_and_sound_answers_stay(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Recall and precision of each filter alone over 240 conversations, a quarter of them with its fault."""
    make: Callable[[int], str] = DEFECTS[name]
    documents = [
        a_chat("x", "Tell me.", make(number) if number % 4 == 0 else sound_answer(number)) for number in range(240)
    ]
    threshold = CASES[name][0]
    curated(tmp_path, f"{{limits: {{{name}: {threshold}}}}}", documents)
    dropped = {row for row, reason in enumerate(reasons(tmp_path)) if reason}
    planted = set(range(0, 240, 4))
    recall, precision = len(dropped & planted) / len(planted), len(dropped & planted) / max(len(dropped), 1)
    with capsys.disabled():
        print(f"\ninstructions.{name}: recall {recall:.1%}, precision {precision:.1%} (60 planted of 240)")
    assert recall >= 0.95 and precision >= 0.95


def test_all_rules_together_drop_the_planted_and_nothing_else(tmp_path: Path):
    makes = list(DEFECTS.values())
    documents = [a_chat("x", "Tell me.", makes[n // 4 % 4](n) if n % 4 == 0 else sound_answer(n)) for n in range(160)]
    found = curated(tmp_path, ALL, documents)
    assert {row for row, reason in enumerate(reasons(tmp_path)) if reason} == set(range(0, 160, 4))
    assert sum(found["dropped"].values()) == 40 and found["kept"] == 120


def test_a_list_of_ones_own_takes_the_place_of_the_shipped_one(tmp_path: Path):
    (tmp_path / "words.txt").write_text("# mine\nred apple\n")
    asked = f"{{limits: {{max_harmful_words: 0}}, harmful_words: {tmp_path / 'words.txt'}}}"
    found = curated(tmp_path, asked, [a_chat("a", "?", "A red apple."), a_chat("b", "?", "kill yourself")])
    assert found["kept_examples"] == ["d1"]
    with pytest.raises(DataError, match=r"instructions\.harmful_words"):
        curated(tmp_path, "{harmful_words: /nowhere/x.txt}", [])


# ---------------------------------------------------------------- thresholds of each domain

MIXED = [
    a_chat("a", "Write a function that adds.", f"{PROSE} {PROSE}"),
    a_chat("b", "Find the bug in this code.", f"{PROSE} {PROSE}"),
    a_chat("c", "What is the capital of Peru?", f"{PROSE} {PROSE}"),
    a_chat("d", "What is the capital of Peru?", "Lima."),
]


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ("{limits: {max_repetition: 0.2}}", ["d3"]),
        ("{limits: {max_repetition: 0.2}, of_domain: {Coding: {max_repetition: 0.9}}}", ["d0", "d1", "d3"]),
        (
            "{limits: {max_repetition: 0.2}, of_domain: {Coding: {max_repetition: 0.9}, Code_Debugging: "
            "{max_repetition: 0.1}}}",
            ["d0", "d3"],
        ),
        ("{limits: {max_repetition: 0.2}, of_domain: {Knowledge: {max_repetition: null}}}", ["d2", "d3"]),
        ("{of_domain: {Coding: {max_repetition: 0.2}}}", ["d2", "d3"]),
        ("{limits: {max_repetition: 0.2}, of_domain: {Coding: {max_malformed: 0}}}", ["d3"]),
    ],
)
def test_a_domain_has_thresholds_of_its_own(asked: str, want: list[str], tmp_path: Path):
    assert curated(tmp_path, asked, MIXED)["kept_examples"] == want


def test_labels_are_kept_beside_the_shards_counted_in_the_funnel_and_shown_by_stats(tmp_path: Path):
    found = curated(tmp_path, "{limits: {max_repetition: 0.2}}", MIXED)
    assert found["domains"] == {
        "Coding": {"Code_Debugging": {"kept": 0, "read": 1}, "Code_Generation": {"kept": 0, "read": 1}},
        "Knowledge": {"History_and_Society": {"kept": 1, "read": 2}},
    }
    source = Source.open(str(tmp_path / "data/sources/web/train"))
    told = statistics(source)
    assert told["curated"]["domains"] == found["domains"] and told["curated"]["kept"] == 1
    assert "Coding/Code_Debugging 0 of 1" in statistics_text(told)
    assert list(Path(source.uri).glob("*.domain-*.parquet"))


def test_another_threshold_computes_nothing(tmp_path: Path):
    first, second = Work("native"), Work("native")
    curated(tmp_path, "{limits: {max_repetition: 0.2}}", MIXED, first)
    assert first.computed == {"answers": 4, "domain": 4}
    assert curated(tmp_path, "{limits: {max_repetition: 0.99}}", MIXED, second)["kept"] == 4
    assert second.computed == {}


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ("{of_domain: {Codign: {max_malformed: 0}}}", "did you mean Coding"),
        ("{classify: judge}", "judge: needed"),
        ("{of_domain: {Coding: {min: {clarity: 0.5}}}}", "judge: needed"),
        ("{limits: {min: {charity: 0.5}}}", "charity"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(asked: str, want: str):
    with pytest.raises(RecipeError, match=want):
        a_recipe(f"{{instructions: {asked}}}")


# ---------------------------------------------------------------- a judge


def judged_by(server: Server, more: str) -> str:  # noqa: F811
    return f"{{judge: {{url: '{server.url}', model: m, concurrency: 2, max_failed: 0.5}}, {more}}}"


def answering(body: dict[str, Any], _: int) -> tuple[int, str]:
    """Labels by a word, and qualities that the answer itself states: `quality=3 clarity=1`."""
    said = json.dumps(body["messages"][1], ensure_ascii=False)
    if "sub-domains" in body["messages"][0]["content"]:
        name = next((one.name for one in sub_domains() if f"about {one.name}" in said), "Small_Talk")
        if "mislabelled" in said:
            return 200, json.dumps({"domain": "Coding", "sub_domain": "Small_Talk"})
        return 200, f"I think: {json.dumps({'domain': DOMAIN_OF[name], 'sub_domain': name})}"
    if "unparseable" in said:
        return 200, "Five stars!"
    scores = dict.fromkeys(CRITERIA, 4)
    return 200, json.dumps(scores | {name: 1 for name in CRITERIA if f"bad {name}" in said})


def test_each_quality_keeps_and_drops_and_another_threshold_asks_nothing(server: Server, tmp_path: Path):  # noqa: F811
    server.script = answering
    documents = [a_chat("x", "Look.", "Fine.", pictures=[PHOTO])]
    documents += [a_chat("x", "Look.", f"bad {name}", pictures=[a_photo(n)]) for n, name in enumerate(CRITERIA)]
    for number, name in enumerate(CRITERIA):
        found = curated(tmp_path, judged_by(server, f"limits: {{min: {{{name}: 0.5}}}}"), documents)
        assert found["dropped"] == {f"instructions.min.{name}": 1} and reasons(tmp_path)[number + 1]
    assert len(server.asked()) == len(documents), "once a conversation, whatever the thresholds"
    found = curated(tmp_path, judged_by(server, "limits: {max: {complexity: 0.5}}"), documents)
    assert found["dropped"]["instructions.max.complexity"] == 6 and found["kept"] == 1
    assert found["quality_judge"]["failed"] == 0
    content = next(body for body in server.asked() if "Fine." in json.dumps(body))["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "text", "text"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    assert texts == ["Question:", "Look.", "Answer:", "Fine."]


def test_a_judge_tells_domains_and_one_that_exists_is_needed(server: Server, tmp_path: Path):  # noqa: F811
    server.script = answering
    documents = [a_chat("x", f"This is about {one.name}.", "I see.") for one in sub_domains()]
    documents.append(a_chat("x", "This is mislabelled.", "I see."))
    asked = judged_by(server, "classify: judge, of_domain: {Geometry: {max_incomplete: 0}}")
    found = curated(tmp_path, asked, documents)
    told = {name: counts["read"] for section in found["domains"].values() for name, counts in section.items()}
    assert told == {**dict.fromkeys(DOMAIN_OF, 1), "unlabelled": 1}
    assert found["domain_judge"]["failed"] == 1 and found["domain_judge"]["malformed"] == 3
    with pytest.raises(DataError, match="too many samples without a valid answer"):
        curated(tmp_path / "strict", asked.replace("0.5", "0.0"), documents)


def test_a_sample_without_a_score_stays_and_pictures_are_no_matter_of_text(server: Server, tmp_path: Path):  # noqa: F811
    server.script = answering
    documents = [
        a_chat("x", "Look.", "unparseable", pictures=[PHOTO]),
        a_chat("x", "Read.", "bad use_of_visual_information"),
        a_chat("x", "Watch.", "bad use_of_visual_information", video=True),
        a_chat("x", "Look.", "bad use_of_visual_information", pictures=[PHOTO]),
    ]
    asked = judged_by(server, "limits: {min: {use_of_visual_information: 0.5}}")
    found = curated(tmp_path, asked, documents)
    assert found["kept_examples"] == ["d0", "d1", "d2"] and found["quality_judge"]["failed"] == 1
    shown = [part["text"] for part in server.asked()[-1]["messages"][1]["content"] if part["type"] == "text"]
    assert any("[a video]" in json.dumps(body) for body in server.asked()) and "Question:" in shown


def test_answers_of_a_judge_are_read_wherever_they_stand():
    assert parse_label('Sure: {"domain": "Coding", "sub_domain": "Code_Debugging"}') is not None
    assert parse_label('{"domain": "Vision", "sub_domain": "Code_Debugging"}') is None
    whole = json.dumps(dict.fromkeys(CRITERIA, 5))
    assert parse_qualities(whole) is not None and parse_qualities(whole.replace("5", "6")) is None
