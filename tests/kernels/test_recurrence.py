"""The recurrence of Flash Attention Entropy, and why it is not the one that the paper prints."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st


def true_entropy(scores: np.ndarray) -> float:
    log_p = scores - scores.max()
    log_p -= math.log(np.exp(log_p).sum())
    p = np.exp(log_p)
    return float(-(p[p > 0] * log_p[p > 0]).sum())


def centred(scores: np.ndarray, block: int, dtype: type = np.float64) -> float:
    """u <- a (u + (m - m') l) + sum p (s - m'): what every kernel here does."""
    m, total, u = dtype(-1e30), dtype(0), dtype(0)
    for start in range(0, len(scores), block):
        s = scores[start : start + block].astype(dtype)
        m_new = max(m, s.max())
        shrink, p = np.exp(m - m_new), np.exp(s - m_new)
        u = shrink * (u + (m - m_new) * total) + (p * (s - m_new)).sum(dtype=dtype)
        total = shrink * total + p.sum(dtype=dtype)
        m = m_new
    return float(np.log(total) - u / total)


def printed(scores: np.ndarray, block: int) -> float:
    """Algorithm 2 of the ToProVAR paper (arXiv 2602.22948), sign mended: E <- a E + sum P log P, then E / l - log l."""
    m, total, e = -1e30, 0.0, 0.0
    for start in range(0, len(scores), block):
        s = scores[start : start + block]
        m_new = max(m, s.max())
        shrink, p = np.exp(m - m_new), np.exp(s - m_new)
        e = shrink * e + (p * np.where(p > 0, np.log(np.maximum(p, 1e-300)), 0.0)).sum()
        total = shrink * total + p.sum()
        m = m_new
    return float(-(e / total - math.log(total)))


scores_lists = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=200)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(scores_lists, st.integers(1, 64))
def test_centred_recurrence_equals_the_two_pass_value(values: list[float], block: int) -> None:
    scores = np.array(values)
    assert abs(centred(scores, block) - true_entropy(scores)) < 1e-10


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scores_lists, st.integers(1, 64))
def test_centred_recurrence_holds_in_fp32_at_scores_of_100(values: list[float], block: int) -> None:
    scores = np.array(values, dtype=np.float32)
    assert abs(centred(scores, block, np.float32) - true_entropy(scores.astype(np.float64))) < 1e-4


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scores_lists, scores_lists)
def test_parts_merge_by_their_weights(left: list[float], right: list[float]) -> None:
    """H = sum_x w_x (H_x + LSE - LSE_x), w_x = exp(LSE_x - LSE): what split keys rely on (paper.md 2.2)."""
    parts = [np.array(left), np.array(right)]
    lse = [float(np.logaddexp.reduce(s)) for s in parts]
    whole = float(np.logaddexp.reduce(np.concatenate(parts)))
    merged = sum(math.exp(x - whole) * (true_entropy(s) + whole - x) for s, x in zip(parts, lse, strict=True))
    assert abs(merged - true_entropy(np.concatenate(parts))) < 1e-10


def test_printed_recurrence_fails_when_the_maximum_moves() -> None:
    scores = np.sort(np.random.default_rng(0).normal(0.0, 2.0, 4096))
    truth = true_entropy(scores)
    assert abs(centred(scores, 128) - truth) < 1e-10
    assert abs(printed(scores, 128) - truth) > 1.0  # 1.9 nats of 6.6


def test_printed_recurrence_is_right_only_with_the_maximum_in_the_first_block() -> None:
    scores = np.random.default_rng(1).normal(0.0, 2.0, 1024)
    descending = np.sort(scores)[::-1]
    assert abs(printed(descending, 128) - true_entropy(scores)) < 1e-10
    assert abs(printed(scores, 128) - true_entropy(scores)) > 1e-2


def test_printed_recurrence_orders_queries_wrongly() -> None:
    """Its error depends on where the maximum lies, so it changes which tokens are kept."""
    rng = np.random.default_rng(2)
    rows = [rng.normal(0.0, 2.0, 1024) for _ in range(64)]
    truth = np.argsort([true_entropy(r) for r in rows])[:16]
    wrong = np.argsort([printed(r, 64) for r in rows])[:16]
    ours = np.argsort([centred(r, 64) for r in rows])[:16]
    assert set(ours) == set(truth)
    assert set(wrong) != set(truth)
