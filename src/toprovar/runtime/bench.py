"""How long a bundle takes, scale by scale: warm, medians with 20 % and 80 % quantiles, never of a wrong result.

Two bundles are measured in turn, picture by picture, so that both see the same state of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toprovar.errors import BundleError, InputError
from toprovar.runtime import trtexec
from toprovar.runtime.loop import Timing
from toprovar.runtime.machine import describe_machine
from toprovar.runtime.session import Session, TextFeatures
from toprovar.runtime.verify import verify

__all__ = ["SCHEMA", "bench", "describe_bundle", "markdown", "require_verified"]

SCHEMA = "toprovar.bench/1"


def bench(
    sessions: Sequence[Session],
    *,
    prompt_classes: Sequence[str] = (),
    repeat: int = 10,
    warmup: int = 2,
    on_run: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Measure bundles side by side.

    Args:
        sessions: the bundles; each runs batches of its `batch_size`. Ratios are to the first of them.
        prompt_classes: which to measure; default: all of the first bundle.
        repeat: measured runs per prompt class and bundle.
        warmup: runs before them that do not count.
        on_run: called with (runs done, runs in all).

    Returns: the document that is written as JSON and shown by `markdown`; times are milliseconds per batch.

    Raises:
        BundleError: a bundle fails its golden trace.
        InputError: an unknown prompt class, or no runs.
    """
    if repeat < 1 or warmup < 0:
        raise InputError(f"bench: {repeat} runs after {warmup} for warming up; give 1 or more after 0 or more")
    names = tuple(prompt_classes) or sessions[0].prompt_classes
    for session in sessions:
        for name in names:
            if name not in session.prompt_classes:
                valid = ", ".join(session.prompt_classes)
                raise InputError(f"bench: {session.bundle.root} has no prompt class {name!r}; valid: {valid}")
        require_verified(session)

    runs = len(names) * (warmup + repeat) * len(sessions)
    done = 0
    timings: list[dict[str, list[Timing]]] = [{name: [] for name in names} for _ in sessions]
    for name in names:
        for turn in range(warmup + repeat):
            for session, measured in zip(sessions, timings, strict=True):
                timing = _run_once(session, name, seed=turn)
                if turn >= warmup:
                    measured[name].append(timing)
                done += 1
                on_run(done, runs)
    bundles = [
        {**describe_bundle(session), "classes": {name: _class_summary(session, measured[name]) for name in names}}
        for session, measured in zip(sessions, timings, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "settings": {"batch": sessions[0].batch_size, "repeat": repeat, "warmup": warmup},
        "bundles": bundles,
        "ratios": [_ratios(bundles[0], other) for other in bundles[1:]],
    }


def require_verified(session: Session) -> None:
    """Raises BundleError where the bundle fails its golden trace: a speed of a wrong result is worth nothing."""
    verdict = verify(session)
    for one in verdict.classes:
        if not one.passed:
            raise BundleError(f"{session.bundle.root}: fails its golden trace, so nothing is measured: {one}")


def describe_bundle(session: Session) -> dict[str, Any]:
    """Which bundle, and what ran it."""
    manifest = session.bundle.manifest
    return {
        "name": manifest.name,
        "backbone": manifest.backbone,
        "profile": manifest.provenance.profile,
        "precision": manifest.precision,
        "manifest_sha256": session.bundle.manifest_sha256,
        "plan_sha256": manifest.provenance.plan_sha256,
        "checkpoint_sha256": manifest.provenance.checkpoint_sha256,
        "size_bytes": session.bundle.size_bytes,
        "target": session.target_name,
        "runtime": session.target.description,
    }


def _run_once(session: Session, prompt_class: str, seed: int) -> Timing:
    """One full batch of a prompt class."""
    images = session.batch_size
    seeds = [seed * images + image for image in range(images)]
    if not session.takes_text:
        labels = session.labels_of(prompt_class)
        result = session.generate([labels[s % len(labels)] for s in seeds], seeds)
    else:
        _, examples = session.examples()  # the golden trace has been replayed, so every class has some
        of_class = [i for i, name in enumerate(examples.prompt_classes) if name == prompt_class]
        chosen = [of_class[s % len(of_class)] for s in seeds]
        text = TextFeatures(examples.features[chosen], examples.lengths[chosen], (prompt_class,) * images)
        result = session.generate(seeds=seeds, text=text)
    return result.timings[0]


def _class_summary(session: Session, timings: Sequence[Timing]) -> dict[str, Any]:
    scales = []
    for index, step in enumerate(session.bundle.manifest.schedules[timings[0].prompt_class].steps):
        of_scale = [timing.scales[index] for timing in timings]
        scales.append(
            {
                "scale": step.scale,
                "grid": list(step.grid),
                "tokens": step.tokens,
                "keep": step.keep,
                "noise_ms": _quantiles([scale.noise_ms for scale in of_scale]),
                "step_ms": _quantiles([scale.step_ms for scale in of_scale]),
                "advance_ms": _quantiles([scale.advance_ms for scale in of_scale]),
            }
        )
    return {
        "prefix_ms": _quantiles([timing.prefix_ms for timing in timings]),
        "scales": scales,
        "transformer_ms": _quantiles([timing.transformer_ms for timing in timings]),
        "decode_ms": _quantiles([timing.decode_ms for timing in timings]),
        "total_ms": _quantiles([timing.total_ms for timing in timings]),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.2, 0.5, 0.8))
    return {"median": round(float(median), 3), "q20": round(float(low), 3), "q80": round(float(high), 3)}


def _ratios(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast the first bundle is as the other one, from medians."""
    ratios = {
        name: {
            part: round(other["classes"][name][f"{part}_ms"]["median"] / own[f"{part}_ms"]["median"], 3)
            for part in ("transformer", "total")
        }
        for name, own in first["classes"].items()
    }
    return {"bundle": first["name"], "against": other["name"], "classes": ratios}


# ---------------------------------------------------------------------------------------------------------------------
# Markdown, made from the document alone


def markdown(document: dict[str, Any]) -> str:
    """The tables of a bench document."""
    settings = document["settings"]
    lines = ["# Bench", "", *machine_lines(document["machine"])]
    lines += [
        f"- Batch {settings['batch']}; {settings['repeat']} runs after {settings['warmup']} for warming up, bundles in"
        " turn; milliseconds per batch, median (20 % to 80 % quantile)",
        "",
    ]
    for bundle in document["bundles"]:
        lines += [
            f"## {bundle['name']}",
            "",
            f"- {bundle['backbone']}, profile {bundle['profile']}, {bundle['precision']}, {bundle['runtime']}",
            f"- manifest {bundle['manifest_sha256'][:12]}, plan {bundle['plan_sha256'][:12]},"
            f" checkpoint {bundle['checkpoint_sha256'][:12]}; verified against its golden trace",
            "",
        ]
        for name, one in bundle["classes"].items():
            lines += _class_table(name, one)
    for ratio in document["ratios"]:
        lines += [
            f"## {ratio['bundle']} against {ratio['against']}",
            "",
            "| prompt class | transformer | total |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {r['transformer']:.2f} x | {r['total']:.2f} x |" for name, r in ratio["classes"].items()),
            "",
        ]
    if "trtexec" in document:
        lines += trtexec.markdown(document["trtexec"])
    return "\n".join(lines)


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """A list of what the measurement was made on."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    return [
        f"- {machine['processor']}, {machine['cores']} cores{memory}, {machine['system']}; {machine['time_utc']}",
        f"- {versions}" + (f"; commit {machine['commit']}" if machine["commit"] else ""),
    ]


def _class_table(name: str, one: dict[str, Any]) -> list[str]:
    lines = [
        f"### {name}",
        "",
        "| part | grid | tokens | kept | noise | step | advance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for scale in one["scales"]:
        lines.append(
            f"| scale {scale['scale']} | {scale['grid'][0]}x{scale['grid'][1]} | {scale['tokens']} | {scale['keep']} | "
            f"{_span(scale['noise_ms'])} | {_span(scale['step_ms'])} | {_span(scale['advance_ms'])} |"
        )
    lines += ["", "| prefix | transformer (all steps) | decoder | total |", "| ---: | ---: | ---: | ---: |"]
    lines.append(
        "| " + " | ".join(_span(one[key]) for key in ("prefix_ms", "transformer_ms", "decode_ms", "total_ms")) + " |"
    )
    return [*lines, ""]


def _span(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['q20']:.2f} to {value['q80']:.2f})"
