"""Infinity-2B and 8B at 1024 x 1024 on one GPU: per scale, transformer, decode, total, peak memory.

    python benchmarks/infinity.py --out benchmarks/results [--models 2b,8b] [--batches 1,4] [--quick]

Speed does not depend on the weights, so they are random, at the true sizes. Keep ratios do depend on a calibration, and random
weights have none worth the name: the plans are those that the profiles make of the calibration of the embedded
text demo, a small Infinity (benchmarks/results/text-demo-calibration.json), carried over to the larger model by
`carried_plan`. The floor of a plan is its
FLOPs at the rates of a plain GEMM and of this project's attention; its roofline is the sum over scales of that or the time of
reading the layers' weights once, whichever is longer; all rates are measured in the same run. A result is checked before
it is timed: the same noise gives the same picture twice, and the fused graphs give the logits of the plain PyTorch step
within bf16 noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from toprovar.backbones.base import Sampling
from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.infinity import Infinity, InfinitySizes
from toprovar.backbones.infinity_graphs import InfinityGraphs
from toprovar.backbones.schedules import schedule
from toprovar.exporter.calibrate import model_shape
from toprovar.exporter.plan import kept_tokens, make_plan, role_scores
from toprovar.kernels import entropy_attention
from toprovar.profiles.calibration import Calibration, load_calibration
from toprovar.profiles.flops import plan_flops
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.profile import SHIPPED, Profile, load_profile

TEXT_TOKENS = 64
SIZES = {
    "2b": (
        InfinitySizes(32, 2048, 16, 8192, 32, 2048, 512, 16, 15, 8),
        VaeSpec(32, 128, (1, 2, 4, 4, 4), 16),
    ),
    "8b": (
        InfinitySizes(40, 3584, 28, 14336, 56, 2048, 512, 16, 15, 8),
        VaeSpec(14, 128, (1, 2, 4, 4), 8),
    ),
}
ORIGINAL_S = {"2b": 1.16, "8b": 1.74}
"""Seconds per image of the original code on an H100, median of 13 runs."""
FASTVAR_S = {"2b": 0.80}
READ_BY_A_SCALE = [f"{name}.weight" for name in ("sa.mat_qkv", "sa.proj", "ca.mat_q", "ca.proj", "ffn.fc1", "ffn.fc2")]
"""Of a layer, two bytes each; the text's keys are made once a picture."""
PROMPT_CLASS = "object"
"""Of the calibration."""

MOST_LOGIT_DIFFERENCE = 0.25
"""Of the logits' spread."""
MOST_FLIPS = 0.05
"""Share of bits that bf16 may turn over between two correct ways of computing: random weights leave many near ties."""


def build(name: str) -> Infinity:
    sizes, vae_spec = SIZES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = BsqVae(vae_spec)
        grids = schedule("1.0", "1M")
        backbone = Infinity(
            sizes.spec(vae, grids.grids, grids.rope_grid), vae, Sampling(guidance=4.0, temperature=0.5, top_p=0.97)
        )
    backbone.eval().requires_grad_(False)
    backbone.set_precision(torch.bfloat16)
    torch.cuda.empty_cache()
    return backbone


def carried_plan(profile: Profile, calibration: Calibration, prompt_class: str, backbone: Infinity) -> Pruning:
    """What the profile decides of a prompt class of a calibrated model, for another model.

    D is the first scale whose share of the last scale's tokens is at least the one found; layers take the role of the
    layer at their share of the depth; the number of scales left out, and the layers' mean score, are kept.
    """
    spec, model = backbone.spec, model_shape(backbone, TEXT_TOKENS)
    plan = make_plan(profile, calibration)
    one, source = plan.for_class(prompt_class), calibration.model
    roles = "".join(plan.roles[layer * source.depth // spec.depth] for layer in range(spec.depth))
    run = spec.scales - (len(source.grids) - len(one.scales_run))
    opening = None
    if one.depth is not None:
        share = source.tokens[one.depth] / source.tokens[-1]
        opening = next(s for s, tokens in enumerate(spec.tokens) if tokens / spec.tokens[-1] >= share - 1e-9)
    scores = role_scores(calibration, profile.roles).score
    detail = [score for score, role in zip(scores, plan.roles, strict=True) if role == "d"]
    keep = kept_tokens(
        model, profile.tokens, run, opening, statistics.fmean(detail or [1.0]), f"profile {profile.name}"
    )
    return Pruning(
        roles,
        keep + spec.tokens[run:],
        None if opening is None else opening - 1,
        profile.restore,
        tuple(range(run)),
    )


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rates() -> dict[str, float]:
    """TFLOP/s of a plain bf16 GEMM and of this project's attention with entropy, on random data; TB/s of a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm = 2 * 8192**3 / median_ms(lambda: F.linear(a, b)) / 1e9
    q = torch.randn(4096, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    past = [torch.randn(6425, 2, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn(4096, 2, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    ms = median_ms(lambda: entropy_attention(q, *past, *new, scale=0.088, entropy="mean"))
    attention = 4 * 4096 * 10521 * 128 * 32 / ms / 1e9
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    memory = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e9
    return {"gemm_tflops": gemm, "attention_tflops": attention, "memory_tbps": memory}


def floors_ms(backbone: Infinity, pruning: Pruning, images: int, rate: dict[str, Any]) -> tuple[float, float]:
    """Floor and roofline of a plan at the measured rates."""
    run = range(backbone.spec.scales) if pruning.scales_run is None else pruning.scales_run
    flops = plan_flops(model_shape(backbone, TEXT_TOKENS), pruning.roles, [pruning.keep[s] for s in run])
    weights = sum(block.get_parameter(name).numel() for block in backbone.blocks for name in READ_BY_A_SCALE)
    reading = 2 * weights / rate["memory_tbps"] / 1e9
    before = flops.total - sum(scale.total for scale in flops.scales)  # the conditioning
    floor = roofline = images * before / rate["gemm_tflops"] / 1e9
    for scale in flops.scales:
        attention = scale.self_attention + scale.cross_attention
        linear = (scale.total - attention) / rate["gemm_tflops"]
        ms = images * (linear + attention / rate["attention_tflops"]) / 1e9
        floor, roofline = floor + ms, roofline + max(ms, reading)
    return floor, roofline


def measure(engine: InfinityGraphs, condition: tuple[torch.Tensor, ...], most: int) -> dict[str, Any]:
    """Medians over whole pictures, `most` of them or as many as four seconds hold: each stage by events, the total by the
    host's clock."""
    seeds = list(range(engine.images))
    first = engine.generate(condition, seeds).clone()
    torch.cuda.synchronize()
    start = time.perf_counter()
    same = torch.equal(first, engine.generate(condition, seeds))
    repeats = max(5, min(most, int(2 / (time.perf_counter() - start))))
    finite = bool(torch.isfinite(first).all())
    if not (same and finite):
        raise SystemExit(f"wrong result, no speed is reported: same picture twice {same}, finite {finite}")
    stages: dict[str, list[float]] = {name: [] for name, _ in engine.stages}
    totals = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(condition, seeds)
        torch.cuda.synchronize()
        totals.append((time.perf_counter() - start) * 1e3)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(engine.stages) + 1)]
        events[0].record()
        for (_, stage), event in zip(engine.stages, events[1:], strict=True):
            stage()
            event.record()
        torch.cuda.synchronize()
        for (name, _), a, b in zip(engine.stages, events, events[1:], strict=False):
            stages[name].append(a.elapsed_time(b))
    median = {name: statistics.median(values) for name, values in stages.items()}
    ordered = sorted(totals)
    return {
        "total_ms": statistics.median(totals),
        "total_ms_p20": ordered[int(0.2 * (len(ordered) - 1))],
        "total_ms_p80": ordered[int(0.8 * (len(ordered) - 1))],
        "transformer_ms": sum(value for name, value in median.items() if name.startswith("scale")),
        "prefix_ms": median["prefix"],
        "decode_ms": median["decode"],
        "scale_ms": {name.removeprefix("scale "): value for name, value in median.items() if name.startswith("scale")},
    }


def check_step(backbone: Infinity) -> float:
    """Largest difference of the fused step's logits to the plain step's over the first eight scales, over their spread."""
    text = torch.randn(1, TEXT_TOKENS, backbone.spec.text_width, device="cuda")
    lengths = torch.full((1,), TEXT_TOKENS, device="cuda")
    scales = tuple(range(8))
    pruning = dataclasses.replace(Pruning.none(backbone.spec), scales_run=scales)
    trace = generate(backbone, backbone.prefix(text, lengths), pruning=pruning, record=("logits",), decode=False)
    engine = InfinityGraphs(backbone, pruning, text_tokens=TEXT_TOKENS, graphs=False)
    prefix = backbone.prefix(text, lengths)
    x, codes, worst = prefix.x0.clone(), backbone.initial_codes(1), 0.0
    with torch.no_grad():
        for index, run in enumerate(engine.runs):
            logits = engine._step(run, x, prefix.context, engine.cache, [])
            expected = trace.logits[index]
            worst = max(worst, float((logits - expected).abs().max() / expected.std()))
            constants = engine._constants[index]
            codes = backbone.accumulate(trace.tokens[index], codes, constants)
            if "next_position" in constants:
                x = backbone.next_input(codes, constants)
    return worst


def check_bits(backbone: Infinity, pruning: Pruning) -> float:
    """Share of bits that the engine draws differently from plain PyTorch, each scale shown PyTorch's bits before it."""
    text = torch.randn(1, TEXT_TOKENS, backbone.spec.text_width, device="cuda")
    condition = text, torch.full((1,), TEXT_TOKENS, device="cuda")
    trace = generate(
        backbone,
        backbone.prefix(*condition),
        pruning=pruning,
        noise=lambda scale, shape: torch.from_numpy(scale_noise([1], scale, shape[0], shape[2])),
        decode=False,
    )
    engine = InfinityGraphs(backbone, pruning, text_tokens=TEXT_TOKENS, graphs=False)
    engine.load(condition, [1], dict(zip(trace.scales, trace.tokens, strict=True)))
    with torch.no_grad():
        for _, stage in engine.stages[:-1]:
            stage()
    pairs = zip(engine.bits, trace.tokens, strict=True)
    different = sum(int((found != wanted).sum()) for found, wanted in pairs if found is not None)
    return different / sum(wanted.numel() for wanted in trace.tokens)


def check(backbone: Infinity, model: str, fast: Pruning, report: dict[str, Any]) -> None:
    """Notes how far the engine is from plain PyTorch; ends the program where that is more than bf16 explains."""
    difference = report[f"{model}_step_difference"] = check_step(backbone)
    print(f"{model}: logits against the plain step, largest difference / spread: {difference:.3f}", flush=True)
    wrong = difference > MOST_LOGIT_DIFFERENCE
    for name, pruning in (("dense", Pruning.none(backbone.spec)), ("fast", fast)):
        share = report[f"{model}_{name}_bits_different"] = check_bits(backbone, pruning)
        print(f"{model} {name}: {share:.2%} of the bits are drawn differently from plain PyTorch's", flush=True)
        wrong |= share > MOST_FLIPS
    if wrong:
        raise SystemExit("wrong result: no speed is reported")


def cases(backbone: Infinity, calibration: Calibration, quick: bool) -> list[tuple[str, Pruning, bool]]:
    """Name, plan, whether as CUDA graphs; dense first, to which the others are compared."""

    def carried(name: str, **changes: Any) -> Pruning:
        profile = load_profile(name).model_copy(update=changes)
        return carried_plan(profile, calibration, PROMPT_CLASS, backbone)

    dense = Pruning.none(backbone.spec)
    found = [("dense", dense, True), ("fast", carried("fast"), True)]
    if not quick:
        # What a prompt class gets whose rho at the last scale is above the profile's drop_rho.
        found.append(("fast, no scale dropped", carried("fast", drop_scales=0), True))
        found += [(name, carried(name), True) for name in SHIPPED if name != "fast"]
        two = tuple(range(backbone.spec.scales - 2))
        found.append(("drop-last-two only", dataclasses.replace(dense, scales_run=two), True))
        found += [(name, pruning, False) for name, pruning, _ in found[:2]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", default="2b,8b")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--quick", action="store_true", help="dense and fast, batch 1, few repeats")
    parser.add_argument(
        "--calibration", type=Path, default=Path(__file__).parent / "results/text-demo-calibration.json"
    )
    parser.add_argument("--commit", default="", help="of the code measured, where git cannot tell")
    arguments = parser.parse_args()
    calibration = load_calibration(arguments.calibration)
    commit = arguments.commit
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit,
        "text_tokens": TEXT_TOKENS,
        "calibration": arguments.calibration.name,
        "calibration_sha256": calibration.sha256,
        **rates(),
        "rows": [],
    }
    print(json.dumps({k: v for k, v in report.items() if k != "rows"}), flush=True)
    batches = (1,) if arguments.quick else tuple(map(int, arguments.batches.split(",")))
    for images, model in itertools.product(batches, arguments.models.split(",")):
        backbone = build(model)
        planned = cases(backbone, calibration, arguments.quick)
        if f"{model}_step_difference" not in report:
            check(backbone, model, planned[1][1], report)
        rows: list[dict[str, Any]] = []
        for name, pruning, graphs in planned:
            row = run_case(backbone, pruning, images, graphs, 5 if arguments.quick else 15, report)
            if row is None:
                print(f"{model} batch {images} {name}: out of memory", flush=True)
                continue
            rows.append({"model": model, "batch": images, "case": name, **row})
            rows[-1]["speedup"] = rows[0]["total_ms"] / row["total_ms"]
            report["rows"].append(rows[-1])
            save(report, arguments.out)
            print(
                f"{model} b{images} {name:20} graphs {graphs!s:5} total {row['total_ms']:8.1f} ms  transformer "
                f"{row['transformer_ms']:8.1f}  decode {row['decode_ms']:6.1f}  floor {row['floor_ms']:7.1f} "
                f"({row['of_floor']:.0%})  peak {row['peak_memory_gib']:.1f} GiB",
                flush=True,
            )
        del backbone, planned
        torch.cuda.empty_cache()


def run_case(
    backbone: Infinity, pruning: Pruning, images: int, graphs: bool, repeats: int, report: dict[str, Any]
) -> dict[str, Any] | None:
    """Everything measured of one plan at one batch size; None where the memory is too small."""
    gc.collect()  # an engine and its stages refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    text = torch.randn(images, TEXT_TOKENS, backbone.spec.text_width, device="cuda")
    try:
        engine = InfinityGraphs(backbone, pruning, images=images, text_tokens=TEXT_TOKENS, graphs=graphs)
        row = measure(engine, (text, torch.full((images,), TEXT_TOKENS, device="cuda")), repeats)
    except torch.cuda.OutOfMemoryError:
        return None
    floor, roofline = floors_ms(backbone, pruning, images, report)
    return row | {
        "cuda_graphs": graphs,
        "roles": pruning.roles,
        "keep": list(pruning.keep),
        "scales_run": len(pruning.scales_run or backbone.spec.grids),
        "floor_ms": floor,
        "of_floor": floor / row["transformer_ms"],
        "roofline_ms": roofline,
        "of_roofline": roofline / row["transformer_ms"],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "cache_gib": engine.cache.size_bytes / 2**30,
    }


def save(report: dict[str, Any], folder: Path) -> None:
    """Writes what is measured so far, JSON and Markdown, by the name of the GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "infinity-" + re.sub(r"[^a-z0-9]+", "-", report["gpu"].lower())
    for name, text in ((f"{stem}.json", json.dumps(report, indent=1) + "\n"), (f"{stem}.md", markdown(report))):
        beside = folder / f".{name}"
        beside.write_text(text)
        beside.replace(folder / name)


def markdown(report: dict[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    lines = [
        f"Infinity at 1024 x 1024, CFG, bf16, random weights, {report['text_tokens']} text tokens; {report['gpu']}, "
        f"PyTorch {report['torch']}, commit {report['commit']}. Plain GEMM {report['gemm_tflops']:.0f} TFLOP/s, "
        f"attention with entropy {report['attention_tflops']:.0f} TFLOP/s, memory {report['memory_tbps']:.2f} TB/s. "
        f"Medians, ms. Plans: of the profile, from {report['calibration']} ({report['calibration_sha256'][:12]}). "
        "The transformer's floor: its plan's FLOPs; roofline: at each scale that or reading the weights.",
        "",
        "| model | batch | plan | scales | CUDA graphs | total | p20 – p80 | transformer | decode | floor | of floor | "
        "roofline | of it | to dense | GiB | commit |",
        "|" + " --- |" * 16,
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['case']} | {row['scales_run']} | "
            f"{'yes' if row['cuda_graphs'] else 'no'} | "
            f"{row['total_ms']:.1f} | {row['total_ms_p20']:.1f} – {row['total_ms_p80']:.1f} | {row['transformer_ms']:.1f} | "
            f"{row['decode_ms']:.1f} | {row['floor_ms']:.1f} | {row['of_floor']:.0%} | {row['roofline_ms']:.1f} | "
            f"{row['of_roofline']:.0%} | {row['speedup']:.2f} | "
            f"{row['peak_memory_gib']:.1f} | {row.get('commit', report['commit'])} |"
        )
    originals = ", ".join(f"{model} {seconds:.2f} s" for model, seconds in ORIGINAL_S.items())
    fastvar = ", ".join(f"{model} {seconds:.2f} s" for model, seconds in FASTVAR_S.items())
    lines += ["", f"On an H100, batch 1: original code {originals}; FastVAR's own code {fastvar}.", ""]
    if "note" in report:
        lines += [report["note"], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
