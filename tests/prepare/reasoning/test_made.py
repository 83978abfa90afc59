"""Reasoning from a judge: asked for by step, filtered, counted, recorded, resumed; through a scripted endpoint."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil

from pipelines import tracking
from pipelines.cli.data import funnel_table
from pipelines.prepare.ingest import prepare_data
from pipelines.prepare.preview.page import write_preview
from pipelines.prepare.reasoning import made as reasoned_module
from pipelines.prepare.reasoning.annotate import export, take
from pipelines.prepare.reasoning.made import make
from pipelines.prepare.reasoning.mark import COLOUR
from pipelines.prepare.reasoning.steps import steps_of
from pipelines.prepare.resumable import Unfinished
from pipelines.prepare.stage import prepare_stage
from pipelines.prepare.stored import problems
from tests.prepare.builders import small_recipe
from tests.prepare.curate.test_scores import Server, server, still_open
from tests.prepare.reasoning.builders import (
    SIZE,
    WALK,
    Made,
    a_reasoning_recipe,
    a_walk,
    read_back,
    stored,
)  # fmt: skip
from tests.prepare.through import trained
from trainer import storage
from trainer.after import completions
from trainer.data.sample import Message
from trainer.data.shards import Source
from trainer.errors import DataError, RecipeError

__all__ = ["server"]  # the fixture
GOOD = {
    "click": "The city is what I have to say first, so I tap its field.",
    "type": "The keyboard has come up; I enter the name of the town now.",
    "swipe": "None of the visible places is free, so I scroll down for others.",
    "terminate": "The confirmation for Friday has appeared, which means the task is done.",
}
Texts = Callable[[str, int], str]
"""(action, step from 0) -> what the judge writes."""


def told(body: dict[str, Any]) -> str:
    """All text of the request."""
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


def action_of(body: dict[str, Any]) -> str:
    found = re.search(r"The action: (\w+)", told(body))
    assert found is not None
    return found[1]


def step_of(body: dict[str, Any]) -> int:
    return len(re.findall(r"^\d+\. ", told(body), re.M))


def writes(server: Server, texts: Texts = lambda action, step: GOOD[action], agreement: Any = 5) -> None:
    """The judge answers every step with these words, and every check with this number, or that of a function."""

    def script(body: dict[str, Any], number: int) -> tuple[int, str]:
        if "You check" in body["messages"][0]["content"]:
            return 200, json.dumps({"agreement": agreement(told(body)) if callable(agreement) else agreement})
        action = action_of(body)
        return 200, json.dumps({"action": action, "reasoning": texts(action, step_of(body))})

    server.script = script


def asked(server: Server, **more: Any) -> dict[str, Any]:
    judge = {"url": server.url, "model": "m", "concurrency": 4, **more.pop("judge", {})}
    return {"judge": judge, **more}


def made(out: Path, server: Server, split: str = "train", **more: Any) -> dict[str, Any]:
    return make(a_reasoning_recipe(asked(server, **more)), str(out), "reasoned")[split]


def walks(out: Path, count: int = 2, **more: Any) -> list[Made]:
    found = [a_walk(f"w{number}", **more) for number in range(count)]
    stored(str(out), found)
    return found


def uri(out: Path) -> str:
    return storage.join(str(out), "data", "sources", "reasoned", "train")


def words(out: Path) -> dict[str, list[str]]:
    return {sample.id: [step.reasoning for step in steps_of(sample)] for sample, _ in read_back(uri(out))}


def bytes_of(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        completions.request, "__kwdefaults__", {**(completions.request.__kwdefaults__ or {}), "sleep": lambda s: None}
    )


# ---------------------------------------------------------------- what is asked and written


def test_every_step_gets_its_reasoning_before_its_call_and_the_model_learns_it(tmp_path: Path, server: Server):
    before = walks(tmp_path)
    writes(server)
    found = made(tmp_path, server)
    assert (found["read"], found["kept"], found["bad"]) == (2, 2, {})
    assert found["made"] == {"steps": 8, "steps reasoned": 8}
    assert found["judge"] == {"asked": 8, "recorded": 0, "malformed": 0, "unanswered": 0, "failed": 0}
    assert words(tmp_path) == {"w0": list(GOOD.values()), "w1": list(GOOD.values())}
    sample, files = read_back(uri(tmp_path))[0]
    assert sample.source == "reasoned" and sample.meta["reasoning"] == ["judge m"] * 4 and files == before[0][1]
    assert [step.actions for step in steps_of(sample)] == [step.actions for step in steps_of(before[0][0])]
    for trained_as in trained(sample, files, tmp_path / "through"):
        assert f"{GOOD['swipe']}\n<tool_call>" in trained_as.targets
    assert list(problems(Source.open(uri(tmp_path)))) == []


def pictures(body: dict[str, Any]) -> list[np.ndarray]:
    uris = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    files = [base64.b64decode(uri.partition(",")[2]) for uri in uris]
    return [np.asarray(Pil.open(io.BytesIO(data)).convert("RGB")) for data in files]


def marks(picture: np.ndarray) -> np.ndarray:
    return np.argwhere((picture == COLOUR).all(axis=2))


def test_the_judge_sees_the_query_the_calls_before_and_both_screenshots_the_first_with_the_mark(
    tmp_path: Path, server: Server
):
    [(sample, files)] = walks(tmp_path, 1)
    writes(server)
    made(tmp_path, server)
    bodies = sorted(server.asked(), key=step_of)
    assert [action_of(body) for body in bodies] == ["click", "type", "swipe", "terminate"]
    for step, body in enumerate(bodies):
        query = steps_of(sample)[0].query
        assert f"Task: {query}\n" in told(body) and body["messages"][0]["content"].count("JSON") == 1
        shown = pictures(body)
        assert len(shown) == (2 if step < 3 else 1)
        assert all(picture.shape[:2] == SIZE[::-1] for picture in shown)
        assert all(len(marks(picture)) == 0 for picture in shown[1:])
    assert 'Actions so far:\n1. click\n2. type {"text": "Rome"}' in told(bodies[2]) and "none" in told(bodies[0])
    middle = marks(pictures(bodies[0])[0]).mean(axis=0)[::-1]
    assert np.abs(middle - (30, 50)).max() < 1, "where the click is"
    assert len(marks(pictures(bodies[1])[0])) == 0, "typing has no place"
    rows = marks(pictures(bodies[2])[0])[:, 0]
    assert rows.min() <= 52 and rows.max() >= 150, "a swipe from 150 to 50"
    assert "no screenshot after" in told(bodies[3])
    plain = np.asarray(Pil.open(io.BytesIO(files[1])).convert("RGB"))
    assert (pictures(bodies[0])[1] == plain).all() and "(30" not in told(bodies[0])


def test_large_screenshots_are_made_smaller_and_the_mark_is_still_there(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    writes(server)
    made(tmp_path, server, judge={"image_max_pixels": 6000})
    [click] = [body for body in server.asked() if action_of(body) == "click"]
    picture = pictures(click)[0]
    assert picture.shape[0] * picture.shape[1] <= 6000 and len(marks(picture)) > 20


def test_words_of_the_source_are_kept_or_told_to_the_judge_and_replaced(tmp_path: Path, server: Server):
    walks(tmp_path, 1, words=["Click on the city."])
    writes(server)
    found = made(tmp_path, server)
    assert found["made"]["steps with words of the source"] == 1 and len(server.asked()) == 3
    assert words(tmp_path)["w0"][0] == "Click on the city."
    assert read_back(uri(tmp_path))[0][0].meta["reasoning"][:2] == ["source", "judge m"]
    made(tmp_path, server, existing="replace")
    assert words(tmp_path)["w0"] == list(GOOD.values())
    assert any("A person described the action: Click on the city." in told(body) for body in server.asked())


def test_a_sample_without_steps_stays_as_it_is_and_is_counted(tmp_path: Path, server: Server):
    sample, files = a_walk("w0")
    plain = sample.model_copy(update={"id": "screen", "messages": (*sample.messages[:1], _says("A screen."))})
    plain = plain.model_copy(update={"media": sample.media[:1]})
    stored(str(tmp_path), [(plain, files[:1]), (sample, files)])
    writes(server)
    found = made(tmp_path, server)
    assert found["made"]["samples that are no trajectory"] == 1 and found["kept"] == 2
    assert read_back(uri(tmp_path))[0][0] == plain.model_copy(update={"source": "reasoned"})


def _says(text: str) -> Message:
    return Message.model_validate({"role": "assistant", "parts": [{"part": "text", "text": text}]})


# ---------------------------------------------------------------- what is filtered


def test_a_refused_answer_leaves_its_step_without_reasoning_and_is_counted_with_its_reason(
    tmp_path: Path, server: Server
):
    walks(tmp_path, 1)
    bad = {**GOOD, "type": "I scroll down to the list of the towns."}
    writes(server, lambda action, step: bad[action])
    found = made(tmp_path, server)
    assert found["made"] == {
        "answers inconsistent": 1, "steps": 4, "steps reasoned": 3, "steps without reasoning": 1,
    }  # fmt: skip
    assert words(tmp_path)["w0"] == [GOOD["click"], "", GOOD["swipe"], GOOD["terminate"]]
    assert read_back(uri(tmp_path))[0][0].meta["reasoning"] == ["judge m", "", "judge m", "judge m"]
    [shown] = found["examples"]
    assert shown.startswith("w0, step 2: inconsistent: words of move") and "towns" in shown
    table = funnel_table({"reasoned": {"train": found}})
    assert "1 answers inconsistent" in table and "3 steps reasoned" in table


@pytest.mark.parametrize(
    ("filtered", "kept", "steps", "counted"),
    [("bare", 2, [4, 4], None), ("cut", 2, [2, 4], "trajectories cut short"), ("drop", 1, [4], None)],
)
def test_what_becomes_of_a_step_without_reasoning_is_the_recipes_choice(
    tmp_path: Path, server: Server, filtered: str, kept: int, steps: list[int], counted: str | None
):
    found = [a_walk("w0", query="Find a hotel near the old harbour"), a_walk("w1")]
    stored(str(tmp_path), found)
    writes(server)
    script = server.script
    server.script = lambda body, number: (
        (200, json.dumps({"action": "swipe", "reasoning": "Down."}))
        if "harbour" in told(body) and action_of(body) == "swipe"
        else script(body, number)
    )
    funnel = made(tmp_path, server, filtered=filtered)
    left = read_back(uri(tmp_path))
    assert (funnel["read"], funnel["kept"]) == (2, kept) and [len(steps_of(sample)) for sample, _ in left] == steps
    assert funnel["bad"] == ({"step-without-reasoning": 1} if filtered == "drop" else {})
    assert counted is None or funnel["made"][counted] == 1
    assert all(len(files) == len(sample.media) for sample, files in left)
    assert list(problems(Source.open(uri(tmp_path)))) == []


def test_of_several_answers_the_first_that_passes_stays(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    seen: dict[int, int] = {}

    def texts(action: str, step: int) -> str:
        seen[step] = seen.get(step, 0) + 1
        return "No." if seen[step] < 3 else GOOD[action]

    writes(server, texts)
    found = made(tmp_path, server, judge={"answers": 3, "concurrency": 1})
    assert found["made"]["steps reasoned"] == 4 and len(server.asked()) == 12
    assert len({body["seed"] for body in server.asked()}) == 12
    assert words(tmp_path)["w0"] == list(GOOD.values())


def test_words_copied_from_an_earlier_step_are_refused_in_the_later_one(tmp_path: Path, server: Server):
    walks(tmp_path, 1, calls=[WALK[0], WALK[0], WALK[3]])
    writes(server)
    found = made(tmp_path, server)
    assert found["made"]["answers copied-step"] == 1
    assert words(tmp_path)["w0"] == [GOOD["click"], "", GOOD["terminate"]]


def test_an_answer_that_explains_another_action_is_inconsistent(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    server.script = lambda body, number: (200, json.dumps({"action": "type", "reasoning": GOOD[action_of(body)]}))
    found = made(tmp_path, server)
    assert found["made"]["answers inconsistent"] == 3 and found["made"]["steps reasoned"] == 1


def test_the_judge_is_asked_again_whether_the_words_lead_to_the_place(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    writes(server, agreement=lambda text: 1 if "tap its field" in text else 4)
    found = made(tmp_path, server, min_agreement=0.6)
    assert found["made"]["answers disagreement"] == 1 and found["made"]["steps reasoned"] == 3
    assert words(tmp_path)["w0"][0] == "" and found["judge"]["asked"] == 8
    checks = [body for body in server.asked() if "You check" in body["messages"][0]["content"]]
    assert len(checks) == 4 and all("Reasoning: " in told(body) for body in checks)
    assert any(len(marks(pictures(body)[0])) for body in checks)
    again = made(tmp_path, server, min_agreement=0.1)
    assert again["made"]["steps reasoned"] == 4 and again["judge"] == {**found["judge"], "asked": 0, "recorded": 8}


# ---------------------------------------------------------------- recorded, resumed, failing


def test_the_record_gives_the_same_bytes_without_the_endpoint(tmp_path: Path, server: Server):
    walks(tmp_path)
    writes(server)
    first = made(tmp_path, server)
    files = bytes_of(uri(tmp_path))
    count = len(server.bodies)
    assert made(tmp_path, server) == first and len(server.bodies) == count, "there already"
    storage.remove_tree(uri(tmp_path))
    server.http.shutdown()
    server.http.server_close()
    again = made(tmp_path, server)
    assert again["judge"] == {**first["judge"], "asked": 0, "recorded": 8} and again["made"] == first["made"]
    now = bytes_of(uri(tmp_path))
    assert {name: now[name] for name in now if name != "input.json"} == {
        name: files[name] for name in files if name != "input.json"
    }


def test_another_threshold_asks_nothing_and_other_screens_are_asked_about(tmp_path: Path, server: Server):
    walks(tmp_path)
    writes(server)
    made(tmp_path, server)
    found = made(tmp_path, server, filters={"min_words": 13})
    assert found["judge"]["asked"] == 0 and found["made"]["answers too-short"] > 0
    stored(str(tmp_path), [a_walk("w0"), a_walk("other")])
    assert made(tmp_path, server)["judge"]["asked"] == 4, "negative control: new trajectories"


def test_an_interrupted_source_asks_only_what_is_missing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    no_waits(monkeypatch)
    monkeypatch.setattr(reasoned_module, "BLOCK_SAMPLES", 1)
    stored(str(tmp_path), [a_walk(f"w{n}", query=f"Book table number {n} in Rome") for n in range(3)])
    writes(server)
    script = server.script
    server.script = lambda body, number: script(body, number) if "number 2" not in told(body) else (500, "down")
    with pytest.raises(DataError, match="without a valid answer") as error:
        made(tmp_path, server)
    assert (
        error.value.code == 64 and "at most" in str(error.value) and not storage.exists(uri(tmp_path) + "/source.json")
    )
    writes(server)
    found = made(tmp_path, server)
    assert found["judge"]["recorded"] == 8 and found["judge"]["asked"] == 4 and found["kept"] == 3


def test_a_judge_that_goes_away_costs_no_whole_shard_and_leaves_no_file_open(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    no_waits(monkeypatch)
    monkeypatch.setattr(reasoned_module, "BLOCK_SAMPLES", 1)
    stored(str(tmp_path), [a_walk(f"w{n}", query=f"Book table number {n} in Rome") for n in range(4)])
    recipe = a_reasoning_recipe(asked(server), "prepare.shard_bytes=4096")
    writes(server)
    script = server.script
    server.script = lambda body, number: script(body, number) if "number 3" not in told(body) else (400, "down")
    with pytest.raises(Unfinished, match="too many steps without a valid answer of the judge"):
        make(recipe, str(tmp_path), "reasoned")
    assert not still_open(tmp_path)
    tars = sorted(Path(uri(tmp_path), ".tmp-new").glob("*.tar"))
    written = [tar.stat().st_ino for tar in tars]
    assert len(tars) == 2 and "2 whole shards with 2 samples stay" in capsys.readouterr().out
    writes(server)
    found = make(recipe, str(tmp_path), "reasoned")["train"]
    assert "goes on after 2 trajectories" in capsys.readouterr().out and found["kept"] == 4
    assert [Path(uri(tmp_path), tar.name).stat().st_ino for tar in tars] == written, "none is written again"
    assert not still_open(tmp_path)


@pytest.mark.parametrize("after", [1, 2])
def test_a_source_that_was_killed_goes_on_after_its_last_whole_shard_to_the_same_bytes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, after: int
):
    monkeypatch.setattr(reasoned_module, "BLOCK_SAMPLES", 1)
    writes(server)
    small, whole = "prepare.shard_bytes=4096", tmp_path / "whole"
    for out in (tmp_path, whole):
        stored(str(out), [a_walk(f"w{n}", query=f"Book table number {n} in Rome") for n in range(4)])
    recipe = a_reasoning_recipe(asked(server), small)
    want = make(recipe, str(whole), "reasoned")["train"]
    ask, calls = reasoned_module.Writer.ask, []

    def dies(self: Any, block: Any) -> Any:
        calls.append(block)
        if len(calls) > after:
            raise KeyboardInterrupt
        return ask(self, block)

    with monkeypatch.context() as killed:
        killed.setattr(reasoned_module.Writer, "ask", dies)
        with pytest.raises(KeyboardInterrupt):
            make(recipe, str(tmp_path), "reasoned")
    assert not storage.exists(f"{uri(tmp_path)}/source.json")
    count = len(server.asked())
    found = make(recipe, str(tmp_path), "reasoned")["train"]
    assert {**found, "judge": None} == {**want, "judge": None}
    assert len(server.asked()) == count + 4 * (4 - after), "what was answered is not asked again"
    now, first = bytes_of(uri(tmp_path)), bytes_of(uri(whole))
    assert {**now, "input.json": ""} == {**first, "input.json": ""} and len(now) > 6


def test_steps_without_a_valid_answer_stay_bare_up_to_max_failed(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    writes(server)
    script = server.script
    server.script = lambda body, number: script(body, number) if action_of(body) != "type" else (200, "I like it.")
    found = made(tmp_path, server, judge={"max_failed": 0.5})
    assert found["made"]["steps without a valid answer"] == 1 and found["judge"]["malformed"] == 3
    assert words(tmp_path)["w0"][1] == ""


def test_nothing_left_is_one_error(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    writes(server, lambda action, step: "No.")
    with pytest.raises(DataError, match="no trajectory is left"):
        made(tmp_path, server, filtered="drop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "source://nowhere"}, "no such source 'nowhere'"),
        ({"path": "walks.jsonl"}, "source://NAME of a source"),
        ({"format": "agent"}, "the format reasoning has this section"),
        ({"kind": "caption"}, "trajectories have the kind agent"),
        ({"held_out": "source://walks"}, "'walks' has nothing held out"),
        ({"curate": {"dedup": {"exact": True}}}, "has no meaning for what is made"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_runs(server: Server, changes: Any, message: str):
    with pytest.raises(RecipeError, match=re.escape(message)):
        a_reasoning_recipe(asked(server), **changes)


def test_the_preview_shows_the_reasoning_beside_the_action(tmp_path: Path, server: Server):
    walks(tmp_path, 1)
    writes(server)
    made(tmp_path, server)
    write_preview([Source.open(uri(tmp_path))], str(tmp_path / "page.html"), samples=4)
    page = (tmp_path / "page.html").read_text()
    assert all(text.split(",")[0] in page for text in GOOD.values())


def test_what_became_of_steps_is_sent_to_mlflow(tmp_path: Path, server: Server):
    from mlflow.tracking import MlflowClient

    walks(tmp_path, 1)
    writes(server, lambda action, step: "No." if action == "type" else GOOD[action])
    storage.write_json(str(tmp_path / "data" / "funnel.json"), {"reasoned": {"train": made(tmp_path, server)}})
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())
    number = client.create_run(experiment).info.run_id
    tracking.log_funnel(client, number, str(tmp_path))
    sent = client.get_run(number).data.metrics
    assert sent["funnel.reasoned.train.made.answers too-short"] == 1
    assert sent["funnel.reasoned.train.made.steps reasoned"] == 3 and sent["funnel.reasoned.train.kept"] == 1


def test_a_recipe_with_reasoning_goes_from_files_to_a_plan_and_to_peoples_words(
    prepared: str, tmp_path: Path, server: Server
):
    """The corpus' own walks and screens, through ingest, the judge, annotation, counts and a plan."""
    writes(server, lambda action, step: f"{step} Nothing else on the page leads there, so I click on this entry.")
    judge = f"{{url: '{server.url}', model: m}}"
    recipe = small_recipe(
        f'prepare.sources.reasoned={{format: reasoning, kind: agent, rendering: chat, path: "source://agents", '
        f"reasoning: {{judge: {judge}, filters: {{max_of_step: 1}}}}}}",
        "stages.stage2.data={reasoned: 1}",
        "stages.stage2.schedule.steps=2",
    )
    shutil.copytree(Path(prepared) / "data", tmp_path / "data", copy_function=shutil.copy2)
    prepare_data(recipe, str(tmp_path))
    funnel = json.loads((tmp_path / "data" / "funnel.json").read_text())
    agents, reasoned = funnel["agents"], funnel["reasoned"]
    assert reasoned["train"]["kept"] == agents["train"]["kept"] and "held_out" not in reasoned
    made_of = reasoned["train"]["made"]
    assert made_of["steps reasoned"] > 10 and made_of["samples that are no trajectory"] > 5
    assert made_of["steps"] == made_of["steps reasoned"] + made_of["steps without reasoning"]
    assert made_of["answers inconsistent"] == made_of["steps without reasoning"], "an end is no opening"
    plan = prepare_stage(recipe, "stage2", str(tmp_path))
    assert {row["name"]: row["num_dropped"] for row in plan.sources} == {"reasoned": 0}
    source = Source.open(uri(tmp_path))
    export(source, str(tmp_path / "out"), samples=10_000)
    found = take(source, str(tmp_path / "out" / "steps.jsonl"), str(tmp_path / "new"))
    assert found["made"]["steps unchanged"] == made_of["steps reasoned"]
