"""qwenvl runs list|status|logs|stop|retry: runs on Kubeflow Pipelines.

status exits with 1 when the run failed; retry follows the run and exits like submit. A token comes from KFP_TOKEN.
"""

from __future__ import annotations

import argparse

from pipelines.cli.kfp_place import add_place, place_of


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl runs", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    helps = {
        "list": "the newest runs",
        "status": "its state and its steps",
        "logs": "the lines of its steps' pods (needs KUBECONFIG)",
        "stop": "end it and remove what it holds on the cluster",
        "retry": "start its failed steps once more, and follow it",
    }
    for verb, text in helps.items():
        one = verbs.add_parser(verb, help=text, description=text)
        if verb == "list":
            one.add_argument("--number", type=int, default=20, help="how many (default 20)")
        else:
            one.add_argument("run", help="the run's id, as submit printed it")
        if verb == "logs":
            one.add_argument("--step", help="one step, e.g. stage1; default: all of them")
            one.add_argument("--tail", type=int, default=200, help="lines per step (default 200)")
        if verb == "retry":
            one.add_argument("--detach", action="store_true", help="do not follow it")
        add_place(one)
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    from pipelines import remote

    place = place_of(asked)
    match asked.verb:
        case "list":
            return remote.list_runs(place, number=asked.number)
        case "status":
            return remote.status(place, asked.run)
        case "logs":
            return remote.logs(place, asked.run, step=asked.step, tail=asked.tail)
        case "stop":
            return remote.stop(place, asked.run)
        case _:
            return remote.retry(place, asked.run, wait=not asked.detach)
