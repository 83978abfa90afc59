"""Bad input: one clear message, the documented exit code, nothing half-written; through the real command.

What is wrong on the command line and who may use an output is in tests/pipelines/test_run.py; processes that die are in
test_own_data.py and test_verify.py.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.runs import (
    LIMIT_S,
    Finished,
    command_of,
    files_below,
    llava,
    own_recipe,
    qwenvl,
    seconds_until_all_gone,
    start,
    told_by,
    tree_of,
    wait_until,
    write_llava,
)
from trainer import manifest as manifests
from trainer.data.plan import Plan
from trainer.data.shards import Source
from trainer.errors import DataError, PlanError, RecipeError
from trainer.manifest import Change, Manifest
from trainer.resolve import load_recipe


def ended_with(text: str) -> list[str]:
    """The error as the top tells it: from `error` to the end."""
    lines = text.splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith("error")]
    assert len(starts) == 1, f"an error is told once:\n{text}"
    return lines[starts[0] :]


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"prepare": {"max_bad_fractoin": 0.5}}, "did you mean max_bad_fraction?"),
        ({"stages": {"sft": {"train": {"merger": False, "llm": False}}}}, "trains nothing"),
        ({"prepare": {"sources": {"mine": {"format": "lava"}}}}, "did you mean llava?"),
    ],
)
def test_a_recipe_file_that_says_something_wrong_writes_nothing(
    tmp_path: Path, change: dict[str, Any], want: str
) -> None:
    llava(tmp_path / "data")
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(yaml.safe_dump({"extends": own_recipe(tmp_path / "data", tmp_path / "model"), **change}))
    ended = qwenvl("run", str(recipe), "--out", str(tmp_path / "out"))
    assert ended.returncode == RecipeError.code
    told = "\n".join(ended_with(ended.stderr))
    assert want in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def take_away(data: Path, entries: list[dict[str, Any]]) -> None:
    (data / "images" / "03.jpg").unlink()


def cut_off(data: Path, entries: list[dict[str, Any]]) -> None:
    whole = (data / "images" / "03.jpg").read_bytes()
    (data / "images" / "03.jpg").write_bytes(whole[: len(whole) // 2])


def forget_the_picture(data: Path, entries: list[dict[str, Any]]) -> None:
    del entries[3]["image"]
    write_llava(data, entries)


@pytest.mark.parametrize(
    ("spoil", "reason", "want"),
    [
        (take_away, "missing-media", "images/03.jpg, got no such file"),
        (cut_off, "damaged-media", "images/03.jpg"),
        (forget_the_picture, "placeholder-without-media", "expected 1 image files, got 0 of them"),
    ],
)
def test_a_row_that_cannot_be_used_ends_the_preparation_with_its_place(
    smoke: Finished, tmp_path: Path, spoil: Any, reason: str, want: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    spoil(data, llava(data))
    ended = qwenvl("run", own_recipe(data, smoke.out / "export"), "--out", str(out))
    assert ended.returncode == DataError.code, ended.stdout + ended.stderr
    told = "\n".join(ended_with(ended.stderr))
    assert "error in prepare-data" in told and "where: prepare.sources.mine" in told
    assert reason in told and want in told and f"{data}/train.json, entry 3" in told
    assert "do: " in told and "Traceback" not in ended.stdout + told
    left = {name for name in files_below(out) if not name.startswith("runs/")}  # how long the attempt took
    assert left == {"recipe.json"}, "of the source nothing is left"


def test_a_packing_length_that_no_sample_fits_is_an_error_of_the_plan(smoke: Finished, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    llava(data)
    recipe = own_recipe(data, smoke.out / "export", packing={"length": 16, "patch_budget": 64})
    ended = qwenvl("run", recipe, "--out", str(out))
    assert ended.returncode == PlanError.code, ended.stdout + ended.stderr
    told = "\n".join(ended_with(ended.stderr))
    assert "error in prepare-sft" in told and "16" in told and "12" in told
    assert "do: " in told and "Traceback" not in ended.stdout + told
    assert not list(out.glob("sft/plan/*")), "no half of a plan"


def a_long_stage(folder: Path) -> str:
    """tiny_smoke's stage1 alone, with hundreds of steps and no commit of its own among them."""
    kept = ("captions", "text")
    recipe = {
        "extends": "tiny_smoke",
        "name": "long",
        "model": {
            "pretrain": {"llm_steps": 1, "vision_steps": 1, "sources": {"text": ["text"], "pairs": ["captions"]}}
        },
        "prepare": {"sources": {name: None for name in load_recipe("tiny_smoke").prepare.sources if name not in kept}},
        "stages": {
            **dict.fromkeys(("stage2", "stage3", "sft", "dpo")),
            "stage1": {"schedule": {"steps": 500}, "checkpoint": {"every_steps": 500}},
        },
    }
    path = folder / "long.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.extended
def test_ctrl_c_lets_the_ranks_save_ends_everything_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The second time with a sample left out, which the next checkpoint records."""
    recipe, out = a_long_stage(tmp_path), tmp_path / "out"

    def interrupted(begun: str, *words: str) -> Manifest:
        """Start, wait until it says `begun`, press Ctrl-C as a terminal does; the newest checkpoint."""
        top = start(recipe, out, *words)
        wait_until(lambda: re.search(begun, told_by(out)) is not None, top, out)
        tree = tree_of(top.pid)
        ranks = [pid for pid in tree if "trainer.warm" in command_of(pid)]
        assert ranks and all(os.getpgid(pid) != top.pid for pid in ranks), "the signal does not reach ranks by itself"
        os.killpg(top.pid, signal.SIGINT)
        assert top.wait(timeout=60) == 128 + signal.SIGINT, told_by(out)
        assert seconds_until_all_gone(top.pid, tree) < LIMIT_S
        newest = manifests.newest(str(out / "stage1"))
        assert newest is not None, told_by(out)
        return newest

    first = interrupted(r"stage1: step \d+/500")
    assert 1 <= first.step < 500 and first.skips == ()
    told = told_by(out)
    assert "SIGINT: stopping; a stage saves a checkpoint first" in told and "the same command goes on" in told
    assert "Traceback" not in told and not (out / "stage1" / "result.json").exists()

    plan = Plan.read(str(out / "stage1" / "plan"))
    place = plan.pack(int(plan.packs_of(first.step)[0])).places[0]
    sample = f"captions/{Source.open(str(out / plan.sources[place.source]['uri'])).sample_id(place.shard, place.row)}"
    field = "stages.stage1.skip_samples"
    second = interrupted(
        rf"stage1: goes on after step {first.step} of 500(.|\n)*stage1: step {first.step + 1}/500",
        *("--set", f'{field}=["{sample}"]', "--accept-change", field),
    )
    assert second.step > first.step and second.skips == (sample,)
    assert second.accepted_changes == (Change(field="skip_samples", stored=[], asked=[sample], step=first.step),)
    packs = [index for step in range(first.step, second.step) for index in plan.packs_of(step).tolist()]
    uses = [use for index in packs for use in plan.pack(index).places if use[:3] == place[:3]]
    assert uses and second.extra["left_out"] == {
        "samples": len(uses),
        "target_tokens": sum(use.targets for use in uses),
    }
