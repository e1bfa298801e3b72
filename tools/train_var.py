"""Train the demo's class-conditional VAR on tokens of freshly drawn pictures.

    torchrun --nproc-per-node 2 tools/train_var.py --vae OUT/vqvae.ckpt --minutes 7 --out OUT

The model is `toprovar.backbones.var` itself; only the loop over its layers is written again here, around an attention
that is block-causal without paying for a dense mask. `tests/demo/test_training.py` holds the two to the same logits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import training
from picture_vq import PictureVq, demo_sizes, load_picture_vq, tokenize
from torch import Tensor, nn

from toprovar.backbones.base import layer_norm
from toprovar.backbones.var import VAR, VARSpec
from toprovar.backbones.vqvae import VQVAE
from toprovar.demo.pictures import CLASSES, render

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Layer = Callable[[nn.Module, Tensor, Tensor, Attend], Tensor]
FIRST_SEED = 1 << 30  # other pictures than the VQVAE saw
_LOSS_POWER = 0.35  # see scale_weights
_LEFT_OUT = (0, 2, 4)  # last scales that a picture of each part of a batch is trained without
_BATCH_HELP = "pictures a step and process: whole, without the last 2 scales, without the last 4"

# ------------------------------------------------------------------------------------------------------------ attention


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


# ---------------------------------------------------------------------------------------------------------------- model


def build(depth: int, width: int, classes: int, vae: VQVAE) -> VAR:
    """Return a VAR with shared AdaLN and heads of 64, initialised for a short run."""
    spec = VARSpec.of(
        depth=depth,
        width=width,
        heads=width // 64,
        patch_nums=vae.spec.patch_nums,
        vocab=vae.spec.vocab,
        latent_channels=vae.spec.latent_channels,
        stride=vae.spec.stride,
        classes=classes,
        shared_aln=True,
    )
    model = VAR(spec, vae)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vae."):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                nn.init.trunc_normal_(parameter, std=0.04 / math.sqrt(2 * depth))
            elif name.endswith("ada_gss"):
                nn.init.normal_(parameter, std=0.02)
                parameter[:, :, :2] += 0.5  # gates half open: VAR's 1e-5 start is for runs a thousand times longer
            elif name.endswith("class_emb.weight"):
                nn.init.trunc_normal_(parameter, std=0.3)  # it is AdaLN's input too: let it be heard from the start
            elif name.endswith("word_embed.weight"):
                nn.init.trunc_normal_(parameter, std=vae.spec.latent_channels**-0.5)
            elif not name.endswith("scale_mul_1H11"):
                nn.init.trunc_normal_(parameter, std=0.02)
    return model


def run_layer(block: nn.Module, x: Tensor, modulation: Tensor, attend: Attend) -> Tensor:
    """One layer over all scales: x `[L, B, C]` fp32, modulation `[6, B, C]`."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(0)
    q, k, v = (t.permute(1, 2, 0, 3) for t in block.attn.qkv(layer_norm(x) * (1 + scale1) + shift1))
    x = x + gamma1 * block.attn.project(attend(q, k, v).permute(2, 0, 1, 3))
    return x + gamma2 * block.ffn(layer_norm(x) * (1 + scale2) + shift2)


def forward(
    model: VAR, labels: Tensor, inputs: Tensor, attend: Attend, layer: Layer = run_layer
) -> tuple[Tensor, dict[str, Tensor]]:
    """`VAR.forward_training` around another attention.

    Args:
        labels: `[B]`, the number of classes for the unconditional branch.
        inputs: `[B, L - 1, channels]`, the accumulated codes resized to each scale from the second on; the last scales
            may be left out.
        layer: `run_layer`, or its compiled form: compiled once, it serves all layers.

    Returns: the last layer's output `[L, B, C]` and the context that `model.head` takes.
    """
    class_vectors = model.class_emb(labels)
    context = model._modulation(class_vectors)
    first = class_vectors + model.pos_start.transpose(0, 1)
    x = torch.cat((first, model.word_embed(inputs.transpose(0, 1)).float()))
    x = x + (model.pos_1LC[0] + model.lvl_embed(model.lvl_1L[0]))[: len(x)].unsqueeze(1)
    for block, modulation in zip(model._layers, context["modulation"].unbind(0), strict=True):
        x = layer(block, x, modulation, attend)
    return x, context


def scale_weights(tokens: Sequence[int], power: float, device: torch.device) -> Tensor:
    """Return `[L]` loss weights, mean 1: a token of a scale with n tokens weighs n ** -power.

    Plain averaging (power 0) gives the first five scales together 3 % of the loss, too little for a short run to
    learn a picture's layout from.
    """
    weights = torch.cat([torch.full((n,), float(n) ** -power) for n in tokens]).to(device)
    return weights / weights.mean()


def split_parameters(model: VAR) -> tuple[list[tuple[nn.Parameter, int]], list[nn.Parameter]]:
    """Return the matrices inside the layers, which `Muon` trains, with their pieces, and all other parameters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.mat_qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight")):
            matrices.append((parameter, 3 if "qkv" in name else 1))
        elif not name.startswith("vae."):
            others.append(parameter)
    return matrices, others


# ------------------------------------------------------------------------------------------------------------- training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help="checkpoint of train_vqvae.py")
    parser.add_argument("--minutes", type=float, default=13.6)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, nargs=3, default=[32, 96, 256], help=_BATCH_HELP)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2.5e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.025)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--pool", type=int, default=36864)
    parser.add_argument("--lot", type=int, default=768)
    parser.add_argument("--reuse", type=float, default=6.0)
    parser.add_argument("--corrupt", type=float, default=0.2, help="most tokens a picture's inputs get wrong")
    parser.add_argument("--rehearse", action="store_true", help="time --steps, save nothing; no --vae needed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device

    if args.vae is None and not args.rehearse:
        parser.error("--vae is needed: the checkpoint of train_vqvae.py")
    if args.vae is None:
        tokenizer = PictureVq(demo_sizes()).requires_grad_(False).to(device, memory_format=torch.channels_last)
    else:
        tokenizer = load_picture_vq(args.vae, device)
    vae = tokenizer.vae
    seeds = training.Seeds(team, FIRST_SEED)

    def make(count: int) -> tuple[Tensor, ...]:
        labels = np.arange(count) % len(CLASSES)
        pictures = render(labels, seeds.take(count), device=device) * 2 - 1
        with torch.no_grad(), team.autocast():
            features = torch.cat([tokenizer.encoder(part) for part in pictures.split(args.lot // 6)])
        tokens, inputs = tokenize(vae.quantize, features, corrupt=args.corrupt)
        return torch.from_numpy(labels).to(device), tokens.to(torch.int16), inputs.half()

    model = build(args.depth, args.width, len(CLASSES), vae).to(device)
    named = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}
    parameters, tokens_of = list(named.values()), model.spec.tokens
    team.same(parameters)
    torch.manual_seed(1000 + team.rank)  # from here on processes differ: in wrong tokens, not in weights
    # A picture without its last scales costs a quarter, or a sixteenth, and is worth as much where the layout is decided.
    counts = [len(tokens_of) - left_out for left_out in _LEFT_OUT]
    views = [(attend_by_scale(tokens_of[:count], device), sum(tokens_of[:count])) for count in counts]
    pictures = torch.zeros(sum(tokens_of), device=device)  # that a token is seen of
    for size, (_, length) in zip(args.batch, views, strict=True):
        pictures[:length] += size
    weights = scale_weights(tokens_of, _LOSS_POWER, device)
    matrices, others = split_parameters(model)
    muon, optimiser = training.Muon(matrices), training.adamw(others, device, 0.02, (0.9, 0.95))
    average = training.Average(named, 0.998)

    def token_loss(x: Tensor, head_modulation: Tensor, tokens: Tensor) -> Tensor:
        """Nats of every token, summed over the pictures, `[L]`."""
        logits = model.head(x, {"head_modulation": head_modulation})
        return F.cross_entropy(logits.flatten(0, 1), tokens.T.flatten(), reduction="none").view(tokens.T.shape).sum(1)

    layer: Layer = run_layer
    if args.compile:
        layer, token_loss = torch.compile(run_layer, dynamic=False), torch.compile(token_loss, dynamic=False)

    def step(labels: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        """Forward and backward of all parts of a batch: the nats of every token `[L]`."""
        nats = torch.zeros_like(pictures)
        parts = [t.split(args.batch) for t in (labels, tokens, inputs)]
        with team.autocast(cache=not args.graph):
            for label, token, seen, (attend, length) in zip(*parts, views, strict=True):
                x, context = forward(model, label, seen[:, : length - 1].float(), attend, layer)
                summed = token_loss(x, context["head_modulation"], token[:, :length].long())
                nats = nats + F.pad(summed, (0, len(nats) - length))
        nats = nats / pictures
        (nats * weights).mean().backward()
        return nats.detach()

    clock = training.Clock(team, args.minutes, args.steps)
    saved = None if args.rehearse else training.load_checkpoint(args.out / "var.ckpt", device)
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
    pool = training.Pool(make, args.pool, args.lot, args.reuse, 100 + team.rank + clock.step)
    millions = sum(p.numel() for p in parameters) / 1e6
    team.say(f"var: {millions:.2f} M parameters, pool ready {time.perf_counter() - began:.1f} s")
    generator = torch.Generator(device=device).manual_seed(7 + team.rank + clock.step)
    going, began, marked, history, first = True, time.perf_counter(), None, [], clock.step
    while going:
        labels, tokens, inputs = pool.take(sum(args.batch))
        dropped = torch.rand(len(labels), generator=generator, device=device) < 0.1
        labels = torch.where(dropped, len(CLASSES), labels)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, args.lr)
        muon.lr = training.cosine(clock.share, args.muon_lr)
        if marked is None and args.graph:
            step = training.captured(step, labels, tokens, inputs)
        model.zero_grad(set_to_none=not args.graph)  # a captured graph adds to the gradients it knows
        by_token = step(labels, tokens, inputs)
        team.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimiser.step()
        muon.step()
        average.update()
        if marked is None:  # the first step compiles: it is not training time
            if device.type == "cuda":
                torch.cuda.synchronize()
            team.say(f"var: first step {time.perf_counter() - began:.1f} s")
            clock.restart()
            marked = time.perf_counter()
        going = clock.tick()
        if clock.step % 100 == 0 or not going or (args.rehearse and clock.step % 10 == 0):
            scales = [round(float(part.mean()), 2) for part in by_token.split(tokens_of)]
            rate = (clock.step - first) * sum(args.batch) * team.size / max(1e-9, time.perf_counter() - marked)
            history.append((clock.step, round(float(by_token.mean()), 4)))
            team.say(
                f"var step {clock.step} share {clock.share:.3f} nats/token {float(by_token.mean()):.3f} "
                f"by scale {scales} pictures/s {rate:.0f}"
            )
        if team.leads and not args.rehearse and (clock.step % 1000 == 0 or not going):
            state = {"model": named, "optimiser": optimiser.state_dict(), "muon": muon.state(), "average": average.mean}
            state |= {"average_count": average.count, "clock": clock.state(), "seeds": seeds.next}
            training.save_checkpoint(args.out / "var.ckpt", state)
    if team.leads and not args.rehearse:
        shipped = {k: v for k, v in model.state_dict().items() if not k.startswith("vae.")} | average.state()
        size = training.save_weights(args.out / "var.safetensors", shipped, {"format": "pt"})
        facts = {
            "parameters": sum(p.numel() for p in parameters),
            "depth": args.depth,
            "width": args.width,
            "patches": list(vae.spec.patch_nums),
            "steps": clock.step,
            "batch": [size * team.size for size in args.batch],
            "pictures_seen": [clock.step * size * team.size for size in args.batch],
            "pictures_drawn": (seeds.next - FIRST_SEED) * team.size,
            "nats_per_token": history[-1][1],
            "nats_per_token_by_scale": scales,
            "history": history,
            "lr": args.lr,
            "muon_lr": args.muon_lr,
            "minutes": round((time.perf_counter() - began) / 60, 2),
            "machine": training.machine(team.size),
            "size_bytes": size,
        }
        training.save_json(args.out / "var.json", facts)
        team.say("var done", {k: v for k, v in facts.items() if k != "history"})
    team.close()


if __name__ == "__main__":
    main()
