"""The training scripts compute what the backbones compute, and a short run learns."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

picture_vq = pytest.importorskip("picture_vq")
import scale_training  # noqa: E402
import train_var  # noqa: E402
import training  # noqa: E402

from toprovar.backbones.vqvae import VQVAE  # noqa: E402
from toprovar.demo.classifier import Classifier, frechet_distance, load_classifier  # noqa: E402
from toprovar.errors import CheckpointError  # noqa: E402


@pytest.fixture(scope="module")
def model() -> picture_vq.PictureVq:
    """A small tokenizer, every parameter moved off its start."""
    torch.manual_seed(0)
    model = picture_vq.PictureVq(
        picture_vq.demo_sizes((64, 96), latent_channels=8, vocab=32, patch_nums=(1, 2, 3, 5, 8))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def vae(model: picture_vq.PictureVq) -> VQVAE:
    return model.vae


def test_a_new_decoder_shows_the_colours_it_is_given() -> None:
    torch.manual_seed(0)
    fresh = picture_vq.PictureVq(picture_vq.demo_sizes(vocab=8))
    flat = torch.tensor([[0.6, -0.2, 0.1], [-0.5, 0.4, -0.1]])[:, :, None, None]
    halves = torch.cat((flat.flip(0).expand(-1, -1, 64, 32), flat.expand(-1, -1, 64, 32)), dim=3)
    made = fresh.decode(fresh.encoder(halves))
    left, right = made[..., 16:48, 8:24].mean((2, 3)), made[..., 16:48, 40:56].mean((2, 3))
    wanted = (flat - flat.flip(0)).flatten(1)
    assert torch.nn.functional.cosine_similarity(right - left, wanted).min() > 0.9


def test_fast_layers_compute_the_same(vae: VQVAE) -> None:
    codes = torch.randn(2, 8, 8, 8)
    slow = vae.decoder(codes)
    fast = copy.deepcopy(vae.decoder)
    picture_vq.quicken(fast)
    assert torch.allclose(fast(codes), slow, atol=1e-3)


@pytest.mark.parametrize("channels, edge, silu", [(64, 7, True), (96, 16, True), (96, 4, False)])
def test_norm_kernels_compute_norm_and_gradients(channels: int, edge: int, silu: bool) -> None:
    """In Triton's interpreter, in a process of its own: the interpreter is chosen at import."""
    pytest.importorskip("triton")
    script = f"""
import sys, torch
sys.path.insert(0, {str(TOOLS)!r})
import fast_norm
torch.manual_seed(0)
x = (torch.randn(2, {channels}, {edge}, {edge} + 1) * 2 + 1).to(memory_format=torch.channels_last).requires_grad_()
w, b = torch.randn({channels}).requires_grad_(), torch.randn({channels}).requires_grad_()
made, wanted = fast_norm._NormSilu.apply(x, w, b, {silu}), fast_norm.norm_silu(x, w, b, {silu})
slope = torch.randn_like(made)
pairs = [(made, wanted), *zip(torch.autograd.grad(made, (x, w, b), slope), torch.autograd.grad(wanted, (x, w, b), slope))]
print(max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-5


def test_quantiser_of_training_computes_the_same(vae: VQVAE) -> None:
    features = torch.randn(3, 8, 8, 8)
    scales = picture_vq.Scales(vae.spec.patch_nums, torch.device("cpu"))
    coding = picture_vq.quantise(vae.quantize, scales, features)
    expected = vae.quantize.quantise(features)
    assert torch.equal(coding.tokens, torch.cat([token.flatten() for token in expected.tokens]))
    assert torch.allclose(coding.codes, expected.partial[-1], atol=1e-5)


def test_codebook_follows_its_vectors_and_revives_idle_codes() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([[0.0, 0.0], [4.0, 4.0], [50.0, 50.0]])
    codebook = picture_vq.Codebook(weight, decay=0.5)
    wanted = torch.tensor([[1.0, 1.0], [5.0, 5.0]]).repeat(20, 1)
    tokens = torch.tensor([0, 1]).repeat(20)
    for _ in range(30):
        codebook.follow(picture_vq.Coding(wanted, wanted, tokens, wanted))
    assert torch.allclose(weight[:2], wanted[:2], atol=1e-3)
    assert codebook.revive(wanted) == 1 and weight[2].max() <= 5


def test_training_tokens_are_those_of_the_backbone(vae: VQVAE) -> None:
    features = torch.randn(2, 8, 8, 8)
    labels, inputs = picture_vq.tokenize(vae.quantize, features)
    expected = vae.quantize.quantise(features).tokens
    assert torch.equal(labels, torch.cat(expected, 1))
    assert torch.allclose(inputs, vae.quantize.teacher_input(expected), atol=1e-5)


def test_wrong_tokens_change_inputs_and_later_labels_only(vae: VQVAE) -> None:
    features = torch.randn(2, 8, 8, 8)
    clean, _ = picture_vq.tokenize(vae.quantize, features)
    torch.manual_seed(0)
    labels, inputs = picture_vq.tokenize(vae.quantize, features, corrupt=0.9)
    assert torch.equal(labels[:, 0], clean[:, 0])  # nothing was wrong before the first scale
    assert not torch.equal(labels, clean) and torch.isfinite(inputs).all()


@pytest.mark.parametrize("small", [4, 40])
def test_training_pass_equals_the_backbone(vae: VQVAE, small: int) -> None:
    torch.manual_seed(0)
    model = train_var.build(2, 64, 12, vae)
    labels = torch.tensor([3, 12])
    _, inputs = picture_vq.tokenize(vae.quantize, torch.randn(2, 8, 8, 8))
    attend = scale_training.attend_by_scale(model.spec.tokens, torch.device("cpu"), small)
    x, context = train_var.forward(model, labels, inputs, attend)
    logits = model.head(x, context).transpose(0, 1)
    assert torch.allclose(logits, model.forward_training(labels, inputs), atol=1e-5)


def test_loss_weights_favour_early_scales_and_average_to_one() -> None:
    weights = scale_training.scale_weights((1, 4, 16), 0.25, torch.device("cpu"))
    assert float(weights.mean()) == pytest.approx(1.0) and weights[0] > weights[1] > weights[-1]


def test_k_means_finds_the_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator)
    found = picture_vq.k_means(points, 8)
    assert torch.cdist(centres, found).min(1).values.max() < 0.15


def test_seeds_of_processes_do_not_meet() -> None:
    class Two:
        size = 2

    taken = []
    for rank in range(2):
        team = Two()
        team.rank = rank  # type: ignore[attr-defined]
        seeds = training.Seeds(team)  # type: ignore[arg-type]
        taken.append(np.concatenate([seeds.take(300), seeds.take(300)]))
    assert len(np.unique(np.concatenate(taken))) == 1200


def test_schedule_warms_up_and_ends_low() -> None:
    rates = [training.cosine(share, 1.0) for share in (0.0, 0.02, 0.04, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(1.0) and rates[2] > rates[3] > rates[4] > 0


def test_pool_hands_out_rows_and_makes_new_ones() -> None:
    made = []

    def make(count: int) -> tuple[torch.Tensor]:
        made.append(count)
        return (torch.full((count,), float(len(made))),)

    pool = training.Pool(make, rows=8, lot=4, reuse=2.0, seed=0)
    assert len(made) == 2
    drawn = torch.cat([pool.take(4)[0] for _ in range(10)])
    assert len(made) == 7 and drawn.max() >= 5


def test_classifier_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier({"label": 12, "count": 4}, (8, 8, 16, 16)).eval()
    pictures = torch.rand(2, 3, 256, 256)
    training.save_weights(tmp_path / "c.safetensors", model.state_dict(), {"format": "pt"})
    loaded = load_classifier(tmp_path / "c.safetensors")
    for name, logits in loaded(pictures).items():
        assert torch.allclose(logits, model(pictures)[name], atol=2e-2)
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="reinstall"):
        load_classifier(tmp_path / "c.safetensors")


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=generator)
    b = 2 * torch.randn(20000, 3, generator=generator) + 1
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(3 + 3, rel=0.05)  # |shift|^2 = 3, (2 - 1)^2 an axis = 3


def test_orthogonal_draws_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 16), (2, 32, 8), (2, 8, 32)):
        made = training.orthogonal(torch.randn(shape, generator=generator))
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.2 and values.max() < 1.4


def test_muon_descends_and_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    goal = torch.randn(12, 4) * 0.1
    weights = [torch.nn.Parameter(torch.zeros(12, 4)) for _ in range(2)]
    muons = [training.Muon([(weight, 3)]) for weight in weights]

    def step(which: int) -> float:
        loss = (weights[which] - goal).square().sum()
        weights[which].grad = torch.autograd.grad(loss, weights[which])[0]
        muons[which].lr = 0.02
        muons[which].step()
        return float(loss.detach())

    losses = [step(0) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    weights[1].data.copy_(weights[0])
    muons[1].load(muons[0].state())
    step(0), step(1)
    assert torch.equal(weights[0], weights[1])
