"""Train the demo's VQVAE on freshly drawn pictures: `python tools/train_vqvae.py --minutes 2 --out DIR`.

First a plain autoencoder for a few steps, then the codebook is set by k-means on what the scales have to code, then
everything together: reconstruction (L1, L2 and the L1 of gradients, which keeps edges sharp), the codebook loss of VAR
on every partial sum, and new places for codes that nothing uses. The shipped file leaves the encoder out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import training
from fast_vqvae import Coding, quantise, quicken
from tokens import PATCHES, Scales, demo_sizes, residual_vectors
from torch import Tensor

from toprovar.backbones.vqvae import VQVAE, VQVAESpec
from toprovar.demo.pictures import CLASSES, HELD_OUT, render


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return pictures[..., :, 1:] - pictures[..., :, :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(made: Tensor, goal: Tensor) -> Tensor:
    """L1 + L2 + twice the L1 of gradients at full and half size; pictures `[B, 3, h, w]` in [-1, 1]."""
    loss = F.l1_loss(made, goal) + F.mse_loss(made, goal)
    for _ in range(2):
        loss = loss + 2.0 * sum(F.l1_loss(a, b) for a, b in zip(edges(made), edges(goal), strict=True))
        made, goal = F.avg_pool2d(made, 2), F.avg_pool2d(goal, 2)
    return loss


def k_means(vectors: Tensor, count: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Return `[count, d]` centres of `[m, d]`; a centre that loses all its members restarts at a random vector."""

    def some(n: int) -> Tensor:
        return vectors[torch.randint(len(vectors), (n,), generator=generator, device=vectors.device)]

    centres = some(count)
    for _ in range(rounds):
        member = (centres.square().sum(1) - 2 * vectors @ centres.T).argmin(1)
        size = torch.bincount(member, minlength=count)
        total = torch.zeros_like(centres).index_add_(0, member, vectors)
        centres = torch.where(size[:, None] > 0, total / size[:, None].clamp(min=1), some(count))
    return centres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, per process")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 32, 64, 96])
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--patches", type=int, nargs="+", default=list(PATCHES))
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--plain-share", type=float, default=0.08, help="of the time, before there is a codebook")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--lot", type=int, default=768, help="pictures drawn at a time")
    parser.add_argument("--judged", type=int, default=480)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    spec = demo_sizes(args.channels, args.latent, args.vocab, args.patches)
    vae = VQVAE(spec).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        for conv in vae.quantize.quant_resi.qresi_ls:  # begin as no smoothing at all: phi(h) = h
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
    team.same(vae.parameters())
    parameters, codebook = list(vae.parameters()), vae.quantize.embedding.weight
    optimiser = training.adamw(parameters, device, 1e-4, (0.9, 0.99))
    clock, seeds = training.Clock(team, args.minutes, args.steps), training.Seeds(team)
    generator = torch.Generator(device=device).manual_seed(3)

    def encode(pictures: Tensor) -> Tensor:
        with team.autocast():
            return vae.features(pictures).float()

    def decode(codes: Tensor) -> Tensor:
        with team.autocast():
            return vae.decoder(vae.post_quant_conv(codes)).float()

    quicken(vae, args.compile)
    scales = Scales(spec.patch_nums, device)
    judge_pictures = torch.compile(reconstruction_loss, dynamic=False) if args.compile else reconstruction_loss

    def plain(pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Loss to minimise and reconstruction loss, without a codebook."""
        features = encode(pictures)
        loss = judge_pictures(decode(features), pictures)
        # Features of unit spread: what k-means and the codebook's learning rate count on.
        return loss + 0.1 * features.square().mean().add(1e-6).log().square(), loss.detach()

    def coded(pictures: Tensor) -> tuple[Tensor, Tensor, Coding]:
        """Loss to minimise, reconstruction loss, coding; gradients pass the codes straight through to the encoder."""
        features = encode(pictures)
        coding = quantise(vae.quantize, scales, features)
        loss = judge_pictures(decode(features + (coding.codes - features).detach()), pictures)
        return loss + coding.loss, loss.detach(), coding

    usage = torch.ones(args.vocab, device=device)
    has_codebook = False
    saved = training.load_checkpoint(args.out / "vqvae.ckpt", device)
    if saved:
        vae.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        clock.load(saved["clock"])
        seeds.next, usage, has_codebook = saved["seeds"], saved["usage"], saved["has_codebook"]

    def drawn(count: int) -> tuple[Tensor]:
        return (render(np.arange(count) % len(CLASSES), seeds.take(count), device=device) * 2 - 1,)

    pool = training.Pool(drawn, args.lot, args.lot, 1.0, 50 + team.rank + clock.step)
    going, began, marked, revived = True, time.perf_counter(), clock.step, 0
    stage, restarted = -1, 0.0
    while going:
        if not has_codebook and clock.share >= args.plain_share:
            vae.eval()
            with torch.no_grad():
                features = torch.cat([encode(pool.take(args.batch)[0]) for _ in range(6)])
            vae.train()
            found = residual_vectors(vae, features)
            # Every scale has a say: the large ones would otherwise outvote those that lay out the picture.
            some = [v[torch.randperm(len(v), generator=generator, device=device)[: 24 * args.vocab]] for v in found]
            with torch.no_grad():
                codebook.copy_(k_means(torch.cat(some), args.vocab, generator))
            team.same([codebook])
            has_codebook = True
        now = int(has_codebook)
        (pictures,) = pool.take(args.batch)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, args.lr, warmup=0.02)
        before = time.perf_counter()
        coding = None
        if has_codebook:
            total, loss, coding = coded(pictures)
        else:
            total, loss = plain(pictures)
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        team.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if stage != now:  # each stage compiles in its first step: not training time
            if device.type == "cuda":
                torch.cuda.synchronize()
            team.say(f"vqvae: first {'coded' if now else 'plain'} step {time.perf_counter() - before:.1f} s")
            clock.spent = clock.share * 60 * args.minutes
            clock.restart()
            stage, restarted, marked = now, time.perf_counter(), clock.step
        if coding is not None:
            drawn_codes = torch.cat(coding.tokens)
            usage.mul_(0.98).add_(torch.bincount(drawn_codes, minlength=args.vocab), alpha=0.02)
            if clock.step % 40 == 0 and clock.share < 0.7:
                dead = usage < 0.03 * usage.sum() / args.vocab
                # Their new places come from what each scale in turn has to code.
                pick = coding.wanted[1 + (clock.step // 40) % (len(spec.patch_nums) - 1)]
                pick = pick[torch.randint(len(pick), (args.vocab,), generator=generator, device=device)]
                with torch.no_grad():
                    codebook.copy_(torch.where(dead[:, None], pick, codebook))
                team.same([codebook])
                usage = torch.where(dead, usage.mean(), usage)
                revived += int(dead.sum())
        going = clock.tick()
        if clock.step % 100 == 0 or not going:
            rate = (clock.step - marked) * args.batch * team.size / max(1e-9, time.perf_counter() - restarted)
            share, codebook_loss = usage / usage.sum(), float(coding.loss.detach()) if coding else 0.0
            perplexity = float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
            team.say(
                f"vqvae step {clock.step} share {clock.share:.3f} loss {float(loss):.4f} codebook "
                f"{codebook_loss:.4f} perplexity {perplexity:.0f} revived {revived} pictures/s {rate:.0f}"
            )
        if team.leads and clock.step % 500 == 0:
            _save(args.out, vae, spec, optimiser, clock, seeds, usage, has_codebook)
    if team.leads:
        _save(args.out, vae, spec, optimiser, clock, seeds, usage, has_codebook)
        facts = judge(vae, args.judged, args.batch, args.out)
        shipped = {k: v for k, v in vae.state_dict().items() if not k.startswith(("encoder.", "quant_conv."))}
        facts |= {
            "steps": clock.step,
            "batch": args.batch * team.size,
            "loss": round(float(loss), 4),
            "codebook_loss": round(codebook_loss, 4),
            "revived_codes": revived,
            "minutes": round((time.perf_counter() - began) / 60, 2),
            "parameters_shipped": sum(v.numel() for v in shipped.values()),
            "parameters_trained": sum(p.numel() for p in parameters),
            "machine": training.machine(team.size),
            "size_bytes": training.save_weights(args.out / "vae.safetensors", shipped, {"format": "pt"}),
        }
        training.save_json(args.out / "vqvae.json", facts | {"sizes": asdict(spec)})
        team.say("vqvae done", facts)
    team.close()


def _save(
    out: Path,
    vae: VQVAE,
    spec: VQVAESpec,
    optimiser: torch.optim.Optimizer,
    clock: training.Clock,
    seeds: training.Seeds,
    usage: Tensor,
    has_codebook: bool,
) -> None:
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}
    state = {"model": vae.state_dict(), "sizes": sizes, "optimiser": optimiser.state_dict(), "clock": clock.state()}
    state |= {"seeds": seeds.next, "usage": usage, "has_codebook": has_codebook}
    training.save_checkpoint(out / "vqvae.ckpt", state)


@torch.no_grad()
def judge(vae: VQVAE, count: int, batch: int, out: Path) -> dict[str, object]:
    """PSNR on held-out pictures with all scales and without the last ones, used codes, and a sheet of pictures."""
    vae.eval()
    device = next(vae.parameters()).device
    patches = vae.spec.patch_nums
    error = torch.zeros(len(CLASSES), 4, device=device)
    seen = torch.zeros(len(CLASSES), device=device)
    used = torch.zeros(vae.spec.vocab, device=device)
    rows: list[Tensor] = []
    for start in range(0, count, batch):
        labels = np.arange(start, min(start + batch, count)) % len(CLASSES)
        pictures = render(labels, HELD_OUT + start + np.arange(len(labels)), device=device)
        coding = vae.quantize.quantise(vae.features(pictures * 2 - 1).float())
        views = [(vae.decode(coding.partial[i]) + 1) / 2 for i in (-1, -2, -3, -5)]
        index = torch.from_numpy(labels).to(device)
        for i, view in enumerate(views):
            error[:, i].index_add_(0, index, (view - pictures).square().mean((1, 2, 3)))
        seen.index_add_(0, index, torch.ones(len(labels), device=device))
        used += torch.bincount(torch.cat([t.flatten() for t in coding.tokens]), minlength=vae.spec.vocab)
        if start == 0:
            shown = min(12, len(labels))
            rows = [pictures[:shown], *[view[:shown] for view in views]]
    training.save_sheet(out / "vqvae.png", torch.cat(rows), columns=len(rows[0]), edge=128)
    psnr = -10 * torch.log10(error / seen[:, None])
    mean = -10 * torch.log10(error.sum(0) / seen.sum())
    names = ["all", *[f"to {patches[i]}" for i in (-2, -3, -5)]]
    share = used / used.sum()
    return {
        "psnr_db": {name: round(float(value), 2) for name, value in zip(names, mean, strict=True)},
        "psnr_db_by_class": {CLASSES[i]: round(float(psnr[i, 0]), 2) for i in range(len(CLASSES))},
        "codes_used": int((used > 0).sum()),
        "codebook_perplexity": round(float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum())), 1),
    }


if __name__ == "__main__":
    main()
