"""A rank that sends to MLflow and then ends as asked: `python -m tests.observe.program SPEC_JSON fail|wait|loss`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trainer.errors import NumericsError
from trainer.observe import tracking


def main(spec: str, how: str) -> None:
    asked = tracking.Spec.model_validate_json(Path(spec).read_bytes())
    assert tracking.start(asked) is not None
    while tracking.run_id(asked.stage_uri) is None:
        time.sleep(0.05)
    time.sleep(1)  # the sender has set RUNNING by now, or does within its next call
    Path(spec).with_name("begun").touch()
    if how == "fail":
        raise NumericsError("the loss is not finite", where="step 3")
    time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
