"""Replay a bundle's golden trace: the same prompts and seeds must give the same tokens and the same pictures.

Sampling is discontinuous: one token that flips changes every scale behind it. So the first scale that differs is what
tells where to look, and it is what is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toprovar.errors import BundleError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.runtime.session import Session, TextFeatures
from toprovar.runtime.target import Array

__all__ = ["IMAGE_TOLERANCE", "ClassVerdict", "Verdict", "verify"]

IMAGE_TOLERANCE = 1e-3
"""Largest difference of a pixel in [0, 1] between two targets in fp32; a quarter of one step of 8 bits."""


@dataclass(frozen=True)
class ClassVerdict:
    """One prompt class: tokens that differ by scale, and the largest difference of codes and pixels."""

    prompt_class: str
    images: int
    wrong_tokens: dict[int, int]
    tokens: dict[int, int]
    codes_error: float
    image_error: float
    tolerance: float

    @property
    def first_wrong_scale(self) -> int | None:
        return next((scale for scale, wrong in self.wrong_tokens.items() if wrong), None)

    @property
    def passed(self) -> bool:
        return self.first_wrong_scale is None and self.image_error <= self.tolerance

    def __str__(self) -> str:
        scale = self.first_wrong_scale
        if scale is not None:
            found = (
                f"scale {scale} is the first that differs, in {self.wrong_tokens[scale]} of {self.tokens[scale]} tokens"
            )
        else:
            found = f"tokens of all {len(self.tokens)} scales are equal"
        picture = f"pictures differ by {self.image_error:.1e} at most (tolerance {self.tolerance:g})"
        return f"{self.prompt_class}: {'ok' if self.passed else 'WRONG'}, {self.images} images; {found}; {picture}"


@dataclass(frozen=True)
class Verdict:
    """A bundle on a target against its golden trace."""

    classes: tuple[ClassVerdict, ...]

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.classes)


def verify(
    session: Session, tolerance: float = IMAGE_TOLERANCE, on_scale: Callable[[int, int], None] | None = None
) -> Verdict:
    """Replay the golden trace of every prompt class.

    Args:
        session: a bundle on a target.
        tolerance: largest difference of a pixel that passes.
        on_scale: called with (scales done, scales in all), for each prompt class anew.

    Raises:
        BundleError: the bundle has no golden trace, or an incomplete one.
    """
    return Verdict(tuple(_verify_class(session, name, tolerance, on_scale) for name in session.prompt_classes))


def _verify_class(
    session: Session, prompt_class: str, tolerance: float, on_scale: Callable[[int, int], None] | None
) -> ClassVerdict:
    bundle = session.bundle

    def golden(name: str) -> Array:
        if f"{prompt_class}/{name}" not in bundle.golden:
            raise BundleError(f"{bundle.root}: its golden trace has no {prompt_class}/{name}; export it again")
        return bundle.golden[f"{prompt_class}/{name}"]

    seeds = [int(seed) for seed in golden("seeds")]
    if bundle.manifest.condition.kind == "label":
        result = session.generate([int(label) for label in golden(Names.LABELS.value)], seeds, on_scale=on_scale)
    else:
        classes = (prompt_class,) * len(seeds)
        text = TextFeatures(golden(Names.TEXT_FEATURES.value), golden(Names.TEXT_LENGTHS.value), classes)
        result = session.generate(seeds=seeds, text=text, on_scale=on_scale)

    wrong, count = {}, {}
    for step in bundle.manifest.schedules[prompt_class].steps:
        expected = golden(f"tokens_{step.scale}")
        found = np.stack([tokens[step.scale] for tokens in result.tokens])
        wrong[step.scale] = int((found != expected).sum())
        count[step.scale] = expected.size
    return ClassVerdict(
        prompt_class=prompt_class,
        images=len(seeds),
        wrong_tokens=wrong,
        tokens=count,
        codes_error=_worst(result.codes, golden("codes")),
        image_error=_worst(result.images, golden("image")),
        tolerance=tolerance,
    )


def _worst(found: Array, expected: Array) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max())
