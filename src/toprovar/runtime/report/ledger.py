"""Sections of tables: what each part of the method brings and costs, all numbers, how they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toprovar.profiles.evidence import ALL, METRICS, Policy
from toprovar.runtime import bench
from toprovar.runtime.report.section import Section, Table
from toprovar.runtime.report.view import (
    FLOPS,
    View,
    duration,
    giga,
    grid_name,
    listed,
    with_interval,
)

__all__ = ["choices", "costs", "numbers", "how"]


def choices(view: View) -> Section | None:
    """Ablations, and other ways to make one number of the entropies."""
    tables = []
    ablations = [policy for policy in view.policies if policy.family == "ablation"]
    if ablations and view.metrics:
        shown = view.metrics[:4]
        whole = _taken_apart(view, ablations)
        rows = [_ablation_row(view, policy, shown) for policy in ([whole] if whole else []) + ablations]
        columns = ("policy", "what it does", "speed-up", *(METRICS[metric].title for metric in shown))
        tables.append(Table(columns, tuple(rows), "A part switched off or replaced"))
    options = view.evidence.normalisations
    if options:
        metrics = [metric for metric in METRICS if any(metric in option.metrics for option in options)]
        rows = [
            (
                option.title,
                f"{option.rank_correlation:.3f}",
                *(with_interval(metric, option.metrics.get(metric)) for metric in metrics),
            )
            for option in options
        ]
        columns = ("entropy of a token", "same ranking (Spearman)", *(METRICS[metric].title for metric in metrics))
        tables.append(Table(columns, tuple(rows), "Other ways to make one number of all heads"))
    if not tables:
        return None
    return Section(
        "choices",
        "Does each part earn its place?",
        ("The method with one part switched off or replaced at a time, all else equal.",),
        None,
        (),
        tuple(tables),
    )


def _taken_apart(view: View, ablations: Sequence[Policy]) -> Policy | None:
    """The policy of ours that the ablations are made of: ``ours-NAME`` where they are called ``NAME-...``."""
    for policy in view.ours:
        name = policy.name.removeprefix("ours-")
        if all(one.name.startswith(f"{name}-") for one in ablations):
            return policy
    return None


def _ablation_row(view: View, policy: Policy, metrics: Sequence[str]) -> tuple[str, ...]:
    speed = view.speed_up(policy)
    figures = (with_interval(metric, view.metric(policy, ALL, metric)) for metric in metrics)
    return (policy.title, policy.description, f"{speed:.2f} ×" if speed else "", *figures)


def costs(view: View) -> Section | None:
    costs = view.evidence.costs
    if not costs:
        return None
    rows = [
        (
            cost.title,
            duration(cost.seconds * 1000) if cost.seconds < 1 else f"{cost.seconds:.1f} s",
            f"once per {cost.per}",
            cost.note,
        )
        for cost in costs
    ]
    findings = []
    own, dense = (view.cost(one, ALL, view.costs[0]) if one else None for one in (view.headline, view.reference))
    once = sum(cost.seconds for cost in costs if cost.per == "model")
    if own and dense and view.headline and view.costs[0] != FLOPS and dense.mean > own.mean and once:
        count = once * 1000 / (dense.mean - own.mean)
        findings.append(
            f"What is done once for the model is earned back by {view.headline.title} after {count:,.0f} pictures."
        )
    return Section(
        "costs",
        "What the method itself costs",
        (
            "Measuring and choosing take time as well. What is done for every picture is part of all times on this page.",
        ),
        None,
        tuple(findings),
        (Table(("step", "time", "how often", "remark"), tuple(rows)),),
    )


def numbers(view: View) -> Section | None:
    tables = []
    for group in view.groups:
        rows = [_number_cells(view, policy, group) for policy in view.policies if group in policy.groups]
        title = "All prompts" if group == ALL else f"{group.capitalize()} prompts"
        if rows:
            cells = tuple(tuple(row.values()) for row in rows)
            tables.append(Table(tuple(rows[0]), cells, title, folded=group != ALL))
    if not tables:
        return None
    return Section(
        "numbers",
        "All numbers",
        ("Means with {interval|intervals} in brackets. A click on a heading sorts.",),
        None,
        (),
        tuple(tables),
    )


def _number_cells(view: View, policy: Policy, group: str) -> dict[str, str]:
    """Column -> cell; the same columns for every policy."""
    figures = policy.groups[group]
    cells, sizes = {"policy": policy.title}, {}
    for cost in view.costs:
        value, speed = view.cost(policy, group, cost), view.speed_up(policy, group, cost)
        name = view.cost_name(cost)
        cells["of the arithmetic" if cost == FLOPS else f"speed-up, {name}"] = (
            "" if speed is None else f"{1 / speed:.1%}" if cost == FLOPS else f"{speed:.2f} ×"
        )
        sizes["GFLOP" if cost == FLOPS else f"{name}, ms"] = "" if value is None else giga(value.mean)
    for metric in view.metrics:
        quality = view.metric(policy, group, metric)
        equal = metric == "psnr_db" and policy is view.reference
        cells[METRICS[metric].title] = "equal" if equal else with_interval(metric, quality)
    if any(view.total(one) for every in view.policies for one in every.groups.values()):
        total = view.total(figures)
        sizes["whole picture, ms"] = "" if total is None else giga(total.median_ms)
    return {**cells, **sizes, "pictures": str(figures.images)}


def how(view: View, missing: Sequence[str]) -> Section:
    evidence = view.evidence
    text = [evidence.split] if evidence.split else []
    model = evidence.model
    rows = [
        (
            "model",
            f"{model.backbone}, {model.depth} layers of width {model.width}, "
            f"{len(model.grids)} scales up to {grid_name(view, -1)}",
        ),
        ("checkpoint", evidence.checkpoint_sha256[:16]),
    ]
    rows += _machine_rows("quality", evidence.quality_machine)
    if evidence.latency_machine is not None and evidence.latency_machine != evidence.quality_machine:
        rows += _machine_rows("times", evidence.latency_machine)
    tables = [Table(("", ""), tuple(rows), "Environment")]
    sources = tuple(
        (policy.title, policy.description, policy.source or "this project", policy.mapping, _settings(policy))
        for policy in view.policies
    )
    tables.append(
        Table(("policy", "what it does", "source", "carried over by", "settings"), sources, "Policies", folded=True)
    )
    findings = [f"Not measured, and so not on this page: {listed(missing)}."] if missing else []
    return Section("how", "How it was measured", tuple(text), None, tuple(findings), tuple(tables))


def _machine_rows(what: str, machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    try:
        lines = bench.machine_lines(dict(machine))
    except KeyError:
        lines = [f"- {key}: {value}" for key, value in machine.items()]
    return [
        (f"{what}, machine" if i == 0 else f"{what}, versions", line.removeprefix("- ")) for i, line in enumerate(lines)
    ]


def _settings(policy: Policy) -> str:
    parts = []
    for key, value in policy.settings.items():
        if value not in ({}, [], None, ""):
            text = value if isinstance(value, str) else json.dumps(value, separators=(", ", " ")).replace('"', "")
            parts.append(f"{key} {text[:160]}{'…' if len(text) > 160 else ''}")
    return "; ".join(parts)
