"""Pictures and maps as data URIs: a page carries them inside. Needs Pillow (extra `run`)."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from toprovar.errors import FormatError
from toprovar.runtime.pictures import pillow
from toprovar.runtime.target import Array

__all__ = ["COLOURS", "difference", "heat_uri", "mask_uri", "picture_uri", "pixels"]

COLOURS = ("#fde725", "#aadc32", "#5cc863", "#27ad81", "#21908d", "#2c718e", "#3b518b", "#472c7a", "#440154")
"""Viridis from its bright end: low entropy is bright. Even in lightness, and safe for colour-blind readers."""

_QUALITY = 90
"""Of WebP: nothing to be seen of it in a page; figures come from the exact pictures."""


def pixels(stored: Array) -> Array:
    """A picture as evidence stores it, `[h, w, 3]` uint8 or the bytes of a PNG file `[n]` -> `[h, w, 3]` uint8.

    Raises:
        FormatError: it is neither.
    """
    if stored.dtype == np.uint8 and stored.ndim == 3 and stored.shape[2] == 3:
        return stored
    if stored.dtype == np.uint8 and stored.ndim == 1:
        try:
            with pillow().open(io.BytesIO(stored.tobytes()), formats=["PNG"]) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise FormatError("evidence: a picture among its arrays is not a PNG file") from error
    raise FormatError(f"evidence: a picture is {stored.dtype} {list(stored.shape)}; expected uint8 [h, w, 3] or [n]")


def difference(first: Array, second: Array, gain: int = 4) -> Array:
    """How far two pictures `[h, w, 3]` uint8 are apart, `gain` times, black where they are equal."""
    far = np.abs(first.astype(np.int16) - second) * gain
    return far.clip(0, 255).astype(np.uint8)


def picture_uri(picture: Array) -> str:
    """`[h, w, 3]` uint8 -> data URI of a WebP file."""
    return _uri(pillow().fromarray(np.ascontiguousarray(picture)), "WEBP", quality=_QUALITY, method=4)


def heat_uri(values: Array) -> str:
    """A map `[h, w]` of entropies -> data URI of a PNG with a pixel per token, from bright (least) to dark (most)."""
    values = values.astype(np.float64)
    low, high = np.quantile(values, (0.02, 0.98))
    share = ((values - low) / (high - low)).clip(0, 1) if high > low else np.full(values.shape, 0.5)
    image = pillow().fromarray((share * 255 + 0.5).astype(np.uint8)).convert("P")
    image.putpalette(_palette().tobytes())
    return _uri(image, "PNG", optimize=True)


def mask_uri(share: Array) -> str:
    """How much of each token is hidden, `[h, w]` in 0 to 1 -> data URI of a PNG with a pixel per token, black behind glass."""
    alpha = (share.clip(0, 1) * 215 + 0.5).astype(np.uint8)
    black = np.zeros((*share.shape, 4), np.uint8)
    black[..., 3] = alpha
    return _uri(pillow().fromarray(black), "PNG", optimize=True)


def _palette() -> Array:
    """256 colours `[256, 3]` uint8 between those of `COLOURS`."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    return (
        np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], -1).round().astype(np.uint8)
    )


def _uri(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
