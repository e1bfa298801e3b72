"""Replay a bundle's golden trace: the same prompts and seeds must give the same tokens and the same pictures.

Sampling is discontinuous: one token that flips changes every scale behind it. So each scale is shown the golden tokens
of the scales before it, and its own are compared. Two correct runtimes choose differently where two tokens are as likely
within rounding: in fp16 PyTorch and ONNX Runtime do so for 0.3 to 0.9 percent of the class demo's tokens, PyTorch and
TensorRT 8.6.0 for up to 2.8, in fp32 for one of the text demo's 40336 bits. Such a token must be a close call: the golden
one is drawn where its logits are raised by a small part of the largest (see `Trace`), and a token that is not is wrong,
if it is the only one. What is wrong everywhere changes far more than `MOST_FLIPS`: two wrong engines of `advance` changed 55
to 89 percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toprovar.errors import BundleError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.runtime.loop import MARGINS
from toprovar.runtime.session import Session, TextFeatures
from toprovar.runtime.target import Array

__all__ = ["IMAGE_TOLERANCE", "MOST_FLIPS", "WIDEST_MARGIN", "ClassVerdict", "Verdict", "verify"]

IMAGE_TOLERANCE = {"float32": 1e-3, "float16": 2 / 255, "bfloat16": 2 / 255}
"""Largest difference of a pixel in [0, 1] between two targets: a quarter of one step of 8 bits, two steps in half."""
MOST_FLIPS = {"float32": 1e-4, "float16": 0.04, "bfloat16": 0.1}
"""Largest part of the tokens (of the bits, where a token is made of bits) that may differ; in fp32 less than one token of the
class demo, four bits of the text demo."""
WIDEST_MARGIN = {"float32": 2**-12, "float16": 2**-5, "bfloat16": 2**-3}
"""Part of a scale's largest logit by which that of a token that differs may be off, some 30 steps of rounding in half."""


@dataclass(frozen=True)
class ClassVerdict:
    """One prompt class: tokens that differ by scale, and the largest difference of codes and pixels.

    margin: the widest of a token, see `Trace`; None where the loop does not say.
    """

    prompt_class: str
    images: int
    wrong_tokens: dict[int, int]
    tokens: dict[int, int]
    codes_error: float
    image_error: float
    tolerance: float
    most_flips: float
    margin: float | None
    widest_margin: float

    @property
    def first_wrong_scale(self) -> int | None:
        return next((scale for scale, wrong in self.wrong_tokens.items() if wrong), None)

    @property
    def passed(self) -> bool:
        close = self.margin is None or self.margin <= self.widest_margin
        return close and self.flips <= self.most_flips and self.image_error <= self.tolerance

    @property
    def flips(self) -> float:
        """Part of all tokens that differ."""
        return sum(self.wrong_tokens.values()) / sum(self.tokens.values())

    def __str__(self) -> str:
        scale = self.first_wrong_scale
        if scale is not None:
            found = (
                f"scale {scale} is the first that differs, in {self.wrong_tokens[scale]} of {self.tokens[scale]} tokens, "
                f"all scales in {self.flips:.2%} (at most {self.most_flips:.2%})"
            )
            if self.margin is not None:
                much = f"more than {MARGINS[-1]:.2%}" if self.margin == np.inf else f"up to {self.margin:.2%}"
                found += f", by {much} of the largest logit (at most {self.widest_margin:.2%})"
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
    session: Session, tolerance: float | None = None, on_scale: Callable[[int, int], None] | None = None
) -> Verdict:
    """Replay the golden trace of every prompt class.

    Args:
        session: a bundle on a target.
        tolerance: largest difference of a pixel that passes; default: `IMAGE_TOLERANCE` of the bundle's precision.
        on_scale: called with (scales done, scales in all), for each prompt class anew.

    Raises:
        BundleError: the bundle has no golden trace, or an incomplete one.
    """
    return Verdict(tuple(_verify_class(session, name, tolerance, on_scale) for name in session.prompt_classes))


def _verify_class(
    session: Session, prompt_class: str, tolerance: float | None, on_scale: Callable[[int, int], None] | None
) -> ClassVerdict:
    bundle = session.bundle
    precision = bundle.manifest.precision

    def golden(name: str) -> Array:
        if f"{prompt_class}/{name}" not in bundle.golden:
            raise BundleError(f"{bundle.root}: its golden trace has no {prompt_class}/{name}; export it again")
        return bundle.golden[f"{prompt_class}/{name}"]

    seeds = [int(seed) for seed in golden("seeds")]
    expected = {}
    for step in bundle.manifest.schedules[prompt_class].steps:
        expected[step.scale] = tokens = golden(f"tokens_{step.scale}")
        if tokens.shape[:2] != (len(seeds), step.tokens):
            raise BundleError(
                f"{bundle.root}: its golden tokens of scale {step.scale} are {list(tokens.shape)}, the schedule has "
                f"{step.tokens} for each of {len(seeds)} images; export it again"
            )
    if bundle.manifest.condition.kind == "label":
        labels = [int(label) for label in golden(Names.LABELS.value)]
        result = session.generate(labels, seeds, follow=expected, on_scale=on_scale)
    else:
        classes = (prompt_class,) * len(seeds)
        text = TextFeatures(golden(Names.TEXT_FEATURES.value), golden(Names.TEXT_LENGTHS.value), classes)
        result = session.generate(seeds=seeds, text=text, follow=expected, on_scale=on_scale)

    wrong, count = {}, {}
    for scale, tokens in expected.items():
        found = np.stack([of_image[scale] for of_image in result.tokens])
        wrong[scale] = int((found != tokens).sum())
        count[scale] = tokens.size
    return ClassVerdict(
        prompt_class=prompt_class,
        images=len(seeds),
        wrong_tokens=wrong,
        tokens=count,
        codes_error=_worst(result.codes, golden("codes")),
        image_error=_worst(result.images, golden("image")),
        tolerance=IMAGE_TOLERANCE[precision] if tolerance is None else tolerance,
        most_flips=MOST_FLIPS[precision],
        margin=max((float(values.max()) for of_image in result.margins for values in of_image.values()), default=None),
        widest_margin=WIDEST_MARGIN[precision],
    )


def _worst(found: Array, expected: Array) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max())
