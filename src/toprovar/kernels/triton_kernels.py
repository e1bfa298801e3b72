"""Triton kernels of every op: Ampere, Ada and Blackwell run these, Hopper where its own kernel does not apply.

Flash Attention Entropy keeps, for each query, m = max of the scores so far, l = sum e^(s-m) and u = sum e^(s-m) (s-m).
When a block of keys raises the maximum from m to m', with a = e^(m-m'):

    l <- a l + sum p            u <- a (u + (m - m') l) + sum p (s - m')            p = e^(s-m')

and at the end H = log l - u / l (reference: paper.md 2.2; the recurrence printed in the paper lacks the (m - m') l).
Scores are multiplied by log2(e) once, so that every exponential is one exp2.

Conventions. Integer arguments are not specialised: one binary per row of the tuning table, whatever the sizes. Strides
and widths come in units of 8 elements (`*8` names): multiplied by 8 here, they let the compiler see that every access
is 16 bytes wide. `D` is the head dim, split as D0 + D1 (tuning.split_head_dim) into power-of-two tiles. `total` is l.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_kernel", "gather_kernel", "mean_heads_kernel", "merge_kernel", "restore_kernel", "select_kernel"]

_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1.0e30)
"""Start of the running maximum: finite, so that (m - m') * total is 0 and not NaN before the first key."""


@triton.jit
def _load_rows(base, offsets, columns, count, MASK_ROWS: tl.constexpr, D_LEFT: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of which D_LEFT columns exist and, where MASK_ROWS, the first `count` rows; the rest is 0."""
    pointers = base + offsets[:, None] + columns[None, :]
    inside = tl.arange(0, offsets.shape[0])[:, None] < count
    if MASK_ROWS and D_LEFT < WIDTH:
        return tl.load(pointers, mask=inside & (columns[None, :] < D_LEFT), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=inside, other=0.0)
    elif D_LEFT < WIDTH:
        return tl.load(pointers, mask=columns[None, :] < D_LEFT, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend_block(
    q0, q1, m, total, u, acc0, acc1, k_base, v_base, k_offsets, v_offsets, count, scale_log2,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys; with MASKED only its first `count` exist."""
    c0 = tl.arange(0, D0)
    k0 = _load_rows(k_base, k_offsets, c0, count, MASKED, D, D0)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        c1 = tl.arange(0, D1)
        k1 = _load_rows(k_base + D0, k_offsets, c1, count, MASKED, D - D0, D1)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    if MASKED:
        exists = (tl.arange(0, BLOCK_N) < count)[None, :]
        s = tl.where(exists, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    s = s * scale_log2 - m_new[:, None]
    p = tl.exp2(s)
    shrink = tl.exp2(m - m_new)
    if ENTROPY:
        weighted = p * s
        if MASKED:
            weighted = tl.where(exists, weighted, 0.0)
        u = shrink * (u + (m - m_new) * total) + tl.sum(weighted, 1)
    total = shrink * total + tl.sum(p, 1)
    v0 = _load_rows(v_base, v_offsets, c0, count, MASKED, D, D0)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = _load_rows(v_base + D0, v_offsets, c1, count, MASKED, D - D0, D1)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
    return m_new, total, u, acc0, acc1


@triton.jit
def _attend_piece(
    q0, q1, m, total, u, acc0, acc1, k_base, v_base, k_stride, v_stride, first, last, scale_log2,
    ENTROPY: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys first..last-1 of one piece: whole blocks without masks, then what is left."""
    j = tl.arange(0, BLOCK_N)
    k_offsets = j * k_stride
    v_offsets = j * v_stride
    whole = first + (last - first) // BLOCK_N * BLOCK_N
    for start in range(first, whole, BLOCK_N):
        m, total, u, acc0, acc1 = _attend_block(
            q0, q1, m, total, u, acc0, acc1,
            k_base + tl.cast(start, tl.int64) * k_stride, v_base + tl.cast(start, tl.int64) * v_stride,
            k_offsets, v_offsets, BLOCK_N, scale_log2, False, ENTROPY, D, D0, D1, BLOCK_N,
        )  # fmt: skip
    if whole < last:
        m, total, u, acc0, acc1 = _attend_block(
            q0, q1, m, total, u, acc0, acc1,
            k_base + tl.cast(whole, tl.int64) * k_stride, v_base + tl.cast(whole, tl.int64) * v_stride,
            k_offsets, v_offsets, last - whole, scale_log2, True, ENTROPY, D, D0, D1, BLOCK_N,
        )  # fmt: skip
    return m, total, u, acc0, acc1


_SIZES = ["n_queries", "n_past", "n_new", "rows", "heads", "keys_per_split"]
_STRIDES = [f"{name}_{axis}8" for name in ("q", "past_k", "past_v", "new_k", "new_v") for axis in ("token", "row")]


@triton.jit(do_not_specialize=["scale_log2", *_SIZES, *_STRIDES])
def attention_kernel(
    q, past_k, past_v, new_k, new_v, out, entropy, lse, stats,
    scale_log2, n_queries, n_past, n_new, rows, heads, keys_per_split,
    q_token8, q_row8, past_k_token8, past_k_row8, past_v_token8, past_v_row8,
    new_k_token8, new_k_row8, new_v_token8, new_v_row8,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(n_queries / BLOCK_M), rows * heads, splits). Tensors [tokens, rows, heads, D], heads and D dense.

    SPLIT False: out [n,r,h,D] in q's dtype, entropy [r,h,n] if ENTROPY, lse [r,h,n] if LSE (fp32, nats).
    SPLIT True: out is fp32 [splits,n,r,h,D], not divided by l; stats fp32 [3,splits,n,r,h] holds m, l, u (base 2).
    """
    row_head = tl.program_id(1)
    row = (row_head // heads).to(tl.int64)
    head = row_head % heads
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = n < n_queries
    c0 = tl.arange(0, D0)

    q_base = q + row * (q_row8 * 8) + head * D + tl.program_id(0).to(tl.int64) * BLOCK_M * (q_token8 * 8)
    q_offsets = tl.arange(0, BLOCK_M) * (q_token8 * 8)
    left = n_queries - tl.program_id(0) * BLOCK_M
    q0 = _load_rows(q_base, q_offsets, c0, left, True, D, D0)
    m = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        q1 = _load_rows(q_base + D0, q_offsets, c1, left, True, D - D0, D1)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    else:  # carried through unused
        q1 = q0
        acc1 = m

    first = 0
    last = n_past + n_new
    if SPLIT:
        first = tl.program_id(2) * keys_per_split
        last = tl.minimum(last, first + keys_per_split)
    m, total, u, acc0, acc1 = _attend_piece(
        q0, q1, m, total, u, acc0, acc1,
        past_k + row * (past_k_row8 * 8) + head * D, past_v + row * (past_v_row8 * 8) + head * D,
        past_k_token8 * 8, past_v_token8 * 8, tl.minimum(first, n_past), tl.minimum(last, n_past),
        scale_log2, ENTROPY, D, D0, D1, BLOCK_N,
    )  # fmt: skip
    m, total, u, acc0, acc1 = _attend_piece(
        q0, q1, m, total, u, acc0, acc1,
        new_k + row * (new_k_row8 * 8) + head * D, new_v + row * (new_v_row8 * 8) + head * D,
        new_k_token8 * 8, new_v_token8 * 8, tl.maximum(first - n_past, 0), tl.maximum(last - n_past, 0),
        scale_log2, ENTROPY, D, D0, D1, BLOCK_N,
    )  # fmt: skip

    item = (n.to(tl.int64) * rows + row) * heads + head
    if SPLIT:
        items = n_queries.to(tl.int64) * rows * heads
        item += tl.program_id(2) * items
        splits_items = tl.num_programs(2) * items
        tl.store(stats + item, m, mask=present)
        tl.store(stats + splits_items + item, total, mask=present)
        tl.store(stats + 2 * splits_items + item, u, mask=present)
    else:
        inverse = 1.0 / total
        acc0 = acc0 * inverse[:, None]
        if D1 > 0:
            acc1 = acc1 * inverse[:, None]
        plane = (row * heads + head) * n_queries + n
        log2_total = tl.log2(total)
        if ENTROPY:
            tl.store(entropy + plane, _LN2 * (log2_total - u * inverse), mask=present)
        if LSE:
            tl.store(lse + plane, _LN2 * (m + log2_total), mask=present)
    out_rows = out + item[:, None] * D
    tl.store(out_rows + c0[None, :], acc0.to(out.dtype.element_ty), mask=present[:, None] & (c0[None, :] < D))
    if D1 > 0:
        tl.store(
            out_rows + D0 + c1[None, :], acc1.to(out.dtype.element_ty), mask=present[:, None] & (c1[None, :] < D - D0)
        )


@triton.jit(do_not_specialize=["n_queries", "rows", "heads", "splits", "head_dim8"])
def merge_kernel(
    parts, stats, out, entropy, lse, n_queries, rows, heads, splits, head_dim8,
    D_PAD: tl.constexpr, HEADS_PAD: tl.constexpr, ENTROPY: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Grid (n_queries, rows): joins the splits of all heads of one token.

    parts [splits,n,r,h,D] and stats [3,splits,n,r,h] as attention_kernel writes them.
    ENTROPY 0 none, 1 mean over heads -> entropy [r,n], 2 per head -> entropy [r,h,n].
    """
    n = tl.program_id(0)
    row = tl.program_id(1)
    head_dim = head_dim8 * 8
    h = tl.arange(0, HEADS_PAD)
    d = tl.arange(0, D_PAD)
    exists = h < heads
    items = n_queries.to(tl.int64) * rows * heads
    item = (n.to(tl.int64) * rows + row) * heads + h
    m = tl.full([HEADS_PAD], _LOWEST, tl.float32)
    for split in range(splits):
        m = tl.maximum(m, tl.load(stats + split * items + item, mask=exists, other=_LOWEST))
    total = tl.zeros([HEADS_PAD], tl.float32)
    u = tl.zeros([HEADS_PAD], tl.float32)
    acc = tl.zeros([HEADS_PAD, D_PAD], tl.float32)
    inside = exists[:, None] & (d[None, :] < head_dim)
    for split in range(splits):
        at = split * items + item
        below = tl.load(stats + at, mask=exists, other=_LOWEST) - m
        weight = tl.exp2(below)
        part_total = tl.load(stats + splits * items + at, mask=exists, other=1.0)
        total += weight * part_total
        u += weight * (tl.load(stats + 2 * splits * items + at, mask=exists, other=0.0) + below * part_total)
        acc += weight[:, None] * tl.load(parts + at[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
    rows_out = out + item[:, None] * head_dim + d[None, :]
    tl.store(rows_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    log2_total = tl.log2(total)
    plane = (row.to(tl.int64) * heads + h) * n_queries + n
    if ENTROPY > 0:
        nats = tl.where(exists, _LN2 * (log2_total - u / total), 0.0)
        if ENTROPY == 1:
            tl.store(entropy + row.to(tl.int64) * n_queries + n, tl.sum(nats, 0) / heads)
        else:
            tl.store(entropy + plane, nats, mask=exists)
    if LSE:
        tl.store(lse + plane, _LN2 * (m + log2_total), mask=exists)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def mean_heads_kernel(per_head, mean, n_queries, heads, HEADS_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (ceil(n_queries / BLOCK), rows): per_head [r,h,n] -> mean [r,n], always summed in the same order."""
    h = tl.arange(0, HEADS_PAD)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = (h < heads)[:, None] & (n < n_queries)[None, :]
    values = tl.load(per_head + (row * heads + h[:, None]) * n_queries + n[None, :], mask=inside, other=0.0)
    tl.store(mean + row * n_queries + n, tl.sum(values, 0) / heads, mask=n < n_queries)


@triton.jit(do_not_specialize=["n_tokens", "keep"])
def select_kernel(entropy, indices, n_tokens, keep, BLOCK: tl.constexpr):
    """Grid (images,): indices [B,keep] of the `keep` lowest of entropy [B,n_tokens], n_tokens <= BLOCK.

    The keep-th smallest value is found bit pair by bit pair on keys that order as the floats do; ties are then
    taken from the left, and a prefix sum gives every kept token its place. No sort, no atomics, no host.
    """
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(entropy + image * n_tokens + i, mask=i < n_tokens, other=float("inf"))
    value = value + 0.0  # -0 and +0 are one value
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(value == value, key, 0xFFFFFFFE)  # NaN: behind everything that is a token,
    key = tl.where(i < n_tokens, key, 0xFFFFFFFF)  # and before what is none

    # Invariant: the keep-th smallest key begins with the bits of `prefix`. Three counts travel in one integer.
    prefix = tl.full([], 0, tl.uint32)
    for step in tl.static_range(16):
        unit = 1 << (30 - 2 * step)
        one = (key < prefix + unit).to(tl.int64)
        two = (key < prefix + 2 * unit).to(tl.int64)
        three = (key < prefix + 3 * unit).to(tl.int64)
        counts = tl.sum(one + (two << 20) + (three << 40), 0)
        digit = ((counts & 0xFFFFF) < keep).to(tl.uint32)
        digit += (((counts >> 20) & 0xFFFFF) < keep).to(tl.uint32)
        digit += ((counts >> 40) < keep).to(tl.uint32)
        prefix += digit * unit

    below = key < prefix
    equal = key == prefix
    open_places = keep - tl.sum(below.to(tl.int32), 0)
    equal_before = tl.cumsum(equal.to(tl.int32), 0) - equal.to(tl.int32)
    kept = below | (equal & (equal_before < open_places))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices + image * keep + place, i, mask=kept)


@triton.jit(do_not_specialize=["n_tokens", "rows", "images", "keep", "width_units"])
def gather_kernel(
    x, indices, kept, n_tokens, rows, images, keep, width_units, UNIT: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid (keep * rows, ceil(C / BLOCK_C)): kept[k,r] = x[indices[r % images, k], r], C = width_units * UNIT."""
    width = width_units * UNIT
    item = tl.program_id(0)
    row = item % rows
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(indices + (row % images) * keep + item // rows)
    # An index outside the scale reads nothing and leaves NaN, which is seen; it never reads foreign memory.
    valid = (token >= 0) & (token < n_tokens)
    source = x + (token.to(tl.int64) * rows + row) * width
    values = tl.load(source + c, mask=(c < width) & valid, other=float("nan"))
    tl.store(kept + item.to(tl.int64) * width + c, values, mask=c < width)


@triton.jit(
    do_not_specialize=[
        "rows", "images", "keep", "width_units", "grid_h", "grid_w", "cache_h", "cache_w", "span_h", "span_w",
    ]
)  # fmt: skip
def restore_kernel(
    x, kept, indices, cache, y, rows, images, keep, width_units, grid_h, grid_w, cache_h, cache_w, span_h, span_w,
    CACHE: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Grid (tokens * rows, ceil(C / BLOCK_C)): every output row is written once, from what it needs.

    A kept token takes its row of `kept`; any other x, plus the mean of the cache cells under it. CACHE: 0 none, 1 at
    most 2 x 2 cells (enlarging), 2 up to span_h x span_w. `indices` ascends: one load of every (keep / SAMPLES)-th
    entry and one of those behind it tell whether and where a token is in it, so keep is at most SAMPLES^2.
    """
    width = width_units * UNIT
    item = tl.program_id(0)
    n = item // rows
    row = item % rows
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = c < width
    at = item.to(tl.int64) * width + c

    entries = indices + (row % images) * keep
    beyond = 0x7FFFFFFF
    step = (keep + SAMPLES - 1) // SAMPLES
    s = tl.arange(0, SAMPLES)
    sampled = tl.load(entries + s * step, mask=s * step < keep, other=beyond)
    start = tl.maximum(tl.sum((sampled <= n).to(tl.int32), 0) - 1, 0) * step
    near = tl.load(entries + start + s, mask=(s < step) & (start + s < keep), other=beyond)

    if tl.sum((near == n).to(tl.int32), 0) > 0:
        place = start + tl.sum((near < n).to(tl.int32), 0)
        values = tl.load(kept + (place.to(tl.int64) * rows + row) * width + c, mask=column, other=0.0)
    else:
        values = tl.load(x + at, mask=column, other=0.0)
        if CACHE > 0:
            i = n // grid_w
            j = n % grid_w
            top = i * cache_h // grid_h
            left = j * cache_w // grid_w
            height = ((i + 1) * cache_h + grid_h - 1) // grid_h - top
            breadth = ((j + 1) * cache_w + grid_w - 1) // grid_w - left
            corner = cache + ((top * cache_w + left).to(tl.int64) * rows + row) * width + c
            right = rows.to(tl.int64) * width
            down = right * cache_w
            delta = tl.zeros([BLOCK_C], tl.float32)
            if CACHE == 1:  # four independent loads in flight
                delta += tl.load(corner, mask=column, other=0.0).to(tl.float32)
                delta += tl.load(corner + right, mask=column & (breadth > 1), other=0.0).to(tl.float32)
                delta += tl.load(corner + down, mask=column & (height > 1), other=0.0).to(tl.float32)
                both = column & (breadth > 1) & (height > 1)
                delta += tl.load(corner + down + right, mask=both, other=0.0).to(tl.float32)
            else:
                for a in range(span_h):
                    for b in range(span_w):
                        used = column & (a < height) & (b < breadth)
                        delta += tl.load(corner + a * down + b * right, mask=used, other=0.0).to(tl.float32)
            share = 1.0 / (height * breadth).to(tl.float32)
            values = (values.to(tl.float32) + delta * share).to(x.dtype.element_ty)
    tl.store(y + at, values, mask=column)
