"""What the report says about one model, section by section. `page` and `text` only lay it out.

A part that the evidence lacks is left out, and the last section says so. Sentences mark words of the glossary, see `words`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from toprovar.profiles.evidence import ALL, METRICS, Policy
from toprovar.runtime.report.inside import (
    compared_pictures,
    entropy_maps,
    error_growth,
    kept_tokens,
    layer_roles,
    rho_curves,
)
from toprovar.runtime.report.ledger import choices, costs, how, numbers
from toprovar.runtime.report.rivalry import rivals, trade, waterfall
from toprovar.runtime.report.section import Section, Tile
from toprovar.runtime.report.view import (
    FLOPS,
    View,
    class_name,
    figure,
    gap,
    listed,
    quality_line,
)

__all__ = ["Story", "in_short", "sections", "tell", "tiles"]


_BEATEN_SHOWN = 2
"""Cases that the beginning of the page names; all of them stand with the rivals."""


@dataclass(frozen=True)
class Story:
    """All that is said about one model; the page and its Markdown twin are both made from it."""

    name: str
    title: str
    tiles: tuple[Tile, ...]
    in_short: tuple[str, ...]
    sections: tuple[Section, ...]


def tell(view: View) -> Story:
    """The report of one model."""
    evidence = view.evidence
    return Story(evidence.name, evidence.title, tuple(tiles(view)), tuple(in_short(view)), tuple(sections(view)))


def sections(view: View) -> list[Section]:
    """Text, figures and tables, in the order in which they are read."""
    made: list[tuple[str, Section | None]] = [
        ("time against quality", trade(view)),
        ("each rival at its own speed", rivals(view)),
        ("time per scale", waterfall(view)),
        ("entropy maps", entropy_maps(view)),
        ("kept tokens", kept_tokens(view)),
        ("rho over the scales", rho_curves(view)),
        ("layer roles", layer_roles(view)),
        ("pictures", compared_pictures(view)),
        ("how errors grow", error_growth(view)),
        ("other choices", choices(view)),
        ("what the method itself costs", costs(view)),
        ("all numbers", numbers(view)),
    ]
    missing = [name for name, section in made if section is None]
    return [section for _, section in made if section is not None] + [how(view, missing)]


def tiles(view: View) -> list[Tile]:
    """The headline policy, what dropping scales alone does at about its speed, and both ends of our line."""
    faithful = sorted(view.ours, key=lambda one: view.speed_up(one) or 0)
    shown = [view.headline, nearest_drop(view), *faithful[:1], *faithful[-1:]]
    made = []
    for policy in dict.fromkeys(one.name for one in shown if one is not None):
        own = view.evidence.policy(policy)
        if (speed := view.speed_up(own)) is not None:
            made.append(Tile(own.family, own.title, f"{speed:.1f}×", quality_line(view, own)))
    return made


def nearest_drop(view: View) -> Policy | None:
    """The policy that drops scales and nothing else, of about the headline policy's speed."""
    drops = [policy for policy in view.policies if policy.family == "drop" and view.speed_up(policy)]
    wanted = (view.speed_up(view.headline) if view.headline else None) or 1.0
    return min(drops, key=lambda one: abs(math.log((view.speed_up(one) or 1.0) / wanted)), default=None)


def in_short(view: View) -> list[str]:
    """What was found, in sentences; where we lose stands among them."""
    found = []
    if view.headline is not None:
        found.append(f"{view.headline.title} makes a picture {_at_what_cost(view, view.headline)}.")
    if (best := nearest_drop(view)) is not None:
        found.append(
            f"Leaving out the last scales and nothing else ({best.title}) makes it {_at_what_cost(view, best)}: whatever a "
            "method gains must be seen beside this."
        )
    comparisons = view.evidence.comparisons
    if comparisons:
        count = {
            verdict: sum(one.verdict == verdict for one in comparisons)
            for verdict in ("better", "equal", "worse", "none")
        }
        rest = f"; in {count['none']} no policy of ours is as fast" if count["none"] else ""
        found.append(
            f"Against each rival at its own speed, {len(comparisons)} comparisons over metrics and prompt classes: ours is "
            f"better by more than the interval in {count['better']}, equal within it in {count['equal']}, worse in "
            f"{count['worse']}{rest}."
        )
    beaten = sorted(view.beaten(), key=lambda one: one.prompt_class != ALL)
    for one in beaten[:_BEATEN_SHOWN]:
        assert one.difference is not None
        rival = view.evidence.policy(one.rival).title
        reason = f" {one.reason}" if one.reason else ""
        found.append(
            f"Beaten: {rival} is better in {METRICS[one.metric].title} on {class_name(one.prompt_class)}, by "
            f"{gap(one.metric, -one.difference.mean).lstrip('+')}.{reason}"
        )
    if len(beaten) > _BEATEN_SHOWN:
        found.append(f"{len(beaten) - _BEATEN_SHOWN} more such cases are listed with the rivals.")
    found += _below_floor(view)
    return found


def _at_what_cost(view: View, policy: Policy) -> str:
    """How fast by every clock, on how much arithmetic, and how good."""
    clocks = [(view.speed_up(policy, cost=cost), view.cost_name(cost)) for cost in view.costs if cost != FLOPS]
    speeds = [f"{speed:.2f} times ({clock})" for speed, clock in clocks if speed is not None]
    parts = [f"{listed(speeds)} as fast as the dense model"] if speeds else []
    share, whose = 1 / (view.speed_up(policy, cost=FLOPS) or 1.0), "its" if speeds else "the dense"
    parts.append(f"on {share:.0%} of {whose} arithmetic")
    quality = quality_line(view, policy)
    return ", ".join(parts) + (f", at {quality}" if quality else "")


def _below_floor(view: View) -> list[str]:
    """Policies that miss the floor that their own profile asks for."""
    found = []
    for policy in view.policies:
        floor = policy.settings.get("floor")
        if not isinstance(floor, Mapping):
            continue
        for metric, least in floor.items():
            value = view.metric(policy, ALL, metric)
            if value is not None and isinstance(least, (int, float)) and value.mean < least:
                title, own = METRICS[metric].title, figure(metric, value.mean)
                found.append(f"{policy.title}: {title} {own} is below its profile's floor of {figure(metric, least)}.")
    return found
