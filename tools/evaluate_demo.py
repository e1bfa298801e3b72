"""Sample from the demo checkpoint and let the classifier judge: accuracy, Frechet distance, a sheet of pictures.

    python tools/evaluate_demo.py --var DIR/var.safetensors --vae DIR/vae.safetensors \
        --classifier DIR/classifier.safetensors --per-class 8 --guidance 1.5 --out DIR

Several values of --guidance or --top-p are judged one after another; the sheet shows the best: of the settings whose
accuracy is within a hundredth of the highest, the one nearest to drawn pictures.
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
from toprovar.demo.classifier import frechet_distance, load_classifier
from toprovar.demo.labels import PROMPT_CLASSES
from toprovar.demo.pictures import CLASSES, HELD_OUT, render


def sample(model: backbones.Backbone, labels: Tensor, seed: int, batch: int, drop: int = 0) -> Tensor:
    """Return `[n, 3, h, w]` in [0, 1], `batch` pictures at a time; `drop` leaves out the last scales."""
    generator = torch.Generator(device=labels.device).manual_seed(seed)
    spec = model.spec
    pruning = None
    if drop:
        pruning = Pruning("g" * spec.depth, spec.tokens, scales_run=tuple(range(spec.scales - drop)))

    def noise(scale: int, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, device=labels.device).clamp(2**-25, 1 - 2**-24)

    pictures = []
    for part in labels.split(batch):
        image = generate(model, model.prefix(part), noise=noise, pruning=pruning).image
        assert image is not None
        pictures.append(image)
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--var", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5])
    parser.add_argument("--top-k", type=int, default=600)
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.95])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="one, or one a scale")
    parser.add_argument("--drop", type=int, nargs="*", default=[], help="also judge without this many last scales")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    classifier = load_classifier(args.classifier).to(device)
    order = np.repeat(np.arange(len(CLASSES)), args.per_class)
    labels = torch.from_numpy(order).to(device)
    held_out = HELD_OUT + 4096 + np.arange(len(order))
    lots = zip(np.array_split(order, len(CLASSES)), np.array_split(held_out, len(CLASSES)), strict=True)
    real = torch.cat([classifier.features(render(names, seeds, device=device)) for names, seeds in lots])

    results: list[dict[str, object]] = []
    candidates: list[tuple[float, float, Tensor]] = []
    for guidance, top_p, drop in itertools.product(args.guidance, args.top_p, [0, *args.drop]):
        sampling = Sampling(guidance, tuple(args.temperature), top_k=args.top_k, top_p=top_p)
        model = backbones.load("var", args.var, args.vae, sampling=sampling, device=device)
        began = time.perf_counter()
        pictures = sample(model, labels, args.seed, args.batch, drop)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        right = (classifier.judge(pictures)["label"] == labels).float().cpu()
        by_class = right.view(len(CLASSES), -1).mean(1)
        groups = {g: float(np.mean([by_class[CLASSES.index(c)] for c in names])) for g, names in PROMPT_CLASSES.items()}
        features = torch.cat([classifier.features(part) for part in pictures.split(96)])
        distance = frechet_distance(features, real)
        result: dict[str, object] = {
            "guidance": guidance,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": top_p,
            "dropped_scales": drop,
            "pictures": len(labels),
            "accuracy": round(float(right.mean()), 4),
            "accuracy_by_prompt_class": {name: round(value, 4) for name, value in groups.items()},
            "accuracy_by_class": {c: round(float(v), 3) for c, v in zip(CLASSES, by_class, strict=True)},
            "frechet_distance": round(distance, 3),
            "seconds": round(seconds, 1),
        }
        print(result, flush=True)
        results.append(result)
        if not drop:
            candidates.append((float(right.mean()), distance, pictures.cpu()))
    enough = max(accuracy for accuracy, _, _ in candidates) - 0.01
    best = min((c for c in candidates if c[0] >= enough), key=lambda candidate: candidate[1])[2]
    columns = min(args.per_class, 12)
    shown = best.view(len(CLASSES), args.per_class, *best.shape[1:])[:, :columns].flatten(0, 1)
    training.save_sheet(args.out / "samples.png", shown, columns, edge=128)
    training.save_json(args.out / "evaluation.json", {"results": results, "machine": training.machine()})


if __name__ == "__main__":
    main()
