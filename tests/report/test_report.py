"""The report: run.json's keys are a contract, the page is one file, and figures are drawn where the numbers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pipelines.report import charts
from pipelines.report.build import write_report
from pipelines.report.facts import read_facts, run_json
from trainer import handover, manifest, storage
from trainer.handover import FreezeRow, StageResult
from trainer.observe.metrics import Row, encode_rows
from trainer.resolve import load_recipe, resolved

STAGE_KEYS = {
    "name", "freeze", "packing_length", "patch_budget", "world_size", "steps", "tokens", "target_tokens",
    "padding_tokens", "fill", "loss_first", "loss_last", "frozen_unchanged", "trained_changed", "checkpoint",
    "plan_digest", "resumed_from", "mlflow_run_id",
}  # fmt: skip
RUN_KEYS = {"recipe", "digest", "wall_s", "stages", "export", "evaluation", "media_matter", "warnings"}


def a_row(group: str, state: str, *, same: bool) -> FreezeRow:
    digests = {"digest_before": "a" * 64, "digest_after": ("a" if same else "b") * 64}
    return FreezeRow(group=group, trainable=state == "trained", parameters=10, state=state, **digests)  # type: ignore[arg-type]


def a_run(out: str, *, stages: tuple[str, ...] = ("stage1", "dpo"), frozen_same: bool = True) -> str:
    """OUT as a run leaves it, as far as the report reads it."""
    recipe = load_recipe("tiny")
    storage.write_json(storage.join(out, "recipe.json"), resolved(recipe))
    storage.write_json(
        storage.join(out, "data", "funnel.json"), {"captions": {"train": {"read": 9, "kept": 8, "bad": {"missing": 1}}}}
    )
    model = handover.Model(uri="init/model", files={}, digest="m" * 64)
    init = StageResult(
        stage="init", recipe_sha256="r", resolved_stage={}, model=model, init_origin={"llm": "pretrain"}, wall_s=40
    )
    handover.write(out, init)
    for stage in stages:
        uri = storage.join(out, stage)
        rows = encode_rows([Row(step, 0.0, {"loss": 7.0 - step / 4}) for step in range(1, 21)])
        key = manifest.metrics_key(20, 1, "n")
        storage.write_bytes(storage.join(uri, key), rows)
        part = manifest.MetricsPart(
            key=key, first_step=0, last_step=20, size_bytes=len(rows), sha256=storage.sha256_bytes(rows)
        )
        manifest.commit(
            uri,
            manifest.Manifest(
                stage=stage, step=20, attempt=1, nonce="n", world_size=2, stage_digest="s", plan_digest="p",
                base_model_digest="b", objects=(), num_parameters=1, optimizer={}, metrics=(part,),
            ),
        )  # fmt: skip
        metrics = {
            "steps": 20, "tokens": 1000, "target_tokens": 500, "padding_tokens": 24, "fill": 0.97, "packs": 2,
            "loss_first": 6.9, "loss_last": 2.1, "resumed_from": None, "accuracy_last": 0.75, "margin_last": 0.2,
        }  # fmt: skip
        table = (a_row("vision", "trained", same=False), a_row("llm", "frozen", same=frozen_same))
        handover.write(
            out,
            StageResult(
                stage=stage, recipe_sha256="r", resolved_stage={}, model=model, metrics=metrics, freeze_table=table,
                world_size=2, wall_s=60, plan_digest="p" * 64, mlflow_run_id="run", checkpoint=f"{stage}/checkpoints/x",
            ),
        )  # fmt: skip
    return out


def an_evaluated_run(out: str) -> str:
    a_run(out)
    storage.write_bytes(storage.join(out, "evaluate", "pictures", "00.png"), b"\x89PNG")
    figures = {"right": 1.0, "shuffled": 1.5, "n": 30, "ci95": [0.3, 0.7]}
    content = {
        "evaluation": {
            "caption": {
                "loss": {"before": 3.0, "after": 1.0, "n": 30},
                "box_iou": {"before": None, "after": 0.5, "n": 3},
            }
        },
        "media_matter": {"stage1": {"caption": figures}, "dpo": {"caption": figures}},
        "pictures": [
            {
                "picture": "pictures/00.png",
                "task": "box",
                "question": "<b>Where?</b>",
                "key": [1, 2, 3, 4],
                "after": "<script>",
                "scores_after": {"iou": 0.5},
            }
        ],
        "wall_s": 12.0,
    }
    storage.write_json(storage.join(out, "evaluate", "evaluation.json"), content)
    storage.write_json(
        storage.join(out, "prepare-sft", "selection.json"), {"requests": 4, "answers": 16, "kept": 3, "errors": 1}
    )
    return out


def test_run_json_has_the_keys_of_the_contract(tmp_path):
    found = run_json(read_facts(an_evaluated_run(str(tmp_path))))
    assert set(found) == RUN_KEYS
    assert [set(stage) for stage in found["stages"]] == [STAGE_KEYS, STAGE_KEYS | {"accuracy", "margin"}]
    assert found["stages"][0]["freeze"] == {"vision": "trained", "merger": "trained", "llm": "frozen"}
    assert found["media_matter"]["stage1"]["caption"]["ci95"] == [0.3, 0.7]


@pytest.mark.parametrize("same", [True, False])
def test_a_frozen_group_that_moved_is_told(tmp_path, same: bool):
    facts = read_facts(a_run(str(tmp_path), frozen_same=same))
    assert all(stage["frozen_unchanged"] is same for stage in run_json(facts)["stages"])


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path):
    out = an_evaluated_run(str(tmp_path))
    write_report(out)
    text = storage.read_bytes(storage.join(out, "report.html")).decode()
    assert not re.findall(r"(?:src|href)='(?!data:|#)[^']*'|url\((?!#)|@import|<script|<link", text)
    assert "&lt;script&gt;" in text
    for section in ("Lineage", "Freeze proof", "The pictures matter", "Held-out scores", "Packing", "Data", "Times"):
        assert f"<h2>{section}</h2>" in text


VOID = {"meta", "img", "br", "hr", "link", "input"}


class Tags(HTMLParser):
    """What is wrong with a page's tags, and the addresses that stand in its attributes or styles."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.wrong += [f"<{tag}> has {name} twice" for name in set(names) if names.count(name) > 1]
        self.wrong += [f"<{tag}> has an odd attribute {name!r}" for name in names if not re.fullmatch(r"[\w:-]+", name)]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # <circle .../> of an SVG closes itself
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}")
        else:
            self.open.pop()


def faults_of(page: str) -> list[str]:
    """Unclosed or crossed tags, attributes given twice, and names of other hosts."""
    tags = Tags()
    tags.feed(page)
    tags.close()
    hosts = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"data:[^'\"]*|xmlns[:\w]*=['\"][^'\"]*['\"]", "", page))
    twice = [f"id {name} twice" for name in sorted(set(tags.ids)) if tags.ids.count(name) > 1]
    return [*tags.wrong, *(f"<{tag}> is not closed" for tag in tags.open), *twice, *hosts]


def test_the_page_is_well_formed_and_names_no_other_host(tmp_path):
    for out in (an_evaluated_run(str(tmp_path / "whole")), a_run(str(tmp_path / "part"), stages=("stage1",))):
        write_report(out)
        text = storage.read_bytes(storage.join(out, "report.html")).decode()
        assert text.startswith("<!doctype html>") and faults_of(text) == []


@pytest.mark.parametrize(
    ("page", "want"),
    [
        ("<p><b>x</p>", "</p> closes ['b']"),
        ("<div><p>x</p>", "<div> is not closed"),
        ("<a href='https://example.org/x'>x</a>", "https://example.org"),
        ("<i class='a' class='b'>x</i>", "class twice"),
        ("<i title='it's'>x</i>", "odd attribute"),
        ("<i id='a'>x</i><i id='a'>y</i>", "id a twice"),
    ],
)
def test_a_page_with_a_fault_is_found(page: str, want: str):
    assert any(want in fault for fault in faults_of(page)), faults_of(page)


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    out = str(tmp_path)
    storage.write_json(storage.join(out, "recipe.json"), resolved(load_recipe("tiny")))
    facts = write_report(out)
    assert run_json(facts)["stages"] == [] and run_json(facts)["export"] is None


def test_a_source_that_loses_much_to_packing_is_told_in_the_page_and_in_run_json(tmp_path):
    out = a_run(str(tmp_path))
    assert run_json(read_facts(out))["warnings"] == []
    row = {"name": "captions", "split": "train", "num_samples": 100, "drops": {"over_long": 40}}
    plan = {"facts": {"stage": "stage1"}, "length": 512, "patch_budget": 1024, "sources": [row], "statistics": {}}
    storage.write_json(storage.join(out, "stage1", "plan", "plan.json"), plan)
    write_report(out)
    [told] = storage.read_json(storage.join(out, "run.json"))["warnings"]
    assert told["field"] == "stages.stage1.data.captions" and told["message"].startswith("40 of 100 samples (40%)")
    text = storage.read_bytes(storage.join(out, "report.html")).decode()
    assert "<p class='warning'>stages.stage1.data.captions: 40 of 100 samples" in text and faults_of(text) == []


@pytest.mark.parametrize("at", ["held_out_sources.json", "held_out/plan.json"])
def test_a_held_out_source_that_loses_much_is_told_too_also_where_there_is_no_plan_of_it(tmp_path, at: str):
    out = a_run(str(tmp_path))
    row = {"name": "captions", "split": "held_out", "num_samples": 20, "drops": {"over_long": 20}}
    plan = {"facts": {"stage": "stage1"}, "length": 512, "patch_budget": 1024, "sources": [row]}
    storage.write_json(storage.join(out, "stage1", "plan", at), plan)
    [told] = run_json(read_facts(out))["warnings"]
    assert told["message"].startswith("20 of 20 held-out samples (100%)")
    storage.write_json(
        storage.join(out, "recipe.json"), resolved(load_recipe("tiny", ["stages.stage1.held_out_packs=0"]))
    )
    assert run_json(read_facts(out))["warnings"] == [], "what is not measured loses nothing"


def test_an_answer_cannot_write_into_the_page(tmp_path):
    """Negative control of the escaping: the raw text is not in the page."""
    out = an_evaluated_run(str(tmp_path))
    write_report(out)
    assert "<b>Where?</b>" not in storage.read_bytes(storage.join(out, "report.html")).decode()


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0, 1, [0, 0.5, 1.0]), (2.1, 6.9, [2, 4, 6, 8]), (5, 5, [5, 5.2, 5.4, 5.6]), (float("nan"), 1, [])],
)
def test_ticks_are_round_and_cover_the_figures(low: float, high: float, want: list[float]):
    found = charts.nice_ticks(low, high, 3)
    assert found == pytest.approx(want)
    assert not found or (found[0] <= low and found[-1] >= high)


def test_a_curve_goes_down_when_its_loss_does():
    drawn = charts.line_chart([(1, 5.0), (2, 4.0), (3, 3.0)], label="loss")
    ys = [float(pair.split(",")[1]) for pair in re.findall(r"points='([^']+)'", drawn)[0].split()]
    assert ys == sorted(ys)


def test_a_curve_without_figures_says_so():
    assert "no figures" in charts.line_chart([(1, float("nan"))], label="loss")
