"""Calibration measures what the formulas say, resumes what was interrupted, and leaves nothing behind."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from toprovar.backbones.base import Sampling
from toprovar.backbones.generate import generate
from toprovar.backbones.var import VAR, VARSpec
from toprovar.backbones.vqvae import VQVAE, VQVAESpec
from toprovar.errors import CheckpointError, InputError, ToprovarError
from toprovar.exporter import calibrate as module
from toprovar.exporter.calibrate import calibrate, component_ratio, labels_condition, map_statistics, model_shape
from toprovar.exporter.plan import make_plan
from toprovar.exporter.prune import prune, pruning, schedules
from toprovar.profiles import files
from toprovar.profiles.calibration import load_calibration
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.profile import dense_profile, parse_profile

CHECKPOINT = "c" * 64
CLASSES = {"plain": [0, 1], "texture": [2, 3, 4]}
SEEDS = [5, 6]


@pytest.fixture(scope="module")
def backbone():
    """A random VAR with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    patch_nums = (1, 2, 3, 5)
    spec = VARSpec.of(
        depth=3, width=32, heads=2, patch_nums=patch_nums, vocab=16, latent_channels=8, stride=2, classes=5
    )
    vae = VQVAESpec(channels=(32, 32), stem=32, latent_channels=8, vocab=16, patch_nums=patch_nums, encoder=False)
    model = VAR(spec, VQVAE(vae), Sampling(guidance=2.0, top_k=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def measure(backbone, output=None, condition=labels_condition, batch_size=3, **changes):
    arguments = {"classes": CLASSES, "seeds": SEEDS, "checkpoint_sha256": CHECKPOINT} | changes
    return calibrate(backbone, condition=condition, output=output, batch_size=batch_size, progress=False, **arguments)


def timeless(calibration):
    return calibration.model_copy(update={"wall_time_s": 0.0})


# ---------------------------------------------------------------------------------------------- numbers


def test_statistics_of_a_map_follow_the_formulas():
    entropy = torch.rand(4, 3, 30, generator=torch.Generator().manual_seed(1)) * 3
    found = map_statistics(entropy, (5, 6))
    maps = entropy.double().numpy()
    for image in range(3):
        averaged = maps[:, image].mean(0)
        assert found.rho[image] == (averaged < averaged.mean()).mean()
        for layer in range(4):
            one = maps[layer, image]
            assert found.rho_layers[image, layer] == (one < one.mean()).mean()
            assert found.entropy_nats[image, layer] == pytest.approx(one.mean())
            for ratio, matrix in ((found.ratio_raw, one), (found.ratio_centred, one - one.mean())):
                sigma = np.linalg.svd(matrix.reshape(5, 6), compute_uv=False)
                assert ratio[image, layer] == pytest.approx(sigma[0] / sigma[1])


def test_component_ratios_of_special_maps():
    rank_one = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).double()
    assert component_ratio(rank_one) == module.RATIO_LIMIT
    assert component_ratio(torch.zeros(4, 3).double()) == 1
    assert component_ratio(torch.eye(4).double()) == pytest.approx(1)
    assert map_statistics(torch.rand(2, 3, 4), (1, 4)).ratio_raw.shape == (3, 0)


def test_a_calibration_is_the_mean_over_images_generated_one_by_one(backbone):
    calibration = measure(backbone, batch_size=4)
    shape = backbone.spec
    for name, prompts in CLASSES.items():
        images = []
        for label in prompts:
            for seed in SEEDS:
                trace = generate(
                    backbone,
                    backbone.prefix(torch.tensor([label])),
                    noise=lambda scale, shape, seed=seed: torch.from_numpy(
                        scale_noise([seed], scale, shape[0], shape[2])
                    ),
                    entropy="head",
                    decode=False,
                )
                # conditional row only, mean over heads: [L, 1, N] a scale
                images.append([torch.stack([h[:1].mean(1) for h in layers]) for layers in trace.entropy])
        measured = calibration.classes[name]
        assert measured.images == len(images) and measured.prompts == tuple(prompts)
        for scale, grid in enumerate(shape.grids):
            each = [map_statistics(image[scale], grid) for image in images]
            for key in ("rho", "rho_layers", "entropy_nats", "ratio_raw", "ratio_centred"):
                values = np.stack([getattr(one, key)[0] for one in each])
                table = getattr(measured, key)
                np.testing.assert_allclose(table.mean[scale], values.mean(0), rtol=2e-3, atol=1e-5)
                np.testing.assert_allclose(table.sd[scale], values.std(0, ddof=1), rtol=1e-2, atol=1e-3)


def test_the_file_says_how_it_was_measured(backbone, tmp_path):
    calibration = measure(backbone, tmp_path / "c.json")
    assert load_calibration(tmp_path / "c.json") == calibration
    assert os.listdir(tmp_path) == ["c.json"]
    assert calibration.checkpoint_sha256 == CHECKPOINT and calibration.seeds == (5, 6)
    assert calibration.model == model_shape(backbone) and calibration.model.backbone == "var"
    assert calibration.sampling == {"guidance": 2.0, "temperature": 1.0, "top_k": 8, "top_p": 0.0, "guided": True}


# ---------------------------------------------------------------------------------------------- resuming


class Interrupted:
    """A condition that is interrupted at its n-th batch, and counts."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, prompts):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return labels_condition(prompts)


def test_an_interrupted_calibration_goes_on_and_gives_the_same(backbone, tmp_path, capsys):
    whole = measure(backbone)
    with pytest.raises(KeyboardInterrupt):
        measure(backbone, tmp_path / "c.json", Interrupted(at=3))
    (partial,) = os.listdir(tmp_path)
    assert partial.startswith("c.json.") and partial.endswith(".partial")
    assert "interrupted: 6 of 10 images are kept in" in capsys.readouterr().err

    with open(tmp_path / partial, "ab") as file:
        file.write(b'{"batch": 2, "images": [')  # as a crash leaves it
    rest = Interrupted()
    resumed = measure(backbone, tmp_path / "c.json", rest)
    assert rest.calls == 2  # of four batches
    assert timeless(resumed) == timeless(whole) and resumed.sha256 == whole.sha256
    assert os.listdir(tmp_path) == ["c.json"]


def test_what_was_measured_otherwise_is_not_taken_over(backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(backbone, tmp_path / "c.json", Interrupted(at=3))
    for changes in ({"seeds": [5, 7]}, {"checkpoint_sha256": "d" * 64}, {"batch_size": 4}):
        count = Interrupted(at=2)
        with pytest.raises(KeyboardInterrupt):
            measure(backbone, tmp_path / "c.json", count, **changes)
        assert count.calls == 2


def test_a_partial_file_with_another_key_is_started_anew(backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(backbone, tmp_path / "c.json", Interrupted(at=3))
    (partial,) = os.listdir(tmp_path)
    lines = (tmp_path / partial).read_bytes().splitlines(keepends=True)
    (tmp_path / partial).write_bytes(json.dumps({"key": "other"}).encode() + b"\n" + b"".join(lines[1:]))
    count = Interrupted()
    measure(backbone, tmp_path / "c.json", count)
    assert count.calls == 4


def test_nothing_is_left_where_nothing_was_finished(backbone, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        measure(backbone, tmp_path / "c.json", Interrupted(at=1))
    assert os.listdir(tmp_path) == []

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ToprovarError, match="no space left on device"):
        measure(backbone, tmp_path / "c.json")
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="does not exist"):
        measure(backbone, tmp_path / "no" / "c.json")


def test_a_disk_that_fills_up_keeps_what_was_finished(backbone, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def filling(handle):
        calls.append(handle)
        if len(calls) == 4:  # the key, two batches, and then no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", filling)
    with pytest.raises(ToprovarError, match="no space left on device; 2 finished batches are kept; free some space"):
        measure(backbone, tmp_path / "c.json")
    rest = Interrupted()
    assert timeless(measure(backbone, tmp_path / "c.json", rest)) == timeless(measure(backbone))
    assert rest.calls == 2 and os.listdir(tmp_path) == ["c.json"]


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": {}}, "there is no prompt class"),
        ({"classes": {"a": []}}, "prompt class 'a' has no prompts"),
        ({"classes": {"a": [1, 1]}}, "prompt of class a 1 is given twice"),
        ({"classes": {"a": ["a cat"]}}, "prompt 'a cat' is a text; this backbone takes class labels"),
        ({"seeds": []}, "found no seed"),
        ({"seeds": [3, 3]}, "seed 3 is given twice"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_mistakes_are_named(backbone, changes, said):
    with pytest.raises(InputError, match=said):
        measure(backbone, **changes)


def test_entropies_that_are_not_finite_are_the_checkpoints_fault(backbone, tmp_path):
    weight = backbone.blocks[1].attn.q_bias
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(CheckpointError, match="not finite at scale 0, layer 1"):
            measure(backbone, tmp_path / "c.json")
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------- what follows


@pytest.fixture(scope="module")
def calibration(backbone):
    return measure(backbone)


PROFILE = """
schema = "toprovar.profile/1"
name = "t"
[depth]
grid = 3
[roles]
explicit = "gdd"
[classes.texture]
drop_scales = 1
"""


def test_a_plan_becomes_the_loop_of_each_class(backbone, calibration):
    plan = make_plan(parse_profile(PROFILE), calibration, backbone.spec)
    found = schedules(plan)
    assert [step.scale for step in found["texture"].steps] == [0, 1, 2]
    steps = found["plain"].steps
    keep = plan.classes["plain"].keep
    assert [step.keep for step in steps] == list(keep) and keep[:2] == (1, 4) and keep[2] < 9
    assert [step.past_global for step in steps] == [0, 1, 5, 14]
    assert [step.past_detail for step in steps] == [0, 1, 5, 5 + keep[2]]
    assert [step.capture_span_delta for step in steps] == [False, True, False, False]
    assert [step.last for step in steps] == [False, False, False, True]


@pytest.mark.parametrize("restore", ["cache", "identity"])
def test_a_plan_runs_and_a_dense_plan_changes_nothing(backbone, calibration, restore):
    prefix = backbone.prefix(torch.tensor([1, 3]))
    dense = generate(backbone, prefix)
    plan = make_plan(dense_profile(), calibration)
    assert not prune(backbone, plan).spans
    for name in CLASSES:
        same = generate(backbone, prefix, pruning=pruning(plan, name))
        assert torch.equal(same.image, dense.image)

    plan = make_plan(parse_profile(f'restore = "{restore}"\n{PROFILE}'), calibration)
    assert [span[1:] for span in prune(backbone, plan).spans] == [(1, 3)]
    run = generate(backbone, prefix, pruning=pruning(plan, "texture"), record=("kept",))
    assert [kept[0].shape for kept in run.kept] == [(2, keep) for keep in plan.classes["texture"].keep]
    assert run.image is not None and bool(torch.isfinite(run.image).all())
