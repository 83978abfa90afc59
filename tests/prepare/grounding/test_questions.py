"""What is asked of annotated pictures, what is not, and why not."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from pipelines.prepare.grounding.annotated import Annotated, annotated
from pipelines.prepare.grounding.masks import mask_of
from pipelines.prepare.grounding.phrases import COUNT, DETECT, FORMS, NONE, POINT, REFER, pick
from pipelines.prepare.grounding.questions import TASKS, Asked, Asker, Unasked
from tests.prepare.grounding.builders import a_picture_of, boxed, disc, dot, masked, objects_in, words_in
from trainer.data.sample import Object, Sample
from trainer.grounding import Questions

WORDS = ("cat", "cup", "dog", "zebra")
CATS = (boxed("cat", 1, 1, 9, 9), boxed("cat", 20, 20, 30, 30), boxed("dog", 5, 20, 12, 30))


def a_picture(*things: Object, **meta: Any) -> Annotated:
    sample, _ = a_picture_of("p", np.zeros((40, 50, 3), np.uint8), *things, meta=meta)
    found = annotated(sample)
    assert isinstance(found, Annotated)
    return found


def asker(picture: Annotated, seed: int = 0, **changes: Any) -> Asker:
    config = Questions.model_validate({"complete": "vocabulary", **changes})
    return Asker(picture, config, WORDS, Random(seed), ("1", "asked", "mine", str(seed)))


def ask(task: str, picture: Annotated, seed: int = 0, **changes: Any) -> Asked:
    return TASKS[task](asker(picture, seed, **changes))


def labels_of(asked: Asked) -> list[str]:
    return sorted(thing["label"] for thing in asked.answer["objects"])


# ---------------------------------------------------------------- each task


@pytest.mark.parametrize("seed", range(12))
def test_detect_answers_every_object_of_the_labels_named_and_no_other(seed: int):
    asked = ask("detect", a_picture(*CATS), seed)
    want = sorted(thing.label for thing in CATS if thing.label in asked.about)
    assert labels_of(asked) == want and want
    assert all(label in asked.question for label in asked.about)
    assert not any(label in asked.question for label in WORDS if label not in asked.about)


def test_detect_also_names_labels_that_are_not_there():
    named = {label for seed in range(20) for label in ask("detect", a_picture(*CATS), seed).about}
    assert named == set(WORDS)
    none = {label for seed in range(20) for label in ask("detect", a_picture(*CATS), seed, distractors=0).about}
    assert none == {"cat", "dog"}, "negative control"


def test_refer_asks_for_the_only_one_of_its_label_or_for_what_an_expression_means():
    assert {ask("refer", a_picture(*CATS), seed).about for seed in range(9)} == {("dog",)}
    asked = ask("refer", a_picture(*CATS))
    assert "the dog" in asked.question and asked.key == {"task": "box", "value": [5, 20, 12, 30]}
    said = a_picture(boxed("left one", 1, 1, 9, 9), labels="expressions")
    assert "left one" in (told := ask("refer", said, complete="nothing").question) and "the left one" not in told
    with pytest.raises(Unasked, match="no label means one object"):
        ask("refer", a_picture(*CATS[:2]))


def test_point_is_on_the_object_and_on_each_one():
    ring = disc(50, 40, 20, 20, 12) & ~disc(50, 40, 20, 20, 6)
    other = disc(50, 40, 42, 8, 5)
    asked = ask("point", a_picture(masked("ring", ring), masked("ring", other)))
    assert "every ring" in asked.question and asked.key is None
    for thing, inside in zip(asked.answer["objects"], (ring, other), strict=True):
        x, y = thing["at"]["xy"]
        assert inside[int(y), int(x)]
    assert not ring[20, 20], "the centre of its box is not on it"
    one = ask("point", a_picture(dot("nose", 3.5, 4.5)))
    assert one.key == {"task": "point", "value": [3.5, 4.5]} and "the nose" in one.question
    with pytest.raises(Unasked, match="neither points nor masks"):
        ask("point", a_picture(*CATS))


def test_count_and_none():
    counts = {(asked := ask("count", a_picture(*CATS), seed)).about: asked.answer["text"] for seed in range(9)}
    assert counts == {("cat",): "2", ("dog",): "1"}
    for seed in range(20):
        asked = ask("none", a_picture(*CATS), seed)
        assert asked.about[0] in ("cup", "zebra") and asked.about[0] in asked.question
        assert asked.answer["text"] in ("0", *NONE)
        assert asked.key == ({"task": "count", "value": 0} if asked.answer["text"] == "0" else None)


# ---------------------------------------------------------------- what annotations promise

KNOWN = [  # (picture, complete) -> which labels may be absent, which are whole
    (a_picture(*CATS), "vocabulary", {"cup", "zebra"}, {"cat", "dog"}),
    (a_picture(*CATS), "picture", set(), {"cat", "dog"}),
    (a_picture(*CATS, absent=["lion"]), "picture", {"lion"}, {"cat", "dog"}),
    (a_picture(*CATS, absent=["lion"], incomplete=["cat", "cup"]), "vocabulary", {"zebra"}, {"dog"}),
    (a_picture(*CATS, absent=["lion"]), "nothing", {"lion"}, set()),
    (a_picture(boxed("left cat", 1, 1, 9, 9), labels="expressions"), "vocabulary", set(), set()),
]


@pytest.mark.parametrize("picture, complete, absent, whole", KNOWN)
def test_only_what_is_known_is_asked(picture: Annotated, complete: Any, absent: set[str], whole: set[str]):
    assert set(picture.whole(complete)) == whole
    tasks = {"refer": 1} if complete == "nothing" else {"refer": 1, "none": 1, "count": 1}
    seen: dict[str, set[str]] = {"none": set(), "count": set()}
    for seed in range(30):
        for task, found in seen.items():
            try:
                found.update(ask(task, picture, seed, complete=complete, tasks=tasks).about)
            except Unasked:
                continue
    assert seen == {"none": absent, "count": whole}


def test_a_task_that_annotations_cannot_answer_is_refused_with_the_recipe():
    with pytest.raises(ValueError, match="count cannot be answered"):
        Questions.model_validate({"complete": "nothing", "tasks": {"count": 1}})
    assert set(Questions.model_validate({"complete": "nothing"}).tasks) == {"refer", "point", "none"}
    assert set(Questions.model_validate({"complete": "picture"}).tasks) == set(TASKS), "negative control"


def test_too_many_objects_are_not_asked_and_counted():
    crowd = [boxed("ant", n, n, n + 1, n + 1) for n in range(12)]
    found = asker(a_picture(*crowd), max_objects=10, per_picture=5)
    assert [sample.meta["task"] for sample in found.samples("asked", "grounding")] == ["none"]
    assert found.unasked == {
        "detect: too many objects": 1, "count: too many objects": 1, "refer: no label means one object": 1,
        "point: neither points nor masks": 1,
    }  # fmt: skip
    assert ask("count", a_picture(*crowd), max_objects=12).answer["text"] == "12", "negative control"


# ---------------------------------------------------------------- samples


def test_a_sample_says_where_it_came_from_and_keeps_its_picture():
    picture = a_picture(*CATS, copy_paste={"onto": "mine/x"})
    made = asker(picture, per_picture=4).samples("asked", "grounding")
    assert len(made) == 4 and len({sample.id for sample in made}) == 4
    for sample in made:
        assert sample.source == "asked" and sample.media == picture.sample.media
        assert sample.meta["made_from"] == "mine/p" and sample.meta["copy_paste"] == {"onto": "mine/x"}
        assert all(thing in CATS for thing in objects_in(sample))


def test_tasks_are_drawn_by_their_weights():
    counts: dict[str, int] = {}
    for seed in range(400):
        [made] = asker(a_picture(*CATS), seed, per_picture=1, tasks={"detect": 3, "count": 1}).samples("a", "grounding")
        counts[made.meta["task"]] = counts.get(made.meta["task"], 0) + 1
    assert 0.68 < counts["detect"] / 400 < 0.82  # 0.75, binomial with a deviation of 0.022


def test_wordings_are_many_the_same_again_and_never_leave_a_hole():
    for wordings in (DETECT, REFER, POINT, COUNT):
        assert len(set(wordings)) == len(wordings) >= 4
        assert all(one.count("{0}") == 1 for one in wordings)
        picked = [pick(wordings, "x", str(number)) for number in range(200)]
        assert set(picked) == set(wordings)
        assert picked == [pick(wordings, "x", str(number)) for number in range(200)]


def test_the_question_names_the_form_that_the_answer_has():
    found: set[str] = set()
    for seed in range(60):
        asked = ask("refer", a_picture(*CATS), seed, forms={"json": 1, "plain": 1, "any": 1, "xml": 1})
        form = asked.answer["form"]
        found.add(form)
        assert any(asked.question.endswith(told) for told in FORMS[form]) and form != "xml"
    assert found == {"json", "plain", "any"}, "xml is for points alone"
    points = {ask("point", a_picture(dot("nose", 3, 4)), seed, forms={"xml": 1}).answer["form"] for seed in range(5)}
    assert points == {"xml"}


NOT_PICTURES = [
    ({"messages": [{"role": "document", "parts": [{"part": "text", "text": "x"}]}], "media": []}, "no-picture"),
    ({"messages": [], "meta": {}}, "no-objects"),
]


@pytest.mark.parametrize("change, why", NOT_PICTURES)
def test_samples_without_an_annotated_picture_are_counted_by_why(change: dict, why: str):
    sample, _ = a_picture_of("p", np.zeros((40, 50, 3), np.uint8), *CATS)
    assert annotated(Sample.model_validate({**sample.model_dump(), **change})) == why
    two = {**sample.model_dump(), "media": [sample.media[0].model_dump()] * 2}
    assert annotated(Sample.model_validate(two)) == "several-pictures"
    assert isinstance(annotated(sample), Annotated), "negative control"


def test_a_mask_of_the_answer_is_the_one_annotated():
    inside = disc(50, 40, 20, 20, 9)
    [sample] = asker(a_picture(masked("disc", inside)), per_picture=1, tasks={"detect": 1}).samples("a", "grounding")
    [thing] = objects_in(sample)
    assert (mask_of(thing.at, 50, 40) == inside).all()  # type: ignore[arg-type]
    assert words_in(sample, 0)
