"""What a bundle holds, for a person to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toprovar.profiles.manifest import GraphInfo, Schedule, TensorInfo
from toprovar.runtime.bundle import Bundle

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["describe"]


def describe(bundle: Bundle) -> Group:
    """Provenance, graphs with their inputs and outputs, schedules, targets and files, as a rich renderable."""
    from rich.console import Group
    from rich.text import Text

    manifest = bundle.manifest
    model, condition = manifest.model, manifest.condition
    classes = Counter(label.prompt_class for label in condition.labels)
    labels = ", ".join(f"{name} ({count})" for name, count in classes.items())
    if condition.kind == "text":
        encoder = condition.text_encoder.name if condition.text_encoder else "not in the bundle, give features"
        labels = f"text of at most {condition.text_maximum_tokens} tokens, encoder: {encoder}"
    detail = model.roles.count("d")
    provenance = manifest.provenance
    calibration = provenance.calibration_sha256[:12] if provenance.calibration_sha256 else "none needed"
    facts = {
        "bundle": f"{manifest.name}, {bundle.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files, hashes checked",
        "model": f"{manifest.backbone}, {model.parameters / 1e6:.1f} M parameters, {manifest.precision},"
        f" {model.depth} layers of width {model.width} ({model.heads} heads of {model.head_dim})",
        "picture": f"{_times(model.image_size)} pixels, codes {_times(model.code_shape)}",
        "roles": f"{model.roles}   {model.depth - detail} global (dense), {detail} detail (pruned)",
        "asked for by": labels if condition.kind == "text" else f"label: {labels}",
        "sampling": ", ".join(f"{key} {value}" for key, value in manifest.sampling),
        "profile": f"{provenance.profile} ({provenance.profile_sha256[:12]})",
        "made from": f"checkpoint {provenance.checkpoint_sha256[:12]}, calibration {calibration},"
        f" plan {provenance.plan_sha256[:12]}",
        "made by": f"toprovar {manifest.toprovar_version}, op contract {manifest.contract_version}",
    }
    width = max(map(len, facts))
    parts: list[Any] = [Text(f"{key:<{width}}  {value}") for key, value in facts.items()]
    parts += [_graph_table(name, graph) for name, graph in manifest.graphs.items()]
    parts += [_schedule_table(name, schedule) for name, schedule in manifest.schedules.items()]
    parts += [_target_table(bundle), _file_table(bundle)]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    """Words to the left, what ends in a star (numbers) to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.rstrip("*"), justify="right" if column.endswith("*") else "left")
    return table


def _graph_table(name: str, graph: GraphInfo) -> Table:
    table = _table(f"graph {name} ({graph.file})", "", "tensor", "dtype", "shape")
    for kind, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for first, last, count in _runs(tensors):
            names = first.name if count == 1 else f"{first.name} … {last.name} ({count})"
            table.add_row(kind, names, first.dtype, _times(first.shape))
    return table


def _times(sizes: Sequence[int | str]) -> str:
    return " x ".join(map(str, sizes))


def _runs(tensors: Sequence[TensorInfo]) -> list[tuple[TensorInfo, TensorInfo, int]]:
    """First, last and number of the tensors whose names differ by a number alone: a line per kind, not per layer."""
    runs: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for tensor in tensors:
        stem, _, number = tensor.name.rpartition("_")
        key = (stem if number.isdecimal() else tensor.name, tensor.dtype, tensor.shape)
        runs.setdefault(key, []).append(tensor)
    return [(run[0], run[-1], len(run)) for run in runs.values()]


def _schedule_table(name: str, schedule: Schedule) -> Table:
    columns = ("scale*", "grid*", "tokens*", "kept*", "past, global*", "past, detail*", "")
    table = _table(f"schedule of prompt class {name}", *columns)
    for step in schedule.steps:
        grid = f"{step.grid[0]}x{step.grid[1]}"
        numbers = (step.scale, grid, step.tokens, step.keep, step.past_global, step.past_detail)
        note = "fills caches" if step.capture_span_delta else ""
        table.add_row(*map(str, numbers), note, style="bold" if step.keep < step.tokens else None)
    return table


def _target_table(bundle: Bundle) -> Table:
    table = _table("targets", "target", "runs", "version", "GPU", "batch*")
    for name, target in bundle.manifest.targets.items():
        runs = ", ".join(target.engines.values()) or ("the graphs" if name == "onnxruntime" else "the checkpoint")
        table.add_row(name, runs, target.version or "", target.gpu or "", str(target.batch or ""))
    return table


def _file_table(bundle: Bundle) -> Table:
    table = _table("files", "file", "bytes*", "sha256")
    for name, info in bundle.manifest.files.items():
        table.add_row(name, f"{info.size_bytes:,}", info.sha256[:16])
    return table
