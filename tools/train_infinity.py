"""Train the text demo's Infinity and its word encoder on bits of freshly drawn scenes and their captions.

    python tools/train_infinity.py --vae OUT/bsq_vae.ckpt --minutes 5 --out OUT

The model is `toprovar.backbones.infinity` itself, around the block-causal attention of scale_training.py. Every picture's
bits are wrong at a rate of its own, and the labels repair them (bitwise self-correction of the Infinity paper); one
caption in ten is dropped for guidance. Combinations that `captions.held_out` names are never shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import training
from picture_bits import BitScales, PictureBsq, load_picture_bsq
from scale_training import Attend, Task, options, parse, train
from torch import Tensor, nn

from toprovar.backbones.bsq_vae import BsqVae
from toprovar.backbones.infinity import Infinity
from toprovar.demo.captions import COLOURS, COUNTS, MAX_WORDS, SHAPES, TEXTURES, WORD_IDS, held_out
from toprovar.demo.embedded_text import BITS, DEPTH, TEXT_WIDTH, WIDTH, new_infinity, original_state
from toprovar.demo.scenes import random_scenes, render_scenes, scene_of
from toprovar.demo.word_encoder import WordEncoder

Layer = Callable[[nn.Module, Tensor, dict[str, Tensor], Tensor, Attend], Tensor]
FIRST_SEED = 1 << 31  # other pictures than the VAE saw

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
    parser = options(
        str(__doc__),
        "train_bsq_vae.py",
        minutes=5.0,
        batch=[20, 48, 160],
        lr=1.5e-3,
        muon_lr=0.02,
        pool=24576,
        reuse=5.0,
    )
    parser.add_argument("--flip", type=float, default=0.2, help="most bits that are wrong in a picture's inputs")
    args = parse(parser)
    team = training.Team()
    device = team.device
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
    layer: Layer = run_layer

    def bit_loss(x: Tensor, head_modulation: Tensor, packed: Tensor) -> Tensor:
        """Nats a bit of every token, summed over the pictures, `[L]`."""
        zero, one = whole.head(x, {"head_modulation": head_modulation}).unflatten(-1, (BITS, 2)).unbind(-1)
        return F.binary_cross_entropy_with_logits(one - zero, unpack(packed.T), reduction="none").mean(2).sum(1)

    if args.compile:
        layer, bit_loss = torch.compile(run_layer, dynamic=False), torch.compile(bit_loss, dynamic=False)

    def prepare(ids: Tensor, lengths: Tensor, packed: Tensor, inputs: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
        return torch.where(dropped[:, None, None], whole.cfg_uncond, words(ids, lengths)), lengths, packed, inputs

    def nats(text: Tensor, lengths: Tensor, packed: Tensor, inputs: Tensor, attend: Attend, total: int) -> Tensor:
        x, context = forward(whole, text, lengths, inputs[:, : total - 1].float(), attend, layer)
        return bit_loss(x, context["head_modulation"], packed[:, :total])

    def ship() -> int:
        size = training.save_weights(args.out / "infinity.safetensors", original_state(whole)[0], {"format": "pt"})
        return size + training.save_weights(args.out / "words.safetensors", words.state_dict(), {"format": "pt"})

    task = Task(
        name="infinity",
        unit="bit",
        model=model,
        trained={name: p for name, p in model.named_parameters() if ".vae." not in name},
        matrices={
            "sa.mat_qkv": 3,
            "sa.proj": 1,
            "ca.mat_q": 1,
            "ca.mat_kv": 2,
            "ca.proj": 1,
            "ffn.fc1": 1,
            "ffn.fc2": 1,
        },
        tokens=whole.spec.tokens,
        make=make,
        prepare=prepare,
        nats=nats,
        ship=ship,
        facts={"depth": DEPTH, "width": WIDTH, "grids": [list(grid) for grid in whole.spec.grids]},
    )
    train(args, team, seeds, task)


if __name__ == "__main__":
    main()
