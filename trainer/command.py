"""The argv and environment of every program of the trainer: the one place where they are made.

    StageCall    one attempt to train one stage   -> stage_command(call)   -> python -m trainer.launch ... -- ...
    ProgramCall  a program of one process         -> program_command(call) -> python -m trainer.after.generate ...
    PrepareCall  a step of data preparation       -> prepare_command(call) -> python -m pipelines.prepare ...

trainer/component.py runs them on this machine through torchx, k8s/pytorchjob.py puts them into a pod; both take argv
and env from here, so a stage that works on a laptop is started by the same words on a cluster.

The environment is what differs from the caller's: it never holds credentials or addresses of storage, which a pod gets
from its service account and a laptop has already. The number of threads is always stated, because torchrun sets
OMP_NUM_THREADS only for more than one process per node, and one-process pods would differ in bits from a
two-process local run (measured with torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import UsageError
from trainer.recipe import STAGES, Recipe

Device = Literal["cpu", "cuda"]

PROGRAMS = {
    "init": "trainer.before.init",
    "generate": "trainer.after.generate",
    "export": "trainer.after.export",
    "evaluate": "trainer.after.evaluate",
}
"""Programs of one process, by the name of their step; all take --recipe and --out, generate also --stage."""

PREPARE = ("prepare-data", "prepare-stage", "requests", "select")
"""Steps of data preparation that run in a pod of their own on a cluster; all but the first take --stage."""

PARENT_RUN = "MLFLOW_RUN_ID"  # KFP 2.17 may set it itself, so we use the same name
TRACKING_URI = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Command:
    """What to execute, and what to add to the environment."""

    argv: list[str]
    env: dict[str, str]


@dataclass(frozen=True)
class StageCall:
    """One stage on a group of nodes.

    Args:
        recipe: shipped name or URI; a pipeline names OUT/recipe.json, which is resolved and has no overrides.
        out: folder or URI of the run's output.
        nodes, procs_per_node: ranks are nodes x procs_per_node.
        threads: OMP threads of a rank.
        accept_changes: result fields whose change a begun stage accepts.
        shutdown_timeout_s: from SIGTERM to the end of the ranks; default: trainer/launch.py's own.
        python: the interpreter; sys.executable on this machine, the image's `python` in a pod.
    """

    recipe: str
    stage: str
    out: str
    nodes: int = 1
    procs_per_node: int = 1
    threads: int = 1
    device: Device = "cuda"
    overrides: tuple[str, ...] = ()
    accept_changes: tuple[str, ...] = ()
    shutdown_timeout_s: int | None = None
    tracking_uri: str | None = None
    parent_run: str | None = None
    python: str = "python"


@dataclass(frozen=True)
class ProgramCall:
    """A program of one process: init, generate (for sft or dpo), export, evaluate."""

    program: str
    recipe: str
    out: str
    stage: str | None = None
    threads: int = 2
    device: Device = "cuda"
    overrides: tuple[str, ...] = ()
    tracking_uri: str | None = None
    parent_run: str | None = None
    python: str = "python"


@dataclass(frozen=True)
class PrepareCall:
    """A step of data preparation in a process of its own."""

    what: str
    recipe: str
    out: str
    stage: str | None = None
    threads: int = 2
    device: Device = "cpu"
    tracking_uri: str | None = None
    parent_run: str | None = None
    python: str = "python"


def stage_command(call: StageCall) -> Command:
    """argv and environment of one node's launcher; the same on every node of the stage."""
    if call.stage not in STAGES:
        raise UsageError("no such stage", where=call.stage, expected=", ".join(STAGES))
    argv = [call.python, "-m", "trainer.launch"]
    argv += ["--nnodes", str(call.nodes), "--nproc-per-node", str(call.procs_per_node)]
    argv += ["--shutdown-timeout", str(call.shutdown_timeout_s)] if call.shutdown_timeout_s is not None else []
    argv += ["--", "--recipe", call.recipe, "--stage", call.stage, "--out", call.out]
    argv += _repeated("--set", call.overrides) + _repeated("--accept-change", call.accept_changes)
    return Command(argv, _environment(call))


def program_command(call: ProgramCall) -> Command:
    """argv and environment of a program of one process."""
    if call.program not in PROGRAMS:
        raise UsageError("no such program", where=call.program, expected=", ".join(PROGRAMS))
    argv = [call.python, "-m", PROGRAMS[call.program], "--recipe", call.recipe, "--out", call.out]
    if call.stage is not None:
        argv += ["--stage", call.stage]
    return Command(argv + _repeated("--set", call.overrides), _environment(call))


def prepare_command(call: PrepareCall) -> Command:
    """argv and environment of a step of data preparation."""
    if call.what not in PREPARE:
        raise UsageError("no such step", where=call.what, expected=", ".join(PREPARE))
    argv = [call.python, "-m", "pipelines.prepare", call.what, "--recipe", call.recipe, "--out", call.out]
    argv += ["--stage", call.stage] if call.stage is not None else []
    return Command(argv, {**_environment(call), "DAFT_ANALYTICS_ENABLED": "0", "DO_NOT_TRACK": "1"})


def local_call(recipe: Recipe, stage: str, *, ref: str, out: str, **more: Any) -> StageCall:
    """The call of one stage on this machine: the ranks of one of the recipe's nodes.

    A recipe for a cluster may ask for more nodes, which one machine does not have. `more` goes to StageCall, over
    what the recipe says.
    """
    named = recipe.stages.named()
    if stage not in named:
        raise UsageError("the recipe has no such stage", where=stage, expected=", ".join(named))
    compute = named[stage].compute
    says = {"procs_per_node": compute.gpus_per_node, "threads": compute.threads, "device": "cpu"}
    return StageCall(recipe=ref, stage=stage, out=out, **{**says, **more})


def merged(env: Mapping[str, str], command: Command) -> dict[str, str]:
    """A caller's environment with the command's on top."""
    return {**env, **command.env}


def _repeated(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _environment(call: StageCall | ProgramCall | PrepareCall) -> dict[str, str]:
    threads = str(call.threads)
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # no result may hang on the order of a set
        "TOKENIZERS_PARALLELISM": "false",  # loader workers are started after the tokenizer was used
        "HF_HUB_OFFLINE": "1",  # weights come from storage; a forgotten hub name must fail, not download
        "TRANSFORMERS_VERBOSITY": "error",
        "DS_ACCELERATOR": call.device,
    }
    if call.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin at barriers: evaluation 35 s instead of 10 beside others
    else:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is only reproducible with a fixed workspace
    if call.tracking_uri is not None:
        env[TRACKING_URI] = call.tracking_uri
    if call.parent_run is not None:
        env[PARENT_RUN] = call.parent_run
    return env
