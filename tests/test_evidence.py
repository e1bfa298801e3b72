"""The evidence harness from search to document, on models so small that what they draw means nothing."""

import argparse
import json

import numpy as np
import pytest
import torch
from benchmarks import evidence as harness

from tests.backbones.conftest import make_var
from tests.backbones.infinity_models import TEXT_WIDTH, make_infinity
from toprovar.demo.perceptual import PerceptualNet
from toprovar.exporter import search as searching
from toprovar.exporter.calibrate import model_shape
from toprovar.profiles import evidence as ev
from toprovar.profiles.profile import QualityFloor, load_profile

SIDES = (1, 2, 4, 6, 8, 12, 16)


def small_demo(kind):
    torch.manual_seed(0)
    if kind == "class":
        model = make_var(depth=4, patch_nums=SIDES)
        prompts = {"plain": [0, 1], "fine": [2, 3]}

        def condition(some):
            return (torch.tensor([int(p) for p in some], dtype=torch.int32),)

    else:
        model = make_infinity(depth=4, grids=tuple((n, n) for n in (1, 2, 4, 6, 8, 10, 12, 16)))
        prompts = {"plain": ["a disc", "a ring"], "fine": ["dots", "bricks"]}

        def condition(some):
            generator = torch.Generator().manual_seed(sum(map(len, some)))
            return torch.randn(len(some), 4, TEXT_WIDTH, generator=generator), torch.full((len(some),), 4)

    return harness.Demo(
        f"{kind}-test",
        f"A small {kind} model",
        model,
        model_shape(model, 4),
        "c" * 64,
        prompts,
        prompts,
        condition,
        lambda images, some: (images.mean((1, 2, 3)) > 0.5).double(),
        PerceptualNet((8, 8, 8, 8)).eval(),
        bitwise=kind == "text",
        split="Nothing is held out.",
        source=lambda: None,
    )


def arguments(folder, **changes):
    values = {
        "out": folder, "device": "cpu", "pictures": 2, "batch": 2, "seeds": 1, "repeat": 1, "threads": 1, "part": (0, 1),
        "workers": 1, "output": folder / "e.json",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "text"])
def test_every_step_and_the_document(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(searching, "FRACTIONS", (0.3, 0.7))
    monkeypatch.setattr(searching, "DETAIL_SHARES", (0.75,))
    monkeypatch.setattr(harness, "FLOORS", {"fast": QualityFloor(ssim=0.3), "quality": QualityFloor(ssim=0.9)})
    monkeypatch.setattr(harness, "BETWEEN", {})
    monkeypatch.setattr(harness, "BUDGETS", (0.4, 0.8))
    monkeypatch.setattr(harness, "APART", "fast")
    demo = small_demo(kind)
    args = arguments(tmp_path)
    harness.search(demo, args)
    found = load_profile(tmp_path / "profiles" / "fast.toml")
    assert found.quality_floor == QualityFloor(ssim=0.3) and set(found.classes) == {"plain", "fine"}

    harness.mixes(demo, args)
    assert (tmp_path / "profiles" / "budget-80.toml").exists()

    for part in ((0, 2), (1, 2)):
        harness.quality(demo, arguments(tmp_path, part=part))
    lines = (tmp_path / "quality.0-of-2.jsonl").read_text()
    harness.quality(demo, arguments(tmp_path, part=(0, 2)))  # nothing is left to do
    assert (tmp_path / "quality.0-of-2.jsonl").read_text() == lines
    harness.method(demo, args)
    harness.latency(demo, args)
    harness.build(demo, args)

    document = ev.load_evidence(tmp_path / "e.json")
    arrays = ev.load_arrays(tmp_path / "e.json", document)
    names = [policy.name for policy in document.policies]
    assert {"dense", "drop-1", "fastvar", "skipvar-84", "sparsevar", "stagevar", "ours-fast", "fast-random"} <= set(
        names
    )
    dense = document.policy("dense").groups[ev.ALL]
    assert dense.metrics["ssim"].mean == pytest.approx(1) and dense.metrics["tokens"].mean == 1
    assert dense.images == 2 and dense.metrics["frechet"].mean == pytest.approx(0, abs=1e-6)
    assert ("bits" in dense.metrics) == (kind == "text")
    assert all(policy.groups[ev.ALL].transformer for policy in document.policies)
    dropped = document.policy("drop-1").groups[ev.ALL]
    assert dropped.flops < dense.flops and dropped.metrics["tokens"].mean == 1  # of the scales that are run
    rivals = {one.rival for one in document.comparisons}
    assert "fastvar" in rivals and "drop-2" in rivals
    assert {one.mode for one in document.errors} == {"teacher-forced", "free-running"}
    assert [one.name for one in document.normalisations] == ["entropy", "temperature", "log-keys"]
    assert document.normalisations[0].rank_correlation == pytest.approx(1)
    assert document.normalisations[2].rank_correlation == pytest.approx(1)
    assert {one.name for one in document.costs} >= {"calibration", "roles", "entropy", "search"}
    example = document.examples[0]
    for name in example.policies:
        assert bytes(arrays[f"{example.key}.image.{name}"][:4]) == b"\x89PNG"
    last = len(demo.backbone.spec.grids) - 1
    assert arrays[f"{example.key}.entropy.{last}"].shape == (4, *demo.backbone.spec.grids[last])


def test_a_found_profile_reads_as_it_was(tmp_path):
    from tests.profiles.samples import a_calibration
    from toprovar.profiles.profile import ClassOptions, Depth, Profile, Roles, Tokens, parse_profile

    profile = Profile(
        schema="toprovar.profile/1",
        name="fast",
        description="The fastest found with ssim 0.9 or more in every prompt class.",
        roles=Roles(explicit="gddg"),
        quality_floor=QualityFloor(ssim=0.9, accuracy=0.97),
        classes={
            "plain": ClassOptions(tokens=Tokens(keep={}), drop_scales=2),
            "texture": ClassOptions(depth=Depth(grid=16), tokens=Tokens(keep={"16x16": 0.3, "24x24": 0.3})),
        },
    )
    assert parse_profile(harness.profile_toml(profile, "c" * 64)) == profile
    assert a_calibration().classes.keys() == profile.classes.keys()


def test_lines_cut_off_are_made_again(tmp_path):
    lines = harness.Lines(tmp_path, "quality")
    pictures = [harness.Picture(0, 1), harness.Picture(1, 2)]
    lines.add([{"policy": "dense", "prompt": 0, "seed": 1}])
    with open(lines.path, "a") as file:
        file.write('{"policy": "dense", "prompt": 1, "se')
    again = harness.Lines(tmp_path, "quality")
    assert again.missing("dense", pictures) == [1]


def test_tau_is_where_the_line_reaches_0_8():
    rho = np.linspace(0.2, 0.7, 50)
    points = [[5, float(r), float(1.2 - r)] for r in rho]
    found = harness.tau_fit(points)
    assert found.tau is not None and found.tau.mean == pytest.approx(0.4)
    assert found.correlation == pytest.approx(-1)
    assert harness.tau_fit([[5, float(r), 0.95] for r in rho]).tau is None


def test_part_of_a_step():
    assert harness.part_of("2/4") == (2, 4)
    demo = small_demo("class")
    pictures = harness.held_out_pictures(demo, 12)
    whole = list(harness.batches(demo, pictures, 2))
    parts = [list(harness.batches(demo, pictures, 2, (i, 3))) for i in range(3)]
    assert sorted(map(json.dumps, [[g, [p.seed for p in b]] for part in parts for g, b in part])) == sorted(
        map(json.dumps, [[g, [p.seed for p in b]] for g, b in whole])
    )
