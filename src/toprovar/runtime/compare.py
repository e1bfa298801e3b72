"""How far two bundles, or two targets, are apart on the same prompts and noise: tokens, bits, PSNR, SSIM, judges.

Sampling is discontinuous, so two good results may share few tokens at late scales: agreement says where they part,
PSNR and SSIM say how far the pictures are apart, and judges, where there are any, whether it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from toprovar.errors import InputError
from toprovar.runtime.bench import describe_bundle, machine_lines
from toprovar.runtime.machine import describe_machine
from toprovar.runtime.session import Result, Session, TextFeatures
from toprovar.runtime.target import Array

__all__ = ["SCHEMA", "Judges", "compare", "compare_results", "markdown", "psnr_db", "ssim"]

SCHEMA = "toprovar.compare/2"


class Judges(Protocol):
    """Networks that look at pictures `[I, 3, height, width]` fp32 in [0, 1]; the runtime has none of its own."""

    def distance(self, first: Array, second: Array) -> Array:
        """Perceptual distance of each pair, `[I]`."""

    def accuracy(self, images: Array, captions: Sequence[str]) -> Array:
        """Share of what was asked for that each picture shows, `[I]`."""

    def frechet(self, first: Array, second: Array) -> float:
        """Frechet distance between the features of two sets."""


# Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
# IEEE TIP 2004: an 11 x 11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def compare(
    reference: Session,
    other: Session,
    labels: Sequence[int | str] | None,
    seeds: Sequence[int],
    on_scale: Callable[[int, int], None] | None = None,
    *,
    text: TextFeatures | None = None,
    captions: Sequence[str] | None = None,
    judges: Judges | None = None,
) -> dict[str, Any]:
    """Make the same pictures twice and compare them.

    Args:
        reference: what `other` is measured against.
        labels: one per picture, known to both; None where the bundles take text.
        seeds: one per picture.
        text: one per picture; None where the bundles take labels.
        captions: what was asked for, one per picture; names of the labels where they are left out.
        judges: what else looks at the pictures.
        on_scale: called with (scales done, scales in all), for each of the two anew.

    Returns: the document that is written as JSON and shown by `markdown`.

    Raises:
        InputError: the two take different prompts, make pictures of different sizes, or do not know a label.
    """
    if reference.takes_text != other.takes_text:
        text_bundle, label_bundle = (reference, other) if reference.takes_text else (other, reference)
        raise InputError(
            f"compare: {text_bundle.bundle.root} takes text, {label_bundle.bundle.root} labels; give two bundles of one model"
        )
    first = reference.generate(labels, seeds, text=text, on_scale=on_scale)
    second = other.generate(labels, seeds, text=text, on_scale=on_scale)
    if captions is None:
        if labels is None:
            captions = first.prompt_classes
        else:
            captions = [reference.labels[reference.label(label)] for label in labels]
    return {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "reference": describe_bundle(reference),
        "bundle": describe_bundle(other),
        **compare_results(first, second, captions, seeds, judges),
    }


def compare_results(
    first: Result, second: Result, labels: Sequence[str], seeds: Sequence[int], judges: Judges | None = None
) -> dict[str, Any]:
    """The figures of a comparison: of each image, of each prompt class, of all."""
    if first.images.shape != second.images.shape:
        sizes = " and ".join("x".join(map(str, one.images.shape[2:])) for one in (first, second))
        raise InputError(f"compare: pictures of {sizes} pixels; give two bundles that make pictures of one size")
    images = [
        {
            "label": labels[i],
            "seed": int(seeds[i]),
            "prompt_class": first.prompt_classes[i],
            "mse": float(np.mean((first.images[i].astype(np.float64) - second.images[i]) ** 2)),
            "ssim": ssim(first.images[i], second.images[i]),
            **_agreement(first.tokens[i], second.tokens[i]),
        }
        for i in range(len(labels))
    ]
    if judges is not None:
        figures = {
            "perceptual": judges.distance(first.images, second.images),
            "accuracy": judges.accuracy(second.images, labels),
            "reference_accuracy": judges.accuracy(first.images, labels),
        }
        for name, values in figures.items():
            for image, value in zip(images, values, strict=True):
                image[name] = float(value)
    classes = {
        name: _mean([image for image in images if image["prompt_class"] == name])
        for name in dict.fromkeys(first.prompt_classes)
    }
    everything = _mean(images)
    if judges is not None and len(images) > 1:
        everything["frechet"] = judges.frechet(first.images, second.images)
    return {"images": images, "classes": classes, "all": everything}


def _agreement(first: Mapping[int, Array], second: Mapping[int, Array]) -> dict[str, dict[str, float]]:
    """Share of equal tokens by scale; of a bitwise model, where a token is all of its bits, that of equal bits too."""
    same = {str(scale): tokens == second[scale] for scale, tokens in first.items() if scale in second}
    tokens = {scale: float(np.mean(equal if equal.ndim == 1 else equal.all(-1))) for scale, equal in same.items()}
    if all(equal.ndim == 1 for equal in same.values()):
        return {"agreement": tokens}
    return {"agreement": tokens, "bit_agreement": {scale: float(np.mean(equal)) for scale, equal in same.items()}}


def _mean(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over images. PSNR is that of the mean squared error, so that equal images do not make it infinite."""
    means: dict[str, Any] = {
        "images": len(images),
        "psnr_db": psnr_db(float(np.mean([image["mse"] for image in images]))),
    }
    for name in ("ssim", "perceptual", "accuracy", "reference_accuracy"):
        if name in images[0]:
            means[name] = float(np.mean([image[name] for image in images]))
    for name in ("agreement", "bit_agreement"):
        scales = sorted({scale for image in images for scale in image.get(name, ())}, key=int)
        if scales:
            means[name] = {
                scale: float(np.mean([image[name][scale] for image in images if scale in image[name]]))
                for scale in scales
            }
    return means


def psnr_db(mean_squared_error: float) -> float | None:
    """Peak signal-to-noise ratio of pictures in [0, 1], in dB; None where they are equal."""
    return float(-10 * np.log10(mean_squared_error)) if mean_squared_error > 0 else None


def ssim(first: Array, second: Array) -> float:
    """Structural similarity of two pictures `[channels, height, width]` in [0, 1]: mean over channels and windows.

    Windows that reach over the border are left out, and variances are not corrected for the sample, as in the paper
    (and scikit-image's ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``).

    Raises:
        InputError: shapes differ, or the pictures are smaller than a window.
    """
    if first.shape != second.shape or min(first.shape[-2:]) < _WINDOW:
        raise InputError(f"ssim: pictures of {first.shape} and {second.shape}; give two of one size, 11 x 11 or more")
    a, b = first.astype(np.float64), second.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(similarity.mean())


def _blur(image: Array) -> Array:
    """Gaussian window over the last two axes, only where it fits."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    height, width = (size - _WINDOW + 1 for size in image.shape[-2:])
    image = sum(weight * image[..., i : i + height, :] for i, weight in enumerate(weights))
    return sum(weight * image[..., i : i + width] for i, weight in enumerate(weights))


# ---------------------------------------------------------------------------------------------------------------------
# Markdown, made from the document alone


def markdown(document: dict[str, Any]) -> str:
    """The tables of a comparison."""
    reference, bundle = document["reference"], document["bundle"]
    groups = {**document["classes"], "all": document["all"]}
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("images", lambda one: str(one["images"])),
        ("PSNR, dB", lambda one: psnr_text(one["psnr_db"])),
        ("SSIM", lambda one: f"{one['ssim']:.4f}"),
    ]
    if "accuracy" in document["all"]:
        columns += [
            ("perceptual distance", lambda one: f"{one['perceptual']:.4f}"),
            ("accuracy", lambda one: f"{one['accuracy']:.1%}"),
            ("accuracy of the reference", lambda one: f"{one['reference_accuracy']:.1%}"),
            ("Frechet distance", lambda one: f"{one['frechet']:.3f}" if "frechet" in one else ""),
        ]
    lines = [
        f"# {bundle['name']} ({bundle['target']}) against {reference['name']} ({reference['target']})",
        "",
        *machine_lines(document["machine"]),
        "- The same prompts and noise for both. PSNR is of the mean squared error over the images.",
        "",
        "| prompt class | " + " | ".join(title for title, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | " + " | ".join(cell(one) for _, cell in columns) + " |" for name, one in groups.items()),
    ]
    for key, what in (("agreement", "tokens"), ("bit_agreement", "bits")):
        if key not in document["all"]:
            continue
        scales = list(document["all"][key])
        lines += ["", f"Equal {what}, by scale:", ""]
        lines += ["| prompt class | " + " | ".join(scales) + " |", "| --- |" + " ---: |" * len(scales)]
        for name, one in groups.items():
            cells = [f"{one[key][scale]:.1%}" if scale in one[key] else "" for scale in scales]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def psnr_text(value: float | None) -> str:
    """For a table: equal pictures have no PSNR."""
    return "equal" if value is None else f"{value:.2f}"
