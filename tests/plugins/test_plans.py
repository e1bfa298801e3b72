"""The C++ core deals attention to a GPU exactly as the Python originals do."""

from __future__ import annotations

import itertools
import random
import subprocess
from pathlib import Path

import pytest

from toprovar.kernels import contract, hopper, tuning

pytestmark = pytest.mark.cpp


def _problems(count: int) -> list[tuple[int, ...]]:
    """(SMs, queries, past, fresh, rows, heads, head dim): edges first, then seeded random ones."""
    random.seed(5)
    edges = itertools.product((132,), (1, 16, 64, 4096), (0, 1, 6425), (1, 64, 4096), (2,), (16,), contract.HEAD_DIMS)
    problems = [p for p in edges]
    for _ in range(count):
        problems.append(
            (
                random.choice((20, 84, 108, 132, 148)),
                random.randint(1, 5000),
                random.choice((0, random.randint(0, 12000))),
                random.randint(1, 5000),
                random.choice((1, 2, 4, 16)),
                random.choice((1, 12, 16, 30, 32)),
                random.choice(contract.HEAD_DIMS),
            )
        )
    return problems


def _ask(program: Path, lines: list[str]) -> list[list[int]]:
    done = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def program(core_build: Path) -> Path:
    return core_build / "src" / "toprovar" / "plugins" / "cpp" / "toprovar_print_plans"


def test_triton_plans_are_those_of_tuning_choose(program):
    cases = [(arch, dtype, *p) for p in _problems(300) for arch in (80, 90) for dtype in ("float16", "bfloat16")]
    lines = [f"triton {arch} {contract.ONNX_DTYPES[dtype]} {' '.join(map(str, rest))}" for arch, dtype, *rest in cases]
    for (arch, dtype, sms, queries, past, fresh, rows, heads, head_dim), found in zip(
        cases, _ask(program, lines), strict=True
    ):
        config = tuning.choose(arch, dtype, head_dim, queries, past + fresh, rows * heads, sms)
        tile = {"wide": 0, "narrow": 1}[config.tile_name]
        assert found == [tile, config.tile.block_m, config.splits, config.keys_per_split]


def test_hopper_builds_and_plans_are_those_of_hopper_choose(program):
    cases = [(mean, dtype, *p) for p in _problems(300) for mean in (False, True) for dtype in ("float16", "bfloat16")]
    lines = [
        f"hopper {int(mean)} {contract.ONNX_DTYPES[dtype]} {' '.join(map(str, rest))}" for mean, dtype, *rest in cases
    ]
    for (mean, dtype, sms, queries, past, fresh, rows, heads, head_dim), found in zip(
        cases, _ask(program, lines), strict=True
    ):
        entropy = "mean" if mean else "none"
        build, plan = hopper.choose(dtype, head_dim, queries, past, fresh, rows, heads, sms, entropy=entropy)
        assert found == [
            hopper.VARIANTS[dtype, head_dim, mean].index(build),
            plan.ctas,
            plan.full_tiles,
            plan.split_tiles,
            plan.run,
            plan.finish_blocks,
            plan.part_out_floats,
            plan.part_stats_floats,
            plan.ns,
        ]
