"""The evidence: what every policy cost and what it did to the pictures of one model, in JSON, with arrays beside it.

A *policy* is a way of making the same pictures: dense, scales dropped and nothing else, a rival method, ours, ours with a stage
switched off. All policies draw with the same noise from the same weights, so quality is paired picture by picture. The document
holds everything a report shows, and a report measures nothing. Arrays (entropy maps, kept tokens, pictures) lie in one
safetensors file beside the document, named after it and hashed in it.

Latency and quality may come from different machines, since pictures do not depend on the machine; each has its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue, model_validator

from toprovar.errors import FormatError
from toprovar.profiles.files import (
    Sha256,
    Strict,
    model_from_json,
    pretty_json,
    read_document,
    sha256_bytes,
    write_bytes,
    write_text,
)
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.profile import Name

__all__ = [
    "ALL",
    "METRICS",
    "SCHEMA",
    "Arrays",
    "Comparison",
    "Cost",
    "Error",
    "Evidence",
    "Example",
    "Group",
    "Interval",
    "Latency",
    "Metric",
    "Normalisation",
    "Policy",
    "ScaleCost",
    "TauFit",
    "arrays_path",
    "load_arrays",
    "load_evidence",
    "save_evidence",
]

SCHEMA: Final = "toprovar.evidence/1"

ALL: Final = "all"
"""Key of the group that holds every prompt class."""

Arrays = dict[str, npt.NDArray[Any]]


class Metric(NamedTuple):
    """How a figure of quality is read."""

    title: str
    unit: str
    better: Literal["higher", "lower"]
    dense: float | None
    """What the dense model scores against itself; None where that is measured too."""
    meaning: str


METRICS: Final[dict[str, Metric]] = {
    "ssim": Metric("SSIM", "", "higher", 1.0, "Structural similarity to the dense picture of the same noise."),
    "psnr_db": Metric(
        "PSNR", "dB", "higher", None, "Of the mean squared error to the dense pictures, over all pictures."
    ),
    "perceptual": Metric(
        "Perceptual distance",
        "",
        "lower",
        0.0,
        "Distance of deep features to the dense picture, in the manner of LPIPS, by a small network of our own.",
    ),
    "frechet": Metric(
        "Frechet distance",
        "",
        "lower",
        0.0,
        "Between the features of all pictures and of the dense ones; not the FID of the literature.",
    ),
    "accuracy": Metric(
        "Accuracy",
        "",
        "higher",
        None,
        "Share of what was asked for that a judge, trained on drawn pictures only, sees in the picture.",
    ),
    "tokens": Metric("Equal tokens", "", "higher", 1.0, "Share of tokens, of the scales run, equal to the dense ones."),
    "bits": Metric("Equal bits", "", "higher", 1.0, "The same for the bits of a bitwise model."),
}
"""Every figure of quality that a group may hold."""


class Interval(Strict):
    """A mean and its 95% bootstrap interval over pictures (percentiles; the pictures are resampled in pairs)."""

    mean: float
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> Interval:
        if not self.low <= self.high:
            raise ValueError(f"low: found {self.low}, expected at most high, which is {self.high}")
        return self


class Latency(Strict):
    """Wall time of one picture, batch 1, in ms: median and 20th and 80th percentile over repeats and pictures."""

    median_ms: float = Field(gt=0)
    p20_ms: float = Field(gt=0)
    p80_ms: float = Field(gt=0)
    repeats: int = Field(ge=1)


class ScaleCost(Strict):
    """One scale of one policy: a bar of the latency waterfall."""

    scale: int = Field(ge=0)
    kept: float = Field(gt=0)
    """Mean number of tokens that a pruned layer runs; all tokens where nothing is pruned."""
    flops: float = Field(ge=0)
    """As run, all CFG rows, mean over pictures."""
    latency_ms: float | None = Field(default=None, ge=0)
    """Median; None where it was not measured."""


class Group(Strict):
    """The figures of one policy for one prompt class, or for all of them."""

    images: int = Field(ge=1)
    metrics: dict[str, Interval]
    """Keys of `METRICS`."""
    flops: float = Field(gt=0)
    """Of the transformer per picture, as run, mean over pictures."""
    transformer: dict[str, Latency] = Field(default_factory=dict)
    """Runtime (`torch`, `onnxruntime`) -> latency without the decoder; empty where none was measured."""
    total: dict[str, Latency] = Field(default_factory=dict)
    """The same from the condition to the picture, decoder included."""
    scales: tuple[ScaleCost, ...] = ()
    """Of the scales run; for prompt classes only."""


class Policy(Strict):
    """A way of making the pictures, and what it did."""

    name: Name
    title: str
    family: Literal["dense", "drop", "rival", "ours", "ablation"]
    """`ablation`: ours with a stage switched off or replaced."""
    series: str
    """Policies of one series are one method at several settings: points of one line."""
    description: str
    """A sentence for readers who do not know the method."""
    source: str
    """Paper and code that the policy follows; "" for ours."""
    mapping: str = ""
    """How constants published for another model were carried over to this one."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The constants as used."""
    groups: dict[str, Group] = Field(min_length=1)
    """Prompt class, or `ALL` -> figures."""


class Comparison(Strict):
    """Ours against one rival where both take the same time: is it better by more than the interval?

    `ours` is the most faithful of our policies that is no slower than the rival (by `by`); None where none is, and the
    rest then compares nothing.
    """

    rival: Name
    prompt_class: str
    metric: str
    by: Literal["flops", "latency"]
    ours: Name | None
    difference: Interval | None
    """Ours minus the rival, paired by picture, its sign such that above 0 is better for ours."""
    verdict: Literal["better", "equal", "worse", "none"]
    """`equal`: the interval holds 0. `none`: no policy of ours is as fast."""
    reason: str = ""
    """Why, where ours is not better."""


class TauFit(Strict):
    """What tau should be for one prompt class: where images stop changing.

    A point is one picture at one scale: its rho there, and the SSIM of the picture decoded from the codes up to that scale
    with the finished one. `tau` is the rho at which a straight line through the points has SSIM 0.8 (ToProVAR, Fig. 8:
    pictures above 0.8 cluster near rho = 0.4); None where the line does not reach it.
    """

    points: tuple[tuple[float, float], ...]
    """(rho, SSIM)"""
    tau: Interval | None
    correlation: float
    """Pearson's r of the points."""


class Error(Strict):
    """How the error of a policy grows over the scales: relative error of the accumulated code map, and wrong tokens."""

    policy: Name
    prompt_class: str
    mode: Literal["teacher-forced", "free-running"]
    """Teacher-forced: every scale starts from the dense tokens, so it shows its own error only."""
    scales: tuple[int, ...]
    token_error: tuple[float, ...]
    """Share of tokens (bits of a bitwise model) that differ from the dense ones, per scale."""
    code_error: tuple[float, ...]
    """||codes - dense codes|| / ||dense codes|| after the scale."""


class Normalisation(Strict):
    """A way of making one number a token out of the entropies of all heads, and what it changes."""

    name: Name
    title: str
    rho: dict[str, tuple[float, ...]]
    """Prompt class -> low-entropy ratio per scale."""
    rank_correlation: float = Field(ge=-1, le=1)
    """Spearman's, with the default's ranking of tokens, mean over global layers, pruned scales and pictures."""
    metrics: dict[str, Interval]
    """Quality with this choice of tokens, all else equal."""


class Cost(Strict):
    """What a step of the method costs in wall time, so that a speed-up can be stated net of it."""

    name: Name
    title: str
    seconds: float = Field(ge=0)
    per: Literal["model", "image"]
    """Once for a model, or once for every picture."""
    note: str = ""


class Example(Strict):
    """A picture looked at closely; its arrays are keys of the arrays file.

    `<key>.image.<policy>` uint8 [h, w, 3], or [n]: the bytes of a PNG file, which are far fewer.
    `<key>.entropy.<scale>` float16 nats [layers, h, w] of the dense run, conditional row, mean over heads.
    `<key>.kept.<policy>.<scale>` uint8 0 or 1 [spans, h, w], at pruned scales.
    """

    key: Name
    prompt: str
    prompt_class: str
    seed: int = Field(ge=0)
    rho: tuple[float, ...]
    """Of the map averaged over layers, per scale."""
    policies: tuple[Name, ...]
    """Those with a picture."""


class Evidence(Strict):
    """All measurements of one model."""

    schema_version: Literal["toprovar.evidence/1"] = Field(alias="schema")
    name: Name
    """Of the model, such as var-demo."""
    title: str
    checkpoint_sha256: Sha256
    model: ModelShape
    classes: tuple[str, ...] = Field(min_length=1)
    """Prompt classes, coarse content first."""
    split: str
    """Which prompts and seeds were held out from what."""
    policies: tuple[Policy, ...] = Field(min_length=1)
    reference: Name = "dense"
    """The policy that quality is measured against."""
    comparisons: tuple[Comparison, ...] = ()

    rho: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Prompt class -> mean low-entropy ratio per scale."""
    tau: float | None = None
    """The threshold that our plan used on rho; None where none was."""
    depth: dict[str, int | None] = Field(default_factory=dict)
    """Prompt class -> D of our plan (the `fast` profile)."""
    role_scores: tuple[float, ...] = ()
    """Principal component ratio per layer, at `role_scale`."""
    role_scale: int | None = None
    roles: str = ""
    """Of our plan."""
    tau_fits: dict[str, TauFit] = Field(default_factory=dict)
    errors: tuple[Error, ...] = ()
    normalisations: tuple[Normalisation, ...] = ()
    costs: tuple[Cost, ...] = ()
    examples: tuple[Example, ...] = ()
    arrays_sha256: Sha256 | None = None
    """Of the file beside this one; None where there is none."""

    quality_machine: dict[str, JsonValue]
    """Where the pictures were made: what `describe_machine` of the runtime says."""
    latency_machine: dict[str, JsonValue] | None
    """Where times were measured; None where none were."""

    @model_validator(mode="after")
    def _check(self) -> Evidence:
        names = [policy.name for policy in self.policies]
        if len(set(names)) != len(names):
            raise ValueError(f"policies: found {names}, expected each name once")
        if self.reference not in names:
            raise ValueError(f"policies: found no policy {self.reference!r}, expected the reference among them")
        known, scales = {*self.classes, ALL}, len(self.model.grids)
        for policy in self.policies:
            for group, figures in policy.groups.items():
                where = f"policies.{policy.name}.groups.{group}"
                _known(where, (group,), known)
                _known(f"{where}.metrics", figures.metrics, METRICS)
                if any(cost.scale >= scales for cost in figures.scales):
                    raise ValueError(f"{where}.scales: found a scale behind the last one, {scales - 1}")
        for one in self.comparisons:
            _known("comparisons", [one.rival] + ([one.ours] if one.ours else []), names)
            _known("comparisons", (one.prompt_class,), known)
            _known("comparisons", (one.metric,), METRICS)
            if (one.ours is None) != (one.difference is None) or (one.ours is None) != (one.verdict == "none"):
                raise ValueError(f"comparisons.{one.rival}: ours, difference and verdict must be none together")
        for key, table in (("rho", self.rho), ("depth", self.depth), ("tau_fits", self.tau_fits)):
            _known(key, table, known)
        for curve in [*self.rho.values(), *(row for option in self.normalisations for row in option.rho.values())]:
            if len(curve) != scales:
                raise ValueError(f"rho: found {len(curve)} scales, expected {scales}")
        for error in self.errors:
            if not len(error.scales) == len(error.token_error) == len(error.code_error):
                raise ValueError(f"errors.{error.policy}: scales, token_error and code_error differ in length")
            _known("errors", (error.policy,), names)
        for example in self.examples:
            _known(f"examples.{example.key}.policies", example.policies, names)
        for key, row in (("roles", self.roles), ("role_scores", self.role_scores)):
            if row and len(row) != self.model.depth:
                raise ValueError(f"{key}: found {len(row)} layers, expected {self.model.depth}")
        if self.examples and self.arrays_sha256 is None:
            raise ValueError("arrays_sha256: found nothing, expected the hash of the arrays that the examples are in")
        return self

    def policy(self, name: str) -> Policy:
        """A policy by its name.

        Raises:
            FormatError: there is none of that name.
        """
        for one in self.policies:
            if one.name == name:
                return one
        raise FormatError(f"evidence: policy {name!r} is not in it; expected one of {', '.join(self._names())}")

    def _names(self) -> list[str]:
        return [policy.name for policy in self.policies]


def _known(where: str, found: Any, valid: Any) -> None:
    if unknown := [name for name in found if name not in valid]:
        raise ValueError(f"{where}: found {unknown[0]!r}, expected one of {', '.join(sorted(valid))}")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def arrays_path(path: str | os.PathLike[str]) -> Path:
    """Where the arrays of a document lie: beside it, with its name."""
    return Path(path).with_suffix(".safetensors")


def load_evidence(path: str | os.PathLike[str]) -> Evidence:
    """Read the document.

    Raises:
        FormatError: missing, or it does not follow the format; one line.
    """
    return model_from_json(
        Evidence, read_document(path, "file of measurements"), os.fspath(path), "file of measurements"
    )


def load_arrays(path: str | os.PathLike[str], evidence: Evidence) -> Arrays:
    """Read the arrays of the document at `path`; empty where it has none.

    Raises:
        FormatError: missing, damaged, too large, or not those of this document.
    """
    from safetensors.numpy import load

    if evidence.arrays_sha256 is None:
        return {}
    place = arrays_path(path)
    data = read_document(place, "arrays file")
    if (found := sha256_bytes(data)) != evidence.arrays_sha256:
        raise FormatError(f"{place}: sha256 is {found[:12]}…, expected {evidence.arrays_sha256[:12]}…, as {path} says")
    return dict(load(data))


def save_evidence(path: str | os.PathLike[str], evidence: Evidence, arrays: Mapping[str, npt.NDArray[Any]]) -> Evidence:
    """Write document and arrays atomically, arrays first; the same evidence gives the same bytes.

    Returns: the document as written, which names the hash of the arrays.
    """
    from safetensors.numpy import save

    digest = None
    if arrays:
        data = save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
        digest = sha256_bytes(data)
        write_bytes(arrays_path(path), data)
    written = Evidence.model_validate(evidence.model_copy(update={"arrays_sha256": digest}).__dict__)
    write_text(path, pretty_json(written))
    return written
