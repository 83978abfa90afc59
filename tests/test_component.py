"""The torchx component: `torchx run` starts what trainer/command.py says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import storage
from trainer.command import local_call, stage_command
from trainer.component import DIE_WITH_PARENT, refuse_unprepared, stage
from trainer.errors import PlanError, RecipeError, UsageError
from trainer.resolve import load_recipe

ROOT = Path(__file__).parents[1]


def test_the_app_is_one_role_with_the_stage_s_command() -> None:
    app = stage(recipe="tiny", stage="sft", out="/o", overrides=["seed=7"], threads=2)
    want = stage_command(
        local_call(
            load_recipe("tiny"), "sft", ref="tiny", out="/o", python=sys.executable, overrides=("seed=7",), threads=2
        )
    )
    (role,) = app.roles
    assert [role.entrypoint, *role.args] == want.argv
    assert role.env == {**want.env, DIE_WITH_PARENT: "1"}


def test_torchx_takes_the_arguments_as_the_readme_writes_them() -> None:
    words = "run --dryrun -s local_cwd trainer/component.py:stage --recipe tiny --stage sft --out out/x"
    words += " --overrides seed=7,stages.sft.optim.lr=1e-5"
    done = torchx(words)
    assert done.returncode == 0, done.stderr
    for want in ("'trainer.launch'", "'seed=7'", "'stages.sft.optim.lr=1e-5'", str(ROOT / "out" / "x")):
        assert want in done.stdout


@pytest.mark.parametrize(
    ("words", "want"),
    [("--recipe tiny --stage stage9", "no such stage"), ("--recipe tinny --stage sft", "did you mean tiny?")],
)
def test_a_mistake_is_one_message_and_its_code(words: str, want: str) -> None:
    done = torchx(f"run --dryrun -s local_cwd trainer/component.py:stage --out out/x {words}")
    assert done.returncode == RecipeError.code
    assert want in done.stderr and "Traceback" not in done.stderr


def test_an_output_that_is_not_prepared_is_one_message_its_code_and_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = torchx(
        f"run -s local_cwd trainer/component.py:stage --recipe tiny --stage sft --out {out} --overrides seed=7"
    )
    assert done.returncode == PlanError.code
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    assert f"where: {out}/sft/plan/plan.json" in done.stderr
    assert f"do: qwenvl run tiny --out {out} --set seed=7" in done.stderr
    assert not out.exists()


def test_a_stage_whose_parent_is_not_finished_names_it_and_the_command(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    storage.write_json(storage.join(out, "stage2", "plan", "plan.json"), {})
    recipe = load_recipe("tiny")
    with pytest.raises(UsageError, match=rf"init is not finished\n(.*\n)*  do: qwenvl run tiny --out {out}"):
        refuse_unprepared(recipe, local_call(recipe, "stage2", ref="tiny", out=out))


def test_what_the_error_expected_and_found_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = str(tmp_path), load_recipe("tiny")
    storage.write_json(storage.join(out, "stage2", "plan", "plan.json"), {})

    def raises(*_: object) -> None:
        raise UsageError("stage1 is another one", where="here", expected="one thing", got="another")

    monkeypatch.setattr("trainer.handover.lineage", raises)
    with pytest.raises(UsageError, match="  where: here\n  expected: one thing\n  got: another\n  do: qwenvl run tiny"):
        refuse_unprepared(recipe, local_call(recipe, "stage2", ref="tiny", out=out))


def torchx(words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "torchx")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    argv = [program, *words.split()]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout_s, check=False)
