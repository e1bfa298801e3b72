"""Calibration and export of Infinity at its true size: time and peak memory of the commands a user gives.

    python benchmarks/full_size.py FOLDER --out benchmarks/results [--models 2b,8b] [--prompts 50] [--device cuda]

Random weights, written to FOLDER as a checkpoint is (fp32 transformer, that of 8B in shards, and its VAE) with random text
features; then `toprovar calibrate` and `toprovar export`, each in a process of its own. Peak memory of the host counts
pages of the memory-mapped checkpoint as well. Entropies of random weights say nothing; time and memory do not depend on
them. A step that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
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
SHARD_BYTES = {"8b": 4 << 30}
"""Of a checkpoint that is released in shards."""
HEADER = ("step", "seconds", "peak of the host, GiB", "peak of the GPU, GiB", "size on disk, GiB")


def write_checkpoint(name: str, folder: Path, device: str) -> tuple[Path, Path]:
    """Random weights, of the names and dtypes that a released checkpoint has. Returns transformer and VAE."""
    sizes, vae_spec = SIZES[name]
    torch.manual_seed(0)
    chosen = schedule("1.0", RESOLUTION)
    with torch.device(device):
        vae = BsqVae(vae_spec)
        model = Infinity(sizes.spec(vae, chosen.grids, chosen.rope_grid), vae)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}
    checkpoint, decoder = folder / f"{name}.safetensors", folder / f"{name}-vae.safetensors"
    if name in SHARD_BYTES:
        checkpoint = folder / f"{name}-weights"
        write_shards(weights, checkpoint, SHARD_BYTES[name])
    else:
        save_file(weights, checkpoint)
    mask = {"quantizer.lfq.mask": torch.zeros(1)}  # by which a VAE of Infinity is known
    save_file(vae.state_dict() | mask, decoder)
    return checkpoint, decoder


def write_shards(weights: dict[str, torch.Tensor], folder: Path, size_bytes: int) -> None:
    """Shards of about `size_bytes` and their index, as Hugging Face lays them out."""
    folder.mkdir(exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for key, value in weights.items():
        if used + value.nbytes > size_bytes and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][key] = value
        used += value.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_prompts(folder: Path, count: int, width: int) -> None:
    """Prompts, and features of 16 to 64 tokens for each."""
    random = np.random.default_rng(0)
    lengths = random.integers(16, TEXT_TOKENS + 1, count)
    features = random.standard_normal((int(lengths.sum()), width), np.float32)
    np.savez(folder / "features.npz", text_features=features.astype(np.float16), text_lens=lengths)
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(count)))


def measured(*arguments: object) -> dict[str, Any]:
    """One command in a process of its own: seconds, and peak memory of host and GPU in GiB, or its exit status."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    taken: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if result.returncode:
        return {**taken, "exit_status": result.returncode}
    return {**taken, **json.loads(result.stdout.splitlines()[-1])}


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

    checkpoint, vae = write_checkpoint(name, folder, device)
    gc.collect()
    torch.cuda.empty_cache()  # the commands need the room
    write_prompts(folder, prompts, SIZES[name][0].text_width)
    model: list[object] = [
        "--backbone",
        "infinity" if name not in ("2b", "8b") else f"infinity-{name}",
        "--device",
        device,
    ]
    model += ["--checkpoint", checkpoint, "--vae", vae]
    model += ["--features", folder / "features.npz", "--text-tokens", TEXT_TOKENS, "--resolution", RESOLUTION]
    calibration, bundle = folder / f"{name}.json", folder / f"{name}.bundle"
    options: list[object] = ["--prompts", folder / "prompts.txt", "--seeds", 1, "--batch-size", BATCH_SIZE.get(name, 4)]
    options += ["-o", calibration, "--force"]
    step(f"calibrate on {prompts} prompts", measured("calibrate", *model, *options))
    if calibration.exists():
        options = ["--calibration", calibration, "--profile", "fast", "--precision", "fp16", "-o", bundle, "--force"]
        taken = measured("export", *model, *options)
        step("export, fp16, golden traces included", {**taken, "disk_gib": size_gib(bundle)})
    for path in (checkpoint, bundle):
        shutil.rmtree(path, ignore_errors=True)  # of a folder
    for path in folder.glob(f"{name}*.safetensors"):
        path.unlink()
    return rows


def markdown(document: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(HEADER) + " |", "| --- " * 2 + "| ---: " * 4 + "|"]
    for row in document["rows"]:
        failed = f"exit status {row['exit_status']}" if "exit_status" in row else ""
        cells = [row["model"], row["step"], row["seconds"], row.get("host_gib", failed), row.get("gpu_gib", "")]
        cells.append(row.get("disk_gib", ""))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    machine = document["machine"]
    return "\n".join(["# Infinity at full size", "", f"{document['gpu']}; {machine['cores']} cores", "", *lines, ""])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for checkpoint and bundle: 14 GB for 2b, 51 GB for 8b")
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


if __name__ == "__main__":
    main()
