"""Attention with entropy against PyTorch's attentions, and the token kernels against copy bandwidth, on one GPU.

    python benchmarks/attention.py [--quick] [--models infinity-2b,var-d30] [--out benchmarks/results]
    python benchmarks/attention.py --render benchmarks/results/attention-<gpu>.json

Shapes: every scale of Infinity-2B and 8B at 1024 x 1024, VAR-d30 and HART at 1024, for 2 and 8 rows (1 and 4 images
with classifier-free guidance). Each implementation is captured in a CUDA graph that walks through several sets of
inputs, together larger than twice the L2 cache where that takes no more than 16 sets; graphs are replayed in turn, each
turn in another order and each replay with an L2 cache full of something else, so that neither a change of clocks nor what
ran before favours one. Times are medians of replays with 20% and 80% quantiles. The others get one piece of keys in their
own [R,H,L,D] layout for free; ours reads past and new keys where a runtime keeps them.

Every result is compared with the float64 oracle on sampled queries before it is timed. A wrong one is reported as
wrong, without a speed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from toprovar.kernels import (
    area_matrix,
    contract,
    entropy_attention,
    gather_tokens,
    restore_tokens,
    scatter_tokens,
    select_tokens,
)
from toprovar.kernels.oracle import attention_oracle, gather_oracle, restore_oracle, select_oracle

INFINITY = tuple(n * n for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
MODELS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    # heads, head dim, tokens of each scale (HART's first scale is its 300 context positions)
    "infinity-2b": (16, 128, INFINITY),
    "infinity-8b": (28, 128, INFINITY),
    "var-d30": (30, 64, tuple(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))),
    "hart-1024": (24, 64, (300, *(n * n for n in (2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)))),
}
ROWS = (2, 8)
L2_BYTES_TO_EXCEED = 120 << 20
MAX_SETS = 16
NAIVE_LIMIT_BYTES = 24 << 30
"""Memory that naive attention may take for its scores; above, it is skipped and the table says so."""

IMPLEMENTATIONS = {
    "toprovar": "toprovar, entropy",
    "toprovar_plain": "toprovar, none",
    "triton": "Triton, entropy",
    "triton_plain": "Triton, none",
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "efficient": "efficient",
    "keys_as_values": "K as V (cuDNN), entropy",
    "naive": "naive, entropy",
}


@dataclass(frozen=True)
class Problem:
    model: str
    scale: int
    rows: int
    heads: int
    head_dim: int
    queries: int
    past: int

    @property
    def keys(self) -> int:
        return self.past + self.queries

    @property
    def flops(self) -> float:
        return 4.0 * self.rows * self.heads * self.queries * self.keys * self.head_dim

    @property
    def bytes(self) -> int:
        return 2 * self.rows * self.heads * self.head_dim * 2 * (self.queries + self.keys)


def problems(models: list[str], quick: bool) -> Iterator[Problem]:
    for model in models:
        heads, head_dim, tokens = MODELS[model]
        for rows in ROWS:
            past = 0
            for scale, n in enumerate(tokens):
                # The quick run keeps the largest scale, one in the middle and one that is all launch.
                if not quick or (rows == 2 and scale in (4, len(tokens) - 4, len(tokens) - 1)):
                    yield Problem(model, scale, rows, heads, head_dim, n, past)
                past += n


@dataclass
class Inputs:
    """One set: pieces [tokens,R,H,D] for toprovar, whole [R,H,tokens,D] for the others."""

    pieces: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    whole: tuple[Tensor, Tensor, Tensor]


def make_inputs(p: Problem) -> Inputs:
    def normal(n: int) -> Tensor:
        return torch.randn(n, p.rows, p.heads, p.head_dim, device="cuda", dtype=torch.bfloat16)

    pieces = (normal(p.queries), normal(p.past), normal(p.past), normal(p.queries), normal(p.queries))
    q, past_k, past_v, new_k, new_v = pieces
    whole = (q, torch.cat([past_k, new_k]), torch.cat([past_v, new_v]))
    return Inputs(pieces, tuple(t.permute(1, 2, 0, 3).contiguous() for t in whole))  # type: ignore[arg-type]


Result = tuple[Tensor, Tensor | None]
"""(out in either layout, mean entropy [R,N] or None)."""


def sdpa(backend: SDPBackend) -> Callable[[Inputs, float], Result]:
    def run(x: Inputs, scale: float) -> Result:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x.whole, scale=scale), None

    return run


def keys_as_values(x: Inputs, scale: float) -> Result:
    """H = LSE - scale * q.(P K): attention a second time, with K for V. What can be had without a kernel."""
    q, k, v = x.whole
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attention(q, k, v, None, True, scale=scale)
    keys_out = attention(q, k, k, None, False, scale=scale)[0]
    entropy = lse.reshape(q.shape[:3]) - scale * (q.float() * keys_out.float()).sum(-1)
    return out, entropy.mean(1)


def naive(x: Inputs, scale: float) -> Result:
    q, k, v = x.whole
    p = torch.softmax((q @ k.mT).float() * scale, -1)
    return p.to(v.dtype) @ v, -torch.special.xlogy(p, p).sum(-1).mean(1)


def ours(entropy: str) -> Callable[[Inputs, float], Result]:
    def run(x: Inputs, scale: float) -> Result:
        found = entropy_attention(*x.pieces, scale=scale, entropy=entropy)
        return found.out, found.entropy

    return run


def triton(entropy: str) -> Callable[[Inputs, float], Result]:
    from toprovar.kernels import launch

    def run(x: Inputs, scale: float) -> Result:
        out, mean, _ = launch.entropy_attention(*x.pieces, scale, entropy, False)
        return out, mean if entropy == "mean" else None

    return run


def implementations() -> dict[str, Callable[[Inputs, float], Result]]:
    return {
        "toprovar": ours("mean"),
        "toprovar_plain": ours("none"),
        "triton": triton("mean"),
        "triton_plain": triton("none"),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash2": sdpa(SDPBackend.FLASH_ATTENTION),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "keys_as_values": keys_as_values,
        "naive": naive,
    }


@dataclass
class Oracle:
    """What is right for at most 16 queries of the first and the last row."""

    queries: Tensor
    rows: Tensor
    out: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, p: Problem, x: Inputs, scale: float) -> Oracle:
        queries = torch.linspace(0, p.queries - 1, min(p.queries, 16), device="cuda").long()
        rows = torch.tensor(sorted({0, p.rows - 1}), device="cuda")
        q, past_k, past_v, new_k, new_v = (t[:, rows] for t in x.pieces)
        out, entropy, _ = attention_oracle(q[queries], past_k, past_v, new_k, new_v, scale)
        return cls(queries, rows, out, entropy.mean(1))

    def errors(self, result: Result, sequence_first: bool) -> dict[str, float]:
        out, mean = result
        found = (out if sequence_first else out.permute(2, 0, 1, 3))[self.queries][:, self.rows].double()
        measured = {"out_relative": float((found - self.out).norm() / self.out.norm())}
        if mean is not None:
            sampled = mean[self.rows][:, self.queries].double()
            measured["entropy_nats"] = float((sampled - self.entropy).abs().max())
        return measured


def allowed(name: str) -> dict[str, float]:
    tolerance = contract.TOLERANCES["bfloat16"]
    # K as V loses to the rounding of P K, which is why it is here; its entropy is reported, not refused.
    nats = float("inf") if name == "keys_as_values" else tolerance.entropy_nats
    return {"out_relative": tolerance.out_relative, "entropy_nats": nats}


@cache
def _filler() -> Tensor:
    return torch.zeros(L2_BYTES_TO_EXCEED // 4, device="cuda")


def replay_ms(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Milliseconds per call, from an L2 cache full of clean lines of something else. Reading those also gives the host time
    to launch the graph behind it."""
    _filler().max()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graphs(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], budget_ms: float) -> dict[str, dict[str, float]]:
    """Replays all graphs in turn. `budget_ms` per graph, at least 5 and at most 40 replays, after 2 unmeasured ones."""
    rounds = {}
    for name, (graph, calls) in graphs.items():
        replay_ms(graph, calls)
        rounds[name] = max(5, min(40, int(budget_ms / max(1e-3, replay_ms(graph, calls) * calls))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0)
    for turn in range(max(rounds.values())):
        for name in order.sample(sorted(graphs), len(graphs)):
            if turn < rounds[name]:
                times[name].append(replay_ms(*graphs[name]))
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_ms": statistics.median(values), "q20_ms": cuts[0], "q80_ms": cuts[3], "replays": len(values)}


def measure(p: Problem, budget_ms: float) -> dict[str, Any]:
    torch.manual_seed(p.queries)
    scale = p.head_dim**-0.5
    sets = [make_inputs(p) for _ in range(max(1, min(MAX_SETS, -(-L2_BYTES_TO_EXCEED // p.bytes))))]
    oracle = Oracle.of(p, sets[0], scale)
    results: dict[str, dict[str, Any]] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, run in implementations().items():
        if name == "naive" and 12 * p.rows * p.heads * p.queries * p.keys > NAIVE_LIMIT_BYTES:
            results[name] = {"skipped": "its scores would not fit in memory"}
            continue
        try:
            found = oracle.errors(run(sets[0], scale), name.startswith(("toprovar", "triton")))
        except RuntimeError as error:
            results[name] = {"skipped": str(error).splitlines()[0][:200]}
            continue
        results[name] = {"errors": found}
        bounds = allowed(name)
        if any(not value <= bounds[key] for key, value in found.items()):
            results[name]["wrong"] = f"exceeds {bounds}"
            continue

        def walk(run: Callable[[Inputs, float], Result] = run) -> None:
            for x in sets:
                run(x, scale)

        graphs[name] = (capture(walk), len(sets))
    for name, times in time_graphs(graphs, budget_ms).items():
        results[name] |= times | {"tflop_s": p.flops / times["median_ms"] / 1e9}
    return asdict(p) | {"keys": p.keys, "sets": len(sets), "results": results}


# --- tokens ---------------------------------------------------------------------------------------------------------


def copy_bandwidth(budget_ms: float) -> float:
    """GB/s of a copy of 1 GiB on the device, read plus written: the better of the driver's copy and of a kernel's."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copies = {
        "driver": (capture(lambda: target.copy_(source)), 1),
        "kernel": (capture(lambda: torch.neg(source, out=target)), 1),
    }
    best = min(times["median_ms"] for times in time_graphs(copies, budget_ms).values())
    return 2 * source.nbytes / best / 1e6


def measure_tokens(budget_ms: float, bandwidth: float) -> list[dict[str, Any]]:
    """Selection, gather, scatter, restore at 64 x 64 tokens, 2 rows, width 2048, bf16, half kept, cache of 48 x 48."""
    n, rows, width, keep, side, cached = 4096, 2, 2048, 2048, 64, 48
    torch.manual_seed(0)
    resize = area_matrix(side, cached).cuda()
    sets = []
    for _ in range(4):
        entropy = torch.rand(1, n, device="cuda")
        x, kept, delta = (torch.randn(m, rows, width, device="cuda").bfloat16() for m in (n, keep, cached * cached))
        indices = select_oracle(entropy, keep)
        sets.append((entropy, x, kept, delta, indices))
    matrix, slots = resize.float(), torch.empty(keep, device="cuda")
    row = 2 * rows * width
    calls: dict[str, tuple[Callable[..., Tensor], int, Callable[..., Tensor]]] = {
        # call, bytes that must move, oracle
        "select": (lambda e, x, k, d, i: select_tokens(e, slots), 4 * (n + keep), lambda e, x, k, d, i: i),
        "gather": (
            lambda e, x, k, d, i: gather_tokens(x, i),
            2 * keep * row,
            lambda e, x, k, d, i: gather_oracle(x, i),
        ),
        "scatter": (
            lambda e, x, k, d, i: scatter_tokens(x, k, i),
            2 * n * row,
            lambda e, x, k, d, i: x.scatter(0, i.long().t()[:, :, None].expand(keep, rows, width), k),
        ),
        "restore": (
            lambda e, x, k, d, i: restore_tokens(x, k, i, d, matrix, matrix),
            (2 * n + cached * cached) * row,
            lambda e, x, k, d, i: restore_oracle(x, k, i, d, resize, resize),
        ),
    }
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    rows_out: list[dict[str, Any]] = []
    for name, (call, size, oracle) in calls.items():
        found, wanted = call(*sets[0]), oracle(*sets[0])
        exact = torch.equal(found, wanted) if name != "restore" else bool(
            ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all()
        )  # fmt: skip
        rows_out.append({"op": name, "bytes": size, "wrong": not exact})
        if exact:

            def walk(call: Callable[..., Tensor] = call) -> None:
                for given in sets:
                    call(*given)

            graphs[name] = (capture(walk), len(sets))
    times = time_graphs(graphs, budget_ms)
    for entry in rows_out:
        if not entry["wrong"]:
            entry |= times[entry["op"]]
            entry["gb_s"] = entry["bytes"] / entry["median_ms"] / 1e6
            entry["share_of_copy"] = entry["gb_s"] / bandwidth
    return rows_out


# --- report ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    def first_line(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "unknown"

    try:
        import triton as triton_package

        triton_version = triton_package.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": first_line("git", "rev-parse", "--short", "HEAD"),
        "kernel_revision": str(contract.KERNEL_REVISION),
        "date": datetime.date.today().isoformat(),
    }


def cell(result: dict[str, Any] | None) -> str:
    if result is None or "skipped" in result:
        return "-"
    if "wrong" in result:
        return "wrong"
    return f"{1e3 * result['median_ms']:.1f}" if result["median_ms"] < 1 else f"{1e3 * result['median_ms']:.0f}"


def render(report: dict[str, Any]) -> str:
    """Markdown of a report."""
    m = report["machine"]
    lines = [
        f"# Attention with entropy on {m['gpu']}",
        "",
        f"Commit {m['commit']}, {m['date']}; driver {m['driver']}, PyTorch {m['torch']}, CUDA {m['cuda']}, "
        f"cuDNN {m['cudnn']}, Triton {m['triton']}. bf16, medians in µs; made from the JSON beside it by "
        "`benchmarks/attention.py`.",
        "",
    ]
    by_group: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in report["attention"]:
        by_group.setdefault((row["model"], row["rows"]), []).append(row)
    for (model, rows), group in by_group.items():
        lines += [
            f"## {model}, {rows} rows x {group[0]['heads']} heads x {group[0]['head_dim']}",
            "",
            "| queries x keys | "
            + " | ".join(IMPLEMENTATIONS.values())
            + " | TFLOP/s with entropy | of cuDNN's time |",
            "| --- |" + " ---: |" * (len(IMPLEMENTATIONS) + 2),
        ]
        for row in group:
            results = row["results"]
            own, cudnn = results["toprovar"], results["cudnn"]
            rate = f"{own['tflop_s']:.0f}" if "tflop_s" in own else "-"
            share = (
                f"{own['median_ms'] / cudnn['median_ms']:.2f}" if "median_ms" in own and "median_ms" in cudnn else "-"
            )
            cells = " | ".join(cell(results.get(name)) for name in IMPLEMENTATIONS)
            lines.append(f"| {row['queries']} x {row['keys']} | {cells} | {rate} | {share} |")
        lines.append("")
    lines += [
        "## Tokens: 4096 x 2 x 2048, bf16, half kept, cache of 48 x 48",
        "",
        f"A device-to-device copy moves {report['copy_gb_s']:.0f} GB/s here, read plus written. "
        "Bytes are the fewest that must move.",
        "",
        "| op | µs | MB | GB/s | of copy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report["tokens"]:
        if row["wrong"]:
            lines.append(f"| {row['op']} | wrong | | | |")
        elif row["op"] == "select":  # waits for itself, not for memory
            lines.append(f"| select | {1e3 * row['median_ms']:.1f} | {row['bytes'] / 1e6:.2f} | | |")
        else:
            lines.append(
                f"| {row['op']} | {1e3 * row['median_ms']:.1f} | {row['bytes'] / 1e6:.2f} | {row['gb_s']:.0f} | "
                f"{100 * row['share_of_copy']:.0f}% |"
            )
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and Markdown"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated, of: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three scales of each model, two rows")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="write the Markdown of a report again; needs no GPU"
    )
    parser.add_argument("--commit", help="what to record where there is no git")
    given = parser.parse_args()
    if given.render:
        given.render.with_suffix(".md").write_text(render(json.loads(given.render.read_text())), encoding="utf-8")
        return 0
    models = given.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; valid: {', '.join(MODELS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is available; the benchmark measures nothing else")

    budget_ms = 20.0
    report: dict[str, Any] = {"machine": machine(), "quick": given.quick, "attention": []}
    if given.commit:
        report["machine"]["commit"] = given.commit
    report["copy_gb_s"] = copy_bandwidth(budget_ms)
    report["tokens"] = measure_tokens(budget_ms, report["copy_gb_s"])
    given.out.mkdir(parents=True, exist_ok=True)
    name = "attention-" + report["machine"]["gpu"].lower().replace(" ", "-") + ("-quick" if given.quick else "")
    for model in models:
        for problem in problems([model], given.quick):
            report["attention"].append(measure(problem, budget_ms))
        # After each model, so that a run that is cut short keeps what it has.
        write(given.out / f"{name}.json", json.dumps(report, indent=1) + "\n")
        write(given.out / f"{name}.md", render(report))
        print(f"{model} done", file=sys.stderr, flush=True)
    print(render(report))
    wrong = [
        f"{row['model']} {row['queries']} x {row['keys']} {name}: {result['errors']}"
        for row in report["attention"]
        for name, result in row["results"].items()
        if "wrong" in result
    ] + [row["op"] for row in report["tokens"] if row["wrong"]]
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
