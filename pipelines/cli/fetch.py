"""qwenvl fetch model REPO@REV --to URI, qwenvl fetch data NAME[@REV] --to URI: pinned, resumable, verified."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl fetch", description=__doc__)
    what = made.add_subparsers(dest="what", required=True)
    model = what.add_parser("model", help="a model folder")
    model.add_argument("ref", metavar="REPO@REV", help="repository and commit, as NAME/MODEL@COMMIT")
    data = what.add_parser("data", help="a data set described in pipelines/data_sources.yaml")
    data.add_argument(
        "ref", metavar="NAME[@REV]", help="a name of `qwenvl fetch list`; a commit instead of the one that it states"
    )
    for one in (model, data):
        one.add_argument("--to", required=True, metavar="URI", help="folder or s3:// address")
        one.add_argument("--endpoint", default=None, help="another hub; default: HF_ENDPOINT")
    what.add_parser("list", help="the data sets that are described")
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    from pipelines import fetch

    if asked.what == "list":
        for name, source in sorted(fetch.data_sources().items()):
            print(f"{name:24} {source['repo']}: {source['about']}")
        return 0
    run = fetch.fetch_model if asked.what == "model" else fetch.fetch_data
    record = run(asked.ref, to=asked.to, endpoint=asked.endpoint, say=lambda line: print(line, flush=True))
    print(f"{len(record['files'])} files in {asked.to}, recorded in {fetch.RECORD}")
    return 0
