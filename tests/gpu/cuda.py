"""What every test of this folder stands under: pytestmark = GPU."""

from __future__ import annotations

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"needs an NVIDIA GPU: torch {torch.__version__} sees no CUDA device"
    ),
]
