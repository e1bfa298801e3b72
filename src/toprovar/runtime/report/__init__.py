"""The report: one self-contained HTML page and its Markdown twin, made from evidence, which is stored or measured here.

    bundles --make--> Part        evidence file --load--> Part        parts --write--> page, Markdown, pictures

`story` says what there is to say, `page` and `text` lay it out, `charts` and `images` draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toprovar.errors import InputError
from toprovar.profiles.evidence import arrays_path, load_arrays, load_evidence, save_evidence
from toprovar.profiles.files import write_bytes, write_text
from toprovar.runtime import pictures
from toprovar.runtime.report import images
from toprovar.runtime.report.measure import Part, make
from toprovar.runtime.report.page import html
from toprovar.runtime.report.story import tell
from toprovar.runtime.report.text import markdown
from toprovar.runtime.report.view import View
from toprovar.runtime.target import Array

__all__ = ["Part", "load", "make", "write"]

_COLUMNS = 6
"""Pictures side by side in the image that goes with the Markdown."""


def load(path: Path | str) -> Part:
    """Read stored measurements.

    Raises:
        FormatError: missing, damaged, or of another format; one line.
    """
    evidence = load_evidence(path)
    return Part(evidence, load_arrays(path, evidence), stored=True)


def write(parts: Part | Sequence[Part], path: Path | str) -> tuple[Path, ...]:
    """Write the page ``<path>``, and beside it the Markdown, a PNG with each model's pictures, and what was measured anew.

    Raises:
        InputError: two parts of one name.
    """
    parts = [parts] if isinstance(parts, Part) else list(parts)
    names = [part.evidence.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise InputError(
            f"report: measurements named {', '.join(names) or 'nothing'}; give at least one, and each once"
        )
    place = Path(path)
    views = [View(part.evidence, part.arrays) for part in parts]
    page, twin = place, place.with_suffix(".md")
    files: list[Path] = []
    beside = {}
    for part, view in zip(parts, views, strict=True):
        stem = place.with_name(f"{place.stem}-{part.evidence.name}")
        if not part.stored:
            document = stem.with_suffix(".json")
            save_evidence(document, part.evidence, part.arrays)
            files += [document, arrays_path(document)] if part.arrays else [document]
        if (sheet := _sheet(view)) is not None:
            write_bytes(stem.with_suffix(".png"), pictures.png(sheet))
            beside[part.evidence.name] = stem.with_suffix(".png").name
            files.append(stem.with_suffix(".png"))
    stories = [tell(view) for view in views]
    write_text(twin, markdown(stories, beside))
    write_text(page, html(stories))
    return page, twin, *files


def _sheet(view: View) -> Array | None:
    """The pictures of every policy as one image: a row per policy, a column per example."""
    examples = view.evidence.examples[:_COLUMNS]
    rows, captions = [], []
    for policy in view.policies:
        stored = [view.arrays.get(f"{example.key}.image.{policy.name}") for example in examples]
        row = [images.pixels(one).transpose(2, 0, 1) / np.float32(255) for one in stored if one is not None]
        if row and len(row) == len(examples):
            speed = view.speed_up(policy)
            rows.append(row)
            captions.append(policy.title + (f": {speed:.2f} x" if speed else ""))
    return pictures.grid(rows, captions, [example.prompt for example in examples]) if rows else None
