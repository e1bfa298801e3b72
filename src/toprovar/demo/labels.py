"""Names of the demo checkpoint's classes. Imports nothing, so that a command line can list them at once."""

from __future__ import annotations

__all__ = ["CLASSES", "PROMPT_CLASS", "PROMPT_CLASSES", "label_of"]

PROMPT_CLASSES: dict[str, tuple[str, ...]] = {
    "plain": ("gradient", "horizon", "glow", "dunes"),
    "object": ("disc", "square", "triangle", "star"),
    "texture": ("stripes", "checker", "dots", "bricks"),
}
"""Prompt class -> its classes, from coarse content to fine."""

CLASSES: tuple[str, ...] = tuple(name for names in PROMPT_CLASSES.values() for name in names)
"""Class names in the order of the checkpoint's labels; the label after the last is the unconditional one."""

PROMPT_CLASS: dict[str, str] = {name: group for group, names in PROMPT_CLASSES.items() for name in names}
"""Class name -> prompt class."""


def label_of(prompt: str) -> int:
    """Return the label of a class name or of a label written as a number.

    Raises:
        ValueError: the prompt is neither.
    """
    text = prompt.strip().lower()
    if text in CLASSES:
        return CLASSES.index(text)
    if text.isdigit() and int(text) < len(CLASSES):
        return int(text)
    valid = f"{', '.join(CLASSES)}, or 0..{len(CLASSES) - 1}"
    raise ValueError(f"prompt {prompt!r} is no class of the demo checkpoint; valid: {valid}")
