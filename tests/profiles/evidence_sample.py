"""Evidence made up for tests: valid, plausible and random; no number in it was measured."""

from __future__ import annotations

import math

import numpy as np

from tests.profiles.samples import CHECKPOINT, a_shape
from toprovar.profiles import evidence as e
from toprovar.profiles.flops import dense_flops

CLASSES = ("plain", "object", "texture")
_MACHINE = {
    "time_utc": "2026-01-01T00:00:00+00:00",
    "system": "Linux x86_64",
    "processor": "a processor made up for tests",
    "cores": 2,
    "memory_gib": 8.0,
    "versions": {"toprovar": "0", "python": "3.12.0"},
    "commit": None,
}

# name, title, family, series, speed-up, loss of quality, scales run, kept share of the last scales
_POLICIES = (
    ("dense", "Dense", "dense", "dense", 1.0, 0.0, 10, 1.0),
    ("drop-1", "Last scale dropped", "drop", "drop", 2.4, 0.06, 9, 1.0),
    ("drop-2", "Last two scales dropped", "drop", "drop", 5.2, 0.11, 8, 1.0),
    ("fastvar", "FastVAR", "rival", "FastVAR", 4.0, 0.12, 8, 0.55),
    ("skipvar", "SkipVAR", "rival", "SkipVAR", 2.1, 0.05, 9, 1.0),
    ("ours-balanced", "toprovar balanced", "ours", "toprovar", 1.3, 0.01, 10, 0.5),
    ("ours-fast", "toprovar fast", "ours", "toprovar", 2.6, 0.03, 10, 0.3),
    ("no-layers", "All layers pruned", "ablation", "toprovar, a stage off", 2.9, 0.09, 10, 0.3),
)


def sample_evidence(seed: int = 0) -> tuple[e.Evidence, e.Arrays]:
    """A document and its arrays, ready for `save_evidence`; every optional part is there."""
    random = np.random.default_rng(seed)
    shape = a_shape()
    dense = dense_flops(shape)

    def interval(mean: float, half: float) -> e.Interval:
        return e.Interval(mean=mean, low=mean - half, high=mean + half)

    policies = []
    for name, title, family, series, speed, loss, run, kept in _POLICIES:
        groups = {}
        for group in (*CLASSES, e.ALL):
            own = loss * {"plain": 0.2, "object": 0.8, "texture": 2.0}.get(group, 1.0)
            noise = float(random.uniform(0.9, 1.1))
            scales = tuple(
                e.ScaleCost(
                    scale=s,
                    kept=shape.tokens[s] * (kept if s >= 6 else 1.0),
                    flops=dense.scales[s].total / speed,
                    latency_ms=500 * dense.scales[s].total / dense.total * noise * (kept if s >= 6 else 1.0),
                )
                for s in range(run)
            )
            groups[group] = e.Group(
                images=68 if group != e.ALL else 204,
                metrics={
                    "ssim": interval(1 - own * noise, 0.01 * (loss > 0)),
                    "psnr_db": interval(40 - 60 * own, 0.8),
                    "perceptual": interval(own * 0.8, 0.02 * (loss > 0)),
                    "frechet": interval(own * 9, 0.5 * (loss > 0)),
                    "accuracy": interval(0.95 - own * 0.3, 0.02),
                    "tokens": interval(1 - own * 3 if own < 0.3 else 0.1, 0.02 * (loss > 0)),
                },
                flops=dense.total / speed,
                transformer={
                    "torch": e.Latency(median_ms=620 / speed, p20_ms=600 / speed, p80_ms=650 / speed, repeats=12),
                    "onnxruntime": e.Latency(median_ms=480 / speed, p20_ms=470 / speed, p80_ms=495 / speed, repeats=12),
                },
                scales=scales if group != e.ALL else (),
            )
        policies.append(
            e.Policy(
                name=name,
                title=title,
                family=family,
                series=series,
                description=f"{title}: a sentence that says what it does.",
                source="arXiv 0000.00000, sections 3 and 4" if family == "rival" else "",
                mapping="Grids scaled by 32/64." if family == "rival" else "",
                settings={"keep": {"24x24": kept}, "scales_run": run},
                groups=groups,
            )
        )

    comparisons = tuple(
        e.Comparison(
            rival=rival,
            prompt_class=group,
            metric="ssim",
            by="latency",
            ours=ours,
            difference=None if ours is None else interval(gain, 0.012),
            verdict=verdict,
            reason=reason,
        )
        for rival, group, ours, gain, verdict, reason in (
            ("skipvar", e.ALL, "ours-fast", 0.02, "better", ""),
            ("skipvar", "plain", "ours-fast", 0.001, "equal", "Plain pictures lose nothing with either."),
            ("drop-1", "texture", "ours-fast", -0.03, "worse", "Textures need the tokens that are pruned."),
            ("fastvar", e.ALL, None, 0.0, "none", "No profile of ours drops two scales for every class."),
        )
    )
    rho = {
        group: tuple(float(v) for v in 0.5 - 0.02 * np.arange(10) * slope + random.normal(0, 0.005, 10))
        for group, slope in zip((*CLASSES, e.ALL), (0.8, 0.6, 0.3, 0.57), strict=True)
    }
    arrays: e.Arrays = {}
    examples = []
    for number, group in enumerate(CLASSES):
        key = f"example{number}"
        y, x = np.mgrid[0:256, 0:256] / 255.0
        picture = np.stack([x, y, np.hypot(x - 0.5, y - 0.5)], -1)
        shown = [name for name, *_ in _POLICIES]
        for name, _, _, _, _, loss, _, _ in _POLICIES:
            noisy = picture + loss * random.normal(0, 1, picture.shape)
            arrays[f"{key}.image.{name}"] = (noisy.clip(0, 1) * 255).astype(np.uint8)
        for scale, (h, w) in enumerate(shape.grids):
            gy, gx = np.mgrid[0:h, 0:w] / max(h - 1, 1)
            focus = 1 - np.exp(-(((gx - 0.5) ** 2 + (gy - 0.5) ** 2) * 12))
            maps = focus + random.normal(0, 0.1, (shape.depth, h, w)) + 0.2 * math.log(scale + 2)
            arrays[f"{key}.entropy.{scale}"] = maps.clip(0).astype(np.float16)
            if scale >= 6:
                for name in ("ours-balanced", "ours-fast"):
                    least = focus.ravel().argsort()[: h * w // 3]
                    kept = np.zeros((3, h * w), np.uint8)
                    kept[:, least] = 1
                    arrays[f"{key}.kept.{name}.{scale}"] = kept.reshape(3, h, w)
        examples.append(
            e.Example(
                key=key,
                prompt=f"a {group} picture",
                prompt_class=group,
                seed=number,
                rho=rho[group],
                policies=tuple(shown),
            )
        )
    points = tuple((float(r), float(s)) for r, s in random.uniform(0.3, 1.0, (60, 2)))
    errors = tuple(
        e.Error(
            policy="ours-fast",
            prompt_class=e.ALL,
            mode=mode,
            scales=tuple(range(10)),
            token_error=tuple(0.0 if s < 6 else rate * (s - 5) for s in range(10)),
            code_error=tuple(0.0 if s < 6 else rate * (s - 5) / 2 for s in range(10)),
        )
        for mode, rate in (("teacher-forced", 0.02), ("free-running", 0.05))
    )
    document = e.Evidence(
        schema=e.SCHEMA,
        name="var-demo",
        title="Class-conditional demo (VAR)",
        checkpoint_sha256=CHECKPOINT,
        model=shape,
        classes=CLASSES,
        split="Made up for tests.",
        policies=tuple(policies),
        comparisons=comparisons,
        rho=rho,
        tau=0.4,
        depth={"plain": 6, "object": 7, "texture": None},
        role_scores=tuple(2.0 + 0.5 * layer for layer in range(shape.depth)),
        role_scale=6,
        roles="gdgddgddgdgg",
        tau_fits={
            group: e.TauFit(points=points, tau=interval(0.41, 0.02) if group != "texture" else None, correlation=-0.3)
            for group in CLASSES
        },
        errors=errors,
        normalisations=tuple(
            e.Normalisation(
                name=name,
                title=title,
                rho=rho,
                rank_correlation=correlation,
                metrics={"ssim": interval(0.97 - 0.01 * (1 - correlation), 0.004)},
            )
            for name, title, correlation in (
                ("mean", "Mean over heads, in nats", 1.0),
                ("temperature", "Each head over its temperature", 0.9),
                ("log-keys", "Over log of the number of keys", 1.0),
            )
        ),
        costs=(
            e.Cost(name="calibration", title="Calibration", seconds=21.0, per="model", note="12 pictures."),
            e.Cost(name="roles", title="Role scores (SVD)", seconds=0.05, per="model"),
            e.Cost(name="entropy", title="Entropy in the global layers", seconds=0.004, per="image"),
        ),
        examples=tuple(examples),
        arrays_sha256="a" * 64,  # `save_evidence` puts the true one here
        quality_machine=dict(_MACHINE),
        latency_machine=dict(_MACHINE),
    )
    return document, arrays
