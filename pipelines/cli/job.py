"""qwenvl job VERB: one step of a recipe on a cluster, without Kubeflow Pipelines.

  render STEP    print what would be created, as YAML; nothing is created or written
  create STEP    create it and leave it
  watch STEP     create or adopt it, follow it, try again where that helps, until its result verifies
  logs STEP      rank 0's log; every rank's last lines from storage when the pods are gone
  stop [STEP]    remove what runs, or suspend it: the next watch resumes it

STEP is a stage (stage1, sft, ...), or prepare-data, init, prepare-STAGE, requests-STAGE, generate-STAGE,
select-STAGE, export, evaluate. The cluster is the one that KUBECONFIG names. A recipe that is given is settled in
--out first; without one the output's own is used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.cli.changes import add_changes

VERBS = {
    "render": "print what would be created, as YAML; nothing is created or written",
    "create": "create it and leave it",
    "watch": "create or adopt it, follow it, try again where that helps, until its result verifies",
    "logs": "rank 0's log; every rank's last lines from storage when the pods are gone",
    "stop": "remove what runs, or suspend it: the next watch resumes it",
}
STEP = (
    "a stage (stage1, sft, ...), or prepare-data, init, prepare-STAGE, requests-STAGE, generate-STAGE, select-STAGE, "
    "export, evaluate"
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="qwenvl job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, told in VERBS.items():
        one = verbs.add_parser(verb, help=told, description=told)
        if verb == "stop":
            one.add_argument("step", metavar="STEP", nargs="?", help=f"{STEP}; default: all of them")
        else:
            one.add_argument("step", metavar="STEP", help=STEP)
        one.add_argument("--cluster", required=True, help="shipped cluster, file or URI")
        one.add_argument("--out", required=True, help="s3:// address of everything that the run makes")
        if verb in ("render", "create", "watch"):
            one.add_argument("--recipe", help="shipped name, file or URI; default: the one that --out was settled with")
            add_changes(one)
            one.add_argument("--run-id", help="who owns what is created; default: made from --out")
        if verb in ("render", "logs"):
            one.add_argument("--attempt", type=int, help="default: 1 for render, the newest for logs")
        if verb == "stop":
            one.add_argument("--suspend", action="store_true", help="keep it; not for jobs in a queue")
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    if asked.verb == "render":
        return render(asked)
    if asked.verb == "logs":
        return show_logs(asked)
    if asked.verb == "stop":
        return stop(asked)
    return launch(asked)


def render(asked: argparse.Namespace) -> int:
    """What one attempt creates, in the order in which kubectl may create it."""
    import yaml

    from k8s import tasks
    from k8s.cleanup import default_run_id
    from k8s.cluster import load_cluster
    from k8s.names import Run
    from pipelines.settle import asked_recipe, stored_recipe

    recipe = asked_recipe(asked.recipe, asked.overrides, asked.base_model) if asked.recipe else stored_recipe(asked.out)
    what, stage = tasks.named(asked.step, recipe)
    run = Run(
        out=asked.out,
        id=asked.run_id or default_run_id(asked.out),
        attempt=asked.attempt or 1,
        accept_changes=_accepted(stage, asked.accept_changes),
    )
    made, unknown = tasks.rendered(what, recipe, load_cluster(_inline(asked.cluster)), run, stage=stage)
    if unknown:
        print(f"note: {unknown}", file=sys.stderr)
    print(yaml.safe_dump_all(made.objects(), sort_keys=True, width=120), end="")
    return 0


def launch(asked: argparse.Namespace) -> int:
    """create and watch."""
    from k8s import launcher
    from k8s.attempts import NEVER
    from k8s.client import connect
    from k8s.loop import Launcher
    from k8s.tasks import named
    from pipelines.settle import settle, stored_recipe
    from trainer.errors import UsageError

    if asked.recipe is None and (asked.overrides or asked.base_model):
        raise UsageError("what shall be changed?", where="--set, --base-model", do="give --recipe as well")
    recipe = (
        settle(asked.recipe, asked.overrides, base_model=asked.base_model, accept=asked.accept_changes, out=asked.out)
        if asked.recipe
        else stored_recipe(asked.out)
    )
    what, stage = named(asked.step, recipe)
    offered, task = launcher.prepared(
        launcher.StepCall(
            what,
            _inline(asked.cluster),
            asked.out,
            stage=stage,
            accept_changes=_accepted(stage, asked.accept_changes),
            run_id=asked.run_id,
        ),
        say=_say,
    )
    api = connect(offered.namespace)
    if asked.verb == "create":
        Launcher(api, offered, task, say=_say, name=NEVER).create()
        return 0
    watching = Launcher(api, offered, task, say=_say)
    try:
        with launcher.word_at_sigterm(task.step):
            watching.launch()
    except KeyboardInterrupt:
        again = f"--cluster {asked.cluster} --out {asked.out}"
        for name in watching.let_go():
            _say(f"{name} goes on; follow it: qwenvl job watch {asked.step} {again}; or stop it: qwenvl job stop")
        raise
    return 0


def show_logs(asked: argparse.Namespace) -> int:
    """Of the newest attempt, or of the one asked for."""
    from k8s import cleanup, logs
    from k8s.client import connect
    from k8s.cluster import load_cluster
    from k8s.kinds import kinds_of
    from trainer import storage
    from trainer.attempt import attempts
    from trainer.errors import UsageError

    stage_uri = storage.join(asked.out, asked.step)
    cluster = load_cluster(_inline(asked.cluster))
    api, kinds = connect(cluster.namespace), kinds_of(cluster)
    found = cleanup.first_pod(api, out=asked.out, step=asked.step, attempt=asked.attempt, kinds=kinds)
    if found is not None:
        logs.Follower(api, *found, _say).follow()
        return 0
    stored = attempts(stage_uri)
    attempt = asked.attempt or max(stored, default=None)
    if attempt not in stored or attempt is None:
        raise UsageError("neither a pod nor stored lines", where=asked.step, expected=f"one of {stored}", got=attempt)
    _say(f"no pod of attempt {attempt} is left; these lines come from storage")
    logs.tell_last_lines(stage_uri, attempt, _say)
    return 0


def stop(asked: argparse.Namespace) -> int:
    from k8s import cleanup
    from k8s.client import connect
    from k8s.cluster import load_cluster
    from k8s.kinds import kinds_of

    cluster = load_cluster(_inline(asked.cluster))
    api, kinds = connect(cluster.namespace), kinds_of(cluster)
    found = cleanup.stop(api, out=asked.out, step=asked.step, suspend=asked.suspend, kinds=kinds)
    _say(f"{'suspended' if asked.suspend else 'removed'}: {', '.join(found) if found else 'nothing was under way'}")
    return 0


def _accepted(stage: str | None, names: list[str]) -> tuple[str, ...]:
    from pipelines.work import accepted_by

    return tuple(accepted_by(stage, names)) if stage else ()


def _inline(ref: str) -> str:
    """A file of this machine as its text, so that a relative path means what it says."""
    return Path(ref).read_text(encoding="utf-8") if Path(ref).is_file() else ref


def _say(line: str) -> None:
    print(line, flush=True)
