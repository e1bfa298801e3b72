"""What the training scripts of the demo checkpoints share: processes, clock, schedule, averages, checkpoints, pictures.

Every script trains for a number of `--minutes`; the learning rate follows the share of that time that has passed, so a
slower machine takes fewer steps and still ends with a finished schedule. `--steps` fixes the steps instead and makes a
run repeatable. Several processes (torchrun) share a batch by averaging gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if "LOCAL_RANK" in os.environ:  # each process sees its own GPU only, as cuda:0, so that all share compiled kernels
    _visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    _own = int(os.environ["LOCAL_RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible[_own] if _own < len(_visible) and _visible[0] else str(_own)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


class Team:
    """The processes of this run: one per GPU under torchrun, else this one alone."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", 0)
            torch.backends.cudnn.allow_tf32 = False  # what autocast leaves in fp32 is small, and decides tokens
            torch.backends.cudnn.benchmark = True
        else:
            self.device = torch.device("cpu")
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.talk = dist.new_group(backend="gloo")  # small decisions, without waiting for the GPU

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Print from the leading process, at once."""
        if self.leads:
            print(*words, flush=True)

    def agree(self, value: float) -> float:
        """Return the leading process's number in all of them."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0, group=self.talk)
        return float(box)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(whole)
        whole /= self.size
        parts = whole.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Copy the leading process's tensors to all of them."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def autocast(self, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
        """bf16 where there is a GPU, plain fp32 elsewhere; without `cache` where a CUDA graph is captured."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=cache)


class Clock:
    """Share of the training that is done, by minutes or by steps; all processes read the same."""

    def __init__(self, team: Team, minutes: float, steps: int, every: int = 10) -> None:
        self.team, self.minutes, self.steps, self.every = team, minutes, steps, every
        self.step, self.spent, self.share, self._base, self._rate = 0, 0.0, 0.0, 0.0, 0.0
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Count time from now, keeping what an earlier run spent: called behind compilation and after a resume."""
        self._start, self._base = time.perf_counter(), self.spent

    def tick(self) -> bool:
        """Count one step; return whether there is another to do."""
        self.step += 1
        if self.steps:
            self.share = self.step / self.steps
        elif self.step % self.every == 0:
            if self.team.device.type == "cuda":
                torch.cuda.synchronize()  # or the clock would run ahead of the work
            self.spent = self.team.agree(self._base + time.perf_counter() - self._start)
            share = self.spent / (60 * self.minutes)
            self._rate = max(0.0, (share - self.share)) / self.every
            self.share = share
        else:
            self.share += self._rate if self.step > self.every else 0.0
        return self.share < 1.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        self.spent = self._base + time.perf_counter() - self._start
        return {"step": self.step, "spent": self.spent}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.step, self.spent = int(state["step"]), state["spent"]
        self.share = (
            self.step / self.steps if self.steps else self.spent / (60 * self.minutes)
        )  # there may be more time
        self.restart()


def cosine(share: float, peak: float, warmup: float = 0.04, floor: float = 0.01) -> float:
    """Learning rate: linear to `peak` over the first `warmup` of the run, then a cosine down to `floor * peak`."""
    if share < warmup:
        return peak * (share / warmup * 0.98 + 0.02)
    done = min(1.0, (share - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """Exponential moving average of weights; young averages forget faster."""

    def __init__(self, named: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.count = decay, 0
        self.names, self.live = list(named), [p.detach() for p in named.values()]
        self.mean = [p.clone().float() for p in self.live]

    def update(self) -> None:
        """Take in the weights as they are now."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return name -> averaged weight."""
        return dict(zip(self.names, self.mean, strict=True))


def adamw(
    parameters: Sequence[nn.Parameter], device: torch.device, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases, gains and embeddings of one row alone."""
    matrices = [p for p in parameters if p.squeeze().dim() >= 2]
    vectors = [p for p in parameters if p.squeeze().dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type == "cuda")


class Muon:
    """Momentum whose update of every matrix is made orthogonal, which learns more in as many steps than AdamW.

    For the matrices inside blocks only; `lr` is the spectral size of an update. Matrices of one shape are handled
    together. Source: K. Jordan et al., "Muon" (2024), with its coefficients of the Newton-Schulz iteration.

    Args:
        matrices: parameters `[rows, columns]`, each with the number of pieces its rows hold (q, k and v are three).
    """

    def __init__(self, matrices: Sequence[tuple[nn.Parameter, int]], momentum: float = 0.95) -> None:
        self.momentum, self.lr = momentum, 0.0
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter, pieces in matrices:
            rows, columns = parameter.shape
            self.groups.setdefault((pieces, rows // pieces, columns), []).append(parameter)
        self.velocity = {
            shape: torch.zeros(len(group) * shape[0], *shape[1:], device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix by `lr` along its orthogonalised momentum (Nesterov's)."""
        for shape, group in self.groups.items():
            gradient = torch.cat([p.grad.view(shape) for p in group if p.grad is not None])
            velocity = self.velocity[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(velocity, self.momentum))
            update *= -self.lr * max(1.0, shape[1] / shape[2]) ** 0.5
            torch._foreach_add_(group, [u.reshape(p.shape) for p, u in zip(group, update.split(shape[0]), strict=True)])

    def state(self) -> list[Tensor]:
        """What a checkpoint keeps."""
        return list(self.velocity.values())

    def load(self, state: Sequence[Tensor]) -> None:
        """Go on from a checkpoint."""
        for place, saved in zip(self.velocity.values(), state, strict=True):
            place.copy_(saved)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Return `[n, rows, columns]` with all singular values drawn near 1, by a quintic Newton-Schulz iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    torch.save(state, half)
    half.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return a training state, or None where there is none yet."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Write safetensors (floats as fp16) and return the size in bytes."""
    from safetensors.torch import save_file

    tensors = {k: (v.half() if v.is_floating_point() else v).detach().cpu().contiguous() for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    save_file(tensors, str(half), metadata=metadata)
    half.chmod(0o644)
    half.replace(path)
    return path.stat().st_size


def save_sheet(path: Path, pictures: Tensor, columns: int, edge: int | None = None) -> None:
    """Write `[n, 3, h, w]` in [0, 1] as one PNG of `columns`, each picture shrunk to `edge` pixels."""
    from PIL import Image

    pictures = pictures.detach().float().cpu().clamp(0, 1)
    if edge is not None and edge != pictures.shape[-1]:
        pictures = nn.functional.interpolate(pictures, (edge, edge), mode="area")
    rows = [torch.cat(list(pictures[i : i + columns]), dim=-1) for i in range(0, len(pictures), columns)]
    rows[-1] = nn.functional.pad(rows[-1], (0, rows[0].shape[-1] - rows[-1].shape[-1]), value=1.0)
    array = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_json(path: Path, facts: dict[str, Any]) -> None:
    """Write the facts a model card is made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def machine(processes: int = 1) -> str:
    """Name the machine as the model card does."""
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, torch {torch.__version__}"


def captured(step: Callable[..., Any], *examples: Tensor) -> Callable[..., Any]:
    """Return `step(*tensors)` as a replayed CUDA graph; inputs keep their shapes, results are the same tensors each time.

    A step that calls `backward` adds to the gradients that are there when it is captured: call it with gradients unset,
    and afterwards clear them with `zero_grad(set_to_none=False)`.
    """
    held = [example.clone() for example in examples]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*held)

    def replay(*tensors: Tensor) -> Any:
        for place, tensor in zip(held, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay


class Seeds:
    """Training seeds that no other process or step uses: `take(n)` returns the next n of this process."""

    def __init__(self, team: Team, start: int = 0) -> None:
        self.next, self.rank, self.size = start, team.rank, team.size

    def take(self, count: int) -> np.ndarray:
        """Return `[count]` int64. Processes own alternate runs of 256 seeds, the unit in which numbers are drawn."""
        index = np.arange(self.next, self.next + count, dtype=np.int64)
        self.next += count
        return (index // 256 * self.size + self.rank) * 256 + index % 256


class Pool:
    """Ready training rows on the device, each used about `reuse` times before a fresh one takes its place.

    Pictures are drawn and encoded in larger lots than a training batch, which keeps the GPU busy, and used more than
    once, because encoding costs a good part of a training step.

    Args:
        make: count -> tuple of tensors with that many rows.
        rows: size of the pool.
        lot: rows made at a time.
        reuse: how often a row is used on average.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], rows: int, lot: int, reuse: float, seed: int) -> None:
        self.make, self.lot, self.reuse = make, lot, reuse
        first = make(lot)
        self.store = [torch.empty(rows, *t.shape[1:], dtype=t.dtype, device=t.device) for t in first]
        self.rows, self.at, self.filled, self.owed = rows, 0, 0, 0.0
        self._put(first)
        while self.filled < rows:
            self._put(make(lot))
        self.generator = torch.Generator(device=first[0].device).manual_seed(seed)

    def _put(self, rows: tuple[Tensor, ...]) -> None:
        count = min(len(rows[0]), self.rows - self.at)
        for store, fresh in zip(self.store, rows, strict=True):
            store[self.at : self.at + count] = fresh[:count]
        self.at = (self.at + count) % self.rows
        self.filled = min(self.rows, self.filled + count)

    def take(self, count: int) -> list[Tensor]:
        """Return `count` random rows of every tensor."""
        self.owed += count / self.reuse
        while self.owed >= self.lot:
            self.owed -= self.lot
            self._put(self.make(self.lot))
        index = torch.randint(self.rows, (count,), generator=self.generator, device=self.store[0].device)
        return [store[index] for store in self.store]
