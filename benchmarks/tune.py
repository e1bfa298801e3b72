"""Times candidate launch configurations of the Triton kernels on this GPU: the source of kernels/tuning.py's rows.

    python benchmarks/tune.py [--head-dims 64,128]

For each shape, every candidate tile with and without split keys, then the blocks of restore and gather; medians of
CUDA-graph replays over rotating inputs. A candidate whose output differs from PyTorch's by more than bf16 allows is
listed as wrong, without a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from attention import L2_BYTES_TO_EXCEED, Inputs, Problem, capture, make_inputs, time_graphs
from torch import Tensor

from toprovar.kernels import area_matrix, gather_tokens, launch, restore_tokens, tuning
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--head-dims", default="128,64", help="of 64, 128")
    for head_dim in map(int, parser.parse_args().head_dims.split(",")):
        for shape in SHAPES[head_dim]:
            tune_attention(*shape, head_dim)
    tune_tokens()


if __name__ == "__main__":
    main()
