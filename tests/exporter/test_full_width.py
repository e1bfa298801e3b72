"""The step graph of Infinity at the true widths of 2B and 8B, two layers deep, against PyTorch: fp32, ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.exporter.test_graph import session, step_case, worst
from toprovar.backbones.base import Sampling
from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.infinity import Infinity, InfinitySizes
from toprovar.backbones.step import Step
from toprovar.exporter.graph import GraphExporter

SIZES = {
    "2b": (InfinitySizes(2, 2048, 16, 8192, 32, 2048, 64, 16, 15, 1), VaeSpec(32, 32, (1, 1, 1, 1, 1), 16, 0)),
    "8b": (InfinitySizes(2, 3584, 28, 14336, 56, 2048, 64, 16, 15, 1), VaeSpec(14, 32, (1, 1, 1, 1), 8, 0)),
}
"""As the released checkpoints but for the depth, the longest text, and a VAE that is not looked at."""
GRIDS = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_step_at_full_width(name: str, tmp_path: Path) -> None:
    sizes, vae_spec = SIZES[name]
    torch.manual_seed(0)
    vae = BsqVae(vae_spec)
    backbone = Infinity(sizes.spec(vae, GRIDS, (64, 64)), vae, Sampling(guidance=4.0, temperature=0.5)).eval()
    backbone.requires_grad_(False)
    graph = GraphExporter(backbone).graph("step", "gd")
    runtime: onnxruntime.InferenceSession = session(graph, tmp_path, external_data=True)
    text, lengths = torch.randn(1, 9, 2048), torch.tensor([7])
    with torch.no_grad():
        context = backbone.prefix(text, lengths).context
    step = Step(backbone, "gd", "cache")
    feeds, expected = step_case(backbone, step, context, (8, 8), 57, 40, keep=23, cached=(6, 6), rope=backbone.rope(4))
    largest = max(float(tensor.abs().max()) for tensor in expected)
    assert worst(runtime, feeds, expected) <= 1e-4 * max(1.0, largest)
