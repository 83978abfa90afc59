"""Checks of sampled answers: each with a kept and a dropped one and planted faults with recall and precision; inside
rejection sampling; by a judge that is asked once."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.answer_checks import (
    Asked,
    code_switching,
    judged_steps,
    parse_steps,
    problem,
    steps_with_image,
)
from pipelines.prepare.ingest import ingest
from pipelines.prepare.sampling import Selection, make_requests, select_answers
from tests.prepare.builders import small_recipe
from tests.prepare.curate.builders import prose
from tests.prepare.curate.conversations import PHOTO, a_chat
from tests.prepare.curate.test_scores import Server, server  # noqa: F401 (a fixture)
from tests.prepare.test_sampling import answer_all, out, reference, sources  # noqa: F401 (a fixture)
from trainer.after import latex
from trainer.after.answers import Request
from trainer.curation import Checks, Judge
from trainer.data.sample import Key, Sample
from trainer.errors import DataError, RecipeError


def a_task(question: str = "How many cars are in the picture?", value: Any = 3, *, picture: bool = True) -> Sample:
    sample, _ = a_chat("t", question, "3", pictures=[PHOTO] if picture else [])
    return sample.model_copy(update={"key": Key(task="count", value=value)})


SEEN = (
    "The picture shows a street with parked cars.",
    "On the left there is a red one.",
    "Two more stand behind the bus.",
    "In the background I see trees only.",
    "The sign above the door reads OPEN.",
    "The tallest bar belongs to May.",
    "The legend says that blue stands for rain.",
    "There is a box at [12, 40, 80, 90] in the lower corner.",
)
UNSEEN = (
    "Let me think about this problem carefully.",
    "We need to add the numbers together.",
    "One plus two makes three in total.",
    "Therefore the sum has to be an integer.",
    "This kind of question usually has a simple solution.",
    "By definition an even number is divisible by two.",
    "Remember that speed is distance divided by time.",
    "Multiplying both sides by four gives the result.",
)


def reasoned(*steps: str, final: str = "3") -> str:
    return "\n".join(steps) + f"\n\nThe answer is {final}."


CASES: dict[str, tuple[Any, str, str]] = {
    "max_words": (60, reasoned(*SEEN[:3]), reasoned(prose(1, 80))),
    "max_repetition": (0.2, reasoned(*SEEN[:3]), reasoned(*SEEN[:3] * 3)),
    "max_code_switching": (0.1, reasoned(*SEEN[:3], "α + β = 3"), reasoned(SEEN[0], "这里有三辆车停在路边。")),
    "min_steps_with_image": (0.5, reasoned(SEEN[0], UNSEEN[0]), reasoned(SEEN[0], UNSEEN[0], UNSEEN[1])),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_keeps_and_drops(name: str):
    threshold, good, bad = CASES[name]
    checks = Checks.model_validate({name: threshold})
    assert problem(checks, a_task(), good) is None and problem(checks, a_task(), bad) == name
    assert problem(Checks(), a_task(), bad) is None, "what is not stated is not checked"


def test_every_check_has_a_case():
    assert set(CASES) == set(Checks.model_fields) - {"steps", "judge"}


CHINESE = ("图中有三辆车停在路边。", "左边的车是红色的。", "所以一共有三辆车。")


def planted(name: str, number: int) -> tuple[Sample, str]:
    """A task and an answer with the fault of a check."""
    seen, unseen = (tuple(texts[(number + k) % 8] for k in range(3)) for texts in (SEEN, UNSEEN))
    if name == "max_words":
        return a_task(), reasoned(prose(number, 70))
    if name == "max_repetition":
        return a_task(), reasoned(*((seen[:2] * 3), ("the car and " * 12,))[number % 2])
    if name == "max_code_switching":
        russian = "На картинке слева стоят три машины."
        mixed = (
            reasoned(seen[0], CHINESE[number % 3]),
            reasoned(seen[1], russian),
            reasoned(f"{seen[2]} 답은 세 대입니다."),
        )
        return a_task(), mixed[number % 3]
    return a_task(), reasoned(*unseen, *((seen[0],) if number % 2 else ()))


def sound(number: int) -> tuple[Sample, str]:
    """Answers without a fault, of the forms that look like one."""
    seen = tuple(SEEN[(number + k) % 8] for k in range(3))
    chinese = a_task("图中有几辆车?"), "\n".join(CHINESE) + "\n答案是:三"
    return (
        (a_task(), reasoned(*seen)),
        (a_task(), "3"),
        chinese,
        (a_task("What is 1 + 2?", picture=False), reasoned(*UNSEEN[:3])),
        (a_task(), reasoned(*seen[:2], "So $\\alpha + 2 = 3$ `int 数` holds for the figure.")),
        (a_task("What does the sign 出口 say?", "出口"), reasoned("The sign on the right reads 出口.", final="出口")),
        (a_task("画像には何台の車がありますか?"), "左に赤い車が見えます。\nThe answer is 3."),
    )[number % 7]


@pytest.mark.parametrize("name", CASES)
def test_planted_faults_are_found_and_sound_answers_stay(name: str, capsys: pytest.CaptureFixture[str]):
    """Recall and precision of each check alone over 200 answers, a quarter of them with its fault."""
    threshold = CASES[name][0]
    checks = Checks.model_validate({name: threshold})
    faulty = [problem(checks, *planted(name, number)) == name for number in range(50)]
    mistaken = [problem(checks, *sound(number)) is not None for number in range(150)]
    recall, precision = sum(faulty) / 50, sum(faulty) / max(sum(faulty) + sum(mistaken), 1)
    with capsys.disabled():
        print(f"\nsampling.checks.{name}: recall {recall:.1%}, precision {precision:.1%} (50 planted of 200)")
    assert recall >= 0.95 and precision >= 0.9


def test_what_does_not_apply_is_kept():
    assert math.isnan(steps_with_image(a_task(picture=False), reasoned(*UNSEEN)))
    assert math.isnan(steps_with_image(a_task(), "3"))
    assert problem(Checks(min_steps_with_image=0.5), a_task(), reasoned(*UNSEEN), with_image=math.nan) is None
    assert code_switching(a_task("1 + 2 = ?", picture=False), "三") == 0.0, "the question has no letters"


# ---------------------------------------------------------------- inside rejection sampling


def recipe_of(stage: str, checks: str) -> Any:
    return small_recipe(f"stages.{stage}.data={{sampled: 1}}", f"stages.{stage}.sampling.checks={checks}")


def texts(request: Request) -> list[tuple[str, str]]:
    right = reference(request)
    return [
        ("nonsense", "stop"),
        (reasoned(*UNSEEN[:3], final=right), "stop"),
        (reasoned(SEEN[0], final=right), "stop"),
    ]


def test_only_answers_that_pass_are_kept_or_chosen_and_the_others_are_counted(out: str):  # noqa: F811
    """The n-th answer: wrong; right with steps that never look; right with a step that does."""
    for stage in ("sft", "dpo"):
        with_checks, without = recipe_of(stage, "{min_steps_with_image: 0.5}"), recipe_of(stage, "null")
        requests = make_requests(with_checks, stage, out)
        shown = {request.id for request in requests if request.sample.media}
        answer_all(out, stage, requests, texts)
        content = select_answers(with_checks, stage, out)
        kept = {sample.meta["request"]: sample for sample in sources(out, stage)}
        refused = [request for request in requests if request.id in shown and request.id in kept]
        assert refused and content["refused"] == content["of_check"]["min_steps_with_image"] >= len(refused)
        for request in refused:
            said = (kept[request.id].chosen or kept[request.id].messages[-1:])[0].parts[0].text  # type: ignore[union-attr]
            assert said.startswith(SEEN[0])
        before = select_answers(without, stage, out)
        assert before["refused"] == 0 and before["of_check"] == {} and before["correct"] == content["correct"]
        used = [sample for sample in sources(out, stage) if sample.meta["request"] in shown]
        assert any(UNSEEN[0] in str(sample.chosen or sample.messages[-1:]) for sample in used), "negative control"


def test_a_judge_reads_the_steps_once_whatever_the_threshold(out: str, server: Server):  # noqa: F811
    def script(body: dict[str, Any], _: int) -> tuple[int, str]:
        said = json.dumps(body["messages"][1])
        return 200, json.dumps({"steps": 4, "steps_with_image": 3 if SEEN[0] in said else 1})

    server.script = script
    judge = f"judge: {{url: '{server.url}', model: m, max_failed: 0}}"
    strict, lax = (recipe_of("sft", f"{{min_steps_with_image: {at}, steps: judge, {judge}}}") for at in (0.5, 0.2))
    requests = make_requests(strict, "sft", out)
    answer_all(out, "sft", requests, texts)
    content = select_answers(strict, "sft", out)
    asked = len(server.asked())
    assert asked and content["steps_judge"] == {
        "asked": asked, "recorded": 0, "malformed": 0, "unanswered": 0, "failed": 0
    }  # fmt: skip
    assert content["refused"] == asked // 2, "one of two right answers to each question about a picture"
    shown = json.dumps(server.asked()[0]["messages"])
    assert "image_url" in shown and "Answer:" in shown and "steps_with_image" in shown
    assert select_answers(lax, "sft", out)["refused"] == 0 and len(server.asked()) == asked
    server.script = lambda body, number: (200, "no")
    changed = recipe_of("sft", f"{{min_steps_with_image: 0.5, steps: judge, {judge.replace('model: m', 'model: n')}}}")
    with pytest.raises(DataError, match="too many answers without a valid answer"):
        select_answers(changed, "sft", out)


@pytest.mark.parametrize("order", permutations([(4, 1), (0, 0), (4, 3)]))
def test_an_answer_of_the_judge_without_steps_has_no_say_in_the_median(
    order: tuple[tuple[int, int], ...],
    tmp_path: Path,
    server: Server,  # noqa: F811
):
    said = [{"steps": steps, "steps_with_image": seen} for steps, seen in order]
    server.script = lambda body, number: (200, json.dumps(said[number]))
    judge = Judge(url=server.url, model="m", answers=3, concurrency=1)
    asked = [Asked("a", a_task(), "Step.", lambda: [PHOTO])]
    shares, _ = judged_steps(asked, judge, record=str(tmp_path / "record"), seed=1, where="here")
    assert shares == [0.5]


MATHS = {r"\frac{1}{2}": ("0.5", "0.6"), "x^2+2x+1": ("(x+1)^2", "(x-1)^2"), r"\{1,2\}": (r"\{2,1\}", "(1,2)")}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tasks_in_latex_go_from_rows_to_kept_answers_and_pairs(
    out: str,  # noqa: F811
    tmp_path: Path,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(latex, "CPU_S", 1)
    rows = [
        {
            "id": f"m{number}",
            "messages": [{"role": "user", "content": f"Task {number}."}, {"role": "assistant", "content": value}],
            "key": {"task": "latex", "value": value},
        }
        for number, value in enumerate(MATHS)
    ]
    path = tmp_path / "maths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{format: openai, path: '{path}', kind: instruction, rendering: chat}}"
    recipe = small_recipe(
        f"prepare.sources.maths={source}",
        f"stages.{stage}.data={{sampled: 1}}",
        f"stages.{stage}.sampling.tasks=[maths]",
    )
    ingest(recipe, out, "maths", recipe.prepare.sources["maths"], "train", str(path), [])
    requests = make_requests(recipe, stage, out)
    assert len(requests) == 3

    def answers(request: Request) -> list[tuple[str, str]]:
        assert request.sample.key is not None
        right, wrong = MATHS[request.sample.key.value]
        steps = "First we look at both sides. Then 1 + 1 = 2 follows.\n\n"
        told = (f"{steps}So the answer is ${wrong}$.", f"{steps}\\boxed{{{right}}}", "9^{9^{9^9}}")
        return [(text, "stop") for text in told]

    answer_all(out, stage, requests, answers)
    content = select_answers(recipe, stage, out)
    assert (content["correct"], content["incorrect"], content["undecided"], content["kept"]) == (3, 6, 2, 3), content
    for sample in sources(out, stage):
        chosen = (sample.chosen or sample.messages[-1:])[0].parts[0].text  # type: ignore[union-attr]
        assert "boxed" in chosen and (stage == "sft" or "So the answer" in sample.rejected[0].parts[0].text)  # type: ignore[union-attr]


def test_a_judges_counts_have_to_be_possible():
    assert parse_steps('{"steps": 2, "steps_with_image": 3}') is None
    assert parse_steps('Here: {"steps": 2, "steps_with_image": 2}') is not None


@pytest.mark.parametrize(
    ("checks", "want"),
    [
        ("{steps: judge, min_steps_with_image: 0.5}", "needs the section judge"),
        ("{min_step: 1}", "unknown key; did you mean"),
        ("{max_repetition: 2}", "less than or equal to 1"),
    ],
)
def test_checks_that_cannot_be_are_refused(checks: str, want: str):
    with pytest.raises(RecipeError, match=want):
        recipe_of("sft", checks)


def test_selection_counts_come_back_from_what_is_stored():
    counts = Selection(requests=2, refused=1)
    counts.of_check["max_words"] += 1
    assert Selection.from_json(json.loads(json.dumps(counts.as_json()))) == counts
