"""Calibration and export of Infinity at its true size: time and peak memory of the commands a user gives.

    python benchmarks/full_size.py FOLDER --out benchmarks/results [--models 2b,8b] [--prompts 50] [--device cuda]

Random weights, written to FOLDER as a checkpoint is (fp32 transformer, and its VAE) with random text features; then
`toprovar calibrate` and `toprovar export`, each in a process of its own. Peak memory of the host counts pages of the
memory-mapped checkpoint as well. Entropies of random weights say nothing; time and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from infinity import SIZES
from safetensors.torch import save_file

from toprovar.backbones.bsq_vae import BsqVae
from toprovar.backbones.infinity import Infinity
from toprovar.backbones.schedules import schedule
from toprovar.runtime.machine import describe_machine

TEXT_TOKENS, RESOLUTION = 64, "1M"
BATCH_SIZE = {"8b": 2}
"""Pictures at once in calibration, where the command's own 4 are too many for 80 GB."""
HEADER = ("step", "seconds", "peak of the host, GiB", "peak of the GPU, GiB", "size on disk, GiB")


def write_checkpoint(name: str, folder: Path, device: str) -> None:
    """Files of random weights, of the names and dtypes that a released checkpoint has."""
    sizes, vae_spec = SIZES[name]
    torch.manual_seed(0)
    chosen = schedule("1.0", RESOLUTION)
    with torch.device(device):
        vae = BsqVae(vae_spec)
        model = Infinity(sizes.spec(vae, chosen.grids, chosen.rope_grid), vae)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}
    save_file(weights, folder / f"{name}.safetensors")
    mask = {"quantizer.lfq.mask": torch.zeros(1)}  # by which a VAE of Infinity is known
    save_file(vae.state_dict() | mask, folder / f"{name}-vae.safetensors")


def write_prompts(folder: Path, count: int, width: int) -> None:
    """Prompts, and features of 16 to 64 tokens for each."""
    random = np.random.default_rng(0)
    lengths = random.integers(16, TEXT_TOKENS + 1, count)
    features = random.standard_normal((int(lengths.sum()), width), np.float32)
    np.savez(folder / "features.npz", text_features=features.astype(np.float16), text_lens=lengths)
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(count)))


def measured(*arguments: object) -> dict[str, Any]:
    """One command in a process of its own: seconds, and peak memory of host and GPU in GiB."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}")
    return {"seconds": round(time.monotonic() - start, 1), **json.loads(result.stdout.splitlines()[-1])}


def child(arguments: list[str]) -> None:
    """The command itself, and what it took."""
    from toprovar.cli import app

    app(arguments, standalone_mode=False)
    peak_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"host_gib": round(peak_host / 2**30, 2), "gpu_gib": round(peak_gpu / 2**30, 2)}))


def size_gib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30, 2)


def run(name: str, folder: Path, prompts: int, device: str) -> list[dict[str, Any]]:
    """Rows of one model."""
    rows: list[dict[str, Any]] = []

    def step(what: str, row: dict[str, Any]) -> None:
        rows.append({"model": name, "step": what, **row})
        print(json.dumps(rows[-1]), flush=True)

    write_checkpoint(name, folder, device)
    write_prompts(folder, prompts, SIZES[name][0].text_width)
    model = ["--backbone", "infinity" if name not in ("2b", "8b") else f"infinity-{name}", "--device", device]
    model += ["--checkpoint", folder / f"{name}.safetensors", "--vae", folder / f"{name}-vae.safetensors"]
    model += ["--features", folder / "features.npz", "--text-tokens", TEXT_TOKENS, "--resolution", RESOLUTION]
    calibration, bundle = folder / f"{name}.json", folder / f"{name}.bundle"
    options = ["--prompts", folder / "prompts.txt", "--seeds", 1, "--batch-size", BATCH_SIZE.get(name, 4)]
    options += ["-o", calibration, "--force"]
    step(f"calibrate on {prompts} prompts", measured("calibrate", *model, *options))
    options = ["--calibration", calibration, "--profile", "fast", "--precision", "fp16", "-o", bundle, "--force"]
    taken = measured("export", *model, *options)
    step("export, fp16, golden traces included", {**taken, "disk_gib": size_gib(bundle)})
    return rows


def markdown(document: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(HEADER) + " |", "| --- " * 2 + "| ---: " * 4 + "|"]
    for row in document["rows"]:
        cells = [row["model"], row["step"], row["seconds"], row["host_gib"], row["gpu_gib"], row.get("disk_gib", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    machine = document["machine"]
    return "\n".join(["# Infinity at full size", "", f"{document['gpu']}; {machine['cores']} cores", "", *lines, ""])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for checkpoints and bundles: 30 GB for 2b, 110 GB for 8b")
    parser.add_argument("--models", default="2b")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "schema": "toprovar.full-size/1",
        "machine": describe_machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "rows": [],
    }
    for name in options.models.split(","):
        document["rows"] += run(name, options.folder, options.prompts, options.device)
        print(markdown(document), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "full-size.json").write_text(json.dumps(document, indent=2) + "\n")
            (options.out / "full-size.md").write_text(markdown(document))
        for path in options.folder.glob(f"{name}*.safetensors"):
            os.unlink(path)


if __name__ == "__main__":
    main()
