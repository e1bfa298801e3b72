"""The Hopper kernel: how it is dealt out, that it compiles (needs a CUDA compiler), what it computes (a Hopper GPU)."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from toprovar.kernels import contract, hopper

from .cases import DISTRIBUTIONS, attention_errors, attention_inputs


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not hopper.available(), reason="needs a Hopper GPU (compute capability 9.0)")
    return pytest.mark.gpu(skip(test))


SCALES = (1, 4, 16, 36, 64, 144, 256, 400, 576, 1024, 1600, 2304, 4096)
"""Queries of each scale of Infinity at 1024 x 1024; the keys of a scale are all up to its own."""


def _dealt(variant: hopper.Variant, plan: hopper.Plan, blocks: int) -> list[tuple[int, int, int, int]]:
    """(tile, first block, last block, slot) of everything the grid does: `Schedule` of hopper.cu."""
    work = []
    units = plan.split_tiles * blocks
    for cta in range(plan.ctas):
        work += [(tile, 0, blocks, -1) for tile in range(cta, plan.full_tiles, plan.ctas)]
        unit, end, pieces = min(cta * plan.run, units), min((cta + 1) * plan.run, units), 0
        while unit < end:
            split = unit // blocks
            first = unit - split * blocks
            last = min(blocks, first + end - unit)
            whole = last - first == blocks
            work.append((plan.full_tiles + split, first, last, -1 if whole else 2 * cta + pieces))
            unit += last - first
            pieces += 1
    return work


def _parts(plan: hopper.Plan, split: int, blocks: int) -> list[int]:
    """Slots that the finish kernel merges for one split tile: `Parts` of hopper.cu; empty if the tile was not cut."""
    begin = split * blocks
    first = begin // plan.run
    count = (begin + blocks - 1) // plan.run - first + 1
    offset = first * plan.run < begin
    return [2 * (first + i) + (offset if i == 0 else 0) for i in range(count)] if count > 1 else []


def _problems() -> list[tuple[int, int, int, int, int]]:
    scales = [(n, sum(SCALES[:i]), n, 2, 16) for i, n in enumerate(SCALES)]
    return [
        *scales,
        (819, 2131, 819, 4, 12),
        (200, 333, 0, 2, 30),
        (130, 20000, 1, 1, 3),
        (7, 0, 900, 1, 1),
        (4096, 6425, 4096, 16, 28),
    ]


BUILDS = [variant for head_dim in (64, 128) for variant in hopper.VARIANTS["bfloat16", head_dim, True]]
EVERY_BUILD = list(itertools.chain.from_iterable(hopper.VARIANTS.values()))


def _label(variant: hopper.Variant) -> str:
    return f"{variant.head_dim} {variant.name}"


@pytest.mark.parametrize("problem", _problems(), ids=str)
@pytest.mark.parametrize("variant", BUILDS, ids=_label)
def test_every_block_of_keys_is_dealt_once_and_every_part_is_merged(
    variant: hopper.Variant, problem: tuple[int, int, int, int, int]
) -> None:
    n, past, fresh, rows, heads = problem
    plan = hopper.plan(variant, n, past, fresh, rows, heads, 132, mean=True)
    tiles = -(-n // variant.tile_m) * rows * heads
    blocks = -(-(-(-past // hopper.SEAM) * hopper.SEAM + fresh) // variant.tile_n)
    assert 1 <= plan.ctas <= 132 * variant.ctas_per_sm
    work = _dealt(variant, plan, blocks)
    done = [(tile, block) for tile, first, last, _ in work for block in range(first, last)]
    assert sorted(done) == [(tile, block) for tile in range(tiles) for block in range(blocks)]
    for split in range(plan.split_tiles):
        slots = [slot for tile, _, _, slot in work if tile == plan.full_tiles + split]
        assert _parts(plan, split, blocks) == [slot for slot in slots if slot >= 0]
    slots = [slot for *_, slot in work if slot >= 0]
    assert len(slots) == len(set(slots))
    assert max(slots, default=-1) < plan.part_stats_floats // (3 * variant.tile_m)


def test_every_variant_fits_a_multiprocessor_and_the_instructions() -> None:
    assert {key[:2] for key in hopper.VARIANTS} == {(t, d) for t in ("float16", "bfloat16") for d in contract.HEAD_DIMS}
    for variant in EVERY_BUILD:
        # 228 KB an SM, of which the driver keeps 1 KB for each CTA
        assert variant.ctas_per_sm * (variant.shared_bytes + 1024) <= 228 * 1024
        assert variant.small_shared_bytes <= 227 * 1024
        assert variant.tile_n % 16 == 0 and variant.tile_n <= 256
        _, header = hopper.source(variant)
        kind = {"bfloat16": "bf16", "float16": "f16"}[variant.dtype]
        assert f"m64n{variant.tile_n}k16.f32.{kind}.{kind}" in header and f"m64n{variant.head_dim}k16" in header


def test_what_the_kernel_takes() -> None:
    assert hopper.supports(torch.bfloat16, 128, 1, 1) and hopper.supports("float16", 64, 4096, 10521, scale=0.1)
    assert hopper.supports(torch.bfloat16, 64, 64, 155)
    assert not hopper.supports(torch.float32, 128, 1, 1) and not hopper.supports(torch.bfloat16, 128, 0, 1)
    assert not hopper.supports(torch.bfloat16, 72, 1, 1)
    assert not hopper.supports(torch.bfloat16, 128, 1, 1, scale=0.0) and not hopper.supports(
        torch.bfloat16, 128, 1, 1, scale=-1.0
    )


def test_the_build_fits_the_problem() -> None:
    """Many full tiles go two warpgroups at a time; few queries, or tiles mostly empty, one."""
    for n, past, rows, tile in ((4096, 6425, 2, "128x160"), (144, 121, 8, "64x96"), (576, 921, 2, "64x96")):
        variant, dealt = hopper.choose("bfloat16", 128, n, past, n, rows, 16, 132, entropy="mean")
        assert variant.name == tile
        assert dealt == hopper.plan(variant, n, past, n, rows, 16, 132, mean=True)
        assert dealt.ns == min(
            hopper.plan(other, n, past, n, rows, 16, 132, mean=True).ns
            for other in hopper.VARIANTS["bfloat16", 128, True]
        )


@pytest.mark.skipif(hopper._nvrtc() is None and shutil.which("nvcc") is None, reason="needs NVRTC or nvcc")
def test_it_compiles_without_a_gpu_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPROVAR_CACHE", str(tmp_path))
    variant = hopper.VARIANTS["float16", 64, False][0]
    cubin = hopper.build_cubin(variant)
    assert cubin[:4] == b"\x7fELF"
    for symbol in (hopper.FORWARD_SYMBOL, hopper.FINISH_SYMBOL, hopper.SMALL_SYMBOL):
        assert symbol.encode() in cubin
    (kept,) = tmp_path.rglob("*.cubin")
    kept.write_bytes(b"\x7fELF kept")
    assert hopper.build_cubin(variant) == b"\x7fELF kept"


SIZES = [
    # N, P, L, R, H
    (1, 0, 1, 2, 16),
    (17, 3, 40, 2, 2),
    (64, 57, 64, 2, 16),
    (33, 0, 128, 1, 30),
    (5, 20, 0, 1, 28),
    (130, 177, 130, 2, 3),
    (129, 353, 0, 1, 3),
    (300, 1001, 300, 2, 4),
    (576, 921, 576, 2, 16),
    (64, 20000, 64, 1, 2),
]


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", contract.HEAD_DIMS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_output_entropy_and_lse_are_within_the_contract(distribution: str, head_dim: int, dtype: str) -> None:
    allowed = contract.TOLERANCES[dtype]
    for seed, sizes in enumerate(SIZES):
        if head_dim in (80, 96) and seed % 3:
            continue
        x, scale = attention_inputs(distribution, (*sizes, head_dim), getattr(torch, dtype), seed, "cuda")
        out, entropy, lse = hopper.forward(*x, scale, "head", True)
        assert entropy is not None and lse is not None
        errors = attention_errors(x, scale, out, entropy, lse)
        assert errors.out <= max(allowed.out_relative, allowed.factor * errors.plain), sizes
        assert errors.entropy <= allowed.entropy_nats, sizes
        assert errors.lse <= allowed.lse_nats, sizes
        mean_out, mean, _ = hopper.forward(*x, scale, "mean")
        assert torch.equal(mean_out, out)
        assert mean is not None
        torch.testing.assert_close(mean, entropy.mean(1), atol=2e-5, rtol=1e-5)
        none_out, none, _ = hopper.forward(*x, scale, "none")
        assert none is None
        torch.testing.assert_close(none_out, out, atol=2e-2, rtol=2e-2)


@on_hopper
@pytest.mark.parametrize("variant", EVERY_BUILD, ids=lambda v: f"{v.dtype} {_label(v)} {v.entropy}")
def test_every_build_is_right_whichever_would_be_chosen(variant: hopper.Variant) -> None:
    allowed = contract.TOLERANCES[variant.dtype]
    for seed, sizes in enumerate(
        [(130, 177, 130, 2, 3), (300, 1001, 300, 2, 4), (576, 921, 576, 2, 16), (70, 20000, 64, 1, 2)]
    ):
        for distribution in ("normal", "hot"):
            inputs = (*sizes, variant.head_dim)
            x, scale = attention_inputs(distribution, inputs, getattr(torch, variant.dtype), seed, "cuda")
            given = "head" if variant.entropy else "none"
            out, entropy, lse = hopper.forward(*x, scale, given, True, variant=variant)
            assert lse is not None
            errors = attention_errors(x, scale, out, lse if entropy is None else entropy, lse)
            assert errors.out <= max(allowed.out_relative, allowed.factor * errors.plain), sizes
            assert errors.lse <= allowed.lse_nats, sizes
            assert entropy is None or errors.entropy <= allowed.entropy_nats, sizes


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_that_leap_far_above_the_first_block(dtype: str) -> None:
    """200 nats from one block to the next: the terms overflow, and the block's scores are formed a second time."""
    allowed = contract.TOLERANCES[dtype]
    for n, past, fresh in ((300, 100, 250), (300, 800, 250), (200, 4000, 200)):
        x, _ = attention_inputs("normal", (n, past, fresh, 1, 3, 128), getattr(torch, dtype), 3, "cuda")
        direction = torch.nn.functional.normalize(x.q[:1].float(), dim=-1)
        place = torch.arange(past + fresh, device="cuda")
        steps = torch.where(place < 200, -1.0, torch.where(place < 600, 0.2, 1.0))[:, None, None, None]
        keys = (steps * direction + 0.02 * torch.cat([x.past_k, x.new_k]).float()).to(x.q.dtype)
        q = (direction + 0.02 * x.q.float()).to(x.q.dtype)
        x = x._replace(q=q, past_k=keys[:past].contiguous(), new_k=keys[past:].contiguous())
        out, entropy, lse = hopper.forward(*x, 100.0, "head", True)
        assert entropy is not None and lse is not None
        errors = attention_errors(x, 100.0, out, entropy, lse)
        assert errors.out <= max(allowed.out_relative, allowed.factor * errors.plain)
        assert errors.entropy <= allowed.entropy_nats and errors.lse <= allowed.lse_nats


@on_hopper
@pytest.mark.parametrize("sizes", [(64, 57, 64, 2, 16, 128), (1600, 2521, 1600, 2, 16, 128)], ids=str)
def test_same_bits_every_time_and_from_a_graph(sizes: tuple[int, int, int, int, int, int]) -> None:
    x, scale = attention_inputs("normal", sizes, torch.bfloat16, device="cuda")
    first = hopper.forward(*x, scale, "mean", True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hopper.forward(*x, scale, "mean", True)
    for _ in range(3):
        for tensor in captured:
            assert tensor is not None
            tensor.fill_(float("nan"))
        graph.replay()
        again = hopper.forward(*x, scale, "mean", True)
        for one, two, three in zip(first, captured, again, strict=True):
            assert one is not None and two is not None and three is not None
            assert torch.equal(one, two) and torch.equal(one, three)


@on_hopper
def test_slices_and_odd_addresses_are_copied_first() -> None:
    x, scale = attention_inputs("normal", (40, 30, 200, 2, 4, 128), torch.float16, device="cuda")
    wide = torch.zeros(40, 2, 4, 129, dtype=torch.float16, device="cuda")
    wide[..., 1:] = x.q
    found = hopper.forward(wide[..., 1:], *x[1:], scale, "head")
    wanted = hopper.forward(*x, scale, "head")
    assert torch.equal(found[0], wanted[0])
    assert found[1] is not None and wanted[1] is not None and torch.equal(found[1], wanted[1])
