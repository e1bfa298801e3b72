"""The plan: a pure function of profile and calibration, right for every profile and calibration there can be."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.profiles.samples import CHECKPOINT, GRIDS, a_calibration, a_measurement, a_profile, a_shape
from toprovar.errors import FormatError
from toprovar.exporter.plan import explain, make_dense_plan, make_plan, role_scores, savings
from toprovar.profiles.files import canonical_json
from toprovar.profiles.plan import Plan
from toprovar.profiles.profile import Depth, Profile, Roles, Tokens, dense_profile


def text_of(renderable, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


# --------------------------------------------------------------------------------------------------- scale stage


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("", 7),  # 16x16 is the first with rho <= 0.4
        ("[depth]\ntau = 0.45", 6),  # 8x8 has it too, but is smaller than min_grid
        ("[depth]\ntau = 0.45\nmin_grid = 8", 5),
        ("[depth]\ntau = 0.38", 8),
        ("[depth]\ntau = 0.1", None),
        ("[depth]\ntau = 0.4\ndirection = '>='\nmin_grid = 2", 1),  # what the paper's main text gives
        ("[depth]\ngrid = 20", 8),
        ("[depth]\ngrid = 33", None),
    ],
)
def test_depth_is_the_first_scale_that_passes(text, depth):
    assert make_plan(a_profile(text), a_calibration()).classes["plain"].depth == depth


def test_rho_of_given_layers_is_the_mean_of_theirs():
    shape = a_shape()
    rows = [[0.6] * 12 for _ in GRIDS]
    rows[8][2], rows[8][5] = 0.3, 0.5
    measured = a_measurement(shape, [0.6] * 10, [2.0] * 12, rho_layers=rows)
    calibration = a_calibration().model_copy(update={"classes": {"plain": measured}})
    for layers, depth in (("[2, 5]", 8), ("[2, 5, 6]", None), ("[2]", 8)):
        assert make_plan(a_profile(f"[depth]\nrho = {layers}"), calibration).classes["plain"].depth == depth
    with pytest.raises(FormatError, match=r"profile t: depth.rho: found layer 12, expected 0 to 11"):
        make_plan(a_profile("[depth]\nrho = [12]"), calibration)


def test_classes_may_differ_in_depth_tokens_and_dropped_scales():
    plan = make_plan(
        a_profile("[classes.texture]\ndrop_scales = 2\n[classes.texture.depth]\ngrid = 8"), a_calibration()
    )
    plain, texture = plan.classes["plain"], plan.classes["texture"]
    assert (plain.depth, len(plain.scales_run)) == (7, 10)
    assert (texture.depth, texture.scales_run) == (5, tuple(range(8)))
    with pytest.raises(FormatError, match=r"profile t: classes.txture: no such prompt class .* plain, texture"):
        make_plan(a_profile("[classes.txture]\ndrop_scales = 2"), a_calibration())


@pytest.mark.parametrize(("drop", "run"), [("0", 10), ("3", 7), ('["32x32"]', 9), ('["32x32", "24x24"]', 8)])
def test_dropped_scales_are_not_run(drop, run):
    plan = make_plan(a_profile(f"drop_scales = {drop}"), a_calibration())
    assert plan.classes["plain"].scales_run == tuple(range(run))
    assert len(plan.classes["plain"].keep) == run


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("10", "found 10, expected fewer than the 10 scales"),
        ('["24x24"]', "found 24x24, expected the last ones of this schedule: 1x1, 2x2"),
        ('["48x48", "64x64"]', "found 48x48, 64x64, expected the last ones"),
    ],
)
def test_scales_that_cannot_be_dropped_are_named(drop, said):
    with pytest.raises(FormatError, match=f"profile t, class plain: drop_scales: {said}"):
        make_plan(a_profile(f"drop_scales = {drop}"), a_calibration())


# --------------------------------------------------------------------------------------------------- layer stage


def test_scales_are_dropped_only_for_classes_that_hardly_need_them():
    plain, texture = [0.0, *[0.5] * 8, 0.3], [0.0, *[0.5] * 8, 0.55]
    calibration = a_calibration().model_copy(
        update={
            "classes": {
                name: a_measurement(a_shape(), rho, [2.0] * 12)
                for name, rho in (("plain", plain), ("texture", texture))
            }
        }
    )
    plan = make_plan(a_profile("drop_scales = 2\ndrop_rho = 0.4"), calibration)
    assert {name: len(one.scales_run) for name, one in plan.classes.items()} == {"plain": 8, "texture": 10}
    own = "drop_scales = 2\ndrop_rho = 0.4\n[classes.texture]\ndrop_rho = 0.6"
    assert len(make_plan(a_profile(own), calibration).classes["texture"].scales_run) == 8
    everywhere = make_plan(a_profile("drop_scales = 2"), calibration)
    assert {len(one.scales_run) for one in everywhere.classes.values()} == {8}
    assert "scales are dropped where the last rho <= 0.4" in text_of(explain(plan, calibration), 200)


def test_the_median_beta_makes_the_median_layer_a_half():
    scores = role_scores(a_calibration(), Roles())
    assert scores.scale == 6 and scores.ratio == tuple(2.0 + layer for layer in range(12))
    assert math.exp(-scores.beta * (7.5 - 1)) == pytest.approx(0.5)
    assert make_plan(a_profile(), a_calibration()).roles == "gdddddgggggg"  # ratio ascends, the first layer is global


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("cut = 0.0", "gddddddddddd"),
        ("cut = 0.0\nmax_detail = 0.25", "gdddgggggggg"),
        ("beta = 1.0\ncut = 0.1", "gdgggggggggg"),  # exp(-2) = 0.135 >= 0.1 > exp(-3)
        ("beta = 1.0\ncut = 0.1\nmatrix = 'centred'", "gdddgggggggg"),  # half as far from 1
        ('explicit = "gdgdgdgdgdgd"', "gdgdgdgdgdgd"),
        ("cut = 1.0", "gggggggggggg"),
    ],
)
def test_roles_follow_the_score(text, roles):
    plan = make_plan(a_profile(f"[roles]\n{text}"), a_calibration())
    assert plan.roles == roles
    assert (plan.classes["plain"].depth is None) == ("d" not in roles)


def test_roles_average_over_images_not_over_classes():
    shape = a_shape(depth=2)
    few, many = a_measurement(shape, [0.3] * 10, [4.0, 2.0], 1), a_measurement(shape, [0.3] * 10, [1.0, 6.0], 3)
    calibration = a_calibration(shape, ratio=[2.0, 2.0], classes=("x",))
    calibration = calibration.model_copy(update={"classes": {"few": few, "many": many}})
    assert role_scores(calibration, Roles()).ratio == (1.75, 5.0)


def test_given_roles_of_another_depth_are_refused():
    with pytest.raises(FormatError, match=r"profile t: roles.explicit: found 3 letters, expected 12, one per layer"):
        make_plan(a_profile('[roles]\nexplicit = "gdd"'), a_calibration())


# --------------------------------------------------------------------------------------------------- token stage


def literal_keep(tokens, alpha_min, alpha_max, phi, score):
    """Sum of P_keep of eq. 6, token by token, on ranks."""
    rank = np.arange(tokens) / max(tokens - 1, 1)
    return (1 - np.clip(alpha_min + (alpha_max - alpha_min) * phi * score * rank, 0, 1)).sum()


@pytest.mark.parametrize(("text", "phi"), [("", True), ("scale_weight = 'none'", False)])
def test_counts_are_the_sum_of_the_papers_probabilities(text, phi):
    keep = (
        make_plan(a_profile(f"[tokens]\nalpha_min = 0.3\nalpha_max = 0.8\n{text}"), a_calibration())
        .classes["plain"]
        .keep
    )
    assert keep[:7] == tuple(n * n for n in (1, 2, 3, 4, 6, 8, 12))
    for scale in (7, 8, 9):
        tokens = GRIDS[scale][0] ** 2
        assert abs(keep[scale] - literal_keep(tokens, 0.3, 0.8, (scale + 1) / 10 if phi else 1.0, 1.0)) <= 0.5


def test_the_layer_score_enters_as_the_mean_of_the_detail_layers():
    calibration = a_calibration()
    keep = make_plan(a_profile("[tokens]\nlayer_score = true"), calibration).classes["plain"].keep
    score = np.mean(role_scores(calibration, Roles()).score[1:6])
    assert abs(keep[9] - literal_keep(1024, 0.4, 0.9, 1.0, score)) <= 0.5


def test_a_table_of_kept_fractions_replaces_the_rule():
    plan = make_plan(a_profile("[tokens.keep]\n24x24 = 0.5\n8x8 = 0.5"), a_calibration())
    assert plan.classes["plain"].keep == (1, 4, 9, 16, 36, 64, 144, 256, 288, 1024)  # 8x8 is before the depth
    assert (plan.classes["plain"].depth, plan.classes["plain"].cache_scale) == (8, 7)
    with pytest.raises(
        FormatError, match=r"class plain: tokens.keep.40x40: no such grid in this schedule; expected 1x1"
    ):
        make_plan(a_profile("[tokens.keep]\n40x40 = 0.5"), a_calibration())


# --------------------------------------------------------------------------------------------------- the whole


def test_dense_plans_have_no_selection():
    calibration = a_calibration()
    for profile in (dense_profile(), dense_profile(2)):
        plan = make_plan(profile, calibration)
        without = make_dense_plan(calibration.model, CHECKPOINT, ["plain", "texture"], profile)
        assert plan.roles == "g" * 12 and plan.classes == without.classes
        assert without.calibration_sha256 is None
        assert all(saving.detail_tokens == 0 for saving in savings(plan).values())
    with pytest.raises(FormatError, match="found pruning"):
        make_dense_plan(calibration.model, CHECKPOINT, ["plain"], a_profile())


def test_a_calibration_of_another_model_is_refused():
    class Spec:
        backbone, depth, width, grids = "var", 12, 256, GRIDS

    make_plan(a_profile(), a_calibration(), Spec)
    Spec.depth = 16
    with pytest.raises(FormatError, match=r"calibration: model.depth: found 12, expected 16, as the checkpoint has"):
        make_plan(a_profile(), a_calibration(), Spec)


def test_restore_by_identity_needs_no_cache():
    plan = make_plan(a_profile('restore = "identity"'), a_calibration())
    assert plan.classes["plain"].depth == 7 and plan.classes["plain"].cache_scale is None


@st.composite
def cases(draw):
    """A profile and a calibration, both as odd as their formats allow."""
    sides = sorted(draw(st.sets(st.integers(1, 24), min_size=1, max_size=7)))
    grids = [(n, n + draw(st.integers(0, 1))) for n in sides]
    shape = a_shape(grids, depth=draw(st.integers(1, 9)))
    unit = st.floats(0, 1)
    calibration = a_calibration(
        shape,
        rho=[draw(unit) for _ in grids],
        ratio=[draw(st.floats(1, 1e6)) for _ in range(shape.depth)],
    )
    alphas = sorted((draw(unit), draw(unit)))
    names = [f"{h}x{w}" for h, w in grids]
    table = st.none() | st.dictionaries(st.sampled_from(names), st.floats(0.001, 1))
    profile = Profile(
        schema="toprovar.profile/1",
        name="t",
        depth=Depth(
            tau=draw(unit),
            direction=draw(st.sampled_from(["<=", ">="])),
            min_grid=draw(st.integers(1, 24)),
            grid=draw(st.none() | st.integers(1, 24)),
        ),
        roles=Roles(
            matrix=draw(st.sampled_from(["raw", "centred"])),
            beta=draw(st.just("median") | st.floats(1e-3, 10)),
            cut=draw(unit),
            max_detail=draw(unit),
            explicit=draw(
                st.none() | st.text("gd", min_size=shape.depth - 1, max_size=shape.depth - 1).map("g".__add__)
            ),
        ),
        tokens=Tokens(
            alpha_min=alphas[0],
            alpha_max=alphas[1],
            scale_weight=draw(st.sampled_from(["linear", "none"])),
            layer_score=draw(st.booleans()),
            keep=draw(table),
        ),
        drop_scales=draw(st.integers(0, len(grids) - 1)),
        restore=draw(st.sampled_from(["cache", "identity"])),
    )
    if profile.roles.explicit is None and max(min(grid) for grid in grids) < 2:
        profile = profile.model_copy(update={"roles": Roles(explicit="g" * shape.depth)})
    return profile, calibration


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_plan_holds_its_invariants(case):
    profile, calibration = case
    plan = make_plan(profile, calibration)
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan  # its own checks pass
    assert canonical_json(make_plan(profile, calibration)) == canonical_json(plan)
    assert plan.profile_sha256 == profile.sha256 and plan.calibration_sha256 == calibration.sha256
    detail = plan.roles.count("d")
    assert plan.roles[0] == "g"
    assert profile.roles.explicit is not None or detail <= profile.roles.max_detail * plan.model.depth + 1e-6
    dropped = profile.drop_scales
    for one in plan.classes.values():
        assert len(one.scales_run) == len(plan.model.grids) - dropped
        for scale, kept in enumerate(one.keep):
            tokens = plan.model.tokens[scale]
            assert 1 <= kept <= tokens
            assert (one.depth is not None and scale >= one.depth) or kept == tokens
            if profile.depth.grid is None:
                assert tokens >= profile.depth.min_grid**2 or kept == tokens
    for saving in savings(plan).values():
        assert saving.dropped_scales >= 0 and saving.detail_tokens >= 0
        assert saving.plan == saving.dense - saving.dropped_scales - saving.detail_tokens > 0
    explain(plan, calibration)


# --------------------------------------------------------------------------------------------------- explaining


def test_the_explanation_says_what_was_decided_and_what_it_saves():
    calibration = a_calibration()
    plan = make_plan(a_profile("drop_scales = 1"), calibration)
    text = text_of(explain(plan, calibration))
    assert "roles    gdddddgggggg" in text and "7 global (dense), 5 detail (pruned)" in text
    assert "plain: D = scale 7 (16x16); rule: first rho <= 0.4 from 12x12" in text
    row = next(line for line in text.splitlines() if "24x24" in line)
    assert "0.380" in row and str(plan.classes["plain"].keep[8]) in row
    assert "dropped" in next(line for line in text.splitlines() if "32x32" in line)
    saving = savings(plan)["plain"]
    for part in (saving.dense, saving.dropped_scales, saving.detail_tokens, saving.plan):
        assert f"{part / 1e9:.3g}" in text
    assert "- dropped scales" in text and "- detail layers' tokens" in text
    assert max(len(line) for line in text_of(explain(plan, calibration), 80).splitlines()) <= 80


def test_a_plan_explains_itself_without_its_calibration_but_not_with_another():
    plan = make_plan(a_profile(), a_calibration())
    assert "D = scale 7" in text_of(explain(plan))
    with pytest.raises(
        FormatError, match=r"plan: calibration_sha256: found .* the given calibration; make the plan again"
    ):
        explain(plan, a_calibration(rho=[0.3] * 10))
