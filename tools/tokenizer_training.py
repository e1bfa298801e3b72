"""What training a tokenizer takes, whichever it is: the options, the loss of a picture, the stages.

`train_vqvae.py` and `train_bsq_vae.py` begin as plain autoencoders and go on with their quantisers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.2, -1.2, 0.0), (0.6, 0.6, -1.2))
"""Lightness, red against green, yellow against blue: without this weight, colours were the last thing learned."""


def slopes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return maps[..., :, 1:] - maps[..., :, :-1], maps[..., 1:, :] - maps[..., :-1, :]


class ReconstructionLoss:
    """L1 at full, half, quarter and eighth size, and twice the L1 of gradients at the first two, in opponent colours.

    Pictures `[B, 3, h, w]` in [-1, 1]. Gradients keep edges sharp, small sizes keep areas right.
    """

    def __init__(self, device: torch.device) -> None:
        self.mix = torch.tensor(_OPPONENT, device=device).view(3, 3, 1, 1)

    def __call__(self, made: Tensor, goal: Tensor) -> Tensor:
        """Return a scalar."""
        made, goal = F.conv2d(made, self.mix), F.conv2d(goal, self.mix)
        loss = F.l1_loss(made, goal)
        for size in range(4):
            if size:
                made, goal = F.avg_pool2d(made, 2), F.avg_pool2d(goal, 2)
                loss = loss + F.l1_loss(made, goal)
            if size < 2:
                pairs = zip(slopes(made), slopes(goal), strict=True)
                loss = loss + 2.0 * torch.stack([F.l1_loss(a, b) for a, b in pairs]).sum()
        return loss


def options(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of both scripts, with a script's own `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--plain-share", type=float, help="of the time, before anything is quantised")
    parser.add_argument("--size", type=int, default=256, help="edge of the pictures")
    parser.add_argument("--lot", type=int, default=768, help="pictures drawn at a time")
    parser.add_argument("--judged", type=int, default=480)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(**defaults)
    return parser


class Stages:
    """Steps of training, whose forward and backward are captured anew in each stage on a GPU.

    Args:
        draw: pictures `[count, 3, h, w]` in [-1, 1], fresh ones.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        clock: training.Clock,
        optimiser: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        draw: Callable[[int], Tensor],
    ) -> None:
        self.name, self.args, self.clock = name, args, clock
        self.optimiser, self.parameters = optimiser, parameters
        self.on_gpu = clock.team.device.type == "cuda"
        self.pool = training.Pool(lambda count: (draw(count),), args.lot, args.lot, 1.0, 50 + clock.step)

    def take(self) -> Tensor:
        """The next batch."""
        return self.pool.take(self.args.batch)[0].contiguous(memory_format=torch.channels_last)

    def begin(self, step: Callable[[Tensor], Any]) -> None:
        """A stage with this forward and backward of a batch; setting it up is not training time."""
        before = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        if self.on_gpu:
            step = training.captured(step, self.take())
            torch.cuda.synchronize()
        self.clock.team.say(f"{self.name}: stage ready in {time.perf_counter() - before:.1f} s")
        self.clock.spent = self.clock.share * 60 * self.args.minutes
        self.clock.restart()
        self._step, self._since, self._first = step, time.perf_counter(), self.clock.step

    def run(self) -> Any:
        """One step; what the stage's function returned."""
        for group in self.optimiser.param_groups:
            group["lr"] = training.cosine(self.clock.share, self.args.lr, warmup=0.02)
        self.optimiser.zero_grad(set_to_none=not self.on_gpu)  # a captured graph adds to the gradients it knows
        result = self._step(self.take())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        return result

    def pictures_per_second(self) -> float:
        """Since the stage began."""
        return (self.clock.step - self._first) * self.args.batch / max(1e-9, time.perf_counter() - self._since)
