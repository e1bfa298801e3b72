"""entropy_attention on a CPU, against the float64 oracle and against a second identity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar.kernels import contract, entropy_attention
from toprovar.kernels.oracle import attention_oracle, entropy_from_values

from .cases import DISTRIBUTIONS, attention_errors, attention_inputs, relative

DTYPES = {name: getattr(torch, name) for name in contract.DTYPES}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_oracle_agrees_with_the_second_identity(distribution: str) -> None:
    x, scale = attention_inputs(distribution, (9, 33, 50, 2, 3, 24), torch.float64)
    _, entropy, _ = attention_oracle(*x, scale)
    assert (entropy - entropy_from_values(*x, scale)).abs().max() < 1e-10


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    dtype=st.sampled_from(sorted(DTYPES)),
    sizes=st.tuples(
        st.integers(1, 40), st.integers(0, 70), st.integers(1, 70), st.integers(1, 4), st.integers(1, 5),
        st.sampled_from([8, 16, 64, 80, 96, 128]),
    ),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_output_entropy_and_lse_are_within_the_contract(
    distribution: str, dtype: str, sizes: tuple[int, int, int, int, int, int], seed: int
) -> None:
    x, scale = attention_inputs(distribution, sizes, DTYPES[dtype], seed)
    found = entropy_attention(*x, scale=scale, entropy="head", return_lse=True)
    assert found.entropy is not None and found.lse is not None
    errors, allowed = attention_errors(x, scale, *found), contract.TOLERANCES[dtype]
    assert errors.out <= max(allowed.out_relative, allowed.factor * errors.plain)
    assert errors.entropy <= allowed.entropy_nats
    assert errors.lse <= allowed.lse_nats


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_mean_is_the_mean_of_the_heads_and_none_gives_the_same_output(dtype: str) -> None:
    x, scale = attention_inputs("normal", (17, 20, 17, 4, 3, 64), DTYPES[dtype])
    head = entropy_attention(*x, scale=scale, entropy="head")
    mean = entropy_attention(*x, scale=scale)
    none = entropy_attention(*x, scale=scale, entropy="none")
    assert none.entropy is None and none.lse is None and head.lse is None
    assert head.entropy is not None and mean.entropy is not None
    assert mean.entropy.shape == (4, 17) and head.entropy.shape == (4, 3, 17)
    torch.testing.assert_close(mean.entropy, head.entropy.mean(1))
    assert relative(none.out, head.out) < contract.TOLERANCES[dtype].out_relative


def test_one_key_has_no_entropy_and_returns_its_value() -> None:
    x, scale = attention_inputs("hot", (5, 0, 1, 2, 3, 64), torch.float16)
    found = entropy_attention(*x, scale=scale)
    assert found.entropy is not None and torch.equal(found.entropy, torch.zeros(2, 5))
    assert torch.equal(found.out, x.new_v.expand(5, 2, 3, 64))


@pytest.mark.parametrize("keys", [2, 100, 10521, 200_000])
def test_equal_keys_give_log_n(keys: int) -> None:
    x, scale = attention_inputs("equal", (2, keys // 3, keys - keys // 3, 1, 2, 8), torch.float32)
    found = entropy_attention(*x, scale=scale)
    assert found.entropy is not None
    assert (found.entropy - math.log(keys)).abs().max() < 2e-6


def test_chunks_of_queries_leave_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    from toprovar.kernels import portable

    x, scale = attention_inputs("normal", (23, 11, 23, 2, 2, 16), torch.float32)
    whole = entropy_attention(*x, scale=scale, entropy="head", return_lse=True)
    monkeypatch.setitem(portable._SCORE_BYTES, "cpu", 4 * 2 * 2 * 34 * 5)
    pieces = entropy_attention(*x, scale=scale, entropy="head", return_lse=True)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)


def test_views_into_a_fused_projection_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(13, 2, 3, 4, 16).unbind(2)
    past = torch.randn(9, 2, 4, 16).transpose(0, 1).contiguous().transpose(0, 1)
    found = entropy_attention(q, past, past, k, v, scale=0.25)
    wanted, entropy, _ = attention_oracle(q, past, past, k, v, 0.25)
    assert found.entropy is not None
    assert relative(found.out, wanted) < 1e-6 and (found.entropy - entropy.mean(1)).abs().max() < 1e-5
