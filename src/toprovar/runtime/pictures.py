"""Pictures to PNG files, one by one or as a grid with captions. Needs Pillow (extra `run`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toprovar.errors import TargetError
from toprovar.profiles.files import write_bytes
from toprovar.runtime.target import Array

__all__ = ["grid", "pillow", "png", "save", "to_bytes"]

_GAP = 6
_CAPTION = 16
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)


def to_bytes(image: Array) -> Array:
    """RGB `[3, height, width]` in [0, 1] -> `[height, width, 3]` uint8, rounded to nearest."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def png(pixels: Array) -> bytes:
    """`[height, width, 3]` uint8 as a PNG file."""
    buffer = io.BytesIO()
    pillow().fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path | str, pixels: Array) -> None:
    """Write `[height, width, 3]` uint8 as a PNG file, atomically."""
    write_bytes(path, png(pixels))


def grid(rows: Sequence[Sequence[Array]], row_captions: Sequence[str] = (), captions: Sequence[str] = ()) -> Array:
    """Pictures side by side.

    Args:
        rows: pictures `[3, height, width]` in [0, 1], all of one size; rows may have different lengths.
        row_captions: one per row, written above it.
        captions: one per column, written above the first row.

    Returns: `[height, width, 3]` uint8.
    """
    _, height, width = rows[0][0].shape
    columns = max(len(row) for row in rows)
    top = _CAPTION if captions else 0
    pitch = height + _GAP + (_CAPTION if row_captions else 0)
    size = (columns * (width + _GAP) + _GAP, top + len(rows) * pitch + _GAP)
    sheet = pillow().new("RGB", size, _BACKGROUND)
    draw = _draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((_GAP + column * (width + _GAP), 3), caption, fill=_INK)
    for index, row in enumerate(rows):
        y = top + index * pitch + _GAP
        if row_captions:
            draw.text((_GAP, y), row_captions[index], fill=_INK)
            y += _CAPTION
        for column, image in enumerate(row):
            sheet.paste(pillow().fromarray(to_bytes(image)), (_GAP + column * (width + _GAP), y))
    return np.asarray(sheet)


def pillow() -> Any:
    """Pillow's ``Image``; TargetError with what to do where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise TargetError("pictures: Pillow is not installed; pip install 'toprovar[run]'") from error
    return Image


def _draw(sheet: Any) -> Any:
    from PIL import ImageDraw

    return ImageDraw.Draw(sheet)
