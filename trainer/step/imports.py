"""Import DeepSpeed and the model classes without what a rank never uses.

DeepSpeed imports its autotuner, which imports MLflow, which imports pandas and scikit-learn; transformers imports scipy
for the losses of detection models. Both are optional there (`except ImportError`, `find_spec`), and a rank that imports
them waits for seconds in each stage: README, "Start-up". Inside `lean_imports()` these packages look as if they were
not installed; afterwards they import as usual.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("mlflow", "pandas", "sklearn", "scipy", "torchvision")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Hide optional packages and hold the garbage collector back while large packages are imported.

    A package that is already imported stays visible, and all do when transformers is imported already: it has asked
    what there is, and remembers. With collection off the imports of a rank take about a tenth less time; what they made
    is then moved out of the collector's sight, which makes later collections cheaper too.
    """
    hidden = [name for name in OPTIONAL if name not in sys.modules and "transformers" not in sys.modules]
    collecting = gc.isenabled()
    gc.disable()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment] - find_spec answers "not installed", import raises
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]
        if collecting:
            gc.freeze()
            gc.enable()


def import_large() -> None:
    """torch, DeepSpeed and the model classes. trainer/warm.py calls it once for all programs of a local run."""
    with lean_imports():
        import deepspeed  # noqa: F401
        import torch  # noqa: F401
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401
