"""Bundles -> evidence: measured and compared here and now, in the format that every report is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from toprovar.errors import BundleError, InputError
from toprovar.profiles import evidence as formats
from toprovar.profiles.calibration import Calibration, load_calibration
from toprovar.profiles.evidence import ALL, Evidence, Example, Group, Interval, Latency, Policy, ScaleCost
from toprovar.profiles.flops import ModelShape, plan_flops
from toprovar.profiles.plan import load_plan
from toprovar.profiles.statistics import bootstrap
from toprovar.runtime import bench, compare, pictures
from toprovar.runtime.session import Result, Session, TextFeatures
from toprovar.runtime.target import Array

__all__ = ["Part", "make"]


@dataclass(frozen=True)
class Part:
    """One model's part of a report. `stored`: its evidence lies in a file already."""

    evidence: Evidence
    arrays: Mapping[str, Array]
    stored: bool = False


def make(
    sessions: Sequence[Session],
    labels: Sequence[int | str] | None,
    seeds: Sequence[int],
    *,
    text: TextFeatures | None = None,
    captions: Sequence[str] | None = None,
    repeat: int = 5,
    warmup: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Part:
    """Measure bundles of one checkpoint, and compare their pictures.

    Args:
        sessions: the bundles; the first, as a rule the dense one, is what the others are compared with.
        labels: one per picture; None where the bundles take text.
        seeds: one per picture.
        text: one per picture; None where the bundles take labels.
        captions: what was asked for, one per picture; names of the labels where they are left out.
        repeat, warmup: runs per prompt class, see `bench.bench`.
        on_progress: called with (what, done, in all).

    Raises:
        BundleError: a bundle fails its golden trace, or holds no plan.
        InputError: bundles of two checkpoints or of one name, pictures of different sizes, an unknown label.
    """
    names = [session.bundle.manifest.name for session in sessions]
    if len(set(names)) < len(names):
        raise InputError(f"report: bundles named {', '.join(names)}; give each its own name when exporting")
    if len({session.bundle.manifest.provenance.checkpoint_sha256 for session in sessions}) > 1:
        raise InputError(
            f"report: {', '.join(names)} are not of one checkpoint; measure those of each by themselves, and give the .json "
            "files of both reports to a third"
        )
    shape = _shape(sessions[0])
    measured = bench.bench(
        sessions, repeat=repeat, warmup=warmup, on_run=lambda done, of: on_progress("measuring", done, of)
    )
    results = []
    for index, session in enumerate(sessions):
        results.append(session.generate(labels, seeds, text=text))
        on_progress("comparing", index + 1, len(sessions))
    if captions is None:
        first = sessions[0]
        captions = results[0].prompt_classes if labels is None else [first.labels[first.label(one)] for one in labels]
    policies = [
        _policy(session, shape, own, compare.compare_results(results[0], result, captions, seeds), repeat)
        for session, own, result in zip(sessions, measured["bundles"], results, strict=True)
    ]
    arrays, examples = _examples(names, results, captions, seeds)
    manifest = sessions[0].bundle.manifest
    classes = tuple(dict.fromkeys(name for session in sessions for name in session.prompt_classes))
    return Part(
        Evidence(
            schema=formats.SCHEMA,
            name=f"{manifest.backbone}-bundles",
            title=f"Bundles of one {manifest.backbone.upper() if manifest.backbone == 'var' else 'Infinity'} checkpoint",
            checkpoint_sha256=manifest.provenance.checkpoint_sha256,
            model=shape,
            classes=classes,
            split=f"{len(seeds)} pictures with seeds {min(seeds)} to {max(seeds)}; times are medians of {repeat} runs per "
            "prompt class, bundles in turn. Each bundle passed its golden trace first.",
            policies=tuple(policies),
            reference=names[0],
            **_decisions(sessions),
            examples=examples,
            arrays_sha256="0" * 64,  # `save_evidence` puts the true one here
            quality_machine=measured["machine"],
            latency_machine=measured["machine"],
        ),
        arrays,
    )


def _shape(session: Session) -> ModelShape:
    """What FLOPs are counted by.

    Raises:
        BundleError: the bundle holds no plan.
    """
    if "plan.json" not in session.bundle.manifest.files:
        raise BundleError(f"{session.bundle.root}: holds no plan.json, which a report needs; export it again")
    return load_plan(session.bundle.path("plan.json")).model


def _policy(session: Session, shape: ModelShape, own: dict[str, Any], fidelity: dict[str, Any], repeat: int) -> Policy:
    """One bundle as a policy."""
    manifest, target = session.bundle.manifest, session.target_name
    plan = load_plan(session.bundle.path("plan.json"))
    detail, groups = manifest.model.roles.count("d"), {}
    for name, schedule in manifest.schedules.items():
        flops = plan_flops(shape, manifest.model.roles, [s.keep for s in schedule.steps], manifest.model.rows_per_image)
        timed = own["classes"].get(name)
        if timed is None or name not in fidelity["classes"]:
            continue
        groups[name] = Group(
            images=fidelity["classes"][name]["images"],
            metrics=_metrics([image for image in fidelity["images"] if image["prompt_class"] == name]),
            flops=flops.total,
            transformer={target: _latency(timed["transformer_ms"], repeat)},
            total={target: _latency(timed["total_ms"], repeat)},
            scales=tuple(
                ScaleCost(scale=step.scale, kept=step.keep, flops=cost.total, latency_ms=time["step_ms"]["median"])
                for step, cost, time in zip(schedule.steps, flops.scales, timed["scales"], strict=True)
            ),
        )
    parts = list(groups.values())
    groups[ALL] = Group(
        images=len(fidelity["images"]),
        metrics=_metrics(fidelity["images"]),
        flops=float(np.mean([part.flops for part in parts])),
        transformer={target: _mean_latency([part.transformer[target] for part in parts])},
        total={target: _mean_latency([part.total[target] for part in parts])},
    )
    runs = sorted({len(schedule.steps) for schedule in manifest.schedules.values()})
    scales = f"{' or '.join(map(str, runs))} of {len(shape.grids)} scales"
    family: Literal["dense", "drop", "ours"]
    steps = [step for schedule in manifest.schedules.values() for step in schedule.steps]
    if any(step.keep < step.tokens for step in steps):
        kept = sum(step.keep for step in steps) / sum(step.tokens for step in steps)
        family, what = "ours", f"{detail} of {len(manifest.model.roles)} layers run on {kept:.0%} of the tokens"
    elif runs == [len(shape.grids)]:
        family, what = "dense", "nothing is left out"
    else:
        family, what = "drop", "nothing else is left out"
    return Policy(
        name=manifest.name,
        title=manifest.name,
        family=family,
        series="toprovar" if family == "ours" else manifest.name,
        description=f"{scales} are run; {what}.",
        source="",
        settings={
            "profile": plan.profile.name,
            "runtime": own["runtime"],
            "precision": manifest.precision,
            "size_bytes": own["size_bytes"],
            "manifest_sha256": own["manifest_sha256"],
            "floor": plan.profile.quality_floor.model_dump(exclude_none=True),
        },
        groups=groups,
    )


def _metrics(images: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Means over pictures with bootstrap intervals; PSNR is that of the mean squared error."""
    mse = np.array([image["mse"] for image in images])
    agreement = [list(image["agreement"].values()) for image in images]
    metrics = {
        "ssim": bootstrap(np.array([image["ssim"] for image in images])),
        "tokens": bootstrap(np.array([np.mean(row) for row in agreement])),
    }
    error = bootstrap(mse)
    if error.low > 0:  # equal pictures have no PSNR
        low, mean, high = (float(-10 * np.log10(value)) for value in (error.high, error.mean, error.low))
        metrics["psnr_db"] = Interval(mean=mean, low=low, high=high)
    return metrics


def _latency(quantiles: dict[str, float], repeat: int) -> Latency:
    return Latency(median_ms=quantiles["median"], p20_ms=quantiles["q20"], p80_ms=quantiles["q80"], repeats=repeat)


def _mean_latency(parts: Sequence[Latency]) -> Latency:
    """Over prompt classes: the mean of their medians and quantiles."""
    middle, low, high = (
        float(np.mean([getattr(part, key) for part in parts])) for key in ("median_ms", "p20_ms", "p80_ms")
    )
    return Latency(median_ms=middle, p20_ms=low, p80_ms=high, repeats=sum(part.repeats for part in parts))


def _decisions(sessions: Sequence[Session]) -> dict[str, Any]:
    """What the calibration saw and what was decided from it: of the `fast` bundle, or else of the first that prunes."""
    for session in sorted(sessions, key=lambda one: "fast" not in one.bundle.manifest.name):
        files = session.bundle.manifest.files
        if "d" not in session.bundle.manifest.model.roles or "calibration.json" not in files:
            continue
        plan = load_plan(session.bundle.path("plan.json"))
        calibration = load_calibration(session.bundle.path("calibration.json"))
        scores = _ratios(calibration, plan.profile.roles.grid)
        return {
            "rho": {name: one.rho.mean for name, one in calibration.classes.items()},
            "tau": plan.profile.depth.tau if plan.profile.depth.grid is None else None,
            "depth": {name: one.depth for name, one in plan.classes.items()},
            "roles": plan.roles,
            "role_scale": scores[0],
            "role_scores": scores[1],
        }
    return {}


def _ratios(calibration: Calibration, side: int) -> tuple[int, tuple[float, ...]]:
    """The representative scale, and the principal component ratio of every layer there, mean over all images."""
    scale = calibration.model.first_scale(side)
    scale = len(calibration.model.grids) - 1 if scale is None else scale
    measured = calibration.classes.values()
    ratios = np.average([one.ratio_raw.mean[scale] for one in measured], 0, [one.images for one in measured])
    return scale, tuple(float(value) for value in ratios)


def _examples(
    names: Sequence[str], results: Sequence[Result], captions: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, Array], tuple[Example, ...]]:
    arrays, examples = {}, []
    for index, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
        key = f"picture{index}"
        for name, result in zip(names, results, strict=True):
            data = pictures.png(pictures.to_bytes(result.images[index]))
            arrays[f"{key}.image.{name}"] = np.frombuffer(data, np.uint8)
        group = results[0].prompt_classes[index]
        examples.append(Example(key=key, prompt=caption, prompt_class=group, seed=seed, rho=(), policies=tuple(names)))
    return arrays, tuple(examples)
