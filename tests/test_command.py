"""argv and environment: one place, the same on a laptop and in a pod."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.command import (
    PARENT_RUN,
    PROGRAMS,
    ProgramCall,
    StageCall,
    local_call,
    merged,
    program_command,
    stage_command,
)
from trainer.errors import UsageError
from trainer.resolve import load_recipe


def test_a_stage_s_command_states_ranks_recipe_stage_output_overrides_and_accepted_changes() -> None:
    call = StageCall(
        recipe="s3://b/recipe.json",
        stage="sft",
        out="s3://b/out",
        nodes=2,
        procs_per_node=8,
        overrides=("seed=7", "stages.sft.optim.lr=1e-5"),
        accept_changes=("optim.lr",),
    )
    words = stage_command(call).argv
    own, rest = words[: words.index("--")], words[words.index("--") + 1 :]
    assert own == ["python", "-m", "trainer.launch", "--nnodes", "2", "--nproc-per-node", "8"]
    assert rest == [
        *("--recipe", "s3://b/recipe.json", "--stage", "sft", "--out", "s3://b/out"),
        *("--set", "seed=7", "--set", "stages.sft.optim.lr=1e-5", "--accept-change", "optim.lr"),
    ]


@pytest.mark.parametrize(
    ("call", "name", "want"),
    [
        (StageCall("r", "sft", "o", threads=3), "OMP_NUM_THREADS", "3"),
        (StageCall("r", "sft", "o"), "OMP_NUM_THREADS", "1"),
        (StageCall("r", "sft", "o", device="cpu"), "DS_ACCELERATOR", "cpu"),
        (StageCall("r", "sft", "o", device="cpu"), "CUDA_VISIBLE_DEVICES", ""),
        (StageCall("r", "sft", "o"), "CUDA_VISIBLE_DEVICES", None),
        (StageCall("r", "sft", "o"), "CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        (StageCall("r", "sft", "o", parent_run="abc"), PARENT_RUN, "abc"),
        (StageCall("r", "sft", "o"), PARENT_RUN, None),
        (ProgramCall("export", "r", "o", threads=4), "OMP_NUM_THREADS", "4"),
    ],
)
def test_the_environment_says_what_must_not_be_left_to_chance(
    call: StageCall | ProgramCall, name: str, want: str | None
) -> None:
    made = stage_command(call) if isinstance(call, StageCall) else program_command(call)
    assert made.env.get(name) == want
    assert merged({"HOME": "/h", name: "other"}, made)[name] == (want if want is not None else "other")


def test_every_program_has_a_command_and_an_unknown_one_is_refused() -> None:
    for program in PROGRAMS:
        argv = program_command(ProgramCall(program, "r", "o", stage="sft" if program == "generate" else None)).argv
        assert argv[1:3] == ["-m", PROGRAMS[program]]
    with pytest.raises(UsageError):
        program_command(ProgramCall("nothing", "r", "o"))
    with pytest.raises(UsageError):
        stage_command(StageCall("r", "stage9", "o"))


def test_a_local_call_has_the_ranks_and_threads_of_one_of_the_recipe_s_nodes() -> None:
    recipe = load_recipe("tiny", ["stages.sft.compute.threads=2"])
    call = local_call(recipe, "sft", ref="tiny", out="o", python="py")
    assert (call.nodes, call.procs_per_node, call.threads, call.device) == (1, 2, 2, "cpu")
    assert local_call(recipe, "sft", ref="tiny", out="o", procs_per_node=1).procs_per_node == 1
    with pytest.raises(UsageError, match="no such stage"):
        local_call(recipe, "stage4", ref="tiny", out="o")


def test_importing_the_commands_needs_no_torch() -> None:
    script = "import trainer.command, sys; print([m for m in ('torch', 'torchx', 'kfp', 'mlflow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
