"""The judge of the demo: a small convolutional net that names what a generated picture shows.

It was trained on drawn pictures only (tools/train_classifier.py), never on generated ones, so what it recognises in a
sample is what the sample has of the real thing. Its pooled features also serve a Frechet distance between sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.errors import CheckpointError

__all__ = ["Classifier", "Residual", "frechet_distance", "halving", "load_classifier", "read_weights"]

_EDGE = 128  # pixels it looks at; pictures are shrunk to it by area


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut, `[B, width, h, w]` -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


def halving(width_in: int, width: int) -> nn.Sequential:
    """`[B, width_in, h, w]` -> `[B, width, h/2, w/2]`: convolution, batch norm, ReLU."""
    conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Classifier(nn.Module):
    """Picture `[B, 3, h, w]` RGB in [0, 1] -> logits of each head `[B, n]`.

    Args:
        heads: name -> number of answers; {"label": 12} for the twelve classes.
        widths: channels of the four halvings.
    """

    def __init__(self, heads: Mapping[str, int], widths: tuple[int, int, int, int] = (24, 48, 96, 128)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.body = nn.Sequential(halving(3, a), halving(a, b), Residual(b), halving(b, c), Residual(c), halving(c, d))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * d, count) for name, count in heads.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """Pooled features `[B, 2 * width]`: mean and maximum of the last maps."""
        if pictures.shape[-1] != _EDGE or pictures.shape[-2] != _EDGE:
            pictures = F.adaptive_avg_pool2d(pictures, _EDGE)
        maps = self.body(pictures * 2 - 1)
        return torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), dim=1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def judge(self, pictures: Tensor, batch: int = 64) -> dict[str, Tensor]:
        """Most likely answer of every head, `[B]` int64, `batch` pictures at a time."""
        parts = [self(part) for part in pictures.split(batch)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in self.heads}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a shipped safetensors file, floats in fp32.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        return {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    except Exception as error:  # the reader raises its own kinds for a truncated or foreign file
        raise CheckpointError(f"{path}: no safetensors file ({error}); reinstall toprovar") from error


def load_classifier(path: str | Path) -> Classifier:
    """Load shipped weights; sizes are read from the tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of these classifiers.
    """
    state = read_weights(path)
    heads = {k.split(".")[1]: v.shape[0] for k, v in state.items() if k.startswith("heads.") and k.endswith("weight")}
    try:
        a, b, c, d = (int(state[f"body.{i}.0.weight"].shape[0]) for i in (0, 1, 3, 5))
        classifier = Classifier(heads, (a, b, c, d))
        classifier.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"classifier {path}: not a demo classifier ({error}); reinstall toprovar") from error
    return classifier.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets `[n, f]`, in float64.

    Comparable only among sets judged by the same classifier: this is not the FID of the literature.
    """
    a, b = a.double(), b.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (a, b))
    # The eigenvalues of cov(a) cov(b) are the squared singular values of a b', so no root of a singular matrix is taken; the
    # triangles of a and b have the same ones and are small.
    triangle_a, triangle_b = (torch.linalg.qr(part, mode="r").R for part in (a, b))
    cross = torch.linalg.svdvals(triangle_a @ triangle_b.T).sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * cross)
