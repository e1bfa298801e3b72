"""Frozen launch configurations of the Triton kernels: plain data and one rule, nothing is tuned at run time.

A C++ launcher reads the same numbers from a cubin library's index (`aot.py`) and repeats the arithmetic of `choose`.
Tiles of sm_90 were measured on an H100. Those of the other architectures were chosen by compiling candidates: shared
memory within the limit, at most SPILL_LIMIT_BYTES of stack; they have not been timed on such a card.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ARCHS",
    "HEADS_PADS",
    "MAX_SPLITS",
    "MEAN_BLOCK",
    "MEAN_WARPS",
    "MERGE_WARPS",
    "MIN_KEYS_PER_SPLIT",
    "RESTORE_SAMPLES",
    "SELECT_BLOCKS",
    "SHARED_LIMIT_BYTES",
    "SM_COUNT",
    "SPILL_LIMIT_BYTES",
    "TILES",
    "TOKEN_BLOCK",
    "AttentionConfig",
    "Tile",
    "choose",
    "head_bucket",
    "heads_pad",
    "nearest_arch",
    "split_head_dim",
]

ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities with a table: A100, RTX 30, RTX 40 and L40, H100, B200, RTX 50."""
SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one block may ask for (CUDA programming guide, table of compute capabilities)."""
SPILL_LIMIT_BYTES = 128
"""Stack a kernel may use per thread: a few registers of the masked tail (up to 64 bytes) or of the widest selection."""
SM_COUNT = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the usual card, for `choose` where the device is not at hand."""

MIN_KEYS_PER_SPLIT = 512
"""Below this the merge costs more than the split gains."""
MAX_SPLITS = 16
WIDE_FILL_PERCENT = 250
"""The wide tile is taken when its blocks fill the multiprocessors this often, in percent: measured on an H100."""
SLOTS_PER_SM = 2
"""Narrow blocks that run at once on one multiprocessor; splits are added until there are this many."""


@dataclass(frozen=True)
class Tile:
    """Queries x keys of one program, its warps and software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """How one attention is launched: `tile_name` is "wide" or "narrow", `keys_per_split` a multiple of block_n."""

    tile_name: str
    tile: Tile
    splits: int
    keys_per_split: int


_SMALL_SHARED: dict[str, tuple[Tile, Tile, Tile, Tile]] = {  # sm_86, 89, 120: 99 KB and the mma.sync products of sm_80
    "wide": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    "narrow": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
}
_HALF: dict[int, dict[str, tuple[Tile, Tile, Tile, Tile]]] = {
    # arch: {tile: for head dims 64, 80, 96, 128}
    80: {
        "wide": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        "narrow": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    },
    86: _SMALL_SHARED,
    89: _SMALL_SHARED,
    90: {
        "wide": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 128, 8, 3)),
        "narrow": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    },
    100: {
        "wide": (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        "narrow": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    },
    120: _SMALL_SHARED,
}

# fp32 is for checking, not for speed: exact products (no tf32) on the ordinary cores, the same tile everywhere.
_SINGLE = Tile(32, 32, 4, 2)

TILES: dict[tuple[int, str, int, str], Tile] = {
    (arch, dtype, head_dim, name): tile
    for arch, names in _HALF.items()
    for name, tiles in names.items()
    for head_dim, tile in zip((64, 80, 96, 128), tiles, strict=True)
    for dtype in ("float16", "bfloat16")
} | {
    (arch, "float32", head_dim, name): _SINGLE
    for arch in ARCHS
    for head_dim in (64, 80, 96, 128)
    for name in ("wide", "narrow")
}
"""(arch, dtype, head-dim bucket, tile name) -> tile."""


SELECT_BLOCKS: dict[int, int] = {256: 4, 1024: 8, 4096: 16, 16384: 32}
"""Tokens one selection program holds -> its warps."""
TOKEN_BLOCK = (2048, 4)
"""Channels and warps of one program of gather and restore: two 16-byte accesses in flight per thread and tensor."""
RESTORE_SAMPLES = 128
"""Entries of one step of the search for a token among the kept ones; its square bounds their number."""
MEAN_BLOCK = 64
"""Queries of one program of the mean over heads."""
MEAN_WARPS = 4
MERGE_WARPS = 8
HEADS_PADS = (32, 64)
"""Padded head counts compiled ahead of time; the padding is part of the summation order, so launches use them too."""


def nearest_arch(capability: int) -> int | None:
    """The table's architecture for a device of this compute capability (major * 10 + minor), None below 80."""
    below = [arch for arch in ARCHS if arch <= capability]
    return below[-1] if below else None


def head_bucket(head_dim: int) -> int:
    """The smallest head dim of the table that holds this one."""
    return next(size for size in (64, 80, 96, 128) if head_dim <= size)


def heads_pad(heads: int) -> int:
    """The power of two that holds the heads of one token, 32 at least."""
    size = HEADS_PADS[0]
    while size < heads:
        size *= 2
    return size


def split_head_dim(arch: int, head_dim: int) -> tuple[int, int]:
    """(D0, D1): a head as one or two power-of-two tiles, so that 80 = 64 + 16 and 96 = 64 + 32 waste no products.

    On sm_90 and sm_100 it is always one padded tile: with two, Triton 3.6's warp-group products gave wrong results for
    the last, partial block of keys on an H100 (right under its interpreter; docs/log.md).
    """
    whole = 16
    while whole < head_dim:
        whole *= 2
    half = whole // 2
    if arch in (90, 100) or half < 16 or half >= head_dim:
        return whole, 0
    rest = 16
    while rest < head_dim - half:
        rest *= 2
    return (half, rest) if half + rest < whole else (whole, 0)


def choose(
    arch: int, dtype: str, head_dim: int, n_queries: int, n_keys: int, row_heads: int, sm_count: int | None = None
) -> AttentionConfig:
    """The launch configuration for `n_queries` queries on `n_keys` keys (past and new), `row_heads` = R * H.

    `arch` is one of ARCHS (see `nearest_arch`), `dtype` a key of contract.DTYPES, `head_dim` at most 128.
    """
    sms = sm_count or SM_COUNT[arch]
    bucket = head_bucket(head_dim)
    wide = TILES[arch, dtype, bucket, "wide"]
    if -(-n_queries // wide.block_m) * row_heads * 100 >= WIDE_FILL_PERCENT * sms:
        return AttentionConfig("wide", wide, 1, -(-n_keys // wide.block_n) * wide.block_n)
    narrow = TILES[arch, dtype, bucket, "narrow"]
    blocks = -(-n_queries // narrow.block_m) * row_heads
    splits = max(1, min(SLOTS_PER_SM * sms // blocks, n_keys // MIN_KEYS_PER_SPLIT, MAX_SPLITS))
    per_split = -(-n_keys // splits)
    per_split = -(-per_split // narrow.block_n) * narrow.block_n
    return AttentionConfig("narrow", narrow, -(-n_keys // per_split), per_split)
