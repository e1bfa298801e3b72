"""The architectures, in readable PyTorch with one attention seam; they load the original checkpoints:
`load("var", "var_d16.pth", "vae_ch160v4096z32.pth")`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toprovar.errors import InputError

if TYPE_CHECKING:
    from toprovar.backbones.base import Backbone

__all__ = ["BACKBONES", "load"]

BACKBONES = ("var", "infinity")


def load(backbone: str, checkpoint: str | Path, vae: str | Path, **options: Any) -> Backbone:
    """Loads a model from its original checkpoints, its size inferred from them, in evaluation mode.

    Args:
        backbone: one of `BACKBONES`.
        checkpoint: the transformer: `.pth`, `.safetensors`, an index of shards, or a folder with one of them.
        vae: the tokenizer's file.
        options: of `load_<backbone>` in the module of that name: sampling, dtype, device, ...

    Raises:
        InputError: an unknown backbone.
        CheckpointError: a file that is missing, truncated, unsafe, of another backbone, or incomplete.
    """
    if backbone not in BACKBONES:
        raise InputError(f"backbone '{backbone}' is unknown: it is one of {', '.join(BACKBONES)}")
    module = import_module(f"toprovar.backbones.{backbone}")
    model: Backbone = getattr(module, f"load_{backbone}")(checkpoint, vae, **options)
    return model
