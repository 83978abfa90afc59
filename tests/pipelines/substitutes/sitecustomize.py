"""Loaded by every Python below a test that puts this folder on PYTHONPATH: tiny steps in place of the real ones.

The mechanics of a run (order, lock, progress, errors, signals, deaths) are tested with steps that take milliseconds.
SUBSTITUTE=FOLDER turns it on; FOLDER/STEP.py, if there is one, is executed as the step, with `out` and `stage` defined.
Every step leaves OUT/STEP.done, and training counts as finished when that exists.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

FOLDER = os.environ.get("SUBSTITUTE")
MODULES = {
    "pipelines.prepare.ingest": ("prepare_data", lambda recipe, out: act("prepare-data", out)),
    "pipelines.prepare.stage": ("prepare_stage", lambda recipe, stage, out: act(f"prepare-{stage}", out, stage)),
    "pipelines.report.build": ("write_report", lambda out: act("report", out)),
}


def act(step: str, out: str, stage: str = "") -> None:
    print(f"{step} at work")
    script = Path(FOLDER or "") / f"{step}.py"
    if script.exists():
        exec(compile(script.read_text(), str(script), "exec"), {"out": out, "stage": stage})
    Path(out, f"{step}.done").touch()


def patch_handover(module: types.ModuleType) -> None:
    module.finished = lambda recipe, stage, out, **more: Path(out, f"{stage}.done").exists() or None  # type: ignore


def patch_command(module: types.ModuleType) -> None:
    def stage_command(call):  # type: ignore[no-untyped-def]
        env = {"SUBSTITUTE_STEP": call.stage, "SUBSTITUTE_OUT": call.out}
        return module.Command([sys.executable, "-c", "import sitecustomize; sitecustomize.run_one()"], env)

    def program_command(call):  # type: ignore[no-untyped-def]
        step = {"generate": f"prepare-{call.stage}-answers"}.get(call.program, call.program)
        env = {"SUBSTITUTE_STEP": step, "SUBSTITUTE_OUT": call.out}
        return module.Command([sys.executable, "-m", "sitecustomize"], env)

    module.stage_command, module.program_command = stage_command, program_command  # type: ignore


def run_one() -> None:
    act(os.environ["SUBSTITUTE_STEP"], os.environ["SUBSTITUTE_OUT"], os.environ["SUBSTITUTE_STEP"])


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before the ordinary finders for the modules that are replaced or patched."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name in MODULES or name == "pipelines.prepare.sampling":
            return importlib.machinery.ModuleSpec(name, self)
        if name in ("trainer.handover", "trainer.command"):
            sys.meta_path.remove(self)
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
            inner = spec.loader.exec_module  # type: ignore[union-attr]

            def execute(module: types.ModuleType) -> None:
                inner(module)
                (patch_handover if name == "trainer.handover" else patch_command)(module)

            spec.loader.exec_module = execute  # type: ignore[union-attr, method-assign]
            return spec
        return None

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ in MODULES:
            name, function = MODULES[module.__name__]
            setattr(module, name, function)
        else:
            module.make_requests = lambda recipe, stage, out: act(f"prepare-{stage}-requests", out, stage)  # type: ignore
            module.select_answers = lambda recipe, stage, out: act(f"prepare-{stage}-select", out, stage)  # type: ignore


if FOLDER and __name__ == "sitecustomize":
    sys.meta_path.insert(0, Finder())
if __name__ == "__main__":
    run_one()
