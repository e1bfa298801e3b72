"""Profile and calibration -> plan: which layers and tokens are pruned from which scale on. No PyTorch here.

Three nested decisions, as in ToProVAR (sections 3.2 to 3.4): the scale depth D opens the pruning, the layer's role says
whether it is pruned, and the token count says how far. `toprovar.profiles.profile` has the options and their sources.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from toprovar.errors import FormatError
from toprovar.profiles.calibration import Calibration
from toprovar.profiles.flops import ModelShape, Saving, dense_flops, plan_flops, saving
from toprovar.profiles.plan import SCHEMA, ClassPlan, Plan
from toprovar.profiles.profile import Depth, Profile, Roles, Tokens

if TYPE_CHECKING:
    from rich.console import Group

__all__ = [
    "RoleScores",
    "explain",
    "kept_tokens",
    "make_dense_plan",
    "make_plan",
    "rho_of_class",
    "role_scores",
    "roles_of",
    "savings",
]


class _Spec(Protocol):
    """What is compared of `toprovar.backbones.base.Spec`."""

    @property
    def backbone(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def grids(self) -> tuple[tuple[int, int], ...]: ...


def make_plan(profile: Profile, calibration: Calibration, spec: _Spec | None = None) -> Plan:
    """Decide. The same profile and calibration give the same plan, byte for byte.

    Args:
        spec: of the checkpoint at hand; where given, the calibration must be of a model of its sizes.

    Raises:
        FormatError: the profile asks for something that this model or calibration does not have; one line.
    """
    model, wish = calibration.model, f"profile {profile.name}"
    if spec is not None:
        for key in ("backbone", "depth", "width", "grids"):
            found, expected = getattr(model, key), getattr(spec, key)
            if found != expected:
                raise FormatError(
                    f"calibration: model.{key}: found {_text(found)}, expected {_text(expected)}, as the checkpoint has"
                )
    if unknown := sorted(set(profile.classes) - set(calibration.classes)):
        raise FormatError(
            f"{wish}: classes.{unknown[0]}: no such prompt class in the calibration; expected one of "
            f"{', '.join(calibration.classes)}"
        )
    scores = None if profile.roles.explicit is not None else role_scores(calibration, profile.roles)
    roles = roles_of(profile.roles, scores, model.depth, wish)
    layer_score = 1.0
    if scores is not None and "d" in roles:
        layer_score = statistics.fmean(scores.score[layer] for layer, role in enumerate(roles) if role == "d")

    classes = {}
    for name in calibration.classes:
        options = profile.for_class(name)
        rho = rho_of_class(calibration, name, options.depth, wish)
        drops = options.drop_rho is None or rho[-1] <= options.drop_rho
        run = _scales_run(model, options.drop_scales if drops else 0, f"{wish}, class {name}")
        opening = _opening(model, options.depth, rho) if "d" in roles else None
        keep = kept_tokens(model, options.tokens, run, opening, layer_score, f"{wish}, class {name}")
        depth = next((scale for scale in range(run) if keep[scale] < model.tokens[scale]), None)
        classes[name] = ClassPlan(
            depth=depth,
            scales_run=tuple(range(run)),
            keep=keep,
            cache_scale=depth - 1 if depth is not None and profile.restore == "cache" else None,
        )
    if all(one.depth is None for one in classes.values()):
        roles = "g" * model.depth  # a graph without selection
    return Plan(
        schema=SCHEMA,
        checkpoint_sha256=calibration.checkpoint_sha256,
        model=model,
        roles=roles,
        restore=profile.restore,
        precision=profile.precision,
        classes=classes,
        profile=profile,
        profile_sha256=profile.sha256,
        calibration_sha256=calibration.sha256,
    )


def make_dense_plan(model: ModelShape, checkpoint_sha256: str, classes: Sequence[str], profile: Profile) -> Plan:
    """The plan of a profile that prunes nothing (`toprovar.profiles.profile.dense_profile`); needs no calibration.

    Raises:
        FormatError: the profile prunes tokens, or drops scales that the model does not have.
    """
    if profile.tokens.keep != {} or profile.classes:
        raise FormatError(
            f"profile {profile.name}: tokens.keep: found pruning, expected an empty table without a calibration"
        )
    run = _scales_run(model, profile.drop_scales, f"profile {profile.name}")
    one = ClassPlan(depth=None, scales_run=tuple(range(run)), keep=model.tokens[:run], cache_scale=None)
    return Plan(
        schema=SCHEMA,
        checkpoint_sha256=checkpoint_sha256,
        model=model,
        roles="g" * model.depth,
        restore=profile.restore,
        precision=profile.precision,
        classes=dict.fromkeys(classes, one),
        profile=profile,
        profile_sha256=profile.sha256,
        calibration_sha256=None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The scale stage


def _scales_run(model: ModelShape, drop: int | tuple[str, ...], wish: str) -> int:
    """How many scales are run."""
    names = [f"{h}x{w}" for h, w in model.grids]
    count = drop if isinstance(drop, int) else len(drop)
    if not isinstance(drop, int) and (count > len(names) or set(drop) != set(names[len(names) - count :])):
        raise FormatError(
            f"{wish}: drop_scales: found {', '.join(drop)}, expected the last ones of this schedule: {', '.join(names)}"
        )
    if count >= len(names):
        raise FormatError(
            f"{wish}: drop_scales: found {count}, expected fewer than the {len(names)} scales of this schedule"
        )
    return len(names) - count


def rho_of_class(calibration: Calibration, name: str, depth: Depth, wish: str = "profile") -> tuple[float, ...]:
    """rho of every scale, from the maps that the profile asks for.

    Raises:
        FormatError: it asks for a layer that the model does not have.
    """
    measured = calibration.classes[name]
    if depth.rho == "mean":
        return measured.rho.mean
    if missing := [layer for layer in depth.rho if layer >= calibration.model.depth]:
        raise FormatError(f"{wish}: depth.rho: found layer {missing[0]}, expected 0 to {calibration.model.depth - 1}")
    return tuple(statistics.fmean(row[layer] for layer in depth.rho) for row in measured.rho_layers.mean)


def _opening(model: ModelShape, depth: Depth, rho: Sequence[float]) -> int | None:
    """The first scale that may be pruned; None where the test never passes (the paper's fallback: no pruning)."""
    if depth.grid is not None:
        return model.first_scale(depth.grid)
    for scale, value in enumerate(rho):
        passes = value <= depth.tau if depth.direction == "<=" else value >= depth.tau
        if passes and model.tokens[scale] >= depth.min_grid**2:
            return scale
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The layer stage


@dataclass(frozen=True)
class RoleScores:
    """Scores of the layers at the representative scale, averaged over all images."""

    scale: int
    ratio: tuple[float, ...]
    """sigma1 / sigma2 per layer."""
    beta: float
    score: tuple[float, ...]
    """R = exp(-beta (ratio - 1)) per layer: near 1 detail, near 0 global."""


def role_scores(calibration: Calibration, roles: Roles) -> RoleScores:
    """The layers' scores at the representative scale.

    Raises:
        FormatError: the model has no scale of at least 2 x 2 tokens.
    """
    model = calibration.model
    measurable = [scale for scale, grid in enumerate(model.grids) if min(grid) >= 2]
    if not measurable:
        raise FormatError("profile: roles.grid: this schedule has no grid of 2x2 or more; give roles.explicit")
    scale = next((s for s in measurable if model.tokens[s] >= roles.grid**2), measurable[-1])
    total = sum(one.images for one in calibration.classes.values())
    tables = [
        (one.images, (one.ratio_raw if roles.matrix == "raw" else one.ratio_centred).mean[scale])
        for one in calibration.classes.values()
    ]
    ratio = tuple(math.fsum(images * row[layer] for images, row in tables) / total for layer in range(model.depth))
    if roles.beta == "median":
        # R = 0.5 at the median; where half of the layers have ratio 1 there is no slope to choose.
        beta = math.log(2) / max(statistics.median(ratio) - 1, 1e-6)
    else:
        beta = roles.beta
    return RoleScores(scale, ratio, beta, tuple(math.exp(-beta * (value - 1)) for value in ratio))


def roles_of(roles: Roles, scores: RoleScores | None, depth: int, wish: str = "profile") -> str:
    """A letter per layer, g or d. `scores` may be None where the profile gives the roles.

    Raises:
        FormatError: the given roles are of another depth.
    """
    if roles.explicit is not None:
        if len(roles.explicit) != depth:
            raise FormatError(
                f"{wish}: roles.explicit: found {len(roles.explicit)} letters, expected {depth}, one per layer"
            )
        return roles.explicit
    assert scores is not None
    # 1e-9: with the median beta the middle layer is at the cut up to rounding, and is detail.
    detail = [layer for layer in range(1, depth) if scores.score[layer] >= roles.cut - 1e-9]
    detail.sort(key=lambda layer: (scores.ratio[layer], layer))
    chosen = set(detail[: int(roles.max_detail * depth + 1e-9)])
    return "".join("d" if layer in chosen else "g" for layer in range(depth))


# ---------------------------------------------------------------------------------------------------------------------
# The token stage


def kept_tokens(
    model: ModelShape, tokens: Tokens, run: int, opening: int | None, layer_score: float, wish: str
) -> tuple[int, ...]:
    """K of every scale that is run: the first `run`, pruned from scale `opening` on (None: dense).

    `layer_score`: mean R of the detail layers. `wish` begins the message of a `FormatError`.
    """
    names = [f"{h}x{w}" for h, w in model.grids]
    if tokens.keep is not None and (unknown := [name for name in tokens.keep if name not in names]):
        raise FormatError(
            f"{wish}: tokens.keep.{unknown[0]}: no such grid in this schedule; expected {', '.join(names)}"
        )
    keep = []
    for scale, count in enumerate(model.tokens[:run]):
        if opening is None or scale < max(opening, 1):  # the first scale has none before it to restore from
            fraction = 1.0
        elif tokens.keep is not None:
            fraction = tokens.keep.get(names[scale], 1.0)
        else:
            phi = (scale + 1) / len(model.grids) if tokens.scale_weight == "linear" else 1.0
            # Ranks are 0 to 1 in equal steps, so their mean is 1/2; eq. 6 clips nothing as alpha_min <= alpha_max <= 1.
            weight = phi * layer_score if tokens.layer_score else phi
            fraction = 1.0 - (tokens.alpha_min + (tokens.alpha_max - tokens.alpha_min) * weight / 2)
        keep.append(min(count, max(1, math.floor(fraction * count + 0.5))))
    return tuple(keep)


# ---------------------------------------------------------------------------------------------------------------------
# Explaining


def savings(plan: Plan) -> dict[str, Saving]:
    """FLOPs of one image, per prompt class: dense, plan, and where the saving comes from."""
    return {name: saving(plan.model, plan.roles, one.keep) for name, one in plan.classes.items()}


def explain(plan: Plan, calibration: Calibration | None = None) -> Group:
    """The plan as a person reads it (a rich renderable): roles, and per class rho, D, K and FLOPs of every scale.

    Raises:
        FormatError: the calibration is not the one that the plan was made from.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    profile, model = plan.profile, plan.model
    if calibration is not None and plan.calibration_sha256 != calibration.sha256:
        raise FormatError(
            f"plan: calibration_sha256: found {(plan.calibration_sha256 or 'none')[:12]}, expected "
            f"{calibration.sha256[:12]}, the given calibration; make the plan again"
        )
    detail = plan.roles.count("d")
    parts: list[Text | Table] = [
        Text(f"plan     {plan.sha256[:12]}, profile {profile.name}, {model.backbone} {plan.checkpoint_sha256[:12]}"),
        Text(f"{model.depth} layers: {model.depth - detail} global (dense), {detail} detail (pruned)"),
        Text(f"roles    {plan.roles}"),
    ]
    if calibration is not None and profile.roles.explicit is None and min(model.grids[-1]) >= 2:
        scores = role_scores(calibration, profile.roles)
        (h, w), cut = model.grids[scores.scale], profile.roles.cut
        parts.append(
            Text(
                f"scores   {' '.join(f'{value:.2f}' for value in scores.score)}  "
                f"(R of the {profile.roles.matrix} map at {h}x{w}, beta {scores.beta:.3g}; detail: R >= {cut:g})"
            )
        )
    parts.append(Text(f"restore  {plan.restore}; precision {plan.precision}"))

    dense = dense_flops(model)
    for name, one in plan.classes.items():
        options = profile.for_class(name)
        flops = plan_flops(model, plan.roles, one.keep)
        rho = rho_of_class(calibration, name, options.depth) if calibration is not None else None
        if options.depth.grid is not None:
            rule = f"fixed at {options.depth.grid}x{options.depth.grid}"
        else:
            side = options.depth.min_grid
            rule = f"first rho {options.depth.direction} {options.depth.tau:g} from {side}x{side}"
        found = "none: no scale is pruned" if one.depth is None else f"scale {one.depth} ({_grid(model, one.depth)})"
        table = Table(title=f"{name}: D = {found}; rule: {rule}", title_justify="left", title_style="bold")
        table.add_column("scale", justify="right")
        for column in ("grid", "tokens", "rho", "test", "K", "kept", "dense GFLOP", "plan GFLOP"):
            table.add_column(column, justify="right")
        for scale, tokens in enumerate(model.tokens):
            ratio, test = "", ""
            if rho is not None:
                ratio = f"{rho[scale]:.3f}"
                if options.depth.grid is None and tokens >= options.depth.min_grid**2:
                    passes = _opening(model, options.depth, rho)
                    test = "D" if scale == passes else ("" if passes is not None and scale > passes else "no")
            if scale < len(one.keep):
                keep = one.keep[scale]
                decided = [str(keep), f"{keep / tokens:.0%}"]
                style = "bold" if keep < tokens else None
                cost = _giga(flops.scales[scale].total)
            else:
                decided, style, cost = ["dropped", ""], "dim", ""
            before = _giga(dense.scales[scale].total)
            table.add_row(
                str(scale), _grid(model, scale), str(tokens), ratio, test, *decided, before, cost, style=style
            )
        parts.append(table)
        if options.drop_rho is not None and options.drop_scales:
            found = "" if rho is None else f", here {rho[-1]:.3f}"
            parts.append(Text(f"  scales are dropped where the last rho <= {options.drop_rho:g}{found}"))
        parts.append(Text(_balance(saving(model, plan.roles, one.keep))))
    return Group(*parts)


def _balance(one: Saving) -> str:
    """Where the saving comes from, dropped scales by themselves."""
    after = one.dense - one.dropped_scales
    lines = (
        ("dense", one.dense, "GFLOP an image (transformer, two CFG rows)"),
        ("- dropped scales", one.dropped_scales, f"{one.dense / after:.2f} x fewer by this"),
        ("- detail layers' tokens", one.detail_tokens, f"{after / one.plan:.2f} x fewer by this, on what was left"),
        ("= plan", one.plan, f"{one.dense / one.plan:.2f} x fewer in all"),
    )
    return "\n".join(f"  {what:24}{_giga(flops):>8}  {remark}" for what, flops, remark in lines)


def _giga(flops: int) -> str:
    value = flops / 1e9
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _grid(model: ModelShape, scale: int) -> str:
    return "x".join(str(side) for side in model.grids[scale])


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join("x".join(str(side) for side in grid) for grid in value)
    return str(value)
