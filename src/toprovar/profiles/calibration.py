"""The calibration: a measurement of one checkpoint, in JSON. Entropies in nats, conditional rows, mean over heads.

Entropy of query i: ``H_i = -sum_j p_ij log p_ij`` over all keys seen, cached and current (ToProVAR, eq. 2). Everything
is measured on each image by itself and then averaged over the images of a prompt class.
"""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from toprovar.errors import FormatError
from toprovar.profiles.files import (
    Sha256,
    Strict,
    canonical_json,
    model_from_json,
    pretty_json,
    read_document,
    sha256_bytes,
    write_text,
)
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.profile import Name

__all__ = [
    "SCHEMA",
    "Calibration",
    "Discriminant",
    "Measurement",
    "PerLayer",
    "PerScale",
    "load_calibration",
    "save_calibration",
]

SCHEMA: Final = "toprovar.calibration/1"
"""Changes with the format, and with any change of what is measured."""

Scales = tuple[float, ...]
Layers = tuple[tuple[float, ...], ...]


class PerScale(Strict):
    """A number per scale: mean and sample standard deviation (0 for one image) over the images of the class."""

    mean: Scales
    sd: Scales


class PerLayer(Strict):
    """A number per scale and layer, `[scale][layer]`, as `PerScale`; an empty row where it does not exist."""

    mean: Layers
    sd: Layers


class Measurement(Strict):
    """What one prompt class showed, over `images` images (every prompt with every seed)."""

    prompts: tuple[int | str, ...] = Field(min_length=1)
    """Class labels or texts."""
    images: int = Field(ge=1)

    rho: PerScale
    """Low-entropy ratio of eq. 3, of the entropy map averaged over all layers."""
    rho_layers: PerLayer
    """Low-entropy ratio of each layer's own map."""
    entropy_nats: PerLayer
    """Mean entropy of a token."""
    ratio_raw: PerLayer
    """sigma1 / sigma2 of the h x w entropy map (ToProVAR, section 3.3); at scales of at least 2 x 2."""
    ratio_centred: PerLayer
    """The same after the map's mean is taken off."""


class Discriminant(Strict):
    """What tells a prompt of one class from those of the others: `toprovar.profiles.prompts.classify`."""

    weights: tuple[float, ...] = Field(min_length=1)
    """Of the pooled text features, a number per channel."""
    bias: float


class Calibration(Strict):
    """A measurement of one checkpoint."""

    schema_version: Literal["toprovar.calibration/1"] = Field(alias="schema")
    toprovar_version: str
    checkpoint_sha256: Sha256
    model: ModelShape
    sampling: dict[str, bool | int | float | tuple[float, ...]]
    """How tokens were drawn: the entropies depend on it."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**64)], ...] = Field(min_length=1)
    """Each prompt was generated once with each seed."""
    classes: dict[Name, Measurement] = Field(min_length=1)
    discriminants: dict[Name, Discriminant] | None = None
    """Of a text model with several classes: one each."""
    wall_time_s: float = Field(ge=0)
    """Not part of `sha256`: two runs that measure the same are the same calibration."""

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if self.discriminants is not None and set(self.discriminants) != set(self.classes):
            raise ValueError(
                f"discriminants: found {', '.join(self.discriminants)}, expected {', '.join(self.classes)}, the classes"
            )
        if self.discriminants and len({len(one.weights) for one in self.discriminants.values()}) > 1:
            raise ValueError("discriminants: found weights of different lengths, expected one width")
        scales, depth = len(self.model.grids), self.model.depth
        for name, one in self.classes.items():
            expected = len(one.prompts) * len(self.seeds)
            if one.images != expected:
                raise ValueError(f"classes.{name}.images: found {one.images}, expected {expected}, prompts times seeds")
            for key in ("rho", "rho_layers", "entropy_nats", "ratio_raw", "ratio_centred"):
                table: PerScale | PerLayer = getattr(one, key)
                for part, values in (("mean", table.mean), ("sd", table.sd)):
                    where = f"classes.{name}.{key}.{part}"
                    if len(values) != scales:
                        raise ValueError(f"{where}: found {len(values)} scales, expected {scales}")
                    for scale, row in enumerate(values):
                        if not isinstance(row, tuple):
                            continue
                        empty = key.startswith("ratio") and min(self.model.grids[scale]) < 2
                        if len(row) != (0 if empty else depth):
                            raise ValueError(
                                f"{where}.{scale}: found {len(row)} layers, expected {0 if empty else depth}"
                            )
            rhos = [*one.rho.mean, *(value for row in one.rho_layers.mean for value in row)]
            if not all(0 <= value <= 1 for value in rhos):
                raise ValueError(f"classes.{name}.rho: found a ratio outside 0 to 1")
            if any(value < 1 for table in (one.ratio_raw, one.ratio_centred) for row in table.mean for value in row):
                raise ValueError(f"classes.{name}.ratio_raw, ratio_centred: found sigma1 / sigma2 below 1")
        return self

    @property
    def sha256(self) -> str:
        """Hash of what was measured; the time it took does not count."""
        value = self.model_dump(mode="json", by_alias=True)
        del value["wall_time_s"]
        return sha256_bytes(canonical_json(value))

    def check_checkpoint(self, sha256: str, source: str = "calibration") -> None:
        """Raises FormatError where this is a calibration of another checkpoint."""
        if sha256 != self.checkpoint_sha256:
            raise FormatError(
                f"{source}: checkpoint_sha256: found {self.checkpoint_sha256[:12]}…, expected {sha256[:12]}…, "
                "the given checkpoint; calibrate it, or give the checkpoint that was calibrated"
            )


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration.

    Raises:
        FormatError: missing, or it does not follow the format; one line.
    """
    return model_from_json(Calibration, read_document(path, "calibration"), os.fspath(path), "calibration")


def save_calibration(path: str | os.PathLike[str], calibration: Calibration) -> None:
    """Write a calibration atomically."""
    write_text(path, pretty_json(calibration))
