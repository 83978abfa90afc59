"""Writes OUT/report.html, one self-contained page, and OUT/run.json with the same facts.

python -m pipelines.report.build OUT
"""

from __future__ import annotations

import sys

from pipelines.report.facts import Facts, read_facts, run_json
from pipelines.report.page import page
from trainer import storage


def write_report(out: str) -> Facts:
    """Both files, from what lies in storage; may be called while a run is still going on."""
    facts = read_facts(out)
    storage.write_json(storage.join(out, "run.json"), run_json(facts))
    content = page(facts).encode()
    storage.write_bytes(storage.join(out, "report.html"), content)
    print(f"report: {storage.join(out, 'report.html')} ({len(content) / 1e3:.0f} kB)", flush=True)
    return facts


if __name__ == "__main__":
    write_report(sys.argv[1])
