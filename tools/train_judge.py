"""Train the text demo's caption judge on drawn scenes: `python tools/train_judge.py --minutes 1.5 --out DIR`.

Held-out scenes (seeds no training run uses) decide the reported accuracy, clean and degraded: blurred and noised as
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
from train_classifier import SCENE_HEADS, degrade, draw_batch

from toprovar.demo.classifier import Classifier
from toprovar.demo.pictures import HELD_OUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lot", type=int, default=768, help="scenes drawn at a time")
    parser.add_argument("--reuse", type=float, default=4.0)
    parser.add_argument("--judged", type=int, default=1920, help="held-out scenes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    model = Classifier(SCENE_HEADS).to(device)
    optimiser = training.adamw(list(model.parameters()), device, 0.02, (0.9, 0.99))
    generator = torch.Generator(device=device).manual_seed(1)
    seeds, clock, began = training.Seeds(team), training.Clock(team, args.minutes, args.steps), time.perf_counter()

    def make(count: int) -> tuple[Tensor, ...]:
        pictures, answers = draw_batch(seeds.take(count), True, device)
        return pictures.half(), torch.stack([answers[name] for name in SCENE_HEADS], 1)

    pool = training.Pool(make, 4 * args.lot, args.lot, args.reuse, 3)
    clock.restart()
    going = True
    while going:
        pictures, answers = pool.take(args.batch)
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, 3e-3)
        with team.autocast():
            logits = model(degrade(pictures.float(), generator))
        losses = [F.cross_entropy(logits[name].float(), answers[:, i]) for i, name in enumerate(SCENE_HEADS)]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        going = clock.tick()
        if clock.step % 100 == 0:
            team.say(f"judge step {clock.step} share {clock.share:.2f} loss {float(loss.detach()):.4f}")
    minutes = (time.perf_counter() - began) / 60
    model.eval()
    right: dict[str, list[Tensor]] = {}
    for start in range(0, args.judged, 120):
        pictures, answers = draw_batch(HELD_OUT + np.arange(start, start + 120), True, device)
        for kind, view in (("clean", pictures), ("degraded", degrade(pictures, generator))):
            for name, answer in model.judge(view).items():
                right.setdefault(f"{kind} {name}", []).append((answer == answers[name]).float())
    facts = {
        "steps": clock.step,
        "batch": args.batch,
        "scenes_drawn": seeds.next,
        "minutes": round(minutes, 2),
        "loss": round(float(loss.detach()), 4),
        "held_out_accuracy": {name: round(float(torch.cat(hits).mean()), 4) for name, hits in right.items()},
        "machine": training.machine(),
        "size_bytes": training.save_weights(args.out / "judge.safetensors", model.state_dict(), {"format": "pt"}),
    }
    training.save_json(args.out / "judge.json", facts)
    team.say("judge done", facts)


if __name__ == "__main__":
    main()
