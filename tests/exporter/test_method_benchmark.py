"""What benchmarks/method.py rests on: three recurrences, and the scores that it sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.method import BLOCK, Scores, fill, recurrences

from toprovar.kernels import entropy_attention


def test_ours_is_the_two_pass_value_and_the_printed_one_is_not() -> None:
    scores = torch.randn(3, 5, 4 * BLOCK + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    truth, ours, printed = recurrences(scores.sort(-1).values)
    assert torch.allclose(ours, truth, atol=1e-12) and (printed - truth).abs().min() > 0.1
    # With the largest score in the first block there is nothing to correct.
    truth, ours, printed = recurrences(scores.sort(-1, descending=True).values)
    assert torch.allclose(ours, truth, atol=1e-12) and torch.allclose(printed, truth, atol=1e-12)


def test_scores_are_those_of_the_op() -> None:
    generator = torch.Generator().manual_seed(1)
    q, new = torch.randn(6, 2, 3, 8, generator=generator), torch.randn(6, 2, 3, 8, generator=generator)
    past = torch.randn(9, 2, 3, 8, generator=generator)
    with Scores() as scores:
        found = entropy_attention(q, past, past, new, new, scale=0.5, entropy="head").entropy
    ((seen_q, keys, scale),) = scores.seen
    logits = torch.einsum("nrhd,lrhd->rhnl", seen_q.double(), keys.double()) * scale
    assert found is not None
    assert recurrences(logits)[0].float().numpy() == pytest.approx(found.numpy(), abs=1e-5)


def test_the_page_says_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    documents = [json.loads(path.read_text()) for path in sorted((root / "benchmarks/results").glob("method-*.json"))]
    text = (root / "docs/method.md").read_text()
    assert text.count("<!-- measured ") == 10 and fill(text, documents) == text
