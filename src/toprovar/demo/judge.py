"""The judge of the text demo: what a picture shows, field by field, against what its caption asked for.

A `Classifier` of six heads that was trained on drawn scenes only (tools/train_judge.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from toprovar.demo.classifier import Classifier, load_classifier
from toprovar.errors import CheckpointError

__all__ = ["FIELDS", "CaptionJudge", "Judgement"]

FIELDS: tuple[str, ...] = ("count", "colour", "texture", "shape", "floor_colour", "floor_texture")
"""What is judged, in the order of `scenes.fields`."""

_WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"


class Judgement(NamedTuple):
    """fields `[N, 6]` int64, as `scenes.fields` gives them; confidence `[N, 6]`, probability of each answer."""

    fields: Tensor
    confidence: Tensor


class CaptionJudge:
    """Reads a scene's six fields off pictures."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @classmethod
    def load(cls, path: str | Path = _WEIGHTS, *, device: torch.device | str = "cpu") -> CaptionJudge:
        """Load shipped weights.

        Raises:
            CheckpointError: the file is missing, damaged, or another net's.
        """
        classifier = load_classifier(path)
        if set(classifier.heads) != set(FIELDS):
            raise CheckpointError(f"{path}: judges {', '.join(classifier.heads)}, expected {', '.join(FIELDS)}")
        return cls(classifier.to(device))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 64) -> Judgement:
        """Pictures `[N, 3, 256, 256]` RGB in [0, 1] -> `Judgement`, `batch` pictures at a time."""
        parts = []
        for part in images.split(batch):
            logits = self.classifier(part)
            parts.append([logits[name].softmax(1).max(1) for name in FIELDS])
        answers = torch.cat([torch.stack([head.indices for head in part], 1) for part in parts])
        confidence = torch.cat([torch.stack([head.values for head in part], 1) for part in parts])
        return Judgement(answers, confidence)
