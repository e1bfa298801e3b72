"""The text demo's BSQ-VAE as it trains: the VQVAE's free encoder, a multi-scale binary quantiser without kernels of its
own, the backbone's decoder.

The shipped file holds the decoder alone: signs need no codebook, and generation no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from picture_vq import Encoder, begin_as_enlarging, quicken
from torch import Tensor, nn

from toprovar.backbones.resample import area_matrix, bilinear_matrix
from toprovar.backbones.schedules import schedule
from toprovar.demo.embedded_text import BITS, RESOLUTION, new_vae

EDGES = tuple(h for h, _ in schedule("1.0", RESOLUTION).grids)
"""Edges of the square token grids: 2521 tokens, two thirds of them in the last two scales."""


class Bits(NamedTuple):
    """labels `[B, L, d]` bool. inputs `[B, L - 1, d]` fp32: what the transformer is fed. codes `[B, d, P, P]` fp32."""

    labels: Tensor
    inputs: Tensor
    codes: Tensor


class BitScales:
    """`bsq_vae.BitQuantizer` by matrices: interpolation kernels compute the same and cost several times as much."""

    def __init__(self, device: torch.device, edges: Sequence[int] = EDGES) -> None:
        final = edges[-1]
        self.edges = tuple(edges)
        self.down = [area_matrix(n, final).to(device) for n in edges]
        self.up = [bilinear_matrix(final, n).to(device) for n in edges]
        self.next = [bilinear_matrix(n, final).to(device) for n in edges]

    @torch.no_grad()
    def __call__(self, features: Tensor, flip: Tensor | None = None, last: Tensor | None = None) -> Bits:
        """Code `features [B, d, P, P]` scale by scale.

        Args:
            flip: `[B]`, each picture's chance that a bit is wrong in what later scales see (bitwise self-correction):
                their labels then repair it.
            last: `[B]`, the last scale whose codes count in `codes`; all by default.
        """
        features = features.float()
        magnitude = features.shape[1] ** -0.5
        seen = torch.zeros_like(features)
        counted = seen
        labels, inputs = [], []
        for s, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            bits = down @ ((features - seen) @ down.T) > 0
            labels.append(bits.flatten(2))
            if flip is not None:
                bits = bits ^ (torch.rand(bits.shape, device=bits.device) < flip.view(-1, 1, 1, 1))
            codes = torch.where(bits, magnitude, -magnitude)
            seen = seen + up @ (codes @ up.T)
            counted = seen if last is None else torch.where((last >= s).view(-1, 1, 1, 1), seen, counted)
            if s + 1 < len(self.edges):
                resize = self.next[s + 1]
                inputs.append((resize @ (seen @ resize.T)).flatten(2))
        return Bits(torch.cat(labels, 2).transpose(1, 2), torch.cat(inputs, 2).transpose(1, 2), counted)


class PictureBsq(nn.Module):
    """The backbone's decoder and the encoder it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(BITS)
        self.decoder = new_vae().decoder
        begin_as_enlarging(self.decoder)
        quicken(self.decoder)


def load_picture_bsq(path: Path, device: torch.device) -> PictureBsq:
    """Return the frozen tokenizer in a checkpoint of train_bsq_vae.py: its averaged weights."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = PictureBsq()
    model.load_state_dict(saved["average"])
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
