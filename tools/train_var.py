"""Train the demo's class-conditional VAR on tokens of freshly drawn pictures.

    torchrun --nproc-per-node 2 tools/train_var.py --vae OUT/vqvae.ckpt --minutes 7 --out OUT

The model is `toprovar.backbones.var` itself; only the loop over its layers is written again here, around an attention
that is block-causal without paying for a dense mask. `tests/demo/test_training.py` holds the two to the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import training
from picture_vq import PictureVq, demo_sizes, load_picture_vq, tokenize
from scale_training import Attend, Task, options, parse, train
from torch import Tensor, nn

from toprovar.backbones.base import layer_norm
from toprovar.backbones.var import VAR, VARSpec
from toprovar.backbones.vqvae import VQVAE
from toprovar.demo.pictures import CLASSES, render

Layer = Callable[[nn.Module, Tensor, Tensor, Attend], Tensor]
FIRST_SEED = 1 << 30  # other pictures than the VQVAE saw

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


# ------------------------------------------------------------------------------------------------------------- training


def main() -> None:
    parser = options(
        str(__doc__),
        "train_vqvae.py",
        minutes=13.6,
        batch=[32, 96, 256],
        lr=2.5e-3,
        muon_lr=0.025,
        pool=36864,
        reuse=6.0,
    )
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--corrupt", type=float, default=0.2, help="most tokens a picture's inputs get wrong")
    args = parse(parser)
    team = training.Team()
    device = team.device
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
    layer: Layer = run_layer

    def token_loss(x: Tensor, head_modulation: Tensor, tokens: Tensor) -> Tensor:
        """Nats of every token, summed over the pictures, `[L]`."""
        logits = model.head(x, {"head_modulation": head_modulation})
        return F.cross_entropy(logits.flatten(0, 1), tokens.T.flatten(), reduction="none").view(tokens.T.shape).sum(1)

    if args.compile:
        layer, token_loss = torch.compile(run_layer, dynamic=False), torch.compile(token_loss, dynamic=False)

    def prepare(labels: Tensor, tokens: Tensor, inputs: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
        return torch.where(dropped, len(CLASSES), labels), tokens, inputs

    def nats(labels: Tensor, tokens: Tensor, inputs: Tensor, attend: Attend, total: int) -> Tensor:
        x, context = forward(model, labels, inputs[:, : total - 1].float(), attend, layer)
        return token_loss(x, context["head_modulation"], tokens[:, :total].long())

    def ship() -> int:
        shipped = {k: v for k, v in model.state_dict().items() if not k.startswith("vae.")}
        return training.save_weights(args.out / "var.safetensors", shipped, {"format": "pt"})

    task = Task(
        name="var",
        unit="token",
        model=model,
        trained={name: p for name, p in model.named_parameters() if not name.startswith("vae.")},
        matrices={"attn.mat_qkv": 3, "attn.proj": 1, "ffn.fc1": 1, "ffn.fc2": 1},
        tokens=model.spec.tokens,
        make=make,
        prepare=prepare,
        nats=nats,
        ship=ship,
        facts={"depth": args.depth, "width": args.width, "patches": list(vae.spec.patch_nums)},
    )
    train(args, team, seeds, task)


if __name__ == "__main__":
    main()
