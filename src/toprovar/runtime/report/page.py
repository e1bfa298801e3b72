"""The report as one HTML file: style, script, figures and pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

from toprovar.runtime.report.markup import Markup, el, join
from toprovar.runtime.report.section import Section, Table, Tile
from toprovar.runtime.report.story import Story
from toprovar.runtime.report.words import WORDS, prose

__all__ = ["INTRODUCTION", "TITLE", "html"]

TITLE = "What a faster picture costs"

INTRODUCTION = (
    "A next-scale image model paints in steps: first one coarse patch, then ever finer grids of {token|tokens}, each "
    "step looking at all that was painted before. The last {scale|scales} are by far the most expensive, and often "
    "change little. Every method on this page saves time by leaving something out.",
    "toprovar decides what to leave out by {entropy}, a measure of how spread out the model's {attention} is. It asks three "
    "questions in turn: from which scale on may anything go ({D}), in which layers ({detail layer|detail layers}), and which "
    "tokens stay ({kept token|kept tokens}). Words with a dotted line are explained when you point at them.",
)


def html(stories: Sequence[Story]) -> str:
    """The page: a part per model, the glossary at the end."""
    links: list[Markup] = []
    for story in stories:
        links += [el("span", story.title, class_="part")] if len(stories) > 1 else []
        links.append(el("a", "In short", href=f"#{story.name}"))
        links += [el("a", section.title, href=f"#{story.name}-{section.key}") for section in story.sections]
    links.append(el("a", "Words", href="#words"))
    body = [
        el(
            "header",
            el("div", el("span", "toprovar report", class_="brand"), _theme_button(), class_="bar"),
            el("h1", TITLE),
            el("div", *(el("p", prose(text), class_="lead") for text in INTRODUCTION), class_="leads"),
        ),
        el("nav", *links, aria_label="Contents"),
        el("main", *(_part(story) for story in stories), _words()),
        el("div", id="tip", role="tooltip", hidden=True),
        el("script", Markup(_resource("page.js"))),
    ]
    head = [
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{TITLE}: {', '.join(story.title for story in stories)}"),
        el("style", Markup(_resource("page.css"))),
    ]
    return "<!doctype html>\n" + el("html", el("head", *head), el("body", *body), lang="en") + "\n"


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _theme_button() -> Markup:
    return el("button", "Light or dark", type="button", id="theme", aria_label="Switch between light and dark")


def _part(story: Story) -> Markup:
    opening = el(
        "section",
        el("h2", story.title),
        el("div", *(_tile(tile) for tile in story.tiles), class_="tiles"),
        _bullets(story.in_short),
        id=story.name,
        class_="opening",
    )
    return el("article", opening, *(_section(story.name, section) for section in story.sections))


def _tile(tile: Tile) -> Markup:
    return el(
        "div",
        el("span", tile.title, class_="name"),
        el("strong", tile.value),
        el("span", tile.remark, class_="remark"),
        class_=f"tile {tile.style}",
    )


def _section(part: str, section: Section) -> Markup:
    return el(
        "section",
        el("h3", section.title),
        *(el("p", prose(text)) for text in section.text),
        section.figure,
        _bullets(section.findings),
        *(_table(table) for table in section.tables),
        id=f"{part}-{section.key}",
    )


def _bullets(lines: Sequence[str]) -> Markup | None:
    return el("ul", *(el("li", prose(line)) for line in lines), class_="findings") if lines else None


def _table(table: Table) -> Markup:
    long = {i for i in range(len(table.columns)) if any(len(row[i]) > 34 for row in table.rows)}
    head = None
    if any(table.columns):
        styles = ["long" if i in long else None for i in range(len(table.columns))]
        head = el(
            "tr",
            *(el("th", column, scope="col", class_=style) for column, style in zip(table.columns, styles, strict=True)),
        )
    rows = [
        el("tr", el("th", row[0], scope="row"), *(_cell(text, i in long) for i, text in enumerate(row[1:], 1)))
        for row in table.rows
    ]
    grid = el(
        "div",
        el("table", el("thead", head) if head else None, el("tbody", *rows)),
        class_="table" if head else "table pairs",
        tabindex=0,
    )
    if table.folded:
        return el("details", el("summary", table.title), grid, class_="fold")
    return join(el("h4", table.title) if table.title else None, grid)


_INTERVAL = re.compile(r"(\S+) (\(\S+ to \S+\))")


def _cell(text: str, is_long: bool) -> Markup:
    """A cell; an interval goes under its mean."""
    if match := _INTERVAL.fullmatch(text):
        return el("td", match[1], el("small", match[2]))
    return el("td", text, class_="long" if is_long else None)


def _words() -> Markup:
    entries = [
        join(el("dt", word), el("dd", meaning))
        for word, meaning in sorted(WORDS.items(), key=lambda one: one[0].lower())
    ]
    return el("section", el("h2", "Words"), el("dl", *entries), id="words")
