"""The embedded checkpoint as a source of exports."""

from __future__ import annotations

from pathlib import Path

from toprovar.demo.labels import CLASSES, PROMPT_CLASS
from toprovar.errors import CheckpointError
from toprovar.exporter.source import SamplingWish, Source
from toprovar.profiles.manifest import Label

__all__ = ["embedded_source"]

SAMPLING = SamplingWish(guidance=1.5, top_k=600, top_p=0.95)
"""What evaluation of the checkpoint found best; see its model card."""


def embedded_source() -> Source:
    """The checkpoint that comes with the package.

    Raises:
        CheckpointError: this installation lacks it.
    """
    folder = Path(__file__).parent / "weights"
    labels = tuple(Label(name=name, prompt_class=PROMPT_CLASS[name]) for name in CLASSES)
    source = Source("var-demo", "var", folder / "var.safetensors", folder / "vae.safetensors", labels, SAMPLING)
    for path in (source.checkpoint, source.vae):
        if not path.is_file():
            raise CheckpointError(f"{path}: the embedded demo checkpoint is not installed; install toprovar again")
    return source
