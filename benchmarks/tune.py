"""Times candidate launch configurations on this GPU: the source of the rows of kernels/tuning.py and kernels/hopper.py.

    python benchmarks/tune.py [--head-dims 64,128] [--hopper]

For each shape, every candidate tile of Triton's with and without split keys, then the blocks of restore and gather;
medians of CUDA-graph replays over rotating inputs. A candidate whose output differs from PyTorch's by more than bf16
allows is listed as wrong, without a time. With --hopper instead every build of `hopper.VARIANTS` on every shape of
attention.py, and the times `tile_ns`, `block_ns` and `_MERGE_NS` that fit best.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from attention import L2_BYTES_TO_EXCEED, MAX_SETS, MODELS, Inputs, Problem, capture, make_inputs, problems, time_graphs
from torch import Tensor

from toprovar.kernels import area_matrix, gather_tokens, hopper, launch, restore_tokens, tuning
from toprovar.kernels.oracle import select_oracle

SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    # queries, past, heads: the last scales, those where the choice of tile turns, few queries on many keys
    128: ((4096, 6425, 16), (1024, 1497, 16), (400, 521, 16), (256, 265, 16), (128, 5000, 16)),
    64: ((4096, 5654, 24), (256, 424, 30)),
}
CANDIDATES = tuple(
    tuning.Tile(*tile)
    for tile in (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3),
    )
)  # fmt: skip
BLOCKS = ((2048, 4), (2048, 8), (2048, 2), (1024, 4), (1024, 2))
Graphs = dict[str, tuple[torch.cuda.CUDAGraph, int]]


def attention(sets: list[Inputs], config: tuning.AttentionConfig) -> list[Tensor]:
    """Every set attended to with this configuration."""
    usual, tuning.choose = tuning.choose, lambda *_: config
    try:
        scale = sets[0].pieces[0].shape[-1] ** -0.5
        return [launch.entropy_attention(*x.pieces, scale, "mean", False)[0] for x in sets]
    finally:
        tuning.choose = usual


def tune_attention(queries: int, past: int, heads: int, head_dim: int) -> None:
    problem = Problem("tune", 0, 2, heads, head_dim, queries, past)
    sets = [make_inputs(problem) for _ in range(max(1, min(16, -(-L2_BYTES_TO_EXCEED // problem.bytes))))]
    wanted = torch.nn.functional.scaled_dot_product_attention(*sets[0].whole, scale=head_dim**-0.5)
    wanted = wanted.permute(2, 0, 1, 3).float()
    graphs: Graphs = {}
    wrong = []
    for tile in CANDIDATES:
        for splits in (1,) if queries > 300 else (1, 2, 4):
            blocks = -(-problem.keys // (splits * tile.block_n))
            keys = blocks * tile.block_n
            config = tuning.AttentionConfig("tried", tile, -(-problem.keys // keys), keys)
            name = f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} /{config.splits}"
            found = attention(sets[:1], config)[0].float()
            if not (found - wanted).norm() / wanted.norm() < 1e-2:
                wrong.append(name)
                continue

            def run(config: tuning.AttentionConfig = config) -> object:
                return attention(sets, config)

            graphs[name] = capture(run), len(sets)
    arch, sm_count = launch._device(0)
    assert arch is not None
    frozen = tuning.choose(arch, "bfloat16", head_dim, queries, problem.keys, 2 * heads, sm_count)
    print(
        f"{queries} x {problem.keys}, {2 * heads} x {head_dim}; now {frozen.tile_name} /{frozen.splits}; wrong {wrong}"
    )
    for name, t in sorted(time_graphs(graphs, 15.0).items(), key=lambda item: item[1]["median_ms"])[:6]:
        print(f"    {name:20} {1e3 * t['median_ms']:9.1f} us {problem.flops / t['median_ms'] / 1e9:6.0f} TFLOP/s")


def tune_tokens() -> None:
    n, rows, width, keep = 4096, 2, 2048, 2048
    matrix = area_matrix(64, 48).float().cuda()
    sets = []
    for _ in range(4):
        x, kept, delta = (torch.randn(m, rows, width, device="cuda").bfloat16() for m in (n, keep, 48 * 48))
        sets.append((x, kept, select_oracle(torch.rand(1, n, device="cuda"), keep), delta, matrix, matrix))
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "restore": (lambda: [restore_tokens(*s) for s in sets], 2 * n + 48 * 48),
        "gather": (lambda: [gather_tokens(s[0], s[2]) for s in sets], 2 * keep),
    }
    for op, (run, tokens) in runs.items():
        usual = tuning.TOKEN_BLOCK
        graphs: Graphs = {}
        for block in BLOCKS:
            tuning.TOKEN_BLOCK = block
            graphs[f"{op} {block}"] = capture(run), 4
        tuning.TOKEN_BLOCK = usual
        for name, t in sorted(time_graphs(graphs, 15.0).items(), key=lambda item: item[1]["median_ms"]):
            rate = 2 * rows * width * tokens / t["median_ms"] / 1e6
            print(f"    {name:26} {1e3 * t['median_ms']:7.1f} us {rate:6.0f} GB/s")


def tune_hopper(head_dim: int) -> None:
    """Least squares of the relative error of t = start + rounds of tiles and blocks, as `hopper.plan` counts them."""
    builds = hopper.VARIANTS["bfloat16", head_dim, True]
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    scale = head_dim**-0.5
    rows: list[list[float]] = []
    for p in problems([name for name, (_, size, _) in MODELS.items() if size == head_dim], quick=False):
        if p.queries <= hopper.SMALL_QUERIES and p.keys <= hopper.SMALL_KEYS:
            continue
        sets = [make_inputs(p) for _ in range(max(1, min(MAX_SETS, -(-L2_BYTES_TO_EXCEED // p.bytes))))]
        graphs: Graphs = {}
        for build in builds:

            def run(build: hopper.Variant = build, sets: list[Inputs] = sets) -> object:
                return [hopper.forward(*x.pieces, scale, variant=build) for x in sets]

            graphs[build.name] = capture(run), len(sets)
        times = {name: 1e6 * t["median_ms"] for name, t in time_graphs(graphs, 6.0).items()}
        chosen = hopper.choose("bfloat16", head_dim, p.queries, p.past, p.queries, p.rows, p.heads, sms, entropy="mean")
        print(
            f"{p.model} {p.rows} rows {p.queries} x {p.keys}: "
            + ", ".join(f"{name} {ns / 1e3:.1f}" for name, ns in times.items())
            + f" us; chosen {chosen[0].name}, {times[chosen[0].name] / min(times.values()):.2f} of the best"
        )
        for i, build in enumerate(builds):
            # How often a tile and a block count is read off plans in which they, and nothing else, take time.
            counts = [
                hopper.plan(one, p.queries, p.past, p.queries, p.rows, p.heads, sms, mean=True)
                for one in (replace(build, tile_ns=1, block_ns=0), replace(build, tile_ns=0, block_ns=1))
            ]
            merged = int(counts[0].run > 0)
            row = [0.0] * (2 * len(builds)) + [float(merged), 1.0]
            row[2 * i], row[2 * i + 1] = (float(one.ns - merged * hopper._MERGE_NS) for one in counts)
            rows.append([value / times[build.name] for value in row])
    matrix = torch.tensor(rows, dtype=torch.float64)
    fit = torch.linalg.lstsq(matrix, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0].tolist()
    for i, build in enumerate(builds):
        print(f"    {build.name}: tile_ns {fit[2 * i]:.0f}, block_ns {fit[2 * i + 1]:.0f}")
    print(f"    _MERGE_NS {fit[-2]:.0f}, start {fit[-1]:.0f} ns")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--head-dims", default="128,64", help="of 64, 128")
    parser.add_argument("--hopper", action="store_true", help="the builds of hopper.cu")
    given = parser.parse_args()
    for head_dim in map(int, given.head_dims.split(",")):
        if given.hopper:
            tune_hopper(head_dim)
            continue
        for shape in SHAPES[head_dim]:
            tune_attention(*shape, head_dim)
    if not given.hopper:
        tune_tokens()


if __name__ == "__main__":
    main()
