"""Train the demo's judge on drawn pictures: `python tools/train_classifier.py --minutes 0.3 --out DIR`.

Held-out pictures (seeds no training run uses) decide the reported accuracy, clean and degraded: blurred and noised as
generated pictures may be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import training
from torch import Tensor

from toprovar.demo.captions import COLOURS, COUNTS, SHAPES, TEXTURES
from toprovar.demo.classifier import Classifier
from toprovar.demo.judge import FIELDS
from toprovar.demo.pictures import CLASSES, HELD_OUT, render
from toprovar.demo.scenes import random_scenes, render_scenes

_SIZES = (len(COUNTS), len(COLOURS), len(TEXTURES), len(SHAPES), len(COLOURS), len(TEXTURES))
SCENE_HEADS = dict(zip(FIELDS, _SIZES, strict=True))
"""What a net that judges scenes answers: field -> number of answers."""


def draw_batch(seeds: np.ndarray, scenes: bool, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pictures `[n, 3, 256, 256]` and the right answer of every head."""
    if scenes:
        rows = random_scenes(seeds)
        answers = {name: torch.from_numpy(rows[:, i].copy()).to(device) for i, name in enumerate(SCENE_HEADS)}
        return render_scenes(rows, seeds, device=device), answers
    labels = np.arange(len(seeds)) % len(CLASSES)
    return render(labels, seeds, device=device), {"label": torch.from_numpy(labels).to(device)}


def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift colours and add noise, each to some of the pictures."""
    n, device = len(pictures), pictures.device

    def chance(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator, device=device) < share).float()

    small = F.interpolate(pictures, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
    strength = torch.rand(n, 1, 1, 1, generator=generator, device=device) * chance(0.5)
    pictures = pictures + (blurred - pictures) * strength
    gain = 1 + 0.08 * torch.randn(n, 3, 1, 1, generator=generator, device=device) * chance(0.5)
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    coarse = torch.randn(n, 3, 32, 32, generator=generator, device=device)
    coarse = F.interpolate(coarse, pictures.shape[-2:], mode="bilinear")
    return (pictures * gain + 0.03 * noise * chance(0.4) + 0.04 * coarse * chance(0.4)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--judged", type=int, default=1200, help="held-out pictures")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    model = Classifier({"label": len(CLASSES)}).to(team.device)
    optimiser = training.adamw(list(model.parameters()), team.device, 0.02, (0.9, 0.99))
    generator = torch.Generator(device=team.device).manual_seed(1 + team.rank)
    seeds, clock, began = training.Seeds(team), training.Clock(team, args.minutes, args.steps), time.perf_counter()
    saved = training.load_checkpoint(args.out / "classifier.ckpt", team.device)
    if saved:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        clock.load(saved["clock"])
        seeds.next = saved["seeds"]
    going = True
    while going:
        pictures, answers = draw_batch(seeds.take(args.batch), False, team.device)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, 2e-3)
        with team.autocast():
            logits = model(degrade(pictures, generator))
        loss = sum(F.cross_entropy(logits[name].float(), answers[name]) for name in answers)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        team.average_gradients(list(model.parameters()))
        optimiser.step()
        going = clock.tick()
        if clock.step % 50 == 0:
            team.say(f"classifier step {clock.step} share {clock.share:.2f} loss {float(loss.detach()):.4f}")
        if team.leads and clock.step % 500 == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            state |= {"clock": clock.state(), "seeds": seeds.next}
            training.save_checkpoint(args.out / "classifier.ckpt", state)
    if team.leads:
        minutes = (time.perf_counter() - began) / 60
        model.eval()
        accuracy: dict[str, float] = {}
        right: dict[str, list[Tensor]] = {}
        for start in range(0, args.judged, 120):
            pictures, answers = draw_batch(HELD_OUT + np.arange(start, start + 120), False, team.device)
            for kind, view in (("clean", pictures), ("degraded", degrade(pictures, generator))):
                for name, answer in model.judge(view).items():
                    right.setdefault(f"{kind} {name}", []).append((answer == answers[name]).float())
        accuracy = {name: round(float(torch.cat(hits).mean()), 4) for name, hits in right.items()}
        facts = {
            "steps": clock.step,
            "batch": args.batch * team.size,
            "minutes": round(minutes, 2),
            "loss": round(float(loss.detach()), 4),
            "held_out_accuracy": accuracy,
            "machine": training.machine(team.size),
        }
        size = training.save_weights(args.out / "classifier.safetensors", model.state_dict(), {"format": "pt"})
        training.save_json(args.out / "classifier.json", facts | {"size_bytes": size})
        team.say("classifier done", facts)
    team.close()


if __name__ == "__main__":
    main()
