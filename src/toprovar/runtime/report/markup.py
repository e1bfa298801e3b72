"""HTML and SVG from Python values. Text is escaped where it enters, so a name from a file cannot become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

__all__ = ["Child", "Markup", "el", "join"]


class Markup(str):
    """Text that is markup already and goes in as it is."""


Child: TypeAlias = "Markup | str | float | Iterable[Child] | None"
"""What an element may hold: markup, text, a number, nothing, or several of these."""

_VOID = frozenset({"br", "hr", "img", "input", "meta"})


def join(*children: Child) -> Markup:
    """Children one after another; text is escaped, None left out."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, (str, int, float)):
            parts.append(escape(str(child)))
        else:
            parts.append(join(*child))
    return Markup("".join(parts))


def el(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. ``class_`` is written ``class`` and ``data_tip`` ``data-tip``; None and False leave an attribute out."""
    text = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        text.append(name if value is True else f'{name}="{escape(str(value))}"')
    opening = f"<{' '.join(text)}>"
    return Markup(opening if tag in _VOID else f"{opening}{join(*children)}</{tag}>")
