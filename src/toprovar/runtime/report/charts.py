"""Charts as HTML and inline SVG: geometry in per cent of the plot, so that they fit any width and text keeps its size.

Lines are SVG stretched over the plot (strokes do not scale); marks, ticks and labels are HTML placed in per cent. Colours come
from classes, so that light, dark and print are the style sheet's business. A mark with ``data-tip`` is explained on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toprovar.runtime.report.markup import Markup, el, join

__all__ = [
    "Axis",
    "Bar",
    "Curve",
    "Mark",
    "Span",
    "bars",
    "interval_rows",
    "legend",
    "panel",
    "scatter",
    "scatter_layout",
]


@dataclass(frozen=True)
class Span:
    """A value and its interval."""

    mean: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------------------------
# Axes


@dataclass(frozen=True)
class Axis:
    """A range of values and where on the plot they lie, in per cent."""

    low: float
    high: float
    log: bool = False
    flipped: bool = False

    @classmethod
    def around(cls, values: Sequence[float], *, flipped: bool = False, may_log: bool = False) -> Axis:
        """An axis that holds all values with some air; logarithmic, where allowed, if they span more than a factor of 4."""
        low, high = min(values), max(values)
        if may_log and low > 0 and high > 4 * low:
            air = (high / low) ** 0.06
            return cls(low / air, high * air, True, flipped)
        air = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - air, high + air, False, flipped)

    def place(self, value: float) -> float:
        """Per cent of the plot's width or height."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * (1 - share if self.flipped else share), 2)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / about
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough * 0.99)
            values = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


# ---------------------------------------------------------------------------------------------------------------------
# Time against quality


@dataclass(frozen=True)
class Mark:
    """A policy on the scatter plot; `number` links it to the key, `family` gives shape and colour."""

    key: str
    number: int
    label: str
    family: str
    series: str
    x: Span
    y: Span
    tip: str


_PLOT = (860.0, 430.0)
"""The plot in pixels on a wide screen: what labels are kept apart for. Narrow screens show numbers only."""
_LETTER, _LINE, _RADIUS = 6.6, 15.0, 9.0


def scatter_layout(
    marks: Sequence[Mark], higher_is_better: bool, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> dict[str, Any]:
    """Where everything lies, as plain numbers for the page's script: up and left is better, whatever the metric.

    Returns: ``marks`` by key (x, y, their intervals, the side of the label, the tip), ``xt`` and ``yt`` (place and text of
    ticks), ``front`` and ``series`` (paths in a 100 x 100 box).
    """
    compared = [mark for mark in marks if mark.family != "ablation"]
    x_axis = Axis.around([v for mark in compared for v in (mark.x.low, mark.x.high)], may_log=True)
    y_axis = Axis.around([v for mark in compared for v in (mark.y.low, mark.y.high)], flipped=not higher_is_better)
    # An ablation far off the others would squeeze them; the tables have it.
    marks = [mark for mark in marks if x_axis.holds(mark.x.mean) and y_axis.holds(mark.y.mean)]
    at = {mark.key: (x_axis.place(mark.x.mean), y_axis.place(mark.y.mean)) for mark in marks}
    sides = _label_sides(marks, at)
    placed = {}
    for mark in marks:
        lows = sorted((y_axis.place(mark.y.low), y_axis.place(mark.y.high)))
        spans = [x_axis.place(mark.x.low), x_axis.place(mark.x.high), *lows]
        placed[mark.key] = [*at[mark.key], *spans, sides[mark.key], mark.tip]
    front: list[tuple[float, float]] = []
    for x, y in sorted((at[mark.key] for mark in compared), key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front += [(x, front[-1][1])] if front else []
            front.append((x, y))
    if front:
        front.append((100.0, front[-1][1]))
    lines = []
    for series in dict.fromkeys(mark.series for mark in compared):
        points = sorted(at[mark.key] for mark in compared if mark.series == series)
        lines += [points] if len(points) > 1 else []
    return {
        "marks": placed,
        "xt": [[x_axis.place(value), x_text(value)] for value in x_axis.ticks(6)],
        "yt": [[y_axis.place(value), y_text(value)] for value in y_axis.ticks(5)],
        "front": _path(front),
        "series": " ".join(_path(points) for points in lines),
    }


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:g} {round(100 - y, 2):g}" for i, (x, y) in enumerate(points))


def _label_sides(marks: Sequence[Mark], at: dict[str, tuple[float, float]]) -> dict[str, str]:
    """A side for each label where it covers no mark and no other label: right, left, top, bottom, or none at all."""
    width, height = _PLOT
    centres = {key: (x / 100 * width, y / 100 * height) for key, (x, y) in at.items()}
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in centres.values()]
    order = {"ours": 0, "dense": 1, "drop": 2, "rival": 3, "ablation": 4}
    sides = {}
    for mark in sorted(marks, key=lambda one: (order.get(one.family, 9), one.number)):
        x, y = centres[mark.key]
        long = _LETTER * len(mark.label)
        boxes = {
            "r": (x + _RADIUS + 2, y - _LINE / 2, x + _RADIUS + 4 + long, y + _LINE / 2),
            "l": (x - _RADIUS - 4 - long, y - _LINE / 2, x - _RADIUS - 2, y + _LINE / 2),
            "t": (x - long / 2, y + _RADIUS + 1, x + long / 2, y + _RADIUS + 1 + _LINE),
            "b": (x - long / 2, y - _RADIUS - 1 - _LINE, x + long / 2, y - _RADIUS - 1),
        }
        sides[mark.key] = "n"
        for side, box in boxes.items():
            inside = box[0] >= 0 and box[2] <= width and box[1] >= -4 and box[3] <= height + 4
            if inside and not any(_overlap(box, other) for other in taken):
                sides[mark.key] = side
                taken.append(box)
                break
    return sides


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def scatter(layout: dict[str, Any], marks: Sequence[tuple[str, int, str, str]], x_title: str, y_title: str) -> Markup:
    """The plot of one layout.

    Args:
        layout: of `scatter_layout`.
        marks: (key, number, label, family) of every policy that any layout shows; those that this one lacks are hidden.
    """
    children: list[Markup] = [
        el(
            "svg",
            el("path", class_="series", d=layout["series"]),
            el("path", class_="front", d=layout["front"]),
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        el("div", *(_tick("xt", "left", *tick) for tick in layout["xt"]), class_="xticks"),
        el("div", *(_tick("yt", "bottom", *tick) for tick in layout["yt"]), class_="yticks"),
    ]
    for key, number, label, family in marks:
        x, y, x_low, x_high, y_low, y_high, side, tip = layout["marks"].get(key, (0, 0, 0, 0, 0, 0, "n", ""))
        hidden = key not in layout["marks"]
        box = f"left:{x}%;bottom:{y}%"
        children += [
            el(
                "i",
                class_=f"xbar {family}",
                style=f"left:{x_low}%;width:{x_high - x_low:.2f}%;bottom:{y}%",
                hidden=hidden,
            ),
            el(
                "i",
                class_=f"ybar {family}",
                style=f"left:{x}%;bottom:{y_low}%;height:{y_high - y_low:.2f}%",
                hidden=hidden,
            ),
            el(
                "button",
                el("b", number),
                el("span", label),
                type="button",
                class_=f"mark {family} {side}",
                style=box,
                data_key=key,
                data_tip=tip,
                aria_label=tip,
                hidden=hidden,
            ),
        ]
    return el(
        "div",
        el("div", y_title, class_="ytitle"),
        el("div", el("span", "↖ better", class_="corner"), *children, class_="plot"),
        el("div", x_title, class_="xtitle"),
        class_="scatter",
    )


def _tick(kind: str, edge: str, place: float, text: str) -> Markup:
    return el("span", text, class_=kind, style=f"{edge}:{place}%")


# ---------------------------------------------------------------------------------------------------------------------
# A number per scale or layer


@dataclass(frozen=True)
class Curve:
    """A line over the labels of a panel; None leaves a gap. `style` is a class of the style sheet."""

    name: str
    values: Sequence[float | None]
    style: str = "c1"


def panel(
    title: str,
    labels: Sequence[str],
    curves: Sequence[Curve],
    axis: Axis,
    text: Callable[[float], str],
    *,
    level: tuple[float, str] | None = None,
    flags: Sequence[tuple[int, str]] = (),
    x_title: str = "",
) -> Markup:
    """Lines over labelled places.

    Args:
        labels: of the places, left to right.
        text: how a value is written.
        level: a horizontal line and its name.
        flags: vertical marks: (place, name).
    """
    count = len(labels)
    centre = [round(100 * (i + 0.5) / count, 2) for i in range(count)]
    paths, dots = [], []
    for curve in curves:
        points = [(centre[i], axis.place(value)) for i, value in enumerate(curve.values) if value is not None]
        paths.append(el("path", class_=f"line {curve.style}", d=_path(points)))
        dots += [
            el(
                "i",
                class_=f"dot {curve.style}",
                style=f"left:{centre[i]}%;bottom:{axis.place(value)}%",
                data_tip=f"{curve.name}, {x_title or 'at'} {labels[i]}: {text(value)}",
            )
            for i, value in enumerate(curve.values)
            if value is not None
        ]
    marks = [_tick("yt", "bottom", axis.place(value), text(value)) for value in axis.ticks(4)]
    marks += [_tick("xt", "left", place, label) for place, label in zip(centre, labels, strict=True)]
    if level is not None:
        marks.append(el("i", el("span", level[1]), class_="level", style=f"bottom:{axis.place(level[0])}%"))
    marks += [el("i", el("span", name), class_="flag", style=f"left:{centre[place]}%") for place, name in flags]
    drawing = el("svg", *paths, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")
    key = el("div", *(el("span", curve.name, class_=curve.style) for curve in curves), class_="key")
    return el(
        "figure",
        el("figcaption", title),
        key if len(curves) > 1 else None,
        el("div", drawing, *marks, *dots, class_="plot", role="img", aria_label=title),
        el("div", x_title, class_="xtitle") if x_title else None,
        class_="panel",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bars


@dataclass(frozen=True)
class Bar:
    """A row of bars: from `start` to `start + length`, of which the first `solid` is drawn darker."""

    label: str
    start: float
    length: float
    solid: float
    text: str
    tip: str
    style: str = "c1"


def bars(rows: Sequence[Bar], end: float) -> Markup:
    """Rows of bars on one axis from 0 to `end`, one under the other; a bar near the end has its value before it."""

    def row(bar: Bar) -> Markup:
        left, width = 100 * bar.start / end, 100 * bar.length / end
        inner = el("i", style=f"width:{100 * min(1, bar.solid / bar.length) if bar.length else 0:.1f}%")
        block = el("div", inner, class_=f"bar {bar.style}", style=f"left:{left:.2f}%;width:{width:.2f}%")
        place = f"right:{100 - left:.2f}%" if left + width > 82 and left > 18 else f"left:{left + width:.2f}%"
        track = el("div", block, el("span", bar.text, class_="value", style=place), class_="track")
        return el("div", el("span", bar.label, class_="label"), track, class_="row", data_tip=bar.tip)

    return el("div", *(row(bar) for bar in rows), class_="bars")


def interval_rows(rows: Sequence[tuple[str, Span | None, str, str, str]], left: str, right: str) -> Markup:
    """Differences around zero with their intervals, a row each.

    Args:
        rows: (label, difference or None, its text, style, tip).
        left, right: what it means to lie there.
    """
    widest = max([max(abs(span.low), abs(span.high)) for _, span, *_ in rows if span] or [1.0]) or 1.0
    axis = Axis(-1.08 * widest, 1.08 * widest)
    body = []
    for label, span, text, style, tip in rows:
        track: list[Markup] = [el("i", class_="zero")]
        if span is not None:
            low, high = axis.place(span.low), axis.place(span.high)
            track.append(el("i", class_=f"span {style}", style=f"left:{low}%;width:{high - low:.2f}%"))
            track.append(el("i", class_=f"dot {style}", style=f"left:{axis.place(span.mean)}%;bottom:50%"))
        cells = [
            el("span", label, class_="label"),
            el("div", *track, class_="track"),
            el("span", text, class_="result"),
        ]
        body.append(el("div", *cells, class_="row", data_tip=tip))
    head = el(
        "div", el("span"), el("div", el("span", left), el("span", right), class_="ends"), el("span"), class_="row head"
    )
    return el("div", head, *body, class_="intervals")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """(style, meaning) of shapes and colours."""
    return el("div", *(join(el("span", text, class_=style)) for style, text in entries), class_="key")
