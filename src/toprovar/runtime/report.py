"""What each bundle saves and what it costs, on one page: latency, fidelity against the first bundle, pictures.

Leaving out the last scales is most of the speed of every method in this family, so a bundle that does that and nothing
else stands as a row of its own beside those that prune.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from toprovar.errors import InputError
from toprovar.profiles.files import pretty_json, write_bytes, write_text
from toprovar.profiles.plan import load_plan
from toprovar.runtime import bench, compare, pictures
from toprovar.runtime.session import Session
from toprovar.runtime.target import Array

__all__ = ["SCHEMA", "Report", "html", "make", "markdown", "write"]

SCHEMA = "toprovar.report/1"

COLUMNS = (
    "bundle",
    "scales",
    "kept tokens",
    "transformer, ms",
    "speed-up",
    "total, ms",
    "speed-up",
    "PSNR, dB",
    "SSIM",
    "equal tokens",
)


@dataclass(frozen=True)
class Report:
    """The document, and the grid of pictures `[height, width, 3]` uint8: a row per bundle, a column per label."""

    document: dict[str, Any]
    grid: Array


def make(
    sessions: Sequence[Session],
    labels: Sequence[int | str],
    seeds: Sequence[int],
    *,
    repeat: int = 5,
    warmup: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Report:
    """Measure and compare bundles.

    Args:
        sessions: the bundles; the first, as a rule the dense one, is what the others are compared with.
        labels: of the pictures in the grid, which are also what fidelity is measured on.
        seeds: one per picture.
        repeat, warmup: runs per prompt class, see `bench.bench`.
        on_progress: called with (what, done, in all).

    Raises:
        BundleError: a bundle fails its golden trace.
        InputError: pictures of different sizes, an unknown label, two bundles of one name.
    """
    names = [session.bundle.manifest.name for session in sessions]
    if len(set(names)) < len(names):
        raise InputError(f"report: bundles named {', '.join(names)}; give each its own name when exporting")
    measured = bench.bench(
        sessions, repeat=repeat, warmup=warmup, on_run=lambda done, of: on_progress("measuring", done, of)
    )
    results = []
    for index, session in enumerate(sessions):
        results.append(session.generate(labels, seeds))
        on_progress("comparing", index + 1, len(sessions))
    captions = [sessions[0].labels[sessions[0].label(label)] for label in labels]
    fidelity = [compare.compare_results(results[0], result, captions, seeds) for result in results]
    rows = [
        _row(session, measured["bundles"][0], bundle, one)
        for session, bundle, one in zip(sessions, measured["bundles"], fidelity, strict=True)
    ]
    document = {
        "schema": SCHEMA,
        "machine": measured["machine"],
        "settings": {**measured["settings"], "labels": captions, "seeds": list(seeds)},
        "rows": rows,
        "bench": {key: measured[key] for key in ("bundles", "ratios")},
        "fidelity": {
            name: {"classes": one["classes"], "all": one["all"]} for name, one in zip(names, fidelity, strict=True)
        },
    }
    row_captions = [_caption(row) for row in rows]
    return Report(document, pictures.grid([list(result.images) for result in results], row_captions, captions))


def write(report: Report, path: Path | str) -> tuple[Path, ...]:
    """Write ``<path>`` (HTML, with the pictures inside), and beside it the same as Markdown, JSON and PNG."""
    place = Path(path)
    image, text, data = (place.with_suffix(suffix) for suffix in (".png", ".md", ".json"))
    png = pictures.png(report.grid)
    write_bytes(image, png)
    write_text(data, pretty_json(report.document))
    write_text(text, markdown(report.document, image.name))
    write_text(place, html(report.document, png))
    return place, text, data, image


def _row(session: Session, dense: dict[str, Any], own: dict[str, Any], fidelity: dict[str, Any]) -> dict[str, Any]:
    """One bundle; times are the mean over its prompt classes of the medians of one batch."""
    steps = [step for schedule in session.bundle.manifest.schedules.values() for step in schedule.steps]
    times = {part: _mean_ms(own, part) for part in ("transformer", "decode", "total")}
    row = {
        "name": own["name"],
        "profile": own["profile"],
        "runtime": own["runtime"],
        "scales": sorted({len(schedule.steps) for schedule in session.bundle.manifest.schedules.values()}),
        "detail_layers": session.bundle.manifest.model.roles.count("d"),
        "layers": session.bundle.manifest.model.depth,
        "kept_share": sum(step.keep for step in steps) / sum(step.tokens for step in steps),
        "size_bytes": own["size_bytes"],
        **{f"{part}_ms": round(value, 2) for part, value in times.items()},
        "transformer_speedup": round(_mean_ms(dense, "transformer") / times["transformer"], 3),
        "total_speedup": round(_mean_ms(dense, "total") / times["total"], 3),
        "psnr_db": fidelity["all"]["psnr_db"],
        "ssim": fidelity["all"]["ssim"],
        "equal_tokens": sum(fidelity["all"]["agreement"].values()) / len(fidelity["all"]["agreement"]),
        "classes": {
            name: {
                "transformer_speedup": round(
                    dense["classes"][name]["transformer_ms"]["median"] / one["transformer_ms"]["median"], 3
                ),
                "ssim": fidelity["classes"][name]["ssim"] if name in fidelity["classes"] else None,
            }
            for name, one in own["classes"].items()
        },
    }
    return {**row, "below_floor": _below_floor(session, row)}


def _mean_ms(bundle: dict[str, Any], part: str) -> float:
    classes = bundle["classes"].values()
    return float(sum(one[f"{part}_ms"]["median"] for one in classes) / len(classes))


def _below_floor(session: Session, row: dict[str, Any]) -> list[str]:
    """Which figures fall below the quality floor that the bundle's profile asks for."""
    if "plan.json" not in session.bundle.manifest.files:
        return []
    floor = load_plan(session.bundle.path("plan.json")).profile.quality_floor
    found = []
    if floor.ssim is not None and row["ssim"] < floor.ssim:
        found.append(f"SSIM {row['ssim']:.3f} is below the profile's floor of {floor.ssim:g}")
    if floor.psnr_db is not None and row["psnr_db"] is not None and row["psnr_db"] < floor.psnr_db:
        found.append(f"PSNR {row['psnr_db']:.1f} dB is below the profile's floor of {floor.psnr_db:g}")
    return found


def _caption(row: dict[str, Any]) -> str:
    if row["psnr_db"] is None:
        return f"{row['name']}: {row['total_ms']:.0f} ms"
    speed = f"{row['total_ms']:.0f} ms, transformer {row['transformer_speedup']:.2f} x"
    return f"{row['name']}: {speed}, SSIM {row['ssim']:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# The page, made from the document alone


def _cells(row: dict[str, Any]) -> list[str]:
    pruned = row["detail_layers"] > 0
    return [
        row["name"],
        " or ".join(map(str, row["scales"])),
        f"{row['kept_share']:.0%} in {row['detail_layers']} of {row['layers']} layers" if pruned else "all",
        f"{row['transformer_ms']:.1f}",
        f"{row['transformer_speedup']:.2f} x",
        f"{row['total_ms']:.1f}",
        f"{row['total_speedup']:.2f} x",
        compare.psnr_text(row["psnr_db"]),
        f"{row['ssim']:.4f}",
        f"{row['equal_tokens']:.1%}",
    ]


def _class_cells(row: dict[str, Any]) -> list[str]:
    """A plan decides for each prompt class by itself, so means over classes hide something."""
    cells = [row["name"]]
    for one in row["classes"].values():
        cells += [f"{one['transformer_speedup']:.2f} x", "" if one["ssim"] is None else f"{one['ssim']:.4f}"]
    return cells


def _class_columns(document: dict[str, Any]) -> list[str]:
    names = document["rows"][0]["classes"]
    return ["bundle", *(f"{name}, {what}" for name in names for what in ("transformer", "SSIM"))]


def _notes(document: dict[str, Any]) -> list[str]:
    settings, rows = document["settings"], document["rows"]
    notes = [
        f"Batch {settings['batch']}; median of {settings['repeat']} runs per prompt class, bundles in turn, after"
        f" {settings['warmup']} for warming up; mean over the prompt classes.",
        "Every bundle was verified against its golden trace before it was measured.",
        f"PSNR, SSIM and equal tokens (mean over scales) are against {rows[0]['name']}: same prompts and noise,"
        f" {len(settings['labels'])} pictures. One token that is drawn differently changes all that follow.",
        "Kept tokens: share that the detail layers run on, over all scales.",
    ]
    dropped = [row["name"] for row in rows if max(row["scales"]) < max(rows[0]["scales"]) and not row["detail_layers"]]
    notes += [f"{name} leaves out the last scales and prunes nothing: what that switch alone does." for name in dropped]
    notes += [f"{row['name']}: {finding}." for row in rows for finding in row["below_floor"]]
    return notes


def markdown(document: dict[str, Any], image: str) -> str:
    """The report as Markdown; `image` is the grid's file beside it."""
    lines = ["# toprovar report", "", *bench.machine_lines(document["machine"])]
    lines += [f"- {document['rows'][0]['runtime']}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| ---" + " | ---:" * (len(COLUMNS) - 1) + " |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in document["rows"]]
    lines += ["", *(f"- {note}" for note in _notes(document)), "", "By prompt class:", ""]
    columns = _class_columns(document)
    lines += ["| " + " | ".join(columns) + " |", "| ---" + " | ---:" * (len(columns) - 1) + " |"]
    lines += ["| " + " | ".join(_class_cells(row)) + " |" for row in document["rows"]]
    return "\n".join([*lines, "", f"![pictures of every bundle]({image})", ""])


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 100rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; text-align: right; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } li { color: #555; }
"""


def html(document: dict[str, Any], png: bytes) -> str:
    """The report as one HTML file, pictures inside, nothing loaded from elsewhere."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "<table>" + row("th", columns) + "".join(row("td", cells) for cells in rows) + "</table>"

    def bullets(lines: Sequence[str]) -> str:
        return "<ul>" + "".join(f"<li>{escape(line.removeprefix('- '))}</li>" for line in lines) + "</ul>"

    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>toprovar report</title>',
            f"<style>{_STYLE}</style></head><body><h1>toprovar report</h1>",
            bullets([*bench.machine_lines(document["machine"]), document["rows"][0]["runtime"]]),
            table(COLUMNS, [_cells(one) for one in document["rows"]]),
            bullets(_notes(document)),
            "<p>By prompt class:</p>",
            table(_class_columns(document), [_class_cells(one) for one in document["rows"]]),
            f'<img alt="pictures of every bundle" src="data:image/png;base64,{base64.b64encode(png).decode()}">',
            "</body></html>",
            "",
        ]
    )
