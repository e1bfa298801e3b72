"""One model's evidence, read the way a report needs it: which time, which numbers, who beats whom. No markup here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from toprovar.profiles.evidence import ALL, METRICS, Comparison, Evidence, Group, Interval, Latency, Policy
from toprovar.runtime.report.charts import Span
from toprovar.runtime.target import Array

__all__ = [
    "FLOPS",
    "View",
    "class_name",
    "duration",
    "figure",
    "gap",
    "giga",
    "grid_name",
    "listed",
    "quality_line",
    "side_names",
    "with_interval",
]

_CLOCKS = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}
FLOPS = "flops"
"""The one scale of cost that needs no clock."""

_FEW = 0.03
"""Scales with less than this share of the dense arithmetic are too short to take a machine's best rate from."""


@dataclass(frozen=True)
class View:
    """Evidence and arrays of one model."""

    evidence: Evidence
    arrays: Mapping[str, Array]

    @cached_property
    def reference(self) -> Policy:
        return self.evidence.policy(self.evidence.reference)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """The reference first, then ours, dropped scales, rivals, ablations."""
        order = {"ours": 1, "drop": 2, "dense": 2, "rival": 3, "ablation": 4}
        return tuple(sorted(self.evidence.policies, key=lambda one: 0 if one is self.reference else order[one.family]))

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {policy.name: number for number, policy in enumerate(self.policies, 1)}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """All prompt classes together first."""
        return (ALL, *self.evidence.classes)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Figures of quality that at least two policies have."""
        shown = []
        for key in METRICS:
            if sum(any(key in group.metrics for group in policy.groups.values()) for policy in self.policies) > 1:
                shown.append(key)
        return tuple(shown)

    @cached_property
    def costs(self) -> tuple[str, ...]:
        """What a picture can be said to cost: the clock of a runtime, of most policies first, and arithmetic."""
        count: dict[str, int] = {}
        for policy in self.policies:
            for runtime in {key for group in policy.groups.values() for key in group.transformer}:
                count[runtime] = count.get(runtime, 0) + 1
        clocks = sorted((key for key in count if count[key] > 1), key=lambda key: (-count[key], key))
        return (*clocks, FLOPS)

    def cost_title(self, cost: str) -> str:
        if cost == FLOPS:
            return "Arithmetic per picture, GFLOP"
        return f"Time per picture, ms ({_CLOCKS.get(cost, cost)}, transformer)"

    def cost_name(self, cost: str) -> str:
        return "Arithmetic" if cost == FLOPS else _CLOCKS.get(cost, cost)

    def cost(self, policy: Policy, group: str, cost: str) -> Span | None:
        """Milliseconds or GFLOP of one picture; None where it was not measured."""
        figures = policy.groups.get(group)
        if figures is None:
            return None
        if cost == FLOPS:
            value = figures.flops / 1e9
            return Span(value, value, value)
        time = figures.transformer.get(cost)
        return None if time is None else Span(time.median_ms, time.p20_ms, time.p80_ms)

    def speed_up(self, policy: Policy, group: str = ALL, cost: str | None = None) -> float | None:
        """How many times as cheap as the reference."""
        cost = self.costs[0] if cost is None else cost
        own, dense = self.cost(policy, group, cost), self.cost(self.reference, group, cost)
        return None if own is None or dense is None else dense.mean / own.mean

    def metric(self, policy: Policy, group: str, metric: str) -> Interval | None:
        """None where it was not measured, and for the reference's PSNR: equal pictures have none."""
        figures = policy.groups.get(group)
        if figures is None or (metric == "psnr_db" and policy is self.reference):
            return None
        return figures.metrics.get(metric)

    def kept_accuracy(self, policy: Policy, group: str = ALL) -> float | None:
        """Share of the reference's accuracy."""
        own, dense = self.metric(policy, group, "accuracy"), self.metric(self.reference, group, "accuracy")
        return None if own is None or dense is None or dense.mean <= 0 else own.mean / dense.mean

    def total(self, figures: Group) -> Latency | None:
        """Latency of the whole picture, by the clock that is shown first."""
        return figures.total.get(self.costs[0]) or next(iter(figures.total.values()), None)

    @cached_property
    def best_rate(self) -> float | None:
        """FLOP per ms: the best of any scale long enough to be timed well; the floor is arithmetic at this rate."""
        least = _FEW * self.reference.groups[next(iter(self.reference.groups))].flops
        rates = [
            scale.flops / scale.latency_ms
            for policy in self.policies
            for group in policy.groups.values()
            for scale in group.scales
            if scale.latency_ms and scale.flops >= least
        ]
        return max(rates, default=None)

    @property
    def ours(self) -> tuple[Policy, ...]:
        return tuple(policy for policy in self.policies if policy.family == "ours")

    @cached_property
    def headline(self) -> Policy | None:
        """The policy of ours that the page begins with: the `fast` one, or else the fastest."""
        named = [policy for policy in self.ours if "fast" in policy.name]
        if named:
            return named[0]
        return max(self.ours, key=lambda one: self.speed_up(one) or 0, default=None)

    def dominators(self, policy: Policy, group: str, metric: str, cost: str) -> list[Policy]:
        """Policies of others that are at least as cheap and better, or as good and cheaper, by their means."""
        own_cost, own = self.cost(policy, group, cost), self.metric(policy, group, metric)
        if own_cost is None or own is None:
            return []
        sign = 1 if METRICS[metric].better == "higher" else -1
        found = []
        for other in self.policies:
            cheap, good = self.cost(other, group, cost), self.metric(other, group, metric)
            if other.family in ("ours", "ablation") or cheap is None or good is None:
                continue
            better = sign * (good.mean - own.mean)
            if cheap.mean <= own_cost.mean and better >= 0 and (cheap.mean < own_cost.mean or better > 0):
                found.append(other)
        return found

    def beaten(self) -> list[Comparison]:
        """Comparisons at equal cost that we lose by more than the interval."""
        return [one for one in self.evidence.comparisons if one.verdict == "worse"]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text


def figure(metric: str, value: float) -> str:
    """A figure of quality as it is written."""
    if metric in ("accuracy", "tokens", "bits"):
        return f"{value:.1%}"
    if metric == "psnr_db":
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def gap(metric: str, value: float) -> str:
    """A difference of two figures, with its sign."""
    if metric in ("accuracy", "tokens", "bits"):
        return f"{100 * value:+.1f} points"
    return f"{value:+.1f} dB" if metric == "psnr_db" else f"{value:+.3f}"


def with_interval(metric: str, value: Interval | None) -> str:
    """A mean and its interval; empty where it was not measured."""
    if value is None:
        return ""
    if value.low == value.high == value.mean:
        return figure(metric, value.mean)
    return f"{figure(metric, value.mean)} ({figure(metric, value.low)} to {figure(metric, value.high)})"


def duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def giga(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def class_name(name: str) -> str:
    return "all prompts" if name == ALL else f"{name} prompts"


def grid_name(view: View, scale: int) -> str:
    h, w = view.evidence.model.grids[scale]
    return f"{h} × {w}"


def side_names(view: View) -> list[str]:
    """Short names of the scales for axes: the side of a square grid."""
    return [str(h) if h == w else f"{h}×{w}" for h, w in view.evidence.model.grids]


def quality_line(view: View, policy: Policy) -> str:
    parts = []
    if (ssim := view.metric(policy, ALL, "ssim")) is not None:
        parts.append(f"SSIM {ssim.mean:.3f}")
    if (kept := view.kept_accuracy(policy)) is not None:
        parts.append(f"{kept:.0%} of the dense accuracy")
    return ", ".join(parts)
