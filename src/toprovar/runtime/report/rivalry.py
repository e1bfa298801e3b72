"""Sections that set policies against each other: time against quality, rival by rival, time per scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toprovar.profiles.evidence import ALL, METRICS, Policy
from toprovar.runtime.report import charts
from toprovar.runtime.report.charts import Bar, Mark, Span
from toprovar.runtime.report.markup import Markup, el, join
from toprovar.runtime.report.section import Section, Table, buttons, select, switch
from toprovar.runtime.report.view import (
    FLOPS,
    View,
    class_name,
    duration,
    gap,
    grid_name,
    listed,
    with_interval,
)

FAMILIES = {
    "dense": "dense, nothing left out",
    "ours": "toprovar",
    "drop": "scales dropped, nothing else",
    "rival": "other methods",
    "ablation": "toprovar with a part switched off or replaced",
}

__all__ = ["trade", "rivals", "waterfall"]


def trade(view: View) -> Section | None:
    if not view.metrics:
        return None
    layouts: dict[str, Any] = {}
    for group in view.groups:
        for metric in view.metrics:
            for cost in view.costs:
                if (marks := _marks(view, group, metric, cost)) and len(marks) > 1:
                    layout = charts.scatter_layout(
                        marks, METRICS[metric].better == "higher", _short, _figure_of(metric)
                    )
                    unit = f", {METRICS[metric].unit}" if METRICS[metric].unit else ""
                    layouts[f"{group}|{metric}|{cost}"] = {
                        **layout,
                        "x": view.cost_title(cost),
                        "y": f"{METRICS[metric].title}{unit}",
                        "note": METRICS[metric].meaning,
                    }
    if not layouts:
        return None
    first = layouts[next(iter(layouts))]
    every = [(policy.name, view.numbers[policy.name], policy.title, policy.family) for policy in view.policies]
    families = [key for key in FAMILIES if any(policy.family == key for policy in view.policies)]
    data = json.dumps(layouts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    figure_ = el(
        "div",
        el(
            "div",
            buttons("Prompts", [(group, "all" if group == ALL else group) for group in view.groups]),
            buttons("Quality", [(metric, METRICS[metric].title) for metric in view.metrics]),
            buttons("Cost", [(cost, view.cost_name(cost)) for cost in view.costs]),
            class_="controls",
        ),
        charts.legend(
            [(f"shape {family}", FAMILIES[family]) for family in families] + [("shape frontline", "Pareto front")]
        ),
        charts.scatter(first, every, first["x"], first["y"]),
        el("p", first["note"], class_="note"),
        el(
            "label",
            el("input", type="checkbox", data_ablations=True),
            " show ablations (those in range)",
            class_="tick",
        )
        if "ablation" in families
        else None,
        _key(view),
        el("script", Markup(data), type="application/json", class_="layouts"),
        class_="trade",
    )
    behind = _behind(view)
    return Section(
        "trade",
        "Time against quality",
        (
            "Each mark is one {policy}. Further left is faster, further up is closer to the {dense} picture or to what was "
            "asked for; the bars are the {interval|intervals}. The line is the Pareto {front}: a policy below it is beaten "
            "by another one in both.",
        ),
        figure_,
        tuple(_front_findings(view, behind)),
        _front_table(view, behind),
    )


def _marks(view: View, group: str, metric: str, cost: str) -> list[Mark]:
    marks = []
    for policy in view.policies:
        x, y = view.cost(policy, group, cost), view.metric(policy, group, metric)
        if x is None or y is None:
            continue
        speed = view.speed_up(policy, group, cost)
        unit = "GFLOP" if cost == FLOPS else "ms"
        tip = (
            f"{policy.title}: {_short(x.mean)} {unit}, {speed:.2f}× as {'little' if cost == FLOPS else 'fast'}; "
            f"{METRICS[metric].title} {with_interval(metric, y)}"
        )
        span = Span(y.mean, y.low, y.high)
        marks.append(
            Mark(policy.name, view.numbers[policy.name], policy.title, policy.family, policy.series, x, span, tip)
        )
    return marks


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure_of(metric: str) -> Callable[[float], str]:
    def text(value: float) -> str:
        if metric in ("accuracy", "tokens", "bits"):
            return f"{value:.0%}"
        return f"{value:.3g}"

    return text


@dataclass(frozen=True)
class _Behind:
    """A policy of ours that others beat in both time and quality, by means alone."""

    policy: Policy
    metric: str
    group: str
    others: tuple[str, ...]


def _picture_metrics(view: View) -> tuple[str, ...]:
    """Figures of the pictures. Equal tokens are counted at the scales that are run, and are none."""
    return tuple(metric for metric in view.metrics if metric not in ("tokens", "bits"))


def _behind(view: View) -> list[_Behind]:
    """Wherever ours is off the front, by the clock that is shown first."""
    return [
        _Behind(policy, metric, group, tuple(one.title for one in others))
        for policy in view.ours
        for metric in _picture_metrics(view)
        for group in view.groups
        if (others := view.dominators(policy, group, metric, view.costs[0]))
    ]


def _front_findings(view: View, behind: Sequence[_Behind]) -> list[str]:
    cases = sum(
        view.cost(policy, group, view.costs[0]) is not None and view.metric(policy, group, metric) is not None
        for policy in view.ours
        for metric in _picture_metrics(view)
        for group in view.groups
    )
    if not cases:
        return []
    clock = "arithmetic" if view.costs[0] == FLOPS else f"time in {view.cost_name(view.costs[0])}"
    counted = "each policy, prompt class and figure of quality by its mean"
    found = [
        f"No policy of others is at once faster and better than ours in {cases - len(behind)} of {cases} cases "
        f"({clock}; {counted})."
    ]
    for metric in view.metrics:
        own = [one for one in behind if one.policy is view.headline and one.metric == metric]
        if own:
            others = listed(list(dict.fromkeys(title for one in own for title in one.others)))
            where = _where(view, [one.group for one in own])
            found.append(f"{own[0].policy.title} is behind {others} in {METRICS[metric].title} on {where}.")
    return found


def _where(view: View, groups: Sequence[str]) -> str:
    return "every prompt class" if set(groups) == set(view.groups) else listed([class_name(group) for group in groups])


def _front_table(view: View, behind: Sequence[_Behind]) -> tuple[Table, ...]:
    rows = []
    for policy in view.ours:
        for metric in view.metrics:
            own = [one for one in behind if one.policy is policy and one.metric == metric]
            if own:
                others = list(dict.fromkeys(title for one in own for title in one.others))
                where = _where(view, [one.group for one in own])
                rows.append((policy.title, METRICS[metric].title, where, ", ".join(others)))
    columns = ("policy of ours", "quality", "prompts", "faster and better")
    return (Table(columns, tuple(rows), "Every case where ours is behind", folded=True),) if rows else ()


def _key(view: View) -> Markup:
    """Numbers of the marks, names, and what each policy does."""
    entries = [
        el(
            "li",
            el("b", view.numbers[policy.name], class_=f"badge {policy.family}"),
            el("span", el("strong", policy.title), " ", policy.description),
            class_=policy.family,
        )
        for policy in view.policies
    ]
    return el("details", el("summary", "Who is who"), el("ol", *entries, class_="who"), class_="fold")


def rivals(view: View) -> Section | None:
    comparisons = view.evidence.comparisons
    if not comparisons:
        return None
    shown, rows = [], []
    styles = {"better": "good", "equal": "even", "worse": "bad", "none": "even"}
    for metric in dict.fromkeys(one.metric for one in comparisons):
        for group in [g for g in view.groups if any(c.prompt_class == g and c.metric == metric for c in comparisons)]:
            lines = []
            for one in comparisons:
                if one.metric != metric or one.prompt_class != group:
                    continue
                rival = view.evidence.policy(one.rival).title
                ours = view.evidence.policy(one.ours).title if one.ours else None
                span = Span(one.difference.mean, one.difference.low, one.difference.high) if one.difference else None
                text = one.verdict if span is None else f"{one.verdict}, {gap(metric, span.mean)}"
                text = f"no policy as {'cheap' if one.by == FLOPS else 'fast'}" if one.verdict == "none" else text
                tip = f"{ours or 'none of ours'} against {rival}, equal {'arithmetic' if one.by == FLOPS else 'time'}: {text}"
                tip += f" ({gap(metric, span.low)} to {gap(metric, span.high)})" if span else ""
                tip += f". {one.reason}" if one.reason else ""
                lines.append((rival, span, text, styles[one.verdict], tip))
                interval = (
                    ""
                    if span is None
                    else f"{gap(metric, span.mean)} ({gap(metric, span.low)} to {gap(metric, span.high)})"
                )
                rows.append((rival, METRICS[metric].title, group, ours or "none", interval, one.verdict, one.reason))
            shown.append((f"{group}|{metric}", charts.interval_rows(lines, "← rival better", "ours better →")))
    groups = [g for g in view.groups if any(key.startswith(f"{g}|") for key, _ in shown)]
    metrics = list(dict.fromkeys(one.metric for one in comparisons))
    block = switch(
        [
            buttons("Prompts", [(group, "all" if group == ALL else group) for group in groups]),
            buttons("Quality", [(metric, METRICS[metric].title) for metric in metrics]),
        ],
        shown,
    )
    columns = ("rival", "quality", "prompts", "ours", "ours minus rival (95%)", "verdict", "why")
    return Section(
        "rivals",
        "Each rival at its own speed",
        (
            "For every other method: the best of our policies that costs no more, against it, picture by picture on the same "
            "noise. A bar to the right of the line means that ours is better; where a bar crosses the line, the difference "
            "is within the {interval} and counts as equal.",
        ),
        block,
        _lost(view),
        (Table(columns, tuple(rows), "Every comparison", folded=True),),
    )


def _lost(view: View) -> tuple[str, ...]:
    """Who beats ours by more than the interval, a sentence per rival; the reasons stand in the table."""
    cases: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for rival in dict.fromkeys(one.rival for one in view.beaten()):
        own = [one for one in view.beaten() if one.rival == rival]
        for metric in dict.fromkeys(one.metric for one in own):
            where = tuple(one.prompt_class for one in own if one.metric == metric)
            cases.setdefault(rival, {}).setdefault(where, []).append(METRICS[metric].title)
    sentences = []
    for rival, groups in cases.items():
        parts = [f"in {listed(metrics)} on {_where(view, where)}" for where, metrics in groups.items()]
        sentences.append(f"{view.evidence.policy(rival).title} beats ours {'; '.join(parts)}.")
    return tuple(sentences)


def waterfall(view: View) -> Section | None:
    classes = [g for g in view.evidence.classes if any(scale.latency_ms for scale in _scales(view.reference, g))]
    policies = [p for p in view.policies if any(scale.latency_ms for g in classes for scale in _scales(p, g))]
    rate = view.best_rate
    if not classes or len(policies) < 1 or rate is None:
        return None
    chosen = [policy for policy in policies if policy is not view.reference] or policies
    headline = view.headline if view.headline in chosen else chosen[0]
    chosen.sort(key=lambda one: one is not headline)
    shown = []
    for group in classes:
        dense = _cascade(view, view.reference, group, rate)
        end = max(bar.start + bar.length for bar in dense) * 1.0
        for policy in chosen:
            own = _cascade(view, policy, group, rate)
            if not own:
                continue
            longest = max(end, *(bar.start + bar.length for bar in own))
            pair = [
                el("figure", el("figcaption", view.reference.title, ", ", duration(end)), charts.bars(dense, longest)),
                el(
                    "figure",
                    el("figcaption", policy.title, ", ", duration(max(bar.start + bar.length for bar in own))),
                    charts.bars(own, longest),
                ),
            ]
            shown.append(
                (
                    f"{group}|{policy.name}",
                    el("div", *(pair if policy is not view.reference else pair[:1]), class_="pair"),
                )
            )
    block = switch(
        [
            buttons("Prompts", [(group, group) for group in classes]),
            select("Policy", [(policy.name, policy.title) for policy in chosen]),
        ],
        shown,
    )
    late = _late_share(view, classes)
    return Section(
        "scales",
        "Where the time goes",
        (
            "One bar per {scale}, from the coarsest grid to the finest, each beginning where the last one ended. The dark part "
            "of a bar is its {floor}: what the arithmetic alone would take. What is above the floor is lost to memory and "
            "overhead." + (f" In the dense model the last two scales take {late:.0%} of the time." if late else ""),
        ),
        join(
            charts.legend(
                [("swatch solid", "floor"), ("swatch light", "measured"), ("swatch c2", "a scale that is pruned")]
            ),
            block,
        ),
    )


def _scales(policy: Policy, group: str) -> tuple[Any, ...]:
    figures = policy.groups.get(group)
    return () if figures is None else figures.scales


def _cascade(view: View, policy: Policy, group: str, rate: float) -> list[Bar]:
    rows, start = [], 0.0
    for scale in _scales(policy, group):
        time = scale.latency_ms or 0.0
        grid, tokens = grid_name(view, scale.scale), view.evidence.model.tokens[scale.scale]
        kept = "all tokens" if scale.kept >= tokens else f"{scale.kept:.0f} of {tokens} tokens in detail layers"
        tip = f"{grid}: {duration(time)}, floor {duration(scale.flops / rate)}, {scale.flops / 1e9:.3g} GFLOP, {kept}"
        style = "c1" if scale.kept >= tokens else "c2"
        rows.append(Bar(grid, start, time, min(scale.flops / rate, time), duration(time), tip, style))
        start += time
    return rows


def _late_share(view: View, classes: Sequence[str]) -> float | None:
    times = [[scale.latency_ms or 0.0 for scale in _scales(view.reference, group)] for group in classes]
    whole = sum(sum(row) for row in times)
    return sum(sum(row[-2:]) for row in times) / whole if whole and min(len(row) for row in times) > 3 else None
