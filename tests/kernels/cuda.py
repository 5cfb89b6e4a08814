"""Where the tests of the CUDA table run: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter is slow, and it truncates bfloat16 instead of rounding it.
TOLERANCES = {torch.float32: 1e-5} | ({torch.float16: 2e-3, torch.bfloat16: 1.5e-2} if GPU else {})
