"""The Triton kernels and their launches, run by Triton's interpreter on CPU tensors.

Collected by test_triton_interpreted.py only, in a process of its own: TRITON_INTERPRET must be set before triton is
imported. The interpreter multiplies bf16 matrices as if they were integers, so bf16 is left to the GPU.
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter

from tests.kernels.cases import DISTRIBUTIONS, attention_errors, attention_inputs
from toprovar.kernels import area_matrix, contract, launch, tuning
from toprovar.kernels.oracle import gather_oracle, restore_oracle, scatter_oracle, select_oracle

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/kernels/test_triton_interpreted.py"

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    # Triton 3.6 converts arrays of one element with int(), which numpy 2.4 refuses for any but 0-d ones.
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


interpreter._patch_lang_tensor = _patch_lang_tensor


@pytest.fixture(autouse=True)
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch as for an A100 of 8 multiprocessors, so that small problems fill it, with small tiles."""
    monkeypatch.setattr(launch, "_device", lambda index: (80, 8))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tuning, "TOKEN_BLOCK", (16, 4))
    small = {"wide": tuning.Tile(32, 32, 4, 2), "narrow": tuning.Tile(16, 16, 4, 2)}
    monkeypatch.setattr(tuning, "TILES", {key: small[key[3]] for key in tuning.TILES})
    monkeypatch.setattr(tuning, "MIN_KEYS_PER_SPLIT", 20)


def check(distribution: str, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.float32) -> None:
    x, scale = attention_inputs(distribution, sizes, dtype)
    found = launch.entropy_attention(*x, scale, "head", True)
    errors, allowed = attention_errors(x, scale, *found), contract.TOLERANCES[str(dtype)[6:]]
    assert errors.out <= max(allowed.out_relative, allowed.factor * errors.plain)
    assert errors.entropy <= allowed.entropy_nats and errors.lse <= allowed.lse_nats
    out, mean, none = launch.entropy_attention(*x, scale, "mean", False)
    assert torch.equal(out, found[0]) and none.numel() == 0
    torch.testing.assert_close(mean, found[1].mean(1), atol=1e-5, rtol=1e-5)
    out, none, _ = launch.entropy_attention(*x, scale, "none", False)
    assert torch.equal(out, found[0]) and none.numel() == 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_in_one_piece(distribution: str, dtype: torch.dtype) -> None:
    assert tuning.choose(80, "float16", 64, 43, 50, 6, 8).splits == 1
    check(distribution, (43, 23, 27, 2, 3, 64), dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_attention_with_split_keys(distribution: str) -> None:
    assert tuning.choose(80, "float32", 64, 7, 110, 3, 8).splits == 4
    check(distribution, (7, 53, 57, 1, 3, 64))


@pytest.mark.parametrize("head_dim", [8, 72, 80, 96, 120, 128])
def test_every_head_dim(head_dim: int) -> None:
    check("normal", (19, 21, 18, 1, 2, head_dim))


@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 33), (32, 0), (1, 31), (64, 32)])
def test_empty_and_whole_pieces(past: int, new: int) -> None:
    check("normal", (3, past, new, 1, 2, 64))
    check("normal", (50, past, new, 1, 4, 64))


def test_views_are_launched_without_a_copy_and_transposed_heads_with_one() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(13, 2, 3, 4, 16).unbind(2)
    assert launch._aligned(k, 2) is k
    past = torch.randn(9, 4, 2, 16).transpose(1, 2)
    assert launch._aligned(past, 2) is not past
    wanted = launch.entropy_attention(*(t.contiguous() for t in (q, past, past, k, v)), 0.25, "head", False)
    found = launch.entropy_attention(q, past, past, k, v, 0.25, "head", False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("keep", [1, 20, 49, 50])
def test_selection(keep: int) -> None:
    torch.manual_seed(0)
    entropy = torch.randn(3, 50)
    entropy[0, 3], entropy[0, 7], entropy[0, 9] = float("nan"), -float("inf"), float("inf")
    entropy[1, ::2], entropy[1, ::4] = 0.0, -0.0
    entropy[2] = 1.0
    assert torch.equal(launch.select_tokens(entropy, keep), select_oracle(entropy, keep))


@pytest.mark.parametrize("c", [8, 24, 7])
@pytest.mark.parametrize("grids", [(10, 5, 4, 3), (5, 10, 5, 10), (10, 5, 23, 2)])
def test_gather_scatter_restore(c: int, grids: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    h, w, hc, wc = grids
    x, cache = torch.randn(50, 4, c), torch.randn(hc * wc, 4, c)
    monkeypatch.setattr(tuning, "RESTORE_SAMPLES", 8)
    keep = 33
    kept, indices = torch.randn(keep, 4, c), select_oracle(torch.rand(2, 50), keep)
    assert torch.equal(launch.gather_tokens(x, indices), gather_oracle(x, indices))
    assert torch.equal(launch.restore_tokens(x, kept, indices, None, (50, 1, 1, 1)), scatter_oracle(x, kept, indices))
    found = launch.restore_tokens(x, kept, indices, cache, grids)
    wanted = restore_oracle(x, kept, indices, cache, area_matrix(h, hc), area_matrix(w, wc))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
