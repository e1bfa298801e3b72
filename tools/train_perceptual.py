"""Train the net behind the perceptual distance: `python tools/train_perceptual.py --minutes 1.3 --out DIR`.

Half of every batch shows the twelve classes, half captioned scenes; the net names what it sees. It also tells how much
a picture was blurred and noised, so that its features keep what a plain classifier learns to overlook.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from train_classifier import SCENE_HEADS, draw_batch

from toprovar.demo.perceptual import PerceptualNet
from toprovar.demo.pictures import CLASSES, HELD_OUT

_HEADS = {"label": len(CLASSES), **SCENE_HEADS, "blur": 4, "noise": 4}
_LEVELS = 4  # of blur and of noise, the first one none
FIRST_SEED = 1 << 32  # other pictures than the judges saw


def spoil(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Blur and noise each picture by a random level of four; return the levels, `[n]` each."""
    n, device = len(pictures), pictures.device
    blur, noise = torch.randint(_LEVELS, (2, n), generator=generator, device=device)
    out = pictures
    for level in range(1, _LEVELS):
        small = F.avg_pool2d(pictures, 2**level)
        soft = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
        out = torch.where((blur == level).view(-1, 1, 1, 1), soft, out)
    grain = torch.randn(out.shape, generator=generator, device=device)
    out = out + 0.03 * noise.view(-1, 1, 1, 1) * grain
    return out.clamp(0, 1), {"blur": blur, "noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.3)
    parser.add_argument("--steps", type=int, default=0, help="fixed number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=3072, help="pictures of each kind that are ready")
    parser.add_argument("--judged", type=int, default=960, help="held-out pictures")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    team = training.Team()
    device = team.device
    net = PerceptualNet().to(device)
    heads = nn.ModuleDict({name: nn.Linear(net.widths[-1], count) for name, count in _HEADS.items()}).to(device)
    optimiser = training.adamw([*net.parameters(), *heads.parameters()], device, 0.02, (0.9, 0.99))
    generator = torch.Generator(device=device).manual_seed(1)
    seeds, clock, began = training.Seeds(team, FIRST_SEED), training.Clock(team, args.minutes, args.steps), time.time()

    def drawn(numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Rows of a picture of a class and one of a scene, with their right answers."""
        (one, labels), (two, fields) = draw_batch(numbers, False, device), draw_batch(numbers, True, device)
        return one.half(), two.half(), *labels.values(), *fields.values()

    def answer(one: Tensor, two: Tensor, *truths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and whether each head was right of these rows."""
        pictures, levels = spoil(torch.cat((one, two)).float(), generator)
        with team.autocast():
            features = net.maps(pictures)[-1].mean((2, 3))
        right, losses = {}, []
        for name, truth in (dict(zip(_HEADS, truths, strict=False)) | levels).items():
            seen = features if name in levels else features[: len(one)] if name == "label" else features[len(one) :]
            logits = heads[name](seen.float())
            losses.append(F.cross_entropy(logits, truth))
            right[name] = (logits.argmax(1) == truth).float()
        return torch.stack(losses).sum(), right

    pool = training.Pool(lambda count: drawn(seeds.take(count)), args.pool, args.pool // 4, 6.0, 2)
    going = True
    while going:
        for group in optimiser.param_groups:
            group["lr"] = training.cosine(clock.share, 3e-3)
        loss, _ = answer(*pool.take(args.batch // 2))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        going = clock.tick()
        if clock.step % 50 == 0:
            team.say(f"perceptual step {clock.step} share {clock.share:.2f} loss {float(loss.detach()):.3f}")
    minutes = (time.time() - began) / 60
    net.eval()
    hits: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, args.judged, 120):
            for name, right in answer(*drawn(HELD_OUT + start + np.arange(60)))[1].items():
                hits.setdefault(name, []).append(right)
    facts = {
        "steps": clock.step,
        "batch": args.batch,
        "minutes": round(minutes, 2),
        "loss": round(float(loss.detach()), 3),
        "held_out_accuracy": {name: round(float(torch.cat(parts).mean()), 4) for name, parts in hits.items()},
        "machine": training.machine(),
        "size_bytes": training.save_weights(args.out / "perceptual.safetensors", net.state_dict(), {"format": "pt"}),
    }
    training.save_json(args.out / "perceptual.json", facts)
    team.say("perceptual done", facts)


if __name__ == "__main__":
    main()
