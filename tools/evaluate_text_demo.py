"""Sample from the text demo and let the caption judge read the pictures: accuracy by field, Frechet distance, a sheet.

    python tools/evaluate_text_demo.py --demo DIR --judge DIR/judge.safetensors --prompts 192 --guidance 2 3 --out DIR

Half of the prompts are combinations that training never showed. Several settings are judged one after another; the
sheet and the pictures' facts show the best.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import training
from torch import Tensor

from toprovar import backbones
from toprovar.backbones.base import Sampling
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.text import TextFeatures
from toprovar.demo.captions import caption, held_out
from toprovar.demo.classifier import frechet_distance
from toprovar.demo.embedded_text import RESOLUTION, TextDemo
from toprovar.demo.judge import FIELDS, CaptionJudge
from toprovar.demo.pictures import HELD_OUT
from toprovar.demo.scenes import random_scenes, render_scenes, scene_of
from toprovar.demo.word_encoder import load_word_encoder


def prompts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `[count, 6]` fields and seeds, every other one a combination held out of training."""
    seeds = HELD_OUT + 8192 + np.arange(16 * count)
    rows = random_scenes(seeds)
    unseen = np.array([held_out(scene_of(row)) for row in rows])
    chosen = np.stack([np.flatnonzero(~unseen)[: count // 2], np.flatnonzero(unseen)[: count // 2]], 1).ravel()
    return rows[chosen], seeds[chosen]


def sample(model: backbones.Backbone, text: TextFeatures, seed: int, batch: int, drop: int = 0) -> Tensor:
    """Return `[n, 3, h, w]` in [0, 1], `batch` pictures at a time; `drop` leaves out the last scales."""
    generator = torch.Generator(device=text.features.device).manual_seed(seed)
    spec = model.spec
    pruning = None
    if drop:
        pruning = Pruning("g" * spec.depth, spec.tokens, scales_run=tuple(range(spec.scales - drop)))

    def noise(scale: int, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, device=text.features.device).clamp(2**-25, 1 - 2**-24)

    pictures = []
    for start in range(0, text.batch, batch):
        part = text[start : start + batch]
        image = generate(model, model.prefix(part.features, part.lengths), noise=noise, pruning=pruning).image
        assert image is not None
        pictures.append(image)
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of the demo's files")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.97])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="each one of all scales")
    parser.add_argument("--drop", type=int, nargs="*", default=[], help="also judge without this many last scales")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    files, judge = TextDemo(args.demo), CaptionJudge.load(args.judge, device=device)
    rows, seeds = prompts(args.prompts)
    unseen = np.array([held_out(scene_of(row)) for row in rows])
    text = load_word_encoder(files.word_encoder, device=device).encode([caption(scene_of(row)) for row in rows])
    truth = torch.from_numpy(rows)

    def drawn(shift: int) -> Tensor:
        """The prompts' scenes as the generator draws them, in parts that fit any machine."""
        lots = zip(np.array_split(rows, 8), np.array_split(seeds + shift, 8), strict=True)
        return torch.cat([render_scenes(some, own, device=device) for some, own in lots])

    def features(pictures: Tensor) -> Tensor:
        return torch.cat([judge.classifier.features(part) for part in pictures.split(96)])

    real = features(drawn(0))

    def judged(pictures: Tensor) -> dict[str, object]:
        right = (judge.judge(pictures).fields.cpu() == truth).float()
        return {
            "accuracy": round(float(right.mean()), 4),
            "all_fields": round(float(right.amin(1).mean()), 4),
            "accuracy_unseen": round(float(right[unseen].mean()), 4),
            "accuracy_by_field": {name: round(float(v), 3) for name, v in zip(FIELDS, right.mean(0), strict=True)},
            "accuracy_by_count": [round(float(right[rows[:, 0] == n].mean()), 3) for n in range(4)],
            "frechet_distance": round(frechet_distance(features(pictures), real), 3),
        }

    results: list[dict[str, object]] = [{"pictures": "drawn from other seeds", **judged(drawn(1 << 20))}]
    print(results[0], flush=True)

    best: tuple[float, Tensor, dict[str, object]] | None = None
    settings = itertools.product(args.guidance, args.top_p, args.temperature, [0, *args.drop])
    for guidance, top_p, temperature, drop in settings:
        sampling = Sampling(guidance, temperature, top_p=top_p)
        model = backbones.load(
            "infinity", files.checkpoint, files.vae, resolution=RESOLUTION, sampling=sampling, device=device
        )
        began = time.perf_counter()
        pictures = sample(model, text, args.seed, args.batch, drop)
        result: dict[str, object] = {
            "pictures": len(rows),
            "guidance": guidance,
            "top_p": top_p,
            "temperature": temperature,
            "dropped_scales": drop,
            **judged(pictures),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(result, flush=True)
        results.append(result)
        score = float(str(result["accuracy"])) - 0.001 * float(str(result["frechet_distance"]))
        if not drop and (best is None or score > best[0]):
            best = (score, pictures, result)
    assert best is not None
    training.save_sheet(args.out / "text_samples.png", best[1][:48], 12, edge=128)
    (args.out / "text_samples.txt").write_text("".join(caption(scene_of(row)) + "\n" for row in rows[:48]))
    print("best", best[2], flush=True)
    facts = {"best": best[2], "results": results, "seed": args.seed, "machine": training.machine()}
    training.save_json(args.out / "text_evaluation.json", facts)


if __name__ == "__main__":
    main()
