"""Train the text demo's Infinity and its word encoder on bits of freshly drawn scenes and their captions.

    python tools/train_infinity.py --vae OUT/bsq_vae.ckpt --minutes 5 --out OUT

The model is `toprovar.backbones.infinity` itself, around the block-causal attention of train_var.py. Every picture's
bits are wrong at a rate of its own, and the labels repair them (bitwise self-correction of the Infinity paper); one
caption in ten is dropped for guidance. Combinations that `captions.held_out` names are never shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import training
from picture_bits import BitScales, PictureBsq, load_picture_bsq
from torch import Tensor, nn
from train_var import Attend, attend_by_scale, scale_weights

from toprovar.backbones.bsq_vae import BsqVae
from toprovar.backbones.infinity import Infinity
from toprovar.demo.captions import COLOURS, COUNTS, MAX_WORDS, SHAPES, TEXTURES, WORD_IDS, held_out
from toprovar.demo.embedded_text import BITS, DEPTH, TEXT_WIDTH, WIDTH, new_infinity, original_state
from toprovar.demo.scenes import random_scenes, render_scenes, scene_of
from toprovar.demo.word_encoder import WordEncoder

Layer = Callable[[nn.Module, Tensor, dict[str, Tensor], Tensor, Attend], Tensor]
FIRST_SEED = 1 << 31  # other pictures than the VAE saw
_LOSS_POWER = 0.35  # see train_var.scale_weights
_LEFT_OUT = (0, 2, 4)  # last scales that a picture of each part of a batch is trained without
_BATCH_HELP = "pictures a step: whole, without the last 2 scales, without the last 4"
_MATRICES = {"sa.mat_qkv": 3, "sa.proj": 1, "ca.mat_q": 1, "ca.mat_kv": 2, "ca.proj": 1, "ffn.fc1": 1, "ffn.fc2": 1}
"""What `Muon` trains of a block, and the pieces each holds."""

# -------------------------------------------------------------------------------------------------------------- captions


def loose_captions(rows: np.ndarray, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Ids `[n, MAX_WORDS]` and lengths `[n]` of captions as people may write them.

    The words of `captions.caption`; one plain texture in four is named, and one half in five has texture before colour.
    """
    named, swapped = generator.random((len(rows), 2)) < 0.25, generator.random((len(rows), 2)) < 0.2
    ids = torch.zeros(len(rows), MAX_WORDS, dtype=torch.int64)
    lengths = torch.empty(len(rows), dtype=torch.int64)
    for i, (count, colour, texture, shape, floor_colour, floor_texture) in enumerate(rows):
        words: list[str] = []
        halves = ((COUNTS[count], colour, texture, SHAPES[shape]), ("a", floor_colour, floor_texture, "floor"))
        for half, (first, hue, pattern, last) in enumerate(halves):
            look = [COLOURS[hue]] + ([TEXTURES[pattern]] if pattern or named[i, half] else [])
            words += [first, *(reversed(look) if swapped[i, half] else look), last] + ["on"] * (half == 0)
        ids[i, : len(words)] = torch.tensor([WORD_IDS[word] for word in words])
        lengths[i] = len(words)
    return ids, lengths


# ----------------------------------------------------------------------------------------------------------------- model


def build(vae: BsqVae) -> Infinity:
    """Return the demo's Infinity, initialised for a short run."""
    model = new_infinity(vae)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vae.") or name.endswith(("scale_mul_1H11", "norm.weight", "cfg_uncond")):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("proj.weight", "fc2.weight")) and name.startswith("blocks."):
                nn.init.trunc_normal_(parameter, std=0.04 / math.sqrt(2 * DEPTH))
            elif name.endswith("ada_gss"):
                nn.init.normal_(parameter, std=0.02)
                parameter[:, :, :2] += 0.5  # gates half open
            elif name.startswith("text_proj") or ".ca.mat" in name or name == "word_embed.weight":
                nn.init.trunc_normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name == "lvl_embed.weight":
                nn.init.trunc_normal_(parameter, std=0.2)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)
    return model


def run_layer(block: nn.Module, x: Tensor, context: dict[str, Tensor], rope: Tensor, attend: Attend) -> Tensor:
    """One layer over all scales: x `[L, B, C]` fp32."""

    def seam(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return attend(*(t.permute(1, 2, 0, 3) for t in (q, k, v))).permute(2, 0, 1, 3), None

    return cast(Tensor, block.run(x, context, rope, seam).x)


def forward(
    model: Infinity, text: Tensor, lengths: Tensor, inputs: Tensor, attend: Attend, layer: Layer = run_layer
) -> tuple[Tensor, dict[str, Tensor]]:
    """`Infinity.forward_training` around another attention.

    Args:
        text: `[B, T, TEXT_WIDTH]`, captions that are dropped already replaced.
        inputs: `[B, L - 1, BITS]`; the last scales may be left out.
        layer: `run_layer`, or its compiled form.

    Returns: the last layer's output `[L, B, C]` and the context that `model.head` takes.
    """
    pooled, source, bias = model.condition(text, lengths)
    context = model.context(pooled, source, bias)
    level, rope = places(model, inputs.shape[1] + 1, inputs.device)
    first = (pooled + model.pos_start[0].float())[None]
    x = torch.cat([first, model.word_embed(inputs.transpose(0, 1)).float()]) + model.lvl_embed(level).float()[:, None]
    for index, block in enumerate(model.blocks):
        x = layer(block, x, model.layer_context(index, context), rope, attend)
    return x, context


@cache
def places(model: Infinity, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale `[total]` and rope table `[total, 1, D]` of the first tokens, made once: a CUDA graph cannot copy them."""
    spec = model.spec
    level = torch.repeat_interleave(torch.arange(spec.scales), torch.tensor(spec.tokens))
    rope = torch.cat([model.rope(s) for s in range(spec.scales)])
    return level[:total].to(device), rope[:total].to(device)


def pack(bits: Tensor) -> Tensor:
    """Bits `[..., BITS]` bool -> `[...]` int32."""
    return (bits.int() << torch.arange(BITS, device=bits.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The reverse of `pack`, as fp32."""
    return ((packed[..., None] >> torch.arange(BITS, device=packed.device, dtype=torch.int32)) & 1).float()


# -------------------------------------------------------------------------------------------------------------- training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help="checkpoint of train_bsq_vae.py")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, nargs=3, default=[20, 48, 160], help=_BATCH_HELP)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--pool", type=int, default=24576)
    parser.add_argument("--lot", type=int, default=768)
    parser.add_argument("--reuse", type=float, default=5.0)
    parser.add_argument("--flip", type=float, default=0.2, help="most bits that are wrong in a picture's inputs")
    parser.add_argument("--rehearse", action="store_true", help="time --steps, save nothing; no --vae needed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    if args.vae is None and not args.rehearse:
        parser.error("--vae is needed: the checkpoint of train_bsq_vae.py")
    if args.vae is None:
        tokenizer = PictureBsq().requires_grad_(False).to(device, memory_format=torch.channels_last)
    else:
        tokenizer = load_picture_bsq(args.vae, device)
    scales, seeds = BitScales(device), training.Seeds(team, FIRST_SEED)
    wording = np.random.default_rng(11)

    def make(count: int) -> tuple[Tensor, ...]:
        own = seeds.take(count + count // 4)  # one in 13 is held out
        rows = random_scenes(own)
        shown = np.flatnonzero([not held_out(scene_of(row)) for row in rows])[:count]
        own, rows = own[shown], rows[shown]
        ids, lengths = loose_captions(rows, wording)
        pictures = render_scenes(rows, own, device=device) * 2 - 1
        with torch.no_grad(), team.autocast():
            features = torch.cat([tokenizer.encoder(part) for part in pictures.split(128)])
        bits = scales(features, args.flip * torch.rand(len(rows), device=device))
        return ids.to(device), lengths.to(device), pack(bits.labels), bits.inputs.half()

    whole = build(new_infinity().vae).to(device)
    model = nn.ModuleDict({"infinity": whole, "words": WordEncoder(TEXT_WIDTH)}).to(device)
    words = cast(WordEncoder, model["words"])
    named = {name: p for name, p in model.named_parameters() if ".vae." not in name}
    pieces = {f".{part}.weight": count for part, count in _MATRICES.items()}
    matrices = [(p, n) for name, p in named.items() for part, n in pieces.items() if "blocks." in name and part in name]
    chosen = {id(p) for p, _ in matrices}
    others = [p for p in named.values() if id(p) not in chosen]
    tokens_of = whole.spec.tokens
    # A picture without its last scales costs a third, or a tenth, and is worth as much where the layout is decided.
    counts = [len(tokens_of) - left_out for left_out in _LEFT_OUT]
    views = [(attend_by_scale(tokens_of[:count], device), sum(tokens_of[:count])) for count in counts]
    pictures = torch.zeros(sum(tokens_of), device=device)  # that a token is seen of
    for size, (_, total) in zip(args.batch, views, strict=True):
        pictures[:total] += size
    weights = scale_weights(tokens_of, _LOSS_POWER, device)
    muon, optimiser = training.Muon(matrices), training.adamw(others, device, 0.02, (0.9, 0.95))
    average = training.Average(named, 0.998)
    torch.manual_seed(1000)

    def bit_loss(x: Tensor, head_modulation: Tensor, packed: Tensor) -> Tensor:
        """Nats a bit of every token, summed over the pictures, `[L]`."""
        zero, one = whole.head(x, {"head_modulation": head_modulation}).unflatten(-1, (BITS, 2)).unbind(-1)
        return F.binary_cross_entropy_with_logits(one - zero, unpack(packed.T), reduction="none").mean(2).sum(1)

    layer: Layer = run_layer
    if args.compile:
        layer, bit_loss = torch.compile(run_layer, dynamic=False), torch.compile(bit_loss, dynamic=False)

    def step(ids: Tensor, lengths: Tensor, packed: Tensor, inputs: Tensor, dropped: Tensor) -> Tensor:
        """Forward and backward of all parts of a batch: nats a bit of every token `[L]`."""
        nats = torch.zeros_like(pictures)
        with team.autocast(cache=not args.graph):
            text = torch.where(dropped[:, None, None], whole.cfg_uncond, words(ids, lengths))
            parts = [t.split(args.batch) for t in (text, lengths, packed, inputs)]
            for said, length, bits, seen, (attend, total) in zip(*parts, views, strict=True):
                x, context = forward(whole, said, length, seen[:, : total - 1].float(), attend, layer)
                summed = bit_loss(x, context["head_modulation"], bits[:, :total])
                nats = nats + F.pad(summed, (0, len(nats) - total))
        nats = nats / pictures
        (nats * weights).mean().backward()
        return nats.detach()

    clock = training.Clock(team, args.minutes, args.steps)
    saved = None if args.rehearse else training.load_checkpoint(args.out / "infinity.ckpt", device)
    if saved:
        model.load_state_dict(saved["model"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        muon.load(saved["muon"])
        average.mean, average.count = saved["average"], int(saved["average_count"])
        clock.load(saved["clock"])
        seeds.next = saved["seeds"]
    if args.rehearse:
        args.pool = args.lot
    began = time.perf_counter()
    pool = training.Pool(make, args.pool, args.lot, args.reuse, 100 + clock.step)
    millions = sum(p.numel() for p in named.values()) / 1e6
    team.say(f"infinity: {millions:.2f} M parameters, pool ready {time.perf_counter() - began:.1f} s")
    generator = torch.Generator(device=device).manual_seed(7 + clock.step)
    going, began, marked, history, first = True, time.perf_counter(), None, [], clock.step
    while going:
        rows = pool.take(sum(args.batch))
        rows.append(torch.rand(len(rows[0]), generator=generator, device=device) < 0.1)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, args.lr)
        muon.lr = training.cosine(clock.share, args.muon_lr)
        if marked is None and args.graph:
            step = training.captured(step, *rows)
        model.zero_grad(set_to_none=not args.graph)  # a captured graph adds to the gradients it knows
        by_token = step(*rows)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimiser.step()
        muon.step()
        average.update()
        if marked is None:  # the first step compiles: it is not training time
            if device.type == "cuda":
                torch.cuda.synchronize()
            team.say(f"infinity: first step {time.perf_counter() - began:.1f} s")
            clock.restart()
            marked = time.perf_counter()
        going = clock.tick()
        if clock.step % 100 == 0 or not going or (args.rehearse and clock.step % 10 == 0):
            by_scale = [round(float(part.mean()), 3) for part in by_token.split(tokens_of)]
            rate = (clock.step - first) * sum(args.batch) / max(1e-9, time.perf_counter() - marked)
            history.append((clock.step, round(float(by_token.mean()), 4)))
            team.say(
                f"infinity step {clock.step} share {clock.share:.3f} nats/bit {float(by_token.mean()):.4f} "
                f"by scale {by_scale} pictures/s {rate:.0f}"
            )
        if not args.rehearse and (clock.step % 1000 == 0 or not going):
            state = {"model": named, "optimiser": optimiser.state_dict(), "muon": muon.state(), "average": average.mean}
            state |= {"average_count": average.count, "clock": clock.state(), "seeds": seeds.next}
            training.save_checkpoint(args.out / "infinity.ckpt", state)
    if args.rehearse:
        return
    model.load_state_dict(average.state(), strict=False)
    size = training.save_weights(args.out / "infinity.safetensors", original_state(whole)[0], {"format": "pt"})
    size += training.save_weights(args.out / "words.safetensors", words.state_dict(), {"format": "pt"})
    facts = {
        "parameters": sum(p.numel() for p in named.values()),
        "depth": DEPTH,
        "width": WIDTH,
        "grids": [list(grid) for grid in whole.spec.grids],
        "steps": clock.step,
        "batch": args.batch,
        "pictures_seen": [clock.step * size for size in args.batch],
        "pictures_drawn": seeds.next - FIRST_SEED,
        "nats_per_bit": history[-1][1],
        "nats_per_bit_by_scale": by_scale,
        "history": history,
        "lr": args.lr,
        "muon_lr": args.muon_lr,
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "machine": training.machine(),
        "size_bytes": size,
    }
    training.save_json(args.out / "infinity.json", facts)
    team.say("infinity done", {k: v for k, v in facts.items() if k != "history"})


if __name__ == "__main__":
    main()
