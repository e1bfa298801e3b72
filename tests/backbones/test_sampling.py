"""Filters and draws against the plain form of the original."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toprovar.backbones.base import Sampling, filter_logits, guide, gumbel
from toprovar.errors import InputError


def _original_filter(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Steps 1 and 2 of sample_with_top_k_top_p_, on one vector: mask below the k-th, sort all, drop the low tail."""
    logits = logits.clone()
    if top_k > 0:
        logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
    if top_p > 0:
        values, order = logits.sort()
        remove = values.softmax(0).cumsum(0) <= 1 - top_p
        remove[-1] = False
        logits[order[remove]] = -torch.inf
    return logits


@pytest.mark.parametrize("top_k", [0, 1, 2, 13, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.96, 1.0])
def test_filters_equal_the_original(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(top_k))
    found = filter_logits(logits, top_k, top_p)
    expected = torch.stack([_original_filter(row, top_k, top_p) for row in logits.flatten(0, 1)]).reshape(logits.shape)
    assert torch.equal(found, expected)


def test_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert torch.isfinite(filter_logits(logits, 2, 0.0)).tolist() == [True, True, True, False]


def test_gumbel_draws_follow_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator)
    uniform = torch.rand(200_000, 6, generator=generator).clamp_min(2.0**-24)
    drawn = (logits + gumbel(uniform)).argmax(-1)
    frequency = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(frequency, logits.softmax(0), atol=0.005, rtol=0)


def test_gumbel_of_the_extreme_values_of_the_noise_is_finite() -> None:
    assert torch.isfinite(gumbel(torch.tensor([2.0**-24, 1 - 2.0**-24]))).all()


def test_guidance() -> None:
    logits = torch.tensor([[[1.0], [5.0], [0.5], [2.0]]])  # two images: conditional 1, 5, unconditional 0.5, 2
    assert guide(logits, torch.tensor([3.0, -2.0])).tolist() == [[[2.0], [11.0]]]
    assert guide(logits[:, :2], torch.tensor([0.5])).tolist() == [[[0.5], [2.5]]]


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 1.5}])
def test_unusable_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**options)  # type: ignore[arg-type]
