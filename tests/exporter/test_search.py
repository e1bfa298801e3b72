"""Quality-guarded planning: above the floor on held-out pictures, fastest first, the same whatever the order and seed."""

import dataclasses

import pytest

from tests.backbones.conftest import make_var
from toprovar.errors import InputError
from toprovar.exporter import search as module
from toprovar.exporter.calibrate import calibrate
from toprovar.exporter.plan import make_plan
from toprovar.exporter.prune import pruning
from toprovar.exporter.search import Picture, Search, split_pictures
from toprovar.profiles.files import pretty_json
from toprovar.profiles.flops import dense_flops, plan_flops
from toprovar.profiles.profile import QualityFloor
from toprovar.profiles.statistics import bootstrap, exact_mean

PROMPTS = {"a": [0, 1, 2], "b": [3, 4]}
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def var():
    model = make_var(depth=4, patch_nums=(1, 2, 4, 6, 8))
    # Late scales that change the picture little, as in a trained model: the codes of every scale are small but the first.
    model.vae.quantize.embedding.weight.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def measured(var):
    return calibrate(var, PROMPTS, [0], checkpoint_sha256="c" * 64, progress=False)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "FRACTIONS", (0.2, 0.5, 0.8))
    monkeypatch.setattr(module, "DETAIL_SHARES", (0.5, 1.0))


def search(var, measured, **changes):
    searched, held_out = split_pictures(PROMPTS, SEEDS)
    return Search(var, measured, **({"searched": searched, "held_out": held_out} | changes))


def test_pictures_are_split_evenly_and_nothing_is_in_both():
    searched, held_out = split_pictures(PROMPTS, SEEDS)
    for name, members in PROMPTS.items():
        assert len(searched[name]) == len(held_out[name]) == len(members)
        assert not set(searched[name]) & set(held_out[name])


def test_what_is_found_is_above_the_floor_where_it_was_not_searched(var, measured, few):
    looking = search(var, measured)
    floor = QualityFloor(ssim=0.8)
    found = looking.find(floor, "mine")
    plan = make_plan(found.profile, measured)
    assert plan.profile.quality_floor == floor and plan.profile.name == "mine"
    dense = dense_flops(measured.model).total
    for name in PROMPTS:
        one = pruning(plan, name)
        assert found.cost[name] == pytest.approx(
            plan_flops(measured.model, plan.roles, plan.classes[name].keep).total / dense
        )
        figures = looking._measure(name, one, held_out=True)
        assert exact_mean(figures["ssim"]) >= 0.8
        assert found.measured[name]["ssim"].mean == exact_mean(figures["ssim"])
    assert min(found.cost.values()) < 1


def test_a_lower_floor_is_never_slower_and_the_highest_is_dense(var, measured, few):
    looking = search(var, measured)
    costs = []
    for floor in (1.0, 0.9, 0.7, 0.0):
        found = looking.find(QualityFloor(ssim=floor), "f")
        costs.append(sum(found.cost.values()))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(2)  # nothing but the dense pictures themselves has SSIM 1
    assert costs[-1] < 1


def test_neither_order_nor_seed_changes_the_plan(var, measured, few, monkeypatch):
    floor = QualityFloor(ssim=0.85)
    first = search(var, measured).find(floor, "f")
    searched, held_out = split_pictures(PROMPTS, SEEDS)
    turned = [{name: part[name][::-1] for name in reversed(PROMPTS)} for part in (searched, held_out)]
    monkeypatch.setattr(module, "bootstrap", lambda values, statistic=None: bootstrap(values, statistic, seed=77))
    second = search(var, measured, searched=turned[0], held_out=turned[1]).find(floor, "f")
    plans = [pretty_json(make_plan(found.profile, measured)) for found in (first, second)]
    assert plans[0] == plans[1]
    assert first.measured["a"]["ssim"].mean == second.measured["a"]["ssim"].mean


def test_a_judge_guards_accuracy(var, measured, few):
    """A judge that sees nothing right unless the picture is the dense one leaves the dense plan only."""
    looking = search(var, measured)
    shown = {}

    def judge(images, pictures):
        import torch

        keys = [(picture, image.numpy().tobytes()) for picture, image in zip(pictures, images, strict=True)]
        return torch.tensor([1.0 if shown.setdefault(key[0], key[1]) == key[1] else 0.0 for key in keys])

    for name in PROMPTS:  # the first picture that the judge sees of each prompt is the dense one
        for held_out in (False, True):
            pictures = (looking.held_out if held_out else looking.searched)[name]
            judge(looking._dense_outcome(name, held_out, 0, pictures).image, pictures)
    looking.judge = judge
    found = looking.find(QualityFloor(accuracy=0.97), "f")
    assert found.cost == {"a": 1.0, "b": 1.0}
    assert found.measured["a"]["accuracy"].mean == 1.0


def test_mistakes_are_named(var, measured):
    with pytest.raises(InputError, match="the floor is empty"):
        search(var, measured).find(QualityFloor(), "f")
    with pytest.raises(InputError, match="needs a judge"):
        search(var, measured).find(QualityFloor(accuracy=0.9), "f")
    with pytest.raises(InputError, match="'b' has no pictures"):
        search(var, measured, searched={"a": [Picture(0, 1)]})


def test_a_candidate_becomes_the_plan_it_was_measured_as(var, measured, few):
    looking = search(var, measured)
    roles = looking.roles()[-1]
    assert roles == "gddd"
    one = looking._candidate(4, 3, 0.5, roles)
    chosen = {"a": one, "b": looking._candidate(5, None, 1.0, roles)}
    plan = make_plan(looking._profile(QualityFloor(ssim=0.5), "f", "", roles, chosen), measured)
    for name, candidate in chosen.items():
        expected = looking._pruning(candidate, roles)
        found = pruning(plan, name)
        if candidate.opening is None:
            expected = dataclasses.replace(expected, roles=plan.roles)
        assert found == expected
