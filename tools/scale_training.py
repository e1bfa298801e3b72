"""What training a next-scale transformer takes, whichever model it is: attention, the parts of a batch, the loop.

A batch has three parts: whole pictures, pictures without their last 2 scales, and without their last 4. They cost a
third or less, and are worth as much where the layout is decided. `train_var.py` and `train_infinity.py` say what their
models add.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_LOSS_POWER = 0.35  # see scale_weights
_LEFT_OUT = (0, 2, 4)  # last scales that a picture of each part of a batch is trained without
_DROPPED = 0.1  # of the pictures are trained without their condition, for guidance

# ------------------------------------------------------------------------------------------------- attention and weights


def block_causal_mask(tokens: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return `[L, L]` bool: a token sees every token of its own and of earlier scales."""
    scale = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens)).to(device)
    return scale[:, None] >= scale[None, :]


def attend_by_scale(tokens: Sequence[int], device: torch.device, small: int = 160) -> Attend:
    """Block-causal attention without a mask where it costs: scales of many tokens run one call each over their past.

    The first scales (together at most `small` tokens) share one masked call. q, k, v: `[B, H, L, D]`, softmax scale 1.
    Training the demo on an H100 this way made 1029 pictures a second, FlexAttention with a block mask 827.
    """
    ends = list(accumulate(tokens))
    shared = max((end for end in ends if end <= small), default=ends[0])
    first = ends.index(shared) + 1
    mask = block_causal_mask(tokens[:first], device)
    cuts = [0, *ends]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head = F.scaled_dot_product_attention(
            q[:, :, :shared], k[:, :, :shared], v[:, :, :shared], attn_mask=mask, scale=1.0
        )
        parts = [head]
        for s in range(first, len(tokens)):
            a, b = cuts[s], cuts[s + 1]
            parts.append(F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=1.0))
        return torch.cat(parts, dim=2)

    return attend


def scale_weights(tokens: Sequence[int], power: float, device: torch.device) -> Tensor:
    """Return `[L]` loss weights, mean 1: a token of a scale with n tokens weighs n ** -power.

    Plain averaging (power 0) gives the first five scales together 3 % of the loss, too little for a short run to
    learn a picture's layout from.
    """
    weights = torch.cat([torch.full((n,), float(n) ** -power) for n in tokens]).to(device)
    return weights / weights.mean()


# -------------------------------------------------------------------------------------------------------------- training


def options(description: str, tokenizer: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of both scripts, with a script's own `defaults`; `tokenizer` is the script that trains --vae."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help=f"checkpoint of {tokenizer}")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, nargs=3, help="pictures of each part, a step and process")
    parser.add_argument("--lr", type=float, help="of AdamW")
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--pool", type=int)
    parser.add_argument("--lot", type=int, default=768)
    parser.add_argument("--reuse", type=float)
    parser.add_argument("--rehearse", action="store_true", help="time --steps, save nothing; no --vae needed")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; sets the seed."""
    args = parser.parse_args()
    if args.vae is None and not args.rehearse:
        parser.error("--vae is needed; it may be missing with --rehearse only")
    if args.rehearse:
        args.pool = args.lot
    torch.manual_seed(0)
    return args


@dataclass(frozen=True)
class Task:
    """What one model adds to the loop. P pictures of a part, N tokens of the scales that it is trained on."""

    name: str
    """Of the files."""
    unit: str
    """What a loss is told of: nats per token, or per bit."""
    model: nn.Module
    """All that is trained, and perhaps more."""
    trained: Mapping[str, nn.Parameter]
    matrices: Mapping[str, int]
    """What `training.Muon` trains of a block -> pieces that each holds; AdamW trains the others."""
    tokens: Sequence[int]
    """Of each scale."""
    make: Callable[[int], tuple[Tensor, ...]]
    """Training rows, as `training.Pool` takes them."""
    prepare: Callable[..., tuple[Tensor, ...]]
    """`(*rows, dropped)` -> rows as `nats` takes them; `dropped` says which are trained without their condition."""
    nats: Callable[..., Tensor]
    """`(*rows of a part, attend, N)` -> nats of each token, summed over the pictures, `[N]`."""
    ship: Callable[[], int]
    """Writes the model's weights, by then averaged; size in bytes."""
    facts: Mapping[str, Any]
    """More for the model card."""


def train(args: argparse.Namespace, team: training.Team, seeds: training.Seeds, task: Task) -> None:
    """Train, save and tell; goes on from the checkpoint of an interrupted run."""
    device, name = team.device, task.name
    parameters, first_seed = list(task.trained.values()), seeds.next
    team.same(parameters)
    torch.manual_seed(
        1000 + team.rank
    )  # from here on processes differ: in what is wrong in their inputs, not in weights
    counts = [len(task.tokens) - left_out for left_out in _LEFT_OUT]
    parts = [(attend_by_scale(task.tokens[:count], device), sum(task.tokens[:count])) for count in counts]
    pictures = torch.zeros(sum(task.tokens), device=device)  # that a token is seen of
    for size, (_, total) in zip(args.batch, parts, strict=True):
        pictures[:total] += size
    weights = scale_weights(task.tokens, _LOSS_POWER, device)
    matrices, others = split_parameters(task.trained, task.matrices)
    muon, optimiser = training.Muon(matrices), training.adamw(others, device, 0.02, (0.9, 0.95))
    average = training.Average(dict(task.trained), 0.998)

    def step(*rows: Tensor) -> Tensor:
        """Forward and backward of all parts of a batch: the nats of every token `[L]`."""
        nats = torch.zeros_like(pictures)
        with team.autocast(cache=not args.graph):
            split = [t.split(args.batch) for t in task.prepare(*rows)]
            for *own, (attend, total) in zip(*split, parts, strict=True):
                nats = nats + F.pad(task.nats(*own, attend, total), (0, len(nats) - total))
        nats = nats / pictures
        (nats * weights).mean().backward()
        return nats.detach()

    clock = training.Clock(team, args.minutes, args.steps)
    checkpoint = args.out / f"{name}.ckpt"
    saved = None if args.rehearse else training.load_checkpoint(checkpoint, device)
    if saved:
        task.model.load_state_dict(saved["model"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        muon.load(saved["muon"])
        average.mean, average.count = saved["average"], int(saved["average_count"])
        clock.load(saved["clock"])
        seeds.next = saved["seeds"]
    began = time.perf_counter()
    pool = training.Pool(task.make, args.pool, args.lot, args.reuse, 100 + team.rank + clock.step)
    millions = sum(p.numel() for p in parameters) / 1e6
    team.say(f"{name}: {millions:.2f} M parameters, pool ready {time.perf_counter() - began:.1f} s")
    generator = torch.Generator(device=device).manual_seed(7 + team.rank + clock.step)
    going, began, marked, history, first = True, time.perf_counter(), None, [], clock.step
    while going:
        rows = pool.take(sum(args.batch))
        rows.append(torch.rand(len(rows[0]), generator=generator, device=device) < _DROPPED)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, args.lr)
        muon.lr = training.cosine(clock.share, args.muon_lr)
        if marked is None and args.graph:
            step = training.captured(step, *rows)
        task.model.zero_grad(set_to_none=not args.graph)  # a captured graph adds to the gradients it knows
        by_token = step(*rows)
        team.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimiser.step()
        muon.step()
        average.update()
        if marked is None:  # the first step compiles: it is not training time
            if device.type == "cuda":
                torch.cuda.synchronize()
            team.say(f"{name}: first step {time.perf_counter() - began:.1f} s")
            clock.restart()
            marked = time.perf_counter()
        going = clock.tick()
        if clock.step % 100 == 0 or not going or (args.rehearse and clock.step % 10 == 0):
            by_scale = [round(float(part.mean()), 3) for part in by_token.split(list(task.tokens))]
            rate = (clock.step - first) * sum(args.batch) * team.size / max(1e-9, time.perf_counter() - marked)
            history.append((clock.step, round(float(by_token.mean()), 4)))
            team.say(
                f"{name} step {clock.step} share {clock.share:.3f} nats/{task.unit} {float(by_token.mean()):.4f} "
                f"by scale {by_scale} pictures/s {rate:.0f}"
            )
        if team.leads and not args.rehearse and (clock.step % 1000 == 0 or not going):
            state = {"model": dict(task.trained), "optimiser": optimiser.state_dict(), "muon": muon.state()}
            state |= {"average": average.mean, "average_count": average.count}
            training.save_checkpoint(checkpoint, state | {"clock": clock.state(), "seeds": seeds.next})
    if team.leads and not args.rehearse:
        task.model.load_state_dict(average.state(), strict=False)
        facts = {
            "parameters": sum(p.numel() for p in parameters),
            **task.facts,
            "steps": clock.step,
            "batch": [size * team.size for size in args.batch],
            "pictures_seen": [clock.step * size * team.size for size in args.batch],
            "pictures_drawn": (seeds.next - first_seed) * team.size,
            f"nats_per_{task.unit}": history[-1][1],
            f"nats_per_{task.unit}_by_scale": by_scale,
            "history": history,
            "lr": args.lr,
            "muon_lr": args.muon_lr,
            "minutes": round((time.perf_counter() - began) / 60, 2),
            "machine": training.machine(team.size),
            "size_bytes": task.ship(),
        }
        training.save_json(args.out / f"{name}.json", facts)
        team.say(f"{name} done", {k: v for k, v in facts.items() if k != "history"})
    team.close()


def split_parameters(
    trained: Mapping[str, nn.Parameter], matrices: Mapping[str, int]
) -> tuple[list[tuple[nn.Parameter, int]], list[nn.Parameter]]:
    """What `training.Muon` takes, and all other parameters; see `Task`."""
    ends = {f".{part}.weight": pieces for part, pieces in matrices.items()}
    blocks = [name for name in trained if "blocks." in name]  # text_proj_for_sos has a `ca` too
    chosen = {name: pieces for name in blocks for end, pieces in ends.items() if name.endswith(end)}
    others = [parameter for name, parameter in trained.items() if name not in chosen]
    return [(trained[name], pieces) for name, pieces in chosen.items()], others
