"""How far two pictures, or two sets of pictures, are apart to a small net that knows the demo's pictures.

The distance is that of LPIPS in its unweighted form (Zhang et al. 2018, arXiv:1801.03924, section 3): maps of every
stage, normalised over channels, squared difference, mean over cells. Trained by tools/train_perceptual.py to name what
pictures of both demos show and how much they are blurred. Comparable only among pictures judged by the same weights:
neither LPIPS nor FID of the literature.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toprovar.demo.classifier import Residual, halving, read_weights
from toprovar.errors import CheckpointError

__all__ = ["PerceptualNet"]

_WEIGHTS = Path(__file__).parent / "weights" / "perceptual.safetensors"


class PerceptualNet(nn.Module):
    """Four halvings of `[N, 3, h, w]` RGB in [0, 1]; `widths` are their channels."""

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 72, 96)) -> None:
        super().__init__()
        self.widths = widths
        stages = [halving(3, widths[0])]
        for narrow, wide in pairwise(widths):
            stages.append(nn.Sequential(halving(narrow, wide), Residual(wide)))
        self.stages = nn.ModuleList(stages)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps of every stage, `[N, width, h / 2, w / 2]` first."""
        x, found = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def features(self, images: Tensor, batch: int = 32) -> Tensor:
        """Mean of the last maps, `[N, widths[-1]]`, `batch` pictures at a time: what `frechet_distance` takes."""
        return torch.cat([self.maps(part)[-1].mean((2, 3)) for part in images.split(batch)])

    def distance(self, a: Tensor, b: Tensor, batch: int = 32) -> Tensor:
        """Perceptual distance of each pair of pictures, `[N, 3, h, w]` twice -> `[N]`; 0 for equal ones."""
        parts = []
        for one, other in zip(a.split(batch), b.split(batch), strict=True):
            pairs = zip(self.maps(one), self.maps(other), strict=True)
            by_stage = [(F.normalize(x) - F.normalize(y)).square().sum(1).mean((1, 2)) for x, y in pairs]
            parts.append(torch.stack(by_stage).mean(0))
        return torch.cat(parts)

    @classmethod
    def load(cls, path: str | Path = _WEIGHTS) -> PerceptualNet:
        """Load shipped weights for evaluation; sizes are read from the tensors.

        Raises:
            CheckpointError: the file is missing, damaged, or another net's.
        """
        state = read_weights(path)
        try:
            names = ("stages.0.0.weight", *(f"stages.{i}.0.0.weight" for i in (1, 2, 3)))
            a, b, c, d = (int(state[name].shape[0]) for name in names)
            net = cls((a, b, c, d))
            net.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not the demo's perceptual net ({error}); reinstall toprovar") from error
        return net.eval().requires_grad_(False)
