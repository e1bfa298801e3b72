"""The demo's networks as judges of a comparison of bundles (`toprovar.runtime.compare.Judges`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toprovar.demo.accuracy import caption_accuracy, label_accuracy
from toprovar.demo.classifier import frechet_distance
from toprovar.demo.labels import CLASSES
from toprovar.demo.perceptual import PerceptualNet
from toprovar.errors import InputError

__all__ = ["DemoJudges"]

Array = npt.NDArray[Any]


class DemoJudges:
    """Judges of one of the two demos.

    Args:
        takes_text: the text demo; else the class demo.

    Raises:
        CheckpointError: this installation lacks their weights.
    """

    def __init__(self, takes_text: bool) -> None:
        self._takes_text = takes_text
        self._accuracy = caption_accuracy() if takes_text else label_accuracy()
        self._net = PerceptualNet.load()

    @torch.no_grad()
    def distance(self, first: Array, second: Array) -> Array:
        """Perceptual distance of each pair of pictures, `[I]`."""
        found: Array = self._net.distance(_tensor(first), _tensor(second)).numpy()
        return found

    def accuracy(self, images: Array, captions: Sequence[str]) -> Array:
        """Share of its label or caption that each picture shows, `[I]`.

        Raises:
            InputError: a caption that the demo does not know.
        """
        try:
            prompts = list(captions) if self._takes_text else [CLASSES.index(name) for name in captions]
            found: Array = self._accuracy(_tensor(images), prompts).numpy()
        except ValueError as error:
            raise InputError(f"judges: the demo's networks judge the demos' own prompts only: {error}") from error
        return found

    @torch.no_grad()
    def frechet(self, first: Array, second: Array) -> float:
        """Frechet distance between the features of two sets of two or more pictures."""
        return frechet_distance(self._net.features(_tensor(first)), self._net.features(_tensor(second)))


def _tensor(images: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
