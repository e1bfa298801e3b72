"""How much of what was asked for the demo's judges see in pictures: one number a picture, for floors and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toprovar.demo.captions import parse
from toprovar.demo.classifier import load_classifier
from toprovar.demo.judge import CaptionJudge
from toprovar.demo.scenes import fields

if TYPE_CHECKING:
    from toprovar.exporter.search import Judge, Picture

__all__ = ["Accuracy", "caption_accuracy", "judge_of", "label_accuracy"]

Accuracy = Callable[[Tensor, Sequence[int | str]], Tensor]
"""Pictures `[B, 3, h, w]` in [0, 1] and their prompts -> `[B]` float64 on the CPU, the share that is right."""

_WEIGHTS = Path(__file__).parent / "weights"


def label_accuracy(weights: Path = _WEIGHTS, device: torch.device | str = "cpu") -> Accuracy:
    """Whether the picture shows its label, 0 or 1.

    Raises:
        CheckpointError: this installation lacks the judge.
    """
    judge = load_classifier(weights / "classifier.safetensors").to(device)

    def accuracy(images: Tensor, prompts: Sequence[int | str]) -> Tensor:
        asked = torch.tensor([int(prompt) for prompt in prompts])
        return (judge.judge(images)["label"].cpu() == asked).double()

    return accuracy


def caption_accuracy(weights: Path = _WEIGHTS, device: torch.device | str = "cpu") -> Accuracy:
    """Share of the caption's six fields (count, colour, texture, shape, floor's colour and texture) that the picture shows.

    Raises:
        CheckpointError: this installation lacks the judge.
    """
    judge = CaptionJudge.load(weights / "judge.safetensors", device=device)

    def accuracy(images: Tensor, prompts: Sequence[int | str]) -> Tensor:
        asked = torch.from_numpy(fields([parse(str(prompt)) for prompt in prompts]))
        return (judge.judge(images).fields.cpu() == asked).double().mean(1)

    return accuracy


def judge_of(backbone: str) -> Callable[[str], Judge]:
    """What judges the embedded model of a backbone: a function of the device, so that nothing is loaded before it is needed."""

    def load(device: str) -> Judge:
        accuracy = (label_accuracy if backbone == "var" else caption_accuracy)(device=device)

        def judge(images: Tensor, pictures: Sequence[Picture]) -> Tensor:
            return accuracy(images, [picture.prompt for picture in pictures])

        return judge

    return load
