"""Policies: ours equals what a plan does, rivals equal their sources, and FLOPs are those that are spent."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.backbones.conftest import make_var
from tests.backbones.infinity_models import make_infinity, make_text
from toprovar.backbones.base import Prefix, restore_constants
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.infinity import rotations
from toprovar.backbones.step import Step
from toprovar.errors import InputError
from toprovar.exporter.calibrate import calibrate, model_shape
from toprovar.exporter.policies.branches import branches_of
from toprovar.exporter.policies.catalogue import catalogue
from toprovar.exporter.policies.engine import Policy, State, run_policy
from toprovar.exporter.policies.grids import nearest_published
from toprovar.exporter.policies.ours import Literally, Planned, head_temperatures, token_scores
from toprovar.exporter.policies.rivals import (
    SKIPVAR_MODELS,
    DropLast,
    FasterVar,
    FastVar,
    SkipVar,
    SparseVar,
    farthest_from_mean,
)
from toprovar.profiles.flops import dense_flops, plan_flops
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.profile import load_profile, parse_profile

SIDES = (1, 2, 4, 6, 8, 12, 16)
"""Ends as Infinity's does, at a quarter of its size: 8 is at the place of 32, 12 of 48, 16 of 64, 6 of 24."""
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def var():
    return make_var(depth=8, patch_nums=SIDES)


@pytest.fixture(scope="module")
def infinity():
    return make_infinity(depth=8, grids=tuple((n, n) for n in (1, 2, 4, 6, 8, 10, 12, 16)), seed=3)


def prefix_of(model, images):
    if model.spec.backbone == "var":
        return model.prefix(torch.arange(images) % model.spec.classes)
    return model.prefix(*make_text(tuple(3 + i % 4 for i in range(images))))


def noise_of(model, seeds):
    def noise(scale):
        shape = model.noise_shape(scale, len(seeds))
        return torch.from_numpy(scale_noise(list(seeds), scale, shape[0], shape[2]))

    return noise


def outcome(model, policy, seeds=(1, 2), **options):
    if policy.adaptive:
        seeds = seeds[:1]
    return run_policy(
        policy, model, model_shape(model, 6), prefix_of(model, len(seeds)), seeds, noise_of(model, seeds), **options
    )


@pytest.fixture(params=["var", "infinity"])
def model(request):
    return request.getfixturevalue(request.param)


# --------------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize("restore", ["cache", "identity"])
def test_a_planned_policy_makes_the_tokens_of_the_step_graph(model, restore):
    scales = len(model.spec.tokens)
    keep = tuple(n if s < scales - 3 else max(1, n // 3) for s, n in enumerate(model.spec.tokens))
    one = Pruning("gddggdgd", keep, scales - 4 if restore == "cache" else None, restore, tuple(range(scales - 1)))
    seeds = (1, 2)
    noise = noise_of(model, seeds)
    expected = generate(model, prefix_of(model, 2), noise=lambda s, _: noise(s), pruning=one)
    found = outcome(model, Planned(one), seeds)
    assert list(found.tokens) == list(one.scales_run)
    for scale, tokens in zip(one.scales_run, expected.tokens, strict=True):
        assert torch.equal(found.tokens[scale], tokens)
    torch.testing.assert_close(found.image, expected.image)
    assert found.total_flops == plan_flops(model_shape(model, 6), one.roles, keep[:-1]).total


def test_dense_and_dropped_scales_spend_what_the_formulas_say(model):
    shape = model_shape(model, 6)
    dense = dense_flops(shape)
    assert outcome(model, Policy()).total_flops == dense.total
    found = outcome(model, DropLast(2))
    assert found.total_flops == dense.conditioning + sum(scale.total for scale in dense.scales[:-2])
    assert found.masks == {}


def test_skipping_detail_layers_spends_the_global_layers_only(model):
    scales = len(model.spec.tokens)
    keep = tuple(n if s < scales - 2 else n // 2 for s, n in enumerate(model.spec.tokens))
    one = Pruning("gddddddd", keep, scales - 3)
    found = outcome(model, Planned(one, skips=True))
    last = scales - 1
    alone = outcome(model, Planned(dataclasses.replace(one, keep=model.spec.tokens)))
    assert found.flops[last] < alone.flops[last] / 4
    assert torch.equal(found.tokens[scales - 3], alone.tokens[scales - 3])
    assert not found.masks[last].any()


def test_choices_of_tokens():
    entropy = torch.rand(2, 3, 10)
    ones = torch.ones(3)
    mean = token_scores("entropy", entropy, ones, 100)
    torch.testing.assert_close(mean, entropy.mean(1))
    assert torch.equal(token_scores("highest", entropy, ones, 100).argsort(), (-mean).argsort())
    assert torch.equal(token_scores("log-keys", entropy, ones, 100).argsort(), mean.argsort())
    torch.testing.assert_close(token_scores("temperature", entropy, ones, 100), mean)
    sharp = token_scores("temperature", entropy, torch.tensor([100.0, 1e-4, 1e-4]), 100)
    assert torch.equal(sharp.argsort(), entropy[:, 0].argsort())


def test_head_temperatures_are_the_factors_of_q(model):
    found = head_temperatures(model, 0)
    assert found.shape == (model.spec.heads,) and bool((found > 1).all())


def test_random_tokens_do_not_depend_on_the_batch(model):
    keep = tuple(max(1, n // 2) if s > 3 else n for s, n in enumerate(model.spec.tokens))
    policy = Planned(Pruning("gddddddd", keep, 3), choice="random")
    both = outcome(model, policy, (1, 2))
    one = outcome(model, policy, (1,))
    scale = len(model.spec.tokens) - 1
    assert torch.equal(both.masks[scale][:1], one.masks[scale])
    assert not torch.equal(both.masks[scale][0], both.masks[scale][1])


def test_teacher_forcing_goes_on_with_the_given_tokens(model):
    dense = outcome(model, Policy())
    keep = tuple(max(1, n // 4) if s > 2 else n for s, n in enumerate(model.spec.tokens))
    found = outcome(model, Planned(Pruning("gddddddd", keep, 2)), forced=dense.tokens)
    assert all(torch.equal(found.tokens[s], dense.tokens[s]) for s in dense.tokens)
    assert any(not torch.equal(found.drawn[s], dense.tokens[s]) for s in dense.tokens)
    torch.testing.assert_close(found.image, dense.image)


def test_the_literal_rule_prunes_about_alpha_min_of_each_scale(var):
    policy = Literally(scores=(0.0, *([1.0] * 7)), tau=1.0)  # D is 2 x 2: everything behind it is pruned
    found = outcome(var, policy, (5,))
    last = len(SIDES) - 1
    assert found.kept[1] == 4
    assert found.kept[last] / var.spec.tokens[last] == pytest.approx(0.6, abs=0.03)
    never = outcome(var, Literally(scores=(0.0, *([1.0] * 7)), tau=0.0), (5,))
    assert torch.equal(never.tokens[last], outcome(var, Policy(), (5,)).tokens[last])


# ------------------------------------------------------------------------------------------------- FastVAR


def test_branches_add_up_to_the_block(model):
    prefix = prefix_of(model, 2)
    constants = model.scale_constants(2)
    x = torch.randn(model.spec.tokens[2], 4, model.spec.width)
    past = [torch.randn(5, 4, model.spec.heads, model.spec.head_dim) for _ in range(2)]
    for layer in range(model.spec.depth):
        expected = model.blocks[layer](x, model.layer_context(layer, prefix.context), *past, rope=constants.get("rope"))
        branches = branches_of(model, layer, prefix.context)
        attended = branches.attention(x, constants.get("rope"), *past)
        found = x + attended.update
        if branches.cross is not None:
            found = found + branches.cross(found)
        found = found + branches.ffn(found)
        torch.testing.assert_close(found, expected.x)
        torch.testing.assert_close(attended.new_k, expected.new_k)


def test_fastvar_equals_its_original_code():
    """One block through three scales, the second cached, the third pruned by 0.4.

    The numbers are outputs of `FastVARCrossAttnBlock` of csguoh/FastVAR (commit 34cdd65) on random weights and inputs, in
    fp32 with PyTorch's attention in place of FlashAttention and `cached_size` set to the second scale's.
    """
    data = load_file(DATA / "fastvar.safetensors")
    grids = ((1, 1), (2, 16), (4, 32))
    model = make_infinity(depth=1, grids=grids)
    template = model.blocks[0]
    # The original's sizes: width 16, 2 heads of 8, hidden 32.
    spec = dataclasses.replace(model.spec, width=16, heads=2, head_dim=8, ffn_width=32)
    model.spec = spec
    block = type(template)(spec)
    block.load_state_dict({name.removeprefix("block."): v for name, v in data.items() if name.startswith("block.")})
    model.blocks = torch.nn.ModuleList([block.eval().requires_grad_(False)])
    text = data["text"].transpose(0, 1)  # [T, R, C]
    cross_k, cross_v = block.ca.kv(text)
    modulation = block.ada_gss[0, 0][:, None] + data["cond"].transpose(0, 1)
    context = {
        "modulation": modulation[None],
        "head_modulation": torch.zeros(2, 2, 16),
        "cross_k": cross_k[None],
        "cross_v": cross_v[None],
        "text_bias": torch.zeros(2, 5),
    }
    state = State(model, model_shape(model, 5), Prefix(data["x0"].transpose(0, 1), context), (0,))
    policy = FastVar(ratios=((64, 0.4),), skipped=(), cached=32, layers=(0, 31))
    angles = data["angles"]
    start = 0
    for scale, (h, w) in enumerate(grids):
        state.scale = scale
        rope = rotations(angles[start : start + h * w, None])
        found = policy.layers_of(state, data[f"x{scale}"].transpose(0, 1).contiguous(), rope)
        torch.testing.assert_close(found.transpose(0, 1), data[f"y{scale}"], rtol=2e-5, atol=2e-5)
        start += h * w
    assert state.kept[2] == 128 - int(128 * 0.4)


def test_fastvar_keeps_the_tokens_farthest_from_the_mean_of_their_row():
    x = torch.randn(20, 4, 8)
    found = farthest_from_mean(x, 7)
    for row in range(4):
        distance = ((x[:, row] - x[:, row].mean(0)) ** 2).sum(-1)
        assert sorted(found[row].tolist()) == sorted(distance.topk(7).indices.tolist())


def test_fastvar_drops_and_prunes_by_place(infinity):
    found = outcome(infinity, FastVar())
    tokens = infinity.spec.tokens
    assert [nearest_published(infinity.spec.grids, s) for s in range(8)] == [4, 8, 16, 24, 32, 40, 48, 64]
    assert list(found.tokens) == [0, 1, 2, 3, 4, 5]
    assert found.kept[4] == tokens[4] - int(tokens[4] * 0.4)
    assert found.kept[5] == tokens[5] - int(tokens[5] * 0.5)
    hart = outcome(infinity, FastVar(**FastVar.HART))
    assert hart.kept[6] == tokens[6] - int(tokens[6] * 0.5) and hart.kept[7] == tokens[7] - int(tokens[7] * 0.75)
    assert found.kept[3] == tokens[3]


# ------------------------------------------------------------------------------------------------- SkipVAR


def test_skipvar_decides_as_its_regressions_say(model):
    policy = SkipVar(SKIPVAR_MODELS["0.84"])
    found = outcome(model, policy, (4,))
    run = len(found.tokens)
    decisions = []

    class Watched(SkipVar):
        def following(self, state):
            following = super().following(state)
            if "skip" in state.memory:
                decisions.append((state.memory["features"], state.memory["skip"], state.memory["unguided"]))
            return following

    outcome(model, Watched(SKIPVAR_MODELS["0.84"]), (4,))
    features, skip, unguided = decisions[0]
    assert skip == SKIPVAR_MODELS["0.84"].skip.predict(features)
    assert (unguided == 0) == (skip > 0) or unguided in (0, 1, 2, 3)
    stops = {0: 99, 1: 64, 2: 48, 3: 40}[skip]
    expected = [s for s in range(len(model.spec.tokens)) if model.spec.grids[s][0] / 16 < stops / 64]
    assert run == len(expected)


def test_skipvar_regressions_by_hand():
    skip = SKIPVAR_MODELS["0.84"].skip
    assert skip.predict((0.115321, 0.489232)) == 2  # at the mean of the features the largest intercept wins
    assert skip.predict((0.4, 0.8)) == 0
    assert skip.predict((0.0, 0.3)) == 3


def test_unguided_scales_run_the_conditional_rows_only(model):
    class Unguided(SkipVar):
        def following(self, state):
            following = Policy.following(self, state)
            state.memory["unguided"] = 2
            return following

    dense = outcome(model, Policy(), (4,))
    found = outcome(model, Unguided(SKIPVAR_MODELS["0.84"]), (4,))
    last = len(model.spec.tokens) - 1
    assert found.flops[last] * 2 == dense.flops[last]
    assert torch.equal(found.tokens[last - 2], dense.tokens[last - 2])
    strengths = model.sampling
    model.sampling = dataclasses.replace(strengths, guidance=0.0 if model.spec.backbone == "var" else 1.0)
    try:
        forced = outcome(model, Policy(), (4,), forced=found.tokens)  # guidance that takes nothing from the other rows
    finally:
        model.sampling = strengths
    assert torch.equal(forced.drawn[last], found.tokens[last])


# ------------------------------------------------------------------------------------- SparseVAR, FasterVAR


def test_sparsevar_keeps_changed_tokens_and_anchors(model):
    found = outcome(model, SparseVar(threshold=0.9), (4,))
    dense = outcome(model, Policy(), (4,))
    last = len(model.spec.tokens) - 1
    assert list(found.tokens) == list(dense.tokens)
    assert found.kept[last] >= 25  # 5 x 5 anchors on 16 x 16: 0, 4, 8, 12 and 15
    assert found.kept[last] < model.spec.tokens[last]
    assert found.flops[last] < dense.flops[last]
    first_pruned = next(s for s in found.kept if found.kept[s] < model.spec.tokens[s])
    assert model.spec.grids[first_pruned][0] / 16 >= 0.625
    assert all(torch.equal(found.tokens[s], dense.tokens[s]) for s in range(first_pruned))


def test_sparsevar_that_keeps_everything_is_dense(model):
    found = outcome(model, SparseVar(threshold=-1.0), (4,))
    dense = outcome(model, Policy(), (4,))
    assert all(torch.equal(found.tokens[s], dense.tokens[s]) for s in dense.tokens)
    torch.testing.assert_close(found.image, dense.image)


def test_silent_tokens_add_nothing(model):
    silent = torch.zeros(model.spec.tokens[-1], dtype=torch.bool)

    class Silent(Policy):
        def accumulate(self, state, tokens, constants):
            from toprovar.exporter.policies.rivals import _accumulate_without

            if state.scale < len(model.spec.tokens) - 1:
                return super().accumulate(state, tokens, constants)
            return _accumulate_without(state, tokens, silent, constants)

    dense = outcome(model, Policy())
    same = outcome(model, Silent())
    last = len(model.spec.tokens) - 1
    torch.testing.assert_close(same.codes[last], dense.codes[last])
    silent[:] = True
    none = outcome(model, Silent())
    if model.spec.backbone == "infinity":  # VAR's codes pass through a convolution with a bias
        torch.testing.assert_close(none.codes[last], dense.codes[last - 1])
    assert not torch.equal(none.codes[last], dense.codes[last])


def test_fastervar_runs_few_mixtures_of_the_unconditional_rows(model):
    found = outcome(model, FasterVar(skipped=()), (4, 5))
    dense = outcome(model, Policy(), (4, 5))
    last = len(model.spec.tokens) - 1
    assert list(found.tokens) == list(dense.tokens)
    assert found.kept[last] < 0.2 * model.spec.tokens[last]
    assert found.flops[last] < 0.3 * dense.flops[last]
    alone = outcome(model, FasterVar(skipped=()), (4,))
    assert torch.equal(alone.tokens[last][0], found.tokens[last][0])


def test_fastervar_as_published_skips_the_last_two_places(infinity):
    found = outcome(infinity, FasterVar())
    assert list(found.tokens) == [0, 1, 2, 3, 4, 5]
    assert found.kept[5] < 0.3 * infinity.spec.tokens[5]


# ------------------------------------------------------------------------------------------------ all of them


def test_the_catalogue_runs(var):
    measured = calibrate(var, {"a": [0, 1], "b": [2]}, [3], checkpoint_sha256="c" * 64, progress=False)
    fast = 'name = "fast"\ndrop_scales = 1\n[depth]\ntau = 1.0\nmin_grid = 6\n[classes.b]\ndrop_scales = 0'
    profiles = [load_profile("balanced"), parse_profile(f'schema = "toprovar.profile/1"\n{fast}')]
    entries = catalogue(measured, profiles)
    names = [entry.name for entry in entries]
    assert names[0] == "dense" and len(set(names)) == len(names)
    assert {"fastvar", "skipvar-84", "sparsevar", "fastervar", "toprovar-literal", "ours-fast", "fast-random"} <= set(
        names
    )
    for entry in entries:
        found = outcome(var, entry.for_class("a"))
        assert bool(torch.isfinite(found.image).all()), entry.name
        assert found.total_flops <= dense_flops(model_shape(var, 6)).total * 1.001, entry.name


def test_adaptive_policies_take_one_picture(var):
    with pytest.raises(InputError, match="one at a time, not 2"):
        run_policy(SparseVar(), var, model_shape(var), prefix_of(var, 2), (1, 2), noise_of(var, (1, 2)))


def test_the_step_graph_is_what_a_planned_policy_stands_for(var):
    """The same layers on the same input, without a loop around them."""
    roles = "gddggddd"
    keep = 40
    step = Step(var, roles, "identity")
    prefix = prefix_of(var, 1)
    scale = len(SIDES) - 1
    x = torch.randn(var.spec.tokens[scale], 2, var.spec.width)
    empty = [x.new_zeros(0, 2, var.spec.heads, var.spec.head_dim) for _ in range(16)]
    rows, cols = restore_constants(var.spec, scale, 0)
    output = step.run(x, prefix.context, None, torch.zeros(keep, dtype=torch.int32), rows, cols, empty, [])
    kept = tuple(keep if s == scale else n for s, n in enumerate(var.spec.tokens))
    state = State(var, model_shape(var), prefix, (0,))
    state.scale = scale
    logits = Planned(Pruning(roles, kept, None, "identity")).step(state, x, {})
    torch.testing.assert_close(logits, output.logits)
    for span, indices in enumerate(output.kept):
        expected = np.zeros(x.shape[0], bool)
        expected[indices[0].numpy()] = True
        np.testing.assert_array_equal(state.masks[scale][0, span].numpy(), expected)
