"""Train the demo's VQVAE on freshly drawn pictures: `python tools/train_vqvae.py --minutes 3.4 --out DIR`.

First a plain autoencoder for a few steps, then the codebook is set by k-means on what the scales have to code, then
everything together. On a GPU forward and backward of a step are one CUDA graph: uncaptured, launching its two thousand
small kernels took three times as long as running them. One process; the shipped file leaves the encoder out.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from picture_vq import (
    PATCHES,
    Codebook,
    Coding,
    PictureVq,
    Scales,
    demo_sizes,
    k_means,
    quantise,
    quicken,
    residual_vectors,
)
from tokenizer_training import ReconstructionLoss, Stages, options
from torch import Tensor

from toprovar.demo.pictures import CLASSES, HELD_OUT, render


def main() -> None:
    parser = options(str(__doc__), minutes=3.4, lr=8e-4, plain_share=0.08)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--patches", type=int, nargs="+", default=list(PATCHES))
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    spec = demo_sizes(vocab=args.vocab, patch_nums=args.patches)
    model = PictureVq(spec).to(device, memory_format=torch.channels_last)
    quicken(model.vae.decoder)
    quantizer, scales = model.vae.quantize, Scales(spec.patch_nums, device)
    codebook = Codebook(quantizer.embedding.weight.data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = training.adamw(parameters, device, 1e-3, (0.9, 0.98))
    reconstruction_loss = ReconstructionLoss(device)
    clock, seeds = training.Clock(team, args.minutes, args.steps), training.Seeds(team)

    def encode(pictures: Tensor) -> Tensor:
        with team.autocast(cache=False):
            return model.encoder(pictures).float()

    def decode(codes: Tensor) -> Tensor:
        with team.autocast(cache=False):
            return model.decode(codes).float()

    def steady(features: Tensor) -> Tensor:
        """Keep the features near unit spread, or growing would be the cheapest way to a small relative error."""
        return 0.1 * features.square().mean().add(1e-6).log().square()

    def plain(pictures: Tensor) -> tuple[Tensor, None]:
        features = encode(pictures)
        loss = reconstruction_loss(decode(features), pictures)
        (loss + steady(features)).backward()
        return loss.detach(), None

    def coded(pictures: Tensor) -> tuple[Tensor, Coding]:
        features = encode(pictures)
        coding = quantise(quantizer, scales, features)
        loss = reconstruction_loss(decode(features + (coding.codes - features).detach()), pictures)
        (loss + coding.loss + steady(features)).backward()
        with torch.no_grad():
            codebook.follow(coding)
        return loss.detach(), Coding(*(t.detach() for t in coding))

    has_codebook = False
    saved = training.load_checkpoint(args.out / "vqvae.ckpt", device)
    if saved:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        clock.load(saved["clock"])
        seeds.next, has_codebook = saved["seeds"], saved["has_codebook"]
        codebook.count.copy_(saved["count"])
        codebook.total.copy_(saved["total"])

    def draw(count: int) -> Tensor:
        names = np.arange(count) % len(CLASSES)
        return render(names, seeds.take(count), size=args.size, device=device) * 2 - 1

    stages = Stages("vqvae", args, clock, optimiser, parameters, draw)
    began, revived, history = time.perf_counter(), 0, []
    stages.begin(coded if has_codebook else plain)
    going = True
    while going:
        if not has_codebook and clock.share >= args.plain_share:
            with torch.no_grad():
                features = torch.cat([encode(stages.take()) for _ in range(8)])
                found = residual_vectors(quantizer, scales, features)
                # Every scale has a say: the large ones would otherwise outvote those that lay out the picture.
                some = [v[torch.randperm(len(v), device=device)[: 24 * args.vocab]] for v in found]
                codebook.set(k_means(torch.cat(some), args.vocab))
            has_codebook = True
            stages.begin(coded)
        loss, coding = stages.run()
        going = clock.tick()
        if coding is not None and clock.step % 40 == 0 and clock.share < 0.7:
            with torch.no_grad():
                revived += codebook.revive(coding.wanted)
        if clock.step % 100 == 0 or not going:
            history.append((clock.step, round(float(loss), 4)))
            team.say(
                f"vqvae step {clock.step} share {clock.share:.3f} loss {float(loss):.4f} "
                f"codebook {float(coding.loss) if coding is not None else 0.0:.4f} "
                f"perplexity {codebook.perplexity():.0f} revived {revived} pictures/s {stages.pictures_per_second():.0f}"
            )
        if clock.step % 1000 == 0 or not going:
            sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}
            state = {"model": model.state_dict(), "sizes": sizes, "optimiser": optimiser.state_dict()}
            state |= {"clock": clock.state(), "seeds": seeds.next, "has_codebook": has_codebook}
            state |= {"count": codebook.count, "total": codebook.total}
            training.save_checkpoint(args.out / "vqvae.ckpt", state)
    facts = judge(model, scales, args.judged, args.batch, args.size, args.out)
    shipped = model.vae.state_dict()
    facts |= {
        "steps": clock.step,
        "batch": args.batch,
        "pictures_seen": clock.step * args.batch,
        "loss": history[-1][1],
        "history": history,
        "lr": args.lr,
        "revived_codes": revived,
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "parameters_shipped": sum(v.numel() for v in shipped.values()),
        "parameters_trained": sum(p.numel() for p in model.parameters()),
        "machine": training.machine(),
        "size_bytes": training.save_weights(args.out / "vae.safetensors", shipped, {"format": "pt"}),
    }
    training.save_json(args.out / "vqvae.json", facts | {"sizes": asdict(spec)})
    team.say("vqvae done", {k: v for k, v in facts.items() if k != "history"})


@torch.no_grad()
def judge(model: PictureVq, scales: Scales, count: int, batch: int, size: int, out: Path) -> dict[str, Any]:
    """PSNR on held-out pictures with all scales and without the last ones, used codes, and a sheet of pictures."""
    device = next(model.parameters()).device
    patches, vocab = scales.edges, model.vae.spec.vocab
    error = torch.zeros(len(CLASSES), 4, device=device)
    seen = torch.zeros(len(CLASSES), device=device)
    used = torch.zeros(vocab, device=device)
    rows: list[Tensor] = []
    for start in range(0, count, batch):
        labels = np.arange(start, min(start + batch, count)) % len(CLASSES)
        pictures = render(labels, HELD_OUT + start + np.arange(len(labels)), size=size, device=device)
        coding = model.vae.quantize.quantise(model.encoder(pictures * 2 - 1).float())
        views = [(model.decode(coding.partial[i]).clamp(-1, 1) + 1) / 2 for i in (-1, -2, -3, -4)]
        index = torch.from_numpy(labels).to(device)
        for i, view in enumerate(views):
            error[:, i].index_add_(0, index, (view - pictures).square().mean((1, 2, 3)))
        seen.index_add_(0, index, torch.ones(len(labels), device=device))
        used += torch.bincount(torch.cat([t.flatten() for t in coding.tokens]), minlength=vocab)
        if start == 0:
            shown = min(12, len(labels))
            rows = [pictures[:shown], *[view[:shown] for view in views]]
    training.save_sheet(out / "vqvae.png", torch.cat(rows), columns=len(rows[0]), edge=min(128, size))
    psnr = -10 * torch.log10(error / seen[:, None])
    mean = -10 * torch.log10(error.sum(0) / seen.sum())
    names = ["all", *[f"to {patches[i]}" for i in (-2, -3, -4)]]
    share = used / used.sum()
    return {
        "psnr_db": {name: round(float(value), 2) for name, value in zip(names, mean, strict=True)},
        "psnr_db_by_class": {CLASSES[i]: round(float(psnr[i, 0]), 2) for i in range(len(CLASSES))},
        "codes_used": int((used > 0).sum()),
        "codebook_perplexity": round(float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum())), 1),
    }


if __name__ == "__main__":
    main()
