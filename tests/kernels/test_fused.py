"""The fused kernels against PyTorch: under Triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_fused_kernels_and_fused_infinity_under_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when its kernels are defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "fused_checks.py")], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_fused_kernels_on_a_gpu() -> None:
    from tests.kernels import fused_checks

    fused_checks.kernels("cuda")
