"""A seed gives the numbers that the format says, on every machine."""

import time

import numpy as np
import pytest

from toprovar.errors import InputError
from toprovar.profiles.noise import philox4x32, scale_noise, uniform

# Known answers of Random123 1.14.0, file examples/kat_vectors, lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def philox(counter, key):
    return tuple(int(word[0]) for word in philox4x32(np.array(counter, np.uint64)[:, None], key))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert philox(words(counter), words(key)) == words(expected)


def test_uniform_follows_the_stated_formula():
    seed, scale = 0x0123456789ABCDEF, 7
    values = uniform(seed, scale, 11)
    for i, value in enumerate(values):
        word = philox((i // 4, scale, 0, 0), (0x89ABCDEF, 0x01234567))[i % 4]
        assert float(value) == ((word >> 9) + 0.5) * 2.0**-23


def test_values_depend_on_seed_scale_and_index_alone():
    long = uniform(5, 3, 300_001)
    assert np.array_equal(long[:17], uniform(5, 3, 17))
    assert not np.array_equal(long[:17], uniform(5, 4, 17))
    assert not np.array_equal(long[:17], uniform(6, 3, 17))
    assert not np.array_equal(long[:17], uniform(5 + (1 << 32), 3, 17))
    assert uniform(5, 3, 0).shape == (0,)


def test_values_are_uniform_inside_the_open_interval():
    values = uniform(11, 0, 4_000_000).astype(np.float64)
    assert values.min() >= 2.0**-24 and values.max() <= 1 - 2.0**-24
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    chi2 = float(((counts - 62_500.0) ** 2 / 62_500.0).sum())
    assert 30 < chi2 < 115  # 63 degrees of freedom: both tails below 1e-4


def test_the_largest_word_stays_below_one():
    largest = np.float32((0xFFFFFFFF >> 9) + 0.5) * np.float32(2.0**-23)
    assert largest < 1 and np.isfinite(-np.log(-np.log(largest)))


def test_a_picture_is_the_same_in_any_batch():
    batch = scale_noise([3, 9], 2, tokens=5, logits=7)
    assert batch.shape == (5, 2, 7) and batch.dtype == np.float32
    assert np.array_equal(batch[:, 1], uniform(9, 2, 35).reshape(5, 7))
    assert np.array_equal(batch[:, :1], scale_noise((3,), 2, 5, 7))


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (1 << 64, 0, 1), (0, -1, 1), (0, 1 << 32, 1), (0, 0, -1)])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(InputError, match="valid is 0 to"):
        uniform(*arguments)


def test_sixteen_million_values_take_seconds_at_most():
    start = time.perf_counter()
    assert uniform(1, 2, 16 << 20).size == 16 << 20
    assert time.perf_counter() - start < 5
