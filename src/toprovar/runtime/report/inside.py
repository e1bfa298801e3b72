"""Sections that look inside: entropy maps, kept tokens, rho, roles, pictures, and how errors grow."""

from __future__ import annotations

import numpy as np

from toprovar.profiles.evidence import ALL, Error, Example, Policy
from toprovar.runtime import compare
from toprovar.runtime.report import charts, images
from toprovar.runtime.report.charts import Axis, Bar, Curve
from toprovar.runtime.report.markup import Markup, el, join
from toprovar.runtime.report.section import Section, Table, example_buttons, select, switch
from toprovar.runtime.report.view import (
    View,
    class_name,
    grid_name,
    side_names,
    with_interval,
)
from toprovar.runtime.target import Array

_EXAMPLES_PER_CLASS = 2

__all__ = ["entropy_maps", "kept_tokens", "rho_curves", "layer_roles", "compared_pictures", "error_growth"]


_LAYERS_SHOWN = 12


def entropy_maps(view: View) -> Section | None:
    examples = _chosen_examples(view, "entropy")
    shown = [(example.key, _entropy_viewer(view, example)) for example in examples]
    if not shown:
        return None
    ramp = el("div", el("span", "focused"), el("i", class_="ramp"), el("span", "spread out"), class_="rampline")
    return Section(
        "entropy",
        "What the model looks at",
        (
            "Each small map is one {layer} (down) at one {scale} (across) of the dense run: a cell per {token}, bright where "
            "its {entropy} is low. Low entropy marks edges, objects and other places that need work; those tokens are the "
            "ones worth keeping. Choose a map to lay it over the picture.",
        ),
        join(ramp, switch([example_buttons(examples)], shown)),
    )


def _entropy_viewer(view: View, example: Example) -> Markup:
    scales = [
        s
        for s, grid in enumerate(view.evidence.model.grids)
        if min(grid) > 1 and f"{example.key}.entropy.{s}" in view.arrays
    ]
    layers = _spread(view.evidence.model.depth, _LAYERS_SHOWN)
    roles = view.evidence.roles
    cells, middle = [el("span", class_="corner")], layers[len(layers) // 2]
    cells += [el("span", side_names(view)[s], class_="head") for s in scales]
    chosen: tuple[str, str] | None = None
    for layer in layers:
        role = {"g": ", global", "d": ", detail"}[roles[layer]] if roles else ""
        cells.append(el("span", layer + 1, class_="head" + (" detail" if role == ", detail" else "")))
        for scale in scales:
            values = view.arrays[f"{example.key}.entropy.{scale}"][layer].astype(np.float64)
            uri = images.heat_uri(values)
            tip = f"layer {layer + 1}{role}, {grid_name(view, scale)}: {values.min():.2f} to {values.max():.2f} nats"
            is_first = layer == middle and scale == scales[-min(3, len(scales))]
            chosen = (uri, tip) if is_first else chosen
            cells.append(
                el(
                    "button",
                    el("img", src=uri, alt=""),
                    type="button",
                    data_map=True,
                    data_tip=tip,
                    aria_label=tip,
                    aria_pressed="true" if is_first else "false",
                )
            )
    base = _base(view, example)
    grid = el("div", *cells, class_="maps", style=f"--columns:{len(scales)}")
    uri, tip = chosen or ("", "")
    stage = el(
        "figure",
        el(
            "div",
            el("img", src=images.picture_uri(base), alt=f"picture of {example.prompt}") if base is not None else None,
            el("img", src=uri, alt=tip, class_="overlay"),
            class_="stage",
        ),
        el("figcaption", el("span", tip, class_="caption")),
        el(
            "label",
            "map ",
            el("input", type="range", min=0, max=100, value=70, data_fade=True),
            " picture",
            class_="fade",
        ),
    )
    return el("div", stage, grid, class_="viewer")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread, first and last among them."""
    return (
        sorted({round(i * (count - 1) / (min(count, most) - 1)) for i in range(min(count, most))}) if count > 1 else [0]
    )


def kept_tokens(view: View) -> Section | None:
    examples = _chosen_examples(view, "kept")
    shown, policies = [], []
    for example in examples:
        base = _base(view, example)
        if base is None:
            continue
        picture = images.picture_uri(base)
        for policy in view.policies:
            scales = [
                s
                for s in range(len(view.evidence.model.grids))
                if f"{example.key}.kept.{policy.name}.{s}" in view.arrays
            ]
            if not scales:
                continue
            policies += [policy] if policy not in policies else []
            cards = []
            for scale in scales:
                kept = view.arrays[f"{example.key}.kept.{policy.name}.{scale}"].astype(np.float64).mean(0)
                cards.append(
                    el(
                        "figure",
                        el(
                            "div",
                            el("img", src=picture, alt=""),
                            el("img", src=images.mask_uri(1 - kept), alt="", class_="overlay"),
                            class_="stage",
                        ),
                        el("figcaption", f"{grid_name(view, scale)}: {kept.mean():.0%} kept"),
                        role="group",
                        aria_label=f"tokens kept at {grid_name(view, scale)}",
                    )
                )
            shown.append((f"{example.key}|{policy.name}", el("div", *cards, class_="cards")))
    if not shown:
        return None
    block = switch([example_buttons(examples), select("Policy", [(one.name, one.title) for one in policies])], shown)
    return Section(
        "kept",
        "Which tokens are kept",
        (
            "The same pictures, bright where a {kept token} is: the {detail layer|detail layers} run there and nowhere else. "
            "Grey in between: some runs of detail layers keep the token and others do not, since each {global layer} in front "
            "of them chooses anew.",
        ),
        block,
    )


def rho_curves(view: View) -> Section | None:
    evidence = view.evidence
    curves = {name: values for name, values in evidence.rho.items() if name != ALL or len(evidence.rho) == 1}
    if not curves:
        return None
    values = [value for curve in curves.values() for value in curve[1:]]
    level = (evidence.tau, f"tau {evidence.tau:g}") if evidence.tau is not None else None
    axis = Axis.around([*values, *([level[0]] if level else [])])
    panels = []
    for name, curve in curves.items():
        depth = evidence.depth.get(name)
        flags = [(depth, f"D: {grid_name(view, depth)}")] if depth is not None else []
        title = f"{name}" if name not in evidence.depth or depth is not None else f"{name}: no tokens pruned"
        line = Curve(name, [None, *curve[1:]], "c1")
        panels.append(
            charts.panel(
                title,
                side_names(view),
                [line],
                axis,
                lambda v: f"{v:.2f}",
                level=level,
                flags=flags,
                x_title="scale (side of the grid)",
            )
        )
    tables = []
    if fits := evidence.tau_fits:
        rows = tuple(
            (
                name,
                with_interval("ssim", fit.tau) if fit.tau else "not reached",
                f"{fit.correlation:+.2f}",
                str(len(fit.points)),
            )
            for name, fit in fits.items()
        )
        columns = ("prompt class", "tau at SSIM 0.8 (95%)", "correlation of rho and SSIM", "points")
        tables.append(Table(columns, rows, "What tau should be, by class"))
    return Section(
        "depth",
        "When pruning may start",
        (
            "{rho} is the share of tokens that are more focused than average. Where it falls, a small part of the picture "
            "stands out and the rest can wait.",
            _rule(evidence.tau),
        ),
        el("div", *panels, class_="panels"),
        (),
        tuple(tables),
    )


def _rule(tau: float | None) -> str:
    if tau is None:
        return (
            "The plan shown here was found by a search over pictures, which chose {D}, the first pruned scale, for each "
            "{prompt class} without looking at {rho}."
        )
    return (
        "The first scale where the curve has fallen to {tau} is {D}, and everything before it runs in full. A {prompt class} "
        "whose curve never gets there is not pruned, and neither are the coarsest scales, wherever the curve is."
    )


def layer_roles(view: View) -> Section | None:
    evidence = view.evidence
    if not evidence.role_scores:
        return None
    roles = evidence.roles or "g" * len(evidence.role_scores)
    words = {"g": "global", "d": "detail"}
    rows = [
        Bar(
            f"{layer + 1}",
            0,
            score,
            score,
            f"{score:.1f}",
            f"layer {layer + 1}, {words[role]}: ratio {score:.2f}",
            {"g": "c1", "d": "c2"}[role],
        )
        for layer, (score, role) in enumerate(zip(evidence.role_scores, roles, strict=True))
    ]
    where = f" at the {grid_name(view, evidence.role_scale)} scale" if evidence.role_scale is not None else ""
    return Section(
        "layers",
        "Which layers are pruned",
        (
            f"For each layer the {{component ratio}} of its entropy map{where}. A high ratio means a map without much "
            "structure: the layer looks at the whole and stays {global layer|global}. A low one means that it works on "
            "places, and it becomes a {detail layer}. The roles are fixed once for a model, and the first layer is always "
            "global." + (" The search took the lowest ratios first, as many as paid." if evidence.tau is None else ""),
        ),
        join(
            charts.legend([("swatch c1", "global, all tokens"), ("swatch c2", "detail, kept tokens only")]),
            charts.bars(rows, max(evidence.role_scores) * 1.18),
        ),
    )


def compared_pictures(view: View) -> Section | None:
    examples = [example for example in _chosen_examples(view, "image") if _base(view, example) is not None]
    shown = []
    for example in examples:
        base = _base(view, example)
        assert base is not None
        cards = []
        for policy in view.policies:
            stored = view.arrays.get(f"{example.key}.image.{policy.name}")
            if stored is None:
                continue
            picture = images.pixels(stored)
            cards.append(_picture_card(view, policy, example, picture, base))
        shown.append((example.key, el("div", *cards, class_="cards wide")))
    if not shown:
        return None
    return Section(
        "pictures",
        "See for yourself",
        (
            "The same prompt and the same noise under every policy. On the right of each picture, its difference from the "
            "dense one, four times enlarged: black is equal. One token that is drawn differently changes all that follow, so "
            "a picture may differ without being worse.",
        ),
        switch([example_buttons(examples)], shown),
    )


def _picture_card(view: View, policy: Policy, example: Example, picture: Array, base: Array) -> Markup:
    pair = [el("img", src=images.picture_uri(picture), alt=f"{example.prompt}, {policy.title}")]
    remark = "reference"
    if policy is not view.reference:
        far = images.difference(picture, base)
        pair.append(el("img", src=images.picture_uri(far), alt="difference from dense, four times"))
        similar = compare.ssim(picture.transpose(2, 0, 1) / 255, base.transpose(2, 0, 1) / 255)
        speed = view.speed_up(policy, example.prompt_class)
        remark = f"SSIM {similar:.3f}" + (f", {speed:.2f}×" if speed else "")
    badge = el("b", view.numbers[policy.name], class_=f"badge {policy.family}")
    caption = el("figcaption", badge, " ", el("strong", policy.title), el("span", remark))
    return el("figure", el("div", *pair, class_="two" if len(pair) > 1 else "one"), caption)


def error_growth(view: View) -> Section | None:
    errors = view.evidence.errors
    if not errors:
        return None
    axis = Axis(0, max(value for error in errors for value in error.code_error) * 1.1 or 1)
    names = list(dict.fromkeys(error.policy for error in errors))
    names.sort(key=lambda name: view.headline is None or name != view.headline.name)
    shown, rows = [], []
    for name in names:
        policy, panels = view.evidence.policy(name), []
        for group in dict.fromkeys(error.prompt_class for error in errors if error.policy == name):
            curves = [_error_curve(view, one) for one in errors if (one.policy, one.prompt_class) == (name, group)]
            title = f"{policy.title}, {class_name(group)}"
            panels.append(
                charts.panel(title, side_names(view), curves, axis, _percent, x_title="scale (side of the grid)")
            )
            ends = {curve.name: next((v for v in reversed(curve.values) if v is not None), 0.0) for curve in curves}
            own, free = ends.get("teacher-forced", 0.0), ends.get("free-running", 0.0)
            carried = f"{max(0.0, 1 - own / free):.0%}" if free > 0 else ""
            rows.append((policy.title, "all" if group == ALL else group, f"{own:.1%}", f"{free:.1%}", carried))
        shown.append((name, el("div", *panels, class_="panels")))
    columns = ("policy", "prompts", "error of the last scale alone", "error at the end, in use", "of it carried over")
    return Section(
        "errors",
        "Do errors grow?",
        (
            "The relative error of the accumulated codes after each scale. {teacher-forced|Teacher-forced}: the scale's own "
            "error. {free-running|Free-running}: what is left of it in use, with all errors before it.",
        ),
        switch([select("Policy", [(name, view.evidence.policy(name).title) for name in names])], shown),
        (),
        (Table(columns, tuple(rows), "At the end", folded=True),),
    )


def _error_curve(view: View, error: Error) -> Curve:
    row: list[float | None] = [None] * len(view.evidence.model.grids)
    for scale, value in zip(error.scales, error.code_error, strict=True):
        row[scale] = value
    return Curve(error.mode, row, "c2" if error.mode == "free-running" else "c1")


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _chosen_examples(view: View, key: str) -> list[Example]:
    """The first examples of each prompt class that have arrays of a kind."""
    chosen, count = [], dict.fromkeys(view.evidence.classes, 0)
    for example in view.evidence.examples:
        if any(name.startswith(f"{example.key}.{key}.") for name in view.arrays) and (
            count.get(example.prompt_class, 0) < _EXAMPLES_PER_CLASS
        ):
            count[example.prompt_class] = count.get(example.prompt_class, 0) + 1
            chosen.append(example)
    return chosen


def _base(view: View, example: Example) -> Array | None:
    """The reference's picture."""
    stored = view.arrays.get(f"{example.key}.image.{view.evidence.reference}")
    return None if stored is None else images.pixels(stored)
