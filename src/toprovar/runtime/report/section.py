"""What a section of the report is made of, and the controls by which a reader chooses what is shown.

The page's script shows the block whose key is made of what is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toprovar.profiles.evidence import Example
from toprovar.runtime.report.markup import Markup, el

__all__ = ["Section", "Table", "Tile", "buttons", "example_buttons", "select", "switch"]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    folded: bool = False
    """Shown on demand."""


@dataclass(frozen=True)
class Tile:
    """A number to begin with."""

    style: str
    title: str
    value: str
    remark: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, in this order: text, figure, findings, tables."""

    key: str
    title: str
    text: tuple[str, ...]
    figure: Markup | None = None
    findings: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def buttons(title: str, choices: Sequence[tuple[str, str]]) -> Markup:
    buttons = [
        el("button", text, type="button", data_value=value, aria_pressed="true" if i == 0 else "false")
        for i, (value, text) in enumerate(choices)
    ]
    return el("div", el("span", title), *buttons, class_="choice", role="group", aria_label=title)


def select(title: str, choices: Sequence[tuple[str, str]]) -> Markup:
    options = [el("option", text, value=value) for value, text in choices]
    return el("label", el("span", title), el("select", *options), class_="choice")


def example_buttons(examples: Sequence[Example]) -> Markup:
    return buttons("Picture", [(example.key, example.prompt) for example in examples])


def switch(controls: Sequence[Markup], blocks: Sequence[tuple[str, Markup]]) -> Markup:
    """Blocks of which one is seen; its key is the chosen values, joined by |."""
    shown = [el("div", block, data_when=key, hidden=i > 0) for i, (key, block) in enumerate(blocks)]
    empty = el("p", "Not measured for this choice.", class_="note", hidden=True, data_empty=True)
    return el("div", el("div", *controls, class_="controls"), *shown, empty, class_="switch")
