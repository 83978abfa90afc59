"""The torchx component of one stage: a stage on this machine, for trying and for debugging.

    torchx run -s local_cwd trainer/component.py:stage --recipe tiny --stage sft --out DIR

torchx takes a component's arguments without `--`: behind one, 2026.10.26 does not hand them on. The component only says
what to run; argv and environment come from trainer/command.py, which the PyTorchJob uses too. The pipeline builds the
same AppDef through `app_of` and hands it to the same scheduler (pipelines/work.py).

No `from __future__ import annotations` here: torchx makes command-line options of the annotations and does not resolve
them when they are strings.
"""

import os
import shlex
import sys

from torchx import specs

from trainer import handover, storage
from trainer.command import Command, StageCall, local_call, stage_command
from trainer.errors import PlanError, QwenVLError, UsageError
from trainer.recipe import Recipe
from trainer.resolve import load_recipe

DEVICES = ("cpu", "cuda")
DIE_WITH_PARENT = "QWENVL_DIE_WITH_PARENT"  # read by trainer/launch.py


# torchx makes options of these plain annotations and help of the docstring: no unions, no Literal.
def stage(
    recipe: str,
    stage: str,
    out: str,
    overrides: list[str] = [],  # noqa: B006 - torchx shows the default and needs a value of the annotated type
    accept_changes: list[str] = [],  # noqa: B006
    device: str = "cpu",
    procs: int = 0,
    threads: int = 0,
) -> specs.AppDef:
    """One stage of a recipe, on this machine.

    Args:
        recipe: name of a shipped recipe, a path or a URI
        stage: stage1, stage2, stage3, sft or dpo
        out: folder or URI of the run's output, the same for all its stages
        overrides: changes of the recipe, a.b=value,c.d=value
        accept_changes: result fields whose change a begun stage accepts
        device: cpu or cuda
        procs: ranks; 0 takes the recipe's gpus_per_node
        threads: threads of a rank; 0 takes the recipe's
    """
    try:
        if device not in DEVICES:
            raise UsageError("no such device", where=device, expected=" or ".join(DEVICES))
        more = {key: value for key, value in (("procs_per_node", procs), ("threads", threads)) if value}
        read = load_recipe(recipe, overrides)
        call = local_call(
            read,
            stage,
            ref=_absolute(recipe),
            out=_absolute_out(out),
            python=sys.executable,
            overrides=tuple(overrides),
            accept_changes=tuple(accept_changes),
            device=device,
            **more,
        )
        if _starts_it():
            refuse_unprepared(read, call)
    except QwenVLError as error:  # the edge of `torchx run`, which would bury the message in its own traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    return app_of(stage, stage_command(call))


def refuse_unprepared(recipe: Recipe, call: StageCall) -> None:
    """What the ranks would find out one after the other.

    Raises:
        PlanError: the stage has no plan. UsageError: a stage before it is not finished. StageMismatch: one is stale.
    """
    words = [word for one in call.overrides for word in ("--set", one)]
    told = shlex.join(["qwenvl", "run", call.recipe, "--out", call.out, *words])
    plan = storage.join(call.out, call.stage, "plan", "plan.json")
    if not storage.exists(plan):
        do = f"{told}    (prepares the data, trains the stages before it, and this one)"
        raise PlanError("the stage's data is not prepared", where=plan, expected="a plan", got="nothing there", do=do)
    try:
        handover.lineage(recipe, call.out, call.stage)
    except UsageError as error:
        do = f"{told}    (goes on from what is finished)"
        raise UsageError(error.what, where=error.where, expected=error.expected, got=error.got, do=do) from None


def _starts_it() -> bool:
    """Whether torchx asks in order to run it: --dryrun only shows the command."""
    return os.path.basename(sys.argv[0]) == "torchx" and "--dryrun" not in sys.argv


def app_of(name: str, command: Command) -> specs.AppDef:
    """A command as torchx's app of one role with one replica; local_cwd ignores image and resources."""
    role = specs.Role(
        name=name,
        image="",
        entrypoint=command.argv[0],
        args=command.argv[1:],
        env={**command.env, DIE_WITH_PARENT: "1"},  # torchx leaves its children behind when it is killed
        num_replicas=1,
        resource=specs.Resource(cpu=-1, gpu=0, memMB=-1),
    )
    return specs.AppDef(name=name, roles=[role])


def _absolute(ref: str) -> str:
    """A recipe file by its full path, so that another working folder finds it; names and URIs as they are."""
    return os.path.realpath(ref) if os.path.isfile(ref) else ref


def _absolute_out(out: str) -> str:
    return out if "://" in out else os.path.realpath(out)
