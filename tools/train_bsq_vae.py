"""Train the text demo's BSQ-VAE on freshly drawn scenes: `python tools/train_bsq_vae.py --minutes 3.5 --out DIR`.

First a plain autoencoder for a few steps, then with the quantiser. Bits are flipped in some pictures and the last scales
left out in some, so the decoder forgives the transformer's mistakes and a picture that stops early still looks right. On
a GPU a step is one CUDA graph. With --decoder-only, more minutes improve the decoder of a tokenizer that a transformer
is already trained on. One process; the shipped file leaves the encoder out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from picture_bits import BitScales, PictureBsq
from tokenizer_training import ReconstructionLoss, Stages, options
from torch import Tensor

from toprovar.demo.embedded_text import BITS, new_infinity, original_state
from toprovar.demo.pictures import HELD_OUT
from toprovar.demo.scenes import random_scenes, render_scenes

FLIP = 0.08
"""Most bits that are wrong in a picture."""


def main() -> None:
    parser = options(str(__doc__), minutes=3.5, lr=1e-3, plain_share=0.06)
    parser.add_argument("--decoder-only", action="store_true", help="leave a resumed run's encoder as it is")
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    model = PictureBsq().to(device, memory_format=torch.channels_last)
    edges = [edge for edge in BitScales(device).edges if edge <= args.size // 8]
    scales = BitScales(device, edges)
    parameters = dict(model.named_parameters())
    optimiser = training.adamw(list(parameters.values()), device, 1e-3, (0.9, 0.98))
    average = training.Average(parameters, 0.998)
    reconstruction_loss = ReconstructionLoss(device)
    clock, seeds = training.Clock(team, args.minutes, args.steps), training.Seeds(team)
    saved = training.load_checkpoint(args.out / "bsq_vae.ckpt", device)
    if saved:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average.mean, average.count = list(saved["average"].values()), int(saved["average_count"])
        clock.load(saved["clock"])
        seeds.next = saved["seeds"]
    if args.decoder_only:
        if not saved:
            parser.error(f"--decoder-only goes on from {args.out / 'bsq_vae.ckpt'}, which is not there")
        model.load_state_dict(saved["average"])  # the encoder that made the transformer's labels
        model.encoder.requires_grad_(False)
        optimiser.zero_grad(set_to_none=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def encode(pictures: Tensor) -> Tensor:
        with team.autocast(cache=False):
            return model.encoder(pictures).float()

    def decode(codes: Tensor) -> Tensor:
        with team.autocast(cache=False):
            return model.decoder(codes).float()

    def plain(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = encode(pictures)
        loss = reconstruction_loss(decode(features), pictures)
        reach = (features.abs() - 1.0).clamp(min=0).square().mean()  # what the bits of all scales can say
        (loss + reach).backward()
        return loss.detach(), reach.detach()

    def coded(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features, batch = encode(pictures), len(pictures)
        flip = FLIP * torch.rand(batch, device=device) * (torch.rand(batch, device=device) < 0.5)
        left_out = (torch.rand(batch, device=device) * 3).long() * (torch.rand(batch, device=device) < 0.2)
        codes = scales(features, flip, len(scales.edges) - 1 - left_out).codes
        gap = ((features - codes).square().mean((1, 2, 3)) * (left_out == 0)).mean()
        loss = reconstruction_loss(decode(features + (codes - features).detach()), pictures)
        (loss + gap).backward()
        return loss.detach(), gap.detach()

    def draw(count: int) -> Tensor:
        own = seeds.take(count)
        return render_scenes(random_scenes(own), own, size=args.size, device=device) * 2 - 1

    stages = Stages("bsq", args, clock, optimiser, trained, draw)
    began, history = time.perf_counter(), []
    has_bits = clock.share >= args.plain_share
    stages.begin(coded if has_bits else plain)
    going = True
    while going:
        if not has_bits and clock.share >= args.plain_share:
            has_bits = True
            stages.begin(coded)
        loss, gap = stages.run()
        average.update()
        going = clock.tick()
        if clock.step % 100 == 0 or not going:
            history.append((clock.step, round(float(loss), 4)))
            team.say(
                f"bsq step {clock.step} share {clock.share:.3f} loss {float(loss):.4f} gap {float(gap):.4f} "
                f"pictures/s {stages.pictures_per_second():.0f}"
            )
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average.state()}
    state |= {"average_count": average.count, "clock": clock.state(), "seeds": seeds.next}
    training.save_checkpoint(args.out / "bsq_vae.ckpt", state)
    model.load_state_dict(average.state())
    facts = judge(model, scales, args.judged, args.batch, args.size, args.out)
    whole = new_infinity()
    whole.vae.decoder.load_state_dict(model.decoder.state_dict())
    shipped = original_state(whole)[1]
    facts |= {
        "bits": BITS,
        "steps": clock.step,
        "batch": args.batch,
        "pictures_seen": clock.step * args.batch,
        "loss": history[-1][1],
        "history": history,
        "lr": args.lr,
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "parameters_shipped": sum(v.numel() for v in shipped.values()),
        "parameters_trained": sum(p.numel() for p in model.parameters()),
        "machine": training.machine(),
        "size_bytes": training.save_weights(args.out / "bsq_vae.safetensors", shipped, {"format": "pt"}),
    }
    training.save_json(args.out / "bsq_vae.json", facts)
    team.say("bsq done", {k: v for k, v in facts.items() if k != "history"})


@torch.no_grad()
def judge(model: PictureBsq, scales: BitScales, count: int, batch: int, size: int, out: Path) -> dict[str, Any]:
    """PSNR on held-out scenes: all scales, without the last ones, with 5% of the bits wrong; and a sheet of pictures."""
    device = next(model.parameters()).device
    final = len(scales.edges) - 1
    error = torch.zeros(4, device=device)
    ones = torch.zeros(final + 1, device=device)
    rows: list[Tensor] = []
    for start in range(0, count, batch):
        seeds = HELD_OUT + start + np.arange(min(batch, count - start))
        pictures = render_scenes(random_scenes(seeds), seeds, size=size, device=device)
        features = model.encoder(pictures * 2 - 1).float()
        every = torch.ones(len(pictures), device=device)
        codings = [scales(features, last=every * (final - n)) for n in range(3)] + [scales(features, 0.05 * every)]
        views = [(model.decoder(coding.codes).clamp(-1, 1) + 1) / 2 for coding in codings]
        error += torch.stack([(view - pictures).square().mean((1, 2, 3)).sum() for view in views])
        parts = codings[0].labels.float().split([edge * edge for edge in scales.edges], dim=1)
        ones += torch.stack([(part.mean((0, 1)) - 0.5).abs().mean() for part in parts]) * len(pictures)
        if start == 0:
            shown = min(12, len(pictures))
            rows = [pictures[:shown], *[view[:shown] for view in views]]
    training.save_sheet(out / "bsq_vae.png", torch.cat(rows), columns=len(rows[0]), edge=min(128, size))
    names = ["all", *[f"to {scales.edges[-1 - n]}" for n in (1, 2)], "5% flipped"]
    psnr = -10 * torch.log10(error / count)
    return {
        "psnr_db": {name: round(float(value), 2) for name, value in zip(names, psnr, strict=True)},
        "bit_imbalance_by_scale": [round(float(value) / count, 3) for value in ones],
    }


if __name__ == "__main__":
    main()
