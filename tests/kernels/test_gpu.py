"""Every kernel on a GPU, against the float64 oracle: errors at most twice those of plain PyTorch in that precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toprovar.kernels import (
    aot,
    area_matrix,
    contract,
    entropy_attention,
    gather_tokens,
    loader,
    restore_tokens,
    scatter_tokens,
    select_tokens,
)
from toprovar.kernels.oracle import attention_oracle, gather_oracle, restore_oracle, scatter_oracle, select_oracle

from .cases import DISTRIBUTIONS, Inputs, attention_errors, attention_inputs, plain_attention, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DTYPES = {name: getattr(torch, name) for name in contract.DTYPES}


def by_triton(x: Inputs, scale: float, entropy: str = "head", return_lse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    launch = pytest.importorskip("toprovar.kernels.launch", reason="Triton is not installed")
    return launch.entropy_attention(*x, scale, entropy, return_lse)


def by_op(x: Inputs, scale: float, entropy: str = "head", return_lse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Whatever the op chooses on this GPU: the Hopper kernel on sm_90."""
    return torch.ops.toprovar.entropy_attention(*x, scale, entropy, return_lse)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {"triton": by_triton, "op": by_op}

# (N, P, L, R, H)
SIZES = {
    "wide": (1537, 601, 1537, 4, 7),
    "narrow": (65, 40, 81, 2, 5),
    "split": (37, 4001, 37, 2, 3),
    "no_past": (129, 0, 129, 2, 3),
    "one_key": (1, 0, 1, 2, 3),
    "whole": (256, 256, 256, 2, 4),
    "only_past": (33, 100, 0, 1, 3),
}


def check(implementation: str, distribution: str, size: str, head_dim: int, dtype: str) -> None:
    x, scale = attention_inputs(distribution, (*SIZES[size], head_dim), DTYPES[dtype], device="cuda")
    found = IMPLEMENTATIONS[implementation](x, scale)
    errors, allowed = attention_errors(x, scale, *found), contract.TOLERANCES[dtype]
    # A floor for inputs on which plain PyTorch is exact by luck (one key): half a unit in the last place.
    assert errors.out <= max(allowed.factor * errors.plain, torch.finfo(DTYPES[dtype]).eps / 2), errors
    assert errors.entropy <= allowed.entropy_nats and errors.lse <= allowed.lse_nats, errors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head_dim", contract.HEAD_DIMS, ids=lambda d: f"d{d}_")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_of_every_size_and_head_dim(implementation: str, size: str, head_dim: int, dtype: str) -> None:
    check(implementation, "normal", size, head_dim, dtype)


@pytest.mark.parametrize("size", ["wide", "split"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"d{d}_")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_of_every_distribution(
    implementation: str, distribution: str, size: str, head_dim: int, dtype: str
) -> None:
    check(implementation, distribution, size, head_dim, dtype)


@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"d{d}_")
@pytest.mark.parametrize("distribution", ["normal", "hot"])
def test_fp32_attention_has_no_tf32_in_it(distribution: str, head_dim: int) -> None:
    check("op", distribution, "narrow", head_dim, "float32")


@pytest.mark.parametrize("head_dim", [8, 72, 120], ids=lambda d: f"d{d}_")
def test_other_head_dims(head_dim: int) -> None:
    check("op", "normal", "narrow", head_dim, "bfloat16")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"d{d}_")
def test_last_scale_of_1024_pixels(implementation: str, head_dim: int) -> None:
    """4096 queries on 10521 keys: sampled queries against the oracle, the mean over heads, equal bits when repeated."""
    x, scale = attention_inputs("hot", (4096, 6425, 4096, 2, 16, head_dim), torch.bfloat16, device="cuda")
    run = IMPLEMENTATIONS[implementation]
    out, head, _ = run(x, scale, "head", False)
    sample = torch.arange(0, 4096, 127, device="cuda")
    wanted, entropy, _ = attention_oracle(x.q[sample], *x[1:], scale)
    assert relative(out[sample], wanted) < contract.TOLERANCES["bfloat16"].out_relative
    assert (head[:, :, sample] - entropy).abs().max() < 2e-3
    again, mean, _ = run(x, scale, "mean", False)
    assert torch.equal(out, again)
    torch.testing.assert_close(mean, head.mean(1), atol=2e-6, rtol=2e-6)
    assert torch.equal(mean, run(x, scale, "mean", False)[1])
    assert torch.equal(out, run(x, scale, "none", False)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_are_read_in_place(implementation: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(213, 2, 3, 4, 64, device="cuda", dtype=torch.float16).unbind(2)
    cache = torch.randn(2, 500, 2, 4, 64, device="cuda", dtype=torch.float16)
    x = Inputs(q, cache[0, 7:300], cache[1, 7:300], k, v)
    out, entropy, _ = IMPLEMENTATIONS[implementation](x, 0.125)
    wanted, wanted_entropy, _ = attention_oracle(*x, 0.125)
    assert relative(out, wanted) < 1e-3 and (entropy - wanted_entropy).abs().max() < 2e-3
    odd = torch.randn(64 * 2 * 4 * 64 + 1, device="cuda", dtype=torch.float16)[1:].view(64, 2, 4, 64)
    x = Inputs(odd, odd[:0], odd[:0], odd, odd)
    assert relative(IMPLEMENTATIONS[implementation](x, 0.125)[0], attention_oracle(*x, 0.125)[0]) < 1e-3


@pytest.mark.parametrize("keys", [2, 10521])
def test_equal_keys_give_log_n_on_the_gpu(keys: int) -> None:
    x, scale = attention_inputs("equal", (130, keys // 2, keys - keys // 2, 1, 2, 64), torch.bfloat16, device="cuda")
    for run in IMPLEMENTATIONS.values():
        assert (run(x, scale)[1] - math.log(keys)).abs().max() < 1e-5


def test_captured_graph_replays_on_new_values_and_nothing_waits_for_the_host() -> None:
    """The whole chain of a pruned scale: attention with entropy, selection, gather, restore."""

    def chain(q: Tensor, past: Tensor, slots: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
        found = entropy_attention(q, past, past, q, q, scale=0.125)
        assert found.entropy is not None
        x = found.out.flatten(2)
        indices = select_tokens(found.entropy[:1].contiguous(), slots)
        kept = gather_tokens(x, indices) * 2
        return found.entropy, indices, restore_tokens(x, kept, indices, cache, rows, cols)

    torch.manual_seed(0)
    q, past = (torch.randn(n, 2, 4, 64, device="cuda", dtype=torch.float16) for n in (256, 85))
    cache = torch.randn(64, 2, 256, device="cuda", dtype=torch.float16)
    resize = area_matrix(16, 8).float().cuda()
    inputs = (q, past, torch.zeros(100, device="cuda"), cache, resize, resize)
    chain(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain(*inputs)
    for seed in range(2):
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for found, wanted in zip(outputs, chain(*inputs), strict=True):
            assert torch.equal(found, wanted)


def test_tensors_on_two_devices_are_refused() -> None:
    from toprovar.errors import InputError

    x, scale = attention_inputs("normal", (4, 5, 4, 1, 1, 64), torch.float16, device="cuda")
    with pytest.raises(InputError, match="past_k is on cpu but q is on cuda:0"):
        entropy_attention(x.q, x.past_k.cpu(), *x[2:], scale=scale)


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 100, 256, 1000, 4096, 16384, 20000])
def test_selection_on_the_gpu(n: int) -> None:
    torch.manual_seed(n)
    entropy = torch.randn(3, n)
    entropy[0, ::3] = 0.5  # ties across the threshold
    entropy[1, ::5], entropy[1, 1::7], entropy[1, 2::11] = float("nan"), float("-inf"), -0.0
    for keep in sorted({1, n // 3 + 1, n - n // 10, n}):
        found = select_tokens(entropy.cuda(), torch.empty(keep))
        assert torch.equal(found.cpu(), select_oracle(entropy, keep)), keep


@pytest.mark.parametrize("c", [2048, 1920, 24, 7])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("grids", [(16, 16, 8, 8), (64, 64, 48, 48), (13, 7, 9, 5), (12, 10, 24, 20), (6, 6, 6, 6)])
def test_gather_scatter_and_restore_on_the_gpu(grids: tuple[int, int, int, int], dtype: str, c: int) -> None:
    torch.manual_seed(c)
    (h, w, hc, wc), rows, images = grids, 4, 2
    n = h * w
    keep = n * 3 // 8 + 1
    x, kept, cache = (torch.randn(m, rows, c, device="cuda").to(DTYPES[dtype]) for m in (n, keep, hc * wc))
    indices = select_tokens(torch.rand(images, n).cuda(), torch.empty(keep))
    assert torch.equal(gather_tokens(x, indices), gather_oracle(x, indices))
    assert torch.equal(scatter_tokens(x, kept, indices), scatter_oracle(x, kept, indices))
    row_matrix, column_matrix = area_matrix(h, hc).cuda(), area_matrix(w, wc).cuda()
    found = restore_tokens(x, kept, indices, cache, row_matrix.float(), column_matrix.float())
    wanted = restore_oracle(x, kept, indices, cache, row_matrix, column_matrix)
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=torch.finfo(DTYPES[dtype]).eps)
    assert torch.equal(gather_tokens(found, indices), kept)


# --- the cubin library ----------------------------------------------------------------------------------------------


def test_library_launch_equals_the_jit_launch_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("toprovar.kernels.launch", reason="Triton is not installed")
    arch, sm_count = launch._device(0)
    if arch != sum(a * b for a, b in zip((10, 1), torch.cuda.get_device_capability(), strict=True)):
        pytest.skip(f"the table has no kernels for this GPU itself, only for sm_{arch}")
    wanted = [
        v
        for v in aot.variants([arch])
        if (v.op == "entropy_attention" and v.describes.get("head_dim", 128) == 128 and v.dtype != "float16"
            and v.describes.get("heads_pad", 32) == 32)
        or v.name in (f"select_sm{arch}_n1024", f"gather_sm{arch}_bfloat16", f"restore_sm{arch}_bfloat16")
    ]  # fmt: skip
    monkeypatch.setattr(aot, "variants", lambda archs: wanted)
    aot.build_library(tmp_path / "cubins", [arch], hopper=False)
    library = loader.Library(tmp_path / "cubins")
    stream = torch.cuda.current_stream().cuda_stream

    splits = set()
    for entropy in ("mean", "none"):
        for n, past, new in ((1537, 601, 1537), (65, 40, 81), (37, 4001, 37)):
            x, scale = attention_inputs("normal", (n, past, new, 4, 7, 128), torch.bfloat16, device="cuda")
            out, mean, _ = launch.entropy_attention(*x, scale, entropy, False)
            call = loader.AttentionLaunch(library, arch, "bfloat16", 4, 7, 128, n, past, new, scale, entropy, sm_count)
            splits.add((call.config.tile_name, call.config.splits > 1))
            workspace = torch.empty(call.workspace_bytes // 4, dtype=torch.float32, device="cuda")
            found, found_mean = torch.empty_like(out), torch.empty_like(mean)
            pointers = {name: tensor.data_ptr() for name, tensor in x._asdict().items()}
            call.run(
                pointers | {"out": found.data_ptr(), "entropy": found_mean.data_ptr()}, workspace.data_ptr(), stream
            )
            assert torch.equal(found, out) and torch.equal(found_mean, mean)
    assert splits == {("wide", False), ("narrow", False), ("narrow", True)}

    entropy_map = torch.rand(2, 900, device="cuda")
    indices = select_tokens(entropy_map, torch.empty(200))
    found = torch.empty_like(indices)
    library.load(f"select_sm{arch}_n1024").launch(
        {"entropy": entropy_map.data_ptr(), "indices": found.data_ptr(), "n_tokens": 900, "keep": 200},
        images=2, stream=stream,
    )  # fmt: skip
    assert torch.equal(found, indices)
    x, cache = (torch.randn(n, 4, 96, device="cuda", dtype=torch.bfloat16) for n in (900, 400))
    kept = gather_tokens(x, indices)
    sizes = {"rows": 4, "images": 2, "keep": 200, "width_units": 96 // 8}
    found = torch.empty_like(kept)
    library.load(f"gather_sm{arch}_bfloat16").launch(
        {"x": x.data_ptr(), "indices": indices.data_ptr(), "kept": found.data_ptr(), "n_tokens": 900, **sizes},
        kept_rows=200 * 4, channels=96, stream=stream,
    )  # fmt: skip
    assert torch.equal(found, kept)
    resize = area_matrix(30, 20).float().cuda()
    restored = restore_tokens(x, -kept, indices, cache, resize, resize)
    found, negative = torch.empty_like(x), -kept
    tensors = {"x": x, "kept": negative, "indices": indices, "cache": cache, "y": found}
    grids = {"grid_h": 30, "grid_w": 30, "cache_h": 20, "cache_w": 20, "span_h": 2, "span_w": 2}
    library.load(f"restore_sm{arch}_bfloat16").launch(
        {**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **sizes, **grids},
        token_rows=900 * 4, channels=96, stream=stream,
    )  # fmt: skip
    assert torch.equal(found, restored)


class PtxLibrary(loader.Library):
    """Kernels of an older architecture as PTX, which the driver compiles for the GPU at hand."""

    def __init__(self, arch: int, dtype: str, head_dim: int) -> None:
        self._entries, self._loaded, self.images = {}, {}, {}
        for variant in aot.variants([arch]):
            fits = variant.dtype in (dtype, "float32") and variant.describes.get("head_dim", head_dim) == head_dim
            if variant.op == "entropy_attention" and fits and variant.describes.get("heads_pad", 32) == 32:
                if variant.describes.get("entropy", "mean") == "mean":
                    self.images[variant.name], self._entries[variant.name] = aot.compile_variant(variant, "ptx")

    def load(self, name: str) -> loader.Kernel:
        if name not in self._loaded:
            self._loaded[name] = loader.Kernel(self._entries[name], self.images[name])
        return self._loaded[name]


@pytest.mark.parametrize("head_dim", contract.HEAD_DIMS, ids=lambda d: f"d{d}_")
@pytest.mark.parametrize("arch", [80, 86])
def test_attention_of_ampere_computes_the_same(arch: int, head_dim: int) -> None:
    """The tiles and the matrix products (mma.sync) of older architectures; their speed is not what is looked at."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU is older than the kernels")
    pytest.importorskip("triton", reason="Triton is not installed")
    library = PtxLibrary(arch, "bfloat16", head_dim)
    chosen = set()
    for n, past, new, r, h in ((700, 601, 700, 4, 7), (129, 0, 129, 2, 3), (37, 4001, 37, 2, 3)):
        x, scale = attention_inputs("normal", (n, past, new, r, h, head_dim), torch.bfloat16, device="cuda")
        call = loader.AttentionLaunch(library, arch, "bfloat16", r, h, head_dim, n, past, new, scale, "mean", 20)
        chosen.add((call.config.tile_name, call.config.splits > 1))
        out, mean = torch.empty_like(x.q), torch.empty(r, n, device="cuda")
        workspace = torch.empty(call.workspace_bytes // 4, dtype=torch.float32, device="cuda")
        pointers = {name: tensor.data_ptr() for name, tensor in x._asdict().items()}
        stream = torch.cuda.current_stream().cuda_stream
        call.run(pointers | {"out": out.data_ptr(), "entropy": mean.data_ptr()}, workspace.data_ptr(), stream)
        wanted, entropy, _ = attention_oracle(*x, scale)
        assert relative(out, wanted) <= 2 * relative(plain_attention(x, scale), wanted)
        assert (mean - entropy.mean(1)).abs().max() <= 2e-3
    assert chosen == {("wide", False), ("narrow", False), ("narrow", True)}
