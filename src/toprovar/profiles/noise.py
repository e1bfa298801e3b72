"""What a seed means: the uniform noise of a picture, the same numbers on every target and in every language.

Noise is an input of the advance graph, so a seed is part of the bundle's format. The generator is counter based
(Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): value ``i`` of scale ``s``
depends on (seed, s, i) alone, whatever the batch, the order of scales or the number of threads.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (block, scale, 0, 0), block = i div 4; output word i mod 4
    u       = ((word >> 9) + 0.5) * 2^-23          exact in float32, 2^-24 <= u <= 1 - 2^-24

Nine bits are dropped, not eight: with 24 bits kept, ``2^24 - 0.5`` is no float32 and rounds to u = 1, whose Gumbel
noise is infinite; that would strike one 256 x 256 picture of VAR (680 tokens, 4096 logits) in six.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from toprovar.errors import InputError

__all__ = ["check_noise", "philox4x32", "scale_noise", "uniform"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_HALF = np.uint64(32)
_CHUNK_BLOCKS = 1 << 15  # five arrays of 8 bytes a block: about what a second-level cache holds
_DROPPED_BITS = np.uint32(9)


def philox4x32(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> tuple[npt.NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: ``[4, n]``, words below 2^32. It is written over, so that a round allocates nothing.
        key: two words below 2^32.

    Returns:
        The four words of every output, ``[n]`` each, below 2^32: views of ``counter``.
    """
    c0, c1, c2, c3 = counter
    high = np.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        for word, multiplier, mixed, round_key in ((c2, _MULTIPLIERS[1], c1, k0), (c0, _MULTIPLIERS[0], c3, k1)):
            np.multiply(word, multiplier, out=word)
            np.right_shift(word, _HALF, out=high)
            np.bitwise_and(word, np.uint64(_LOW), out=word)
            np.bitwise_xor(mixed, high, out=mixed)
            np.bitwise_xor(mixed, np.uint64(round_key), out=mixed)
        c0, c1, c2, c3 = c1, c2, c3, c0  # where each new word lies
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seed: int, scale: int, count: int) -> npt.NDArray[np.float32]:
    """The first ``count`` values of one scale of one picture: float32 in the open interval (0, 1).

    Args:
        seed: of the picture, 0 <= seed < 2^64.
        scale: index s of the scale, 0 <= s < 2^32.
        count: how many values, 0 <= count <= 2^34.

    Raises:
        InputError: an argument is out of its range.
    """
    check_noise(seed, scale, count)
    key = (seed & _LOW, seed >> 32)
    blocks = -(-count // 4)
    values = np.empty((blocks, 4), dtype=np.float32)
    counters = np.empty((4, min(blocks, _CHUNK_BLOCKS)), dtype=np.uint64)
    for start in range(0, blocks, _CHUNK_BLOCKS):
        chunk = values[start : start + _CHUNK_BLOCKS]
        counter = counters[:, : len(chunk)]
        counter[0] = np.arange(start, start + len(chunk))
        counter[1:] = [[scale], [0], [0]]
        for column, word in enumerate(philox4x32(counter, key)):
            chunk[:, column] = word.astype(np.uint32) >> _DROPPED_BITS
        chunk += np.float32(0.5)
        chunk *= np.float32(2.0**-23)
    return values.reshape(-1)[:count]


def check_noise(seed: int, scale: int, count: int) -> None:
    """Raises InputError where `uniform` does."""
    for name, value, limit in (("seed", seed, 1 << 64), ("scale", scale, 1 << 32), ("count", count, (1 << 34) + 1)):
        if not 0 <= value < limit:
            raise InputError(f"noise: {name} is {value}; valid is 0 to {limit - 1}")


def scale_noise(seeds: Sequence[int], scale: int, tokens: int, logits: int) -> npt.NDArray[np.float32]:
    """Noise of one scale of a batch, ``[N, B, V]``: picture b is ``uniform(seeds[b], scale, N * V)``, row-major [N, V].

    A picture is the same whatever batch it is computed in.
    """
    if len(seeds) == 1:
        return uniform(seeds[0], scale, tokens * logits).reshape(tokens, 1, logits)
    noise = np.empty((tokens, len(seeds), logits), dtype=np.float32)
    for image, seed in enumerate(seeds):
        noise[:, image] = uniform(seed, scale, tokens * logits).reshape(tokens, logits)
    return noise
