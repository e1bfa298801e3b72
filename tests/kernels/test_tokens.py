"""Selection, gather, scatter and restore on a CPU, against their oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar.kernels import (
    area_matrix,
    gather_tokens,
    restore_tokens,
    scatter_tokens,
    select_tokens,
)
from toprovar.kernels.oracle import gather_oracle, restore_oracle, scatter_oracle, select_oracle

values = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1.0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_selection_is_stable_ascending_and_puts_nan_last(data: st.DataObject) -> None:
    images, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 50))
    rows = data.draw(st.lists(st.lists(values, min_size=tokens, max_size=tokens), min_size=images, max_size=images))
    keep = data.draw(st.integers(1, tokens))
    entropy = torch.tensor(rows, dtype=torch.float32)
    found = select_tokens(entropy, torch.empty(keep))
    assert found.dtype == torch.int32 and found.shape == (images, keep)
    assert torch.equal(found, select_oracle(entropy, keep))
    assert (found.diff(dim=1) > 0).all()


def tokens(n: int, r: int, c: int, keep: int, images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, r, c, generator=generator)
    return x, select_oracle(torch.rand(images, n, generator=generator), keep)


@pytest.mark.parametrize(("n", "r", "c", "keep", "images"), [(1, 1, 1, 1, 1), (30, 4, 5, 11, 2), (17, 6, 8, 17, 3)])
def test_gather_and_scatter_are_exact_and_inverse(n: int, r: int, c: int, keep: int, images: int) -> None:
    x, indices = tokens(n, r, c, keep, images)
    kept = gather_tokens(x, indices)
    assert torch.equal(kept, gather_oracle(x, indices))
    assert torch.equal(scatter_tokens(x, kept, indices), x)
    assert torch.equal(scatter_tokens(x, -kept, indices), scatter_oracle(x, -kept, indices))


@pytest.mark.parametrize("source", [(1, 1), (4, 3), (6, 5), (9, 7), (12, 10)])
def test_area_matrix_is_torchs_area_resize(source: tuple[int, int]) -> None:
    h, w = 6, 5
    grid = torch.randn(1, 2, *source, dtype=torch.float64)
    wanted = F.interpolate(grid, (h, w), mode="area")
    torch.testing.assert_close(area_matrix(h, source[0]) @ grid @ area_matrix(w, source[1]).T, wanted)


@pytest.mark.parametrize("source", [(1, 1), (4, 3), (6, 5), (9, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_adds_the_resized_cache_to_pruned_rows_only(source: tuple[int, int], dtype: torch.dtype) -> None:
    h, w, r, c = 6, 5, 4, 7
    x, indices = tokens(h * w, r, c, 11, 2)
    x = x.to(dtype)
    kept = torch.randn(11, r, c).to(dtype)
    cache = torch.randn(source[0] * source[1], r, c).to(dtype)
    rows, cols = area_matrix(h, source[0]), area_matrix(w, source[1])
    found = restore_tokens(x, kept, indices, cache, rows.float(), cols.float())
    wanted = restore_oracle(x, kept, indices, cache, rows, cols)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert torch.equal(gather_tokens(found, indices), kept)


def test_keeping_every_token_makes_restore_the_identity_on_kept() -> None:
    x, indices = tokens(12, 2, 8, 12, 1)
    assert torch.equal(indices, torch.arange(12, dtype=torch.int32)[None])
    kept, cache = torch.randn_like(x), torch.randn(4, 2, 8)
    assert torch.equal(restore_tokens(x, kept, indices, cache, torch.ones(3, 2) / 2, torch.ones(4, 2) / 2), kept)
