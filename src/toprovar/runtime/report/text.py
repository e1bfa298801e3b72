"""The report as Markdown: the sentences and tables of the page, and its pictures as one image beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toprovar.runtime.report.page import INTRODUCTION, TITLE
from toprovar.runtime.report.section import Table
from toprovar.runtime.report.story import Story
from toprovar.runtime.report.words import WORDS, plain

__all__ = ["markdown"]


def markdown(stories: Sequence[Story], pictures: Mapping[str, str]) -> str:
    """The twin of the page.

    Args:
        pictures: name of a model's evidence -> file beside the Markdown, for those that have pictures.
    """
    lines = [f"# {TITLE}", "", *(line for text in INTRODUCTION for line in (plain(text), ""))]
    for story in stories:
        lines += [f"## {story.title}", ""]
        lines += [f"- **{tile.value}** {tile.title}: {tile.remark}" for tile in story.tiles]
        lines += [f"- {plain(line)}" for line in story.in_short] + [""]
        if story.name in pictures:
            lines += [f"![pictures of every policy]({pictures[story.name]})", ""]
        for section in story.sections:
            lines += [f"### {section.title}", "", *(line for text in section.text for line in (plain(text), ""))]
            lines += [f"- {plain(line)}" for line in section.findings] + ([""] if section.findings else [])
            for table in section.tables:
                lines += ([f"**{table.title}**", ""] if table.title else []) + _table(table) + [""]
    lines += [
        "## Words",
        "",
        *(f"- **{word}**: {meaning}" for word, meaning in sorted(WORDS.items(), key=_alphabet)),
        "",
    ]
    return "\n".join(lines)


def _alphabet(entry: tuple[str, str]) -> str:
    return entry[0].lower()


def _table(table: Table) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [row(table.columns), row(["---"] * len(table.columns)), *(row(cells) for cells in table.rows)]
