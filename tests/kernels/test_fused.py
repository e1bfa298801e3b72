"""The fused kernels against PyTorch: under Triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 128), (130, 192, 256), (1025, 256, 2048)])
def test_products_on_a_gpu(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    from toprovar.kernels.linear import THIN_ROWS, Products, thin_linear

    generator = torch.Generator(device="cuda").manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, device="cuda", generator=generator).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    wanted = x.float() @ weight.float().T
    products = Products(x.device)
    for gelu in (False, True):
        full = wanted + bias.float()
        full = F.gelu(full, approximate="tanh") if gelu else full
        for _ in range(2):  # the first chooses an algorithm
            found = products(x, weight, bias, gelu=gelu)
            assert found.dtype == dtype
            assert float((found.float() - full).norm() / full.norm()) < 4e-3
    if rows <= THIN_ROWS:
        assert float((thin_linear(x, weight).sum(0) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_decoder_on_a_gpu() -> None:
    """Convolutions of the small picture in four phases against those of the doubled one."""
    from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
    from toprovar.backbones.bsq_vae_cuda import FusedDecoder

    torch.manual_seed(0)
    vae = BsqVae(VaeSpec(8, 64, (1, 2, 2), 4)).cuda().eval().requires_grad_(False)
    codes = torch.randn(2, 8, 12, 20, device="cuda")
    wanted = (vae.decode(codes) + 1) * 0.5
    found = FusedDecoder(vae, torch.float16)(codes)
    assert found.shape == wanted.shape and float((found - wanted).abs().max()) < 0.01
