"""The fused kernels against PyTorch: under Triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

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
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 128), (18, 192, 256), (32, 3584, 14336)])
def test_thin_products_on_a_gpu(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    from toprovar.kernels.linear import thin_linear

    generator = torch.Generator(device="cuda").manual_seed(rows)
    x, weight = (
        torch.randn(*shape, device="cuda", generator=generator).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs))
    )
    wanted = x.double() @ weight.double().T
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


def test_a_decoder_with_its_stream_scaled_gives_the_same_picture() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
    from toprovar.backbones.bsq_vae_cuda import _STREAM, _scaled

    torch.manual_seed(0)
    vae = BsqVae(VaeSpec(4, 32, (1, 2), 2, res_blocks=1)).eval().requires_grad_(False)
    scaled, seen = _scaled(vae.decoder), []
    for decoder in (vae.decoder, scaled):
        cast(nn.Module, decoder.norm_out).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    codes = torch.randn(1, 4, 6, 5)
    wanted, found = vae.decoder(codes), scaled(codes)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert float((seen[1] - seen[0] * _STREAM).abs().max()) < 1e-5 * _STREAM * float(seen[0].abs().max())
