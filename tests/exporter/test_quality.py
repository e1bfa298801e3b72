"""Figures of quality equal those of the runtime, and say what their names say."""

import numpy as np
import pytest
import torch

from toprovar.exporter.quality import code_error, equal_share, mean_squared_error, ssim
from toprovar.runtime import compare


def test_similarity_equals_that_of_the_runtime():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 24, 31, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    found = ssim(a, b)
    for i in range(3):
        assert float(found[i]) == pytest.approx(compare.ssim(a[i].numpy(), b[i].numpy()), abs=1e-12)
        expected = float(np.mean((a[i].double().numpy() - b[i].double().numpy()) ** 2))
        assert float(mean_squared_error(a, b)[i]) == pytest.approx(expected)
    assert float(ssim(a, a).min()) == pytest.approx(1)


def test_equal_tokens_and_codes():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 1]])
    assert equal_share(tokens, torch.tensor([[1, 2, 3, 5], [1, 1, 1, 1]])).tolist() == [0.75, 1.0]
    bits = torch.zeros(1, 2, 4)
    other = bits.clone()
    other[0, 1, 2] = 1
    assert equal_share(bits, other).tolist() == [0.5]
    codes = torch.ones(1, 2, 3, 3)
    assert float(code_error(1.5 * codes, codes)) == pytest.approx(0.5)
