"""Fused memory-bound kernels of a transformer block and of a convolutional decoder (Triton).

The matrix products and attention of a scale are bound by arithmetic; everything between them only moves bytes, so
each of these kernels reads its inputs once and writes its outputs once:

``residual_norm``     x += gamma * branch, then LayerNorm and modulation of the new x for the next branch
``add_parts``         sum of the parts of a product, its bias and GELU
``qk_norm_rope``      split of a QKV product: L2 norm of q and k, head multiplier, rotary embedding; v copied
``text_attention``    attention to the text's keys, a few dozen to a few hundred, with padding masked
``text_softmax``      softmax of every head's scores of the text
``group_norm_silu``   GroupNorm and SiLU of channels-last activations, with the bias of the convolution before it
``add_bias``          sum of two channels-last activations and the bias of the convolution that made the first
``interleave``        the four phases of a convolution behind a doubling of the picture, put in their places
``embed_words``       the next scale's input from its words, for all rows of the batch
``draw_bits``         guidance, noise and the draw of a scale's bits: `toprovar.profiles.noise`, number for number

They compute in fp32 whatever the tensors are. Those in front of a matrix product take its weights as `following` and ask for
them ahead (`toprovar.kernels.linear`). The PyTorch modules in `toprovar.backbones` are their reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear import THIN_ROWS, ahead, launch_options, overlaps, prefetch

__all__ = [
    "add_bias",
    "add_parts",
    "draw_bits",
    "embed_words",
    "group_norm_silu",
    "interleave",
    "qk_norm_rope",
    "residual_norm",
    "text_attention",
    "text_softmax",
]


_LOG2_E = 1.4426950408889634


@triton.jit
def _added(P, at, ok, BIAS, bias_at, stride, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """fp32 sum of the parts of a product, and its bias."""
    total = tl.load(P + at, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(P + part * stride + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(BIAS + bias_at, mask=ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def _residual_norm(
    X,
    BRANCH,
    BIAS,
    GAMMA,
    SCALE,
    SHIFT,
    NORMED,
    FOLLOWING,
    R,
    tokens,
    following_bytes,
    eps,
    part_stride,
    gamma_row,
    modulation_row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if AHEAD:
        prefetch(FOLLOWING, following_bytes, tl.num_programs(0))
        if tl.program_id(0) >= tokens:
            return
    if OVERLAP:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    row = token % R
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(X + token * C + c, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        y = _added(BRANCH, token * C + c, inside, BIAS, c, part_stride, PARTS, HAS_BIAS)
        if HAS_GAMMA:
            y = y * tl.load(GAMMA + row * gamma_row + c, mask=inside, other=0.0).to(tl.float32)
        x = x + y
        if OVERLAP and not EARLY:
            gdc_launch_dependents()
        tl.store(X + token * C + c, x.to(X.dtype.element_ty), mask=inside)
    if HAS_NORM:
        mean = tl.sum(x, 0) / C
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / C
        scale = tl.load(SCALE + row * modulation_row + c, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(SHIFT + row * modulation_row + c, mask=inside, other=0.0).to(tl.float32)
        if ONE_PLUS:
            scale = scale + 1.0
        y = centred * tl.rsqrt(variance + eps) * scale + shift
        tl.store(NORMED + token * C + c, y.to(NORMED.dtype.element_ty), mask=inside)


def residual_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    affine: bool = False,
    eps: float = 1e-6,
    following: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x += gamma * (branch + bias)`` in place, and ``LayerNorm(x) * (1 + scale) + shift`` of the result.

    Args:
        x: ``[N, R, C]`` residual stream, contiguous; written in place when a branch is given.
        branch: ``[N, R, C]`` output of the last branch, or fp32 parts of it ``[parts, N, R, C]`` to be added up, or None.
        gamma: ``[R, C]`` gate of the branch (rows may be strided), or None for 1.
        scale, shift: ``[R, C]`` modulation, or ``[C]`` when ``affine``; None skips the norm.
        bias: ``[C]`` that the branch still lacks, or None.
        dtype: of the normed output; x's when None.
        affine: multiply by ``scale`` rather than ``1 + scale`` (a LayerNorm with weight and bias).
        following: weights of the product behind.

    Returns:
        (x, normed ``[N, R, C]`` or None).
    """
    n, rows, width = x.shape
    norm = scale is not None
    normed = torch.empty((n, rows, width), dtype=dtype or x.dtype, device=x.device) if norm else None
    if n == 0:
        return x, normed
    parts = 0 if branch is None else branch.shape[0] if branch.dim() == 4 else 1
    overlap = overlaps(x)
    following_bytes, programs = ahead(n * rows, following)
    _residual_norm[(max(n * rows, programs),)](
        x,
        x if branch is None else branch,
        x if bias is None else bias,
        x if gamma is None else gamma,
        x if scale is None else scale,
        x if shift is None else shift,
        x if normed is None else normed,
        x if following is None else following,
        rows,
        n * rows,
        following_bytes,
        eps,
        n * rows * width,
        0 if gamma is None else gamma.stride(0),
        0 if (scale is None or affine) else scale.stride(0),
        C=width,
        BLOCK=triton.next_power_of_2(width),
        PARTS=parts,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_NORM=norm,
        ONE_PLUS=not affine,
        AHEAD=following_bytes > 0,
        EARLY=n * rows <= THIN_ROWS,
        OVERLAP=overlap,
        # Few rows leave most of the GPU idle: more warps shorten the wait for each.
        num_warps=4 if width <= 2048 and n * rows > 128 else 8,
        **launch_options(overlap),
    )
    return x, normed


@triton.jit
def _qk_norm_rope(
    QKV,
    BIAS,
    MULTIPLIER,
    COS,
    SIN,
    INDICES,
    Q,
    K,
    V,
    FOLLOWING,
    R,
    tokens,
    following_bytes,
    images,
    keep,
    part_stride,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROPE: tl.constexpr,
    GATHERED: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if AHEAD:
        prefetch(FOLLOWING, following_bytes, tl.num_programs(0))
        if tl.program_id(0) >= tokens:
            return
    if OVERLAP:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = token // R
    h = tl.arange(0, HEADS)
    d = tl.arange(0, 2 * HALF)
    ok = (h < H)[:, None] & (d < D)[None, :]
    at = h[:, None] * D + d[None, :]
    base = token * (3 * H * D)
    if ROPE:
        p = tl.arange(0, HALF)
        position = n
        if GATHERED:
            position = tl.load(INDICES + token % R % images * keep + n).to(tl.int64)
        angle = position * (D // 2) + p
        cos = tl.load(COS + angle, mask=p < D // 2, other=1.0)[None, :]
        sin = tl.load(SIN + angle, mask=p < D // 2, other=0.0)[None, :]
    for part in tl.static_range(2):
        x = _added(QKV, base + part * H * D + at, ok, BIAS, part * H * D + at, part_stride, PARTS, HAS_BIAS)
        if NORMALISE:
            # torch.nn.functional.normalize: x / max(|x|, 1e-12)
            inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
            if part == 0:
                inverse = inverse * tl.load(MULTIPLIER + h, mask=h < H, other=0.0)
            x = x * inverse[:, None]
        if ROPE:
            even, odd = tl.split(tl.reshape(x, [HEADS, HALF, 2]))
            x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, 2 * HALF])
        OUT = Q if part == 0 else K
        tl.store(OUT + token * (H * D) + at, x.to(OUT.dtype.element_ty), mask=ok)
    if OVERLAP and not EARLY:
        gdc_launch_dependents()
    v = _added(QKV, base + 2 * H * D + at, ok, BIAS, 2 * H * D + at, part_stride, PARTS, HAS_BIAS)
    tl.store(V + token * (H * D) + at, v.to(V.dtype.element_ty), mask=ok)


def qk_norm_rope(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    following: torch.Tensor | None = None,
) -> None:
    """Writes q, k, v (k and v straight into the cache) from one QKV product.

    Args:
        qkv: ``[N, R, 3, H, D]`` contiguous, or fp32 parts of it ``[parts, N, R, 3, H, D]`` to be added up.
        q, k, v: ``[N, R, H, D]`` contiguous, written.
        bias: ``[3 H D]`` that the product still lacks, or None.
        multiplier: ``[H]`` fp32 factor of q after the L2 norm of q and k (cosine attention); None: no norm.
        cos, sin: ``[N', 1, D / 2]`` fp32 of interleaved pairs, N' = N without indices; None: no rotation.
        indices: ``[B, N]`` int32: token n of row r stands at ``indices[r % B, n]`` of the N'; None: where it is.
        following: weights of the product behind attention.
    """
    parts = qkv.shape[0] if qkv.dim() == 6 else 1
    n, rows, three, heads, dim = qkv.shape[-5:]
    if three != 3 or not qkv.is_contiguous():
        raise ValueError(f"qkv is [N, R, 3, H, D] and contiguous; found {tuple(qkv.shape)}")
    if n == 0:
        return
    overlap = overlaps(qkv)
    following_bytes, programs = ahead(n * rows, following)
    _qk_norm_rope[(max(n * rows, programs),)](
        qkv,
        qkv if bias is None else bias,
        qkv if multiplier is None else multiplier,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        qkv if indices is None else indices,
        q,
        k,
        v,
        qkv if following is None else following,
        rows,
        n * rows,
        following_bytes,
        1 if indices is None else indices.shape[0],
        n,
        qkv.stride(0) if parts > 1 else 0,
        H=heads,
        HEADS=triton.next_power_of_2(heads),
        D=dim,
        HALF=triton.next_power_of_2(dim // 2),
        PARTS=parts,
        HAS_BIAS=bias is not None,
        NORMALISE=multiplier is not None,
        ROPE=cos is not None,
        GATHERED=indices is not None,
        AHEAD=following_bytes > 0,
        EARLY=n * rows <= THIN_ROWS,
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )


@triton.jit
def _add_parts(
    P,
    BIAS,
    Y,
    FOLLOWING,
    size,
    following_bytes,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if AHEAD:
        prefetch(FOLLOWING, following_bytes, tl.num_programs(0))
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    y = _added(P, at, inside, BIAS, at % N, size, PARTS, True)
    if GELU:  # y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


def add_parts(
    parts: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    *,
    gelu: bool = False,
    following: torch.Tensor | None = None,
) -> torch.Tensor:
    """A product of few rows from its parts.

    Args:
        parts: ``[parts, M, N]`` fp32, of `thin_linear`.
        bias: ``[N]``.
        dtype: of the result.
        gelu: the tanh form of GELU of it.
        following: weights of the product behind.

    Returns: ``[M, N]``.
    """
    count, rows, width = parts.shape
    y = torch.empty((rows, width), dtype=dtype, device=parts.device)
    overlap = overlaps(parts)
    following_bytes, programs = ahead(rows, following)
    block = 256
    _add_parts[(max(triton.cdiv(y.numel(), block), programs),)](
        parts,
        bias,
        y,
        parts if following is None else following,
        y.numel(),
        following_bytes,
        N=width,
        PARTS=count,
        GELU=gelu,
        BLOCK=block,
        AHEAD=following_bytes > 0,
        OVERLAP=overlap,
        num_warps=2,
        **launch_options(overlap),
    )
    return y


@triton.jit
def _text_attention(
    Q,
    K,
    V,
    BIAS,
    OUT,
    FOLLOWING,
    N,
    programs,
    following_bytes,
    scale,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if AHEAD:
        prefetch(FOLLOWING, following_bytes, tl.num_programs(0))
        if tl.program_id(0) >= programs:
            return
    row_head = tl.program_id(0) % (ROWS * HEADS)
    n = tl.program_id(0) // (ROWS * HEADS) * QUERIES + tl.arange(0, QUERIES)
    t = tl.arange(0, KEYS)
    d = tl.arange(0, WIDE)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = n.to(tl.int64)[:, None] * (ROWS * HEADS * D) + row_head * D + d[None, :]
    of_key = t[:, None] * (ROWS * HEADS * D) + row_head * D + d[None, :]
    bias_row = BIAS + row_head // HEADS * T
    # The text is there since the picture began; only q is of the kernel before.
    there = (t < T)[:, None] & (d < D)[None, :]
    k = tl.load(K + of_key, mask=there, other=0.0)
    v = tl.load(V + of_key, mask=there, other=0.0)
    bias = tl.load(bias_row + t, mask=t < T, other=float("-inf"))
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    q = tl.load(Q + at, mask=inside, other=0.0)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDE], tl.float32)
    for start in range(0, T, KEYS):
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :] * 1.4426950408889634  # log2 e
        above = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = above
        if start + KEYS < T:
            left = start + KEYS + t < T
            there = left[:, None] & (d < D)[None, :]
            next_keys = of_key + (start + KEYS) * (ROWS * HEADS * D)
            k = tl.load(K + next_keys, mask=there, other=0.0)
            v = tl.load(V + next_keys, mask=there, other=0.0)
            bias = tl.load(bias_row + start + KEYS + t, mask=left, other=float("-inf"))
    tl.store(OUT + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)


def text_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    following: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of image tokens to the text with softmax scale 1/sqrt(D), as `toprovar.backbones.infinity.masked_attention`.

    Args:
        q: ``[N, R, H, D]``, contiguous.
        k, v: ``[T, R, H, D]``, contiguous, written by no kernel that may still run.
        bias: ``[R, T]`` fp32, added to the scores; finite.
        following: weights of the product behind.

    Returns: ``[N, R, H, D]``.
    """
    n, rows, heads, dim = q.shape
    tokens = k.shape[0]
    out = torch.empty_like(q)
    overlap = overlaps(q)
    following_bytes, least = ahead(n * rows, following)
    queries = 16 if n <= 16 else 64
    programs = triton.cdiv(n, queries) * rows * heads
    _text_attention[(max(programs, least),)](
        q,
        k,
        v,
        bias,
        out,
        q if following is None else following,
        n,
        programs,
        following_bytes,
        dim**-0.5 * _LOG2_E,
        T=tokens,
        HEADS=heads,
        ROWS=rows,
        D=dim,
        WIDE=max(16, triton.next_power_of_2(dim)),
        QUERIES=queries,
        KEYS=min(64, max(16, triton.next_power_of_2(tokens))),
        AHEAD=following_bytes > 0,
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return out


@triton.jit
def _text_softmax(
    SCORES,
    BIAS,
    FOLLOWING,
    N,
    tokens,
    following_bytes,
    scale,
    HEADS: tl.constexpr,
    MANY: tl.constexpr,
    T: tl.constexpr,
    KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if AHEAD:
        prefetch(FOLLOWING, following_bytes, tl.num_programs(0))
        if tl.program_id(0) >= tokens:
            return
    token = tl.program_id(0).to(tl.int64)
    h, t = tl.arange(0, MANY), tl.arange(0, KEYS)
    at = h[:, None] * T + t[None, :]
    inside = (h < HEADS)[:, None] & (t < T)[None, :]
    bias = tl.load(BIAS + token // N * (HEADS * T) + at, mask=inside, other=0.0) * 1.4426950408889634  # log2 e
    if OVERLAP:
        gdc_wait()
    scores = tl.load(SCORES + token * (HEADS * T) + at, mask=inside, other=0.0).to(tl.float32) * scale + bias
    scores = tl.where((t < T)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    tl.store(SCORES + token * (HEADS * T) + at, weights.to(SCORES.dtype.element_ty), mask=inside)


def text_softmax(
    scores: torch.Tensor, bias: torch.Tensor, heads: int, scale: float, *, following: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax of ``scale * scores + bias`` over the keys of each head, in place.

    Args:
        scores: ``[R, N, H T]`` contiguous.
        bias: ``[R, H T]`` fp32, contiguous.
        heads: H.
        following: weights of the product behind.

    Returns: `scores`.
    """
    rows, n, width = scores.shape
    overlap = overlaps(scores)
    following_bytes, least = ahead(rows * n, following)
    _text_softmax[(max(rows * n, least),)](
        scores,
        bias,
        scores if following is None else following,
        n,
        rows * n,
        following_bytes,
        scale * _LOG2_E,
        HEADS=heads,
        MANY=triton.next_power_of_2(heads),
        T=width // heads,
        KEYS=triton.next_power_of_2(width // heads),
        AHEAD=following_bytes > 0,
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return scores


@triton.jit
def _group_statistics(
    X,
    PRE_BIAS,
    PARTIAL,
    HW,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_PRE_BIAS: tl.constexpr,
):
    """Mean and sum of squared deviations of every group over one chunk of rows.

    Each channel's deviations are from its first value, so that their squares do not cancel; nothing is reduced in the loop.
    """
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    width: tl.constexpr = C // GROUPS
    c = tl.arange(0, C)
    first = part * STEPS * ROWS
    pivot = tl.load(X + (b * HW + first) * C + c).to(tl.float32)
    total = tl.zeros([ROWS, C], tl.float32)
    squares = tl.zeros([ROWS, C], tl.float32)
    for step in range(STEPS):
        r = first + step * ROWS + tl.arange(0, ROWS)
        ok = (r < HW)[:, None]
        x = tl.load(X + (b * HW + r[:, None]) * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        d = tl.where(ok, x - pivot[None, :], 0.0)
        total += d
        squares += d * d
    count = tl.minimum(HW - first, STEPS * ROWS).to(tl.float32)
    shift = tl.sum(total, 0) / count
    of_channel = pivot + shift
    if HAS_PRE_BIAS:
        of_channel += tl.load(PRE_BIAS + c).to(tl.float32)
    mean = tl.sum(tl.reshape(of_channel, [GROUPS, width]), 1) / width
    spread = tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, width]), [C])
    d = of_channel - spread
    m2 = tl.maximum(tl.sum(squares, 0) - count * shift * shift, 0.0) + count * d * d
    g = tl.arange(0, GROUPS)
    out = PARTIAL + ((b * tl.num_programs(1) + part) * 3) * GROUPS
    tl.store(out + g, mean)
    tl.store(out + GROUPS + g, tl.sum(tl.reshape(m2, [GROUPS, width]), 1))
    tl.store(out + 2 * GROUPS + g, tl.zeros([GROUPS], tl.float32) + count * width)


@triton.jit
def _group_merge(
    PARTIAL,
    WEIGHT,
    BIAS,
    PRE_BIAS,
    AFFINE,
    parts,
    eps,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SOME: tl.constexpr,
    HAS_PRE_BIAS: tl.constexpr,
):
    """All parts of a few groups at once: M2 = sum of M2_p + n_p (mean_p - mean)^2, exact and without cancellation."""
    b = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = C // GROUPS
    first = tl.program_id(1) * SOME
    part = tl.arange(0, PARTS)[:, None]
    at = PARTIAL + (b * parts + part) * 3 * GROUPS + first + tl.arange(0, SOME)[None, :]
    ok = part < parts
    part_mean = tl.load(at, mask=ok, other=0.0)
    part_m2 = tl.load(at + GROUPS, mask=ok, other=0.0)
    n = tl.load(at + 2 * GROUPS, mask=ok, other=0.0)
    count = tl.sum(n, 0)
    mean = tl.sum(n * part_mean, 0) / count
    deviation = part_mean - mean[None, :]
    m2 = tl.sum(part_m2 + n * deviation * deviation, 0)
    inverse = tl.rsqrt(m2 / count + eps)
    c = first * width + tl.arange(0, SOME * width)
    mean_c = tl.reshape(tl.broadcast_to(mean[:, None], [SOME, width]), [SOME * width])
    inverse_c = tl.reshape(tl.broadcast_to(inverse[:, None], [SOME, width]), [SOME * width])
    scale = tl.load(WEIGHT + c).to(tl.float32) * inverse_c
    if HAS_PRE_BIAS:
        mean_c -= tl.load(PRE_BIAS + c).to(tl.float32)
    tl.store(AFFINE + b * 2 * C + c, scale)
    tl.store(AFFINE + b * 2 * C + C + c, tl.load(BIAS + c).to(tl.float32) - mean_c * scale)


@triton.jit
def _affine_silu(X, AFFINE, Y, HW, C: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    at = (b * HW + r[:, None]) * C + c[None, :]
    ok = (r < HW)[:, None]
    scale = tl.load(AFFINE + b * 2 * C + c)[None, :]
    shift = tl.load(AFFINE + b * 2 * C + C + c)[None, :]
    y = tl.load(X + at, mask=ok, other=0.0).to(tl.float32) * scale + shift
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    *,
    pre_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
) -> torch.Tensor:
    """GroupNorm and SiLU of channels-last activations, two reads and one write.

    Args:
        x: ``[B, C, H, W]`` in ``torch.channels_last``; C a power of two, divisible by ``groups``.
        weight, bias: ``[C]``.
        pre_bias: ``[C]`` added to x first: the bias of a convolution that was run without it.

    Returns:
        ``[B, C, H, W]`` channels-last of x's dtype.
    """
    batch, channels, height, width = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    pixels = height * width
    rows = max(1, 4096 // channels)
    # About eight programs a multiprocessor of a large GPU, each reading a whole number of tiles.
    steps = max(1, triton.cdiv(triton.cdiv(pixels, rows), 1024))
    parts = triton.cdiv(pixels, steps * rows)
    partial = torch.empty((batch, parts, 3, groups), dtype=torch.float32, device=x.device)
    affine = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    before = weight if pre_bias is None else pre_bias
    has = pre_bias is not None
    _group_statistics[(batch, parts)](
        x, before, partial, pixels, C=channels, GROUPS=groups, ROWS=rows, STEPS=steps, HAS_PRE_BIAS=has
    )
    _group_merge[(batch, groups // 2)](
        partial,
        weight,
        bias,
        before,
        affine,
        parts,
        eps,
        PARTS=triton.next_power_of_2(parts),
        C=channels,
        GROUPS=groups,
        SOME=2,
        HAS_PRE_BIAS=has,
    )
    _affine_silu[(triton.cdiv(pixels, rows), batch)](x, affine, y, pixels, C=channels, ROWS=rows, SILU=silu)
    return y


@triton.jit
def _add_bias(A, B, BIAS, Y, total, C: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < total
    y = tl.load(A + i, mask=ok, other=0.0).to(tl.float32) + tl.load(B + i, mask=ok, other=0.0).to(tl.float32)
    y += tl.load(BIAS + i % C).to(tl.float32)
    tl.store(Y + i, y.to(Y.dtype.element_ty), mask=ok)


def add_bias(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``a + b + bias`` in one pass: a, b ``[B, C, H, W]`` channels-last, bias ``[C]``; the sum is formed in fp32."""
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    y = torch.empty_like(a, memory_format=torch.channels_last)
    total, block = a.numel(), 4096
    _add_bias[(triton.cdiv(total, block),)](a, b, bias, y, total, C=a.shape[1], BLOCK=block)
    return y


@triton.jit
def _interleave(PHASES, BIAS, Y, total, height, width, C: tl.constexpr, ROWS: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (pixel < total)[:, None]
    c = tl.arange(0, C)
    column = pixel % (2 * width)
    row = pixel // (2 * width) % (2 * height)
    image = pixel // (4 * width * height)
    below, right = row % 2, column % 2
    cell = (image * (height + 1) + row // 2 + below) * (width + 1) + column // 2 + right
    phase = 2 * below + right
    y = tl.load(PHASES + (cell * 4 + phase)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
    y += tl.load(BIAS + c).to(tl.float32)[None, :]
    tl.store(Y + pixel[:, None] * C + c[None, :], y.to(Y.dtype.element_ty), mask=ok)


def interleave(phases: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The picture of twice the size whose every second pixel is in one of four phases, plus a bias.

    Args:
        phases: ``[B, 4 C, H + 1, W + 1]`` channels-last, C a power of two: pixel (2 i + p, 2 j + q) is channels
            ``(2 p + q) C ...`` at (i + p, j + q).
        bias: ``[C]``.

    Returns: ``[B, C, 2 H, 2 W]`` channels-last of the same dtype.
    """
    batch, channels, height, width = phases.shape[0], phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    phases = phases.contiguous(memory_format=torch.channels_last)
    y = torch.empty(
        (batch, channels, 2 * height, 2 * width),
        dtype=phases.dtype,
        device=phases.device,
        memory_format=torch.channels_last,
    )
    total, rows = batch * 4 * height * width, max(1, 4096 // channels)
    _interleave[(triton.cdiv(total, rows),)](phases, bias, y, total, height, width, C=channels, ROWS=rows)
    return y


@triton.jit
def _embed_words(
    WORDS, WEIGHT, BIAS, POSITION, X, total, B, C,
    BITS: tl.constexpr, WIDE: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, WIDE)
    inside = (row < total)[:, None] & (c < C)[None, :]
    words = tl.load(
        WORDS + row[:, None] * BITS + j[None, :], mask=(row < total)[:, None] & (j < BITS)[None, :], other=0.0
    )
    weight = tl.load(WEIGHT + c[None, :] * BITS + j[:, None], mask=(c < C)[None, :] & (j < BITS)[:, None], other=0.0)
    x = tl.dot(words, weight, input_precision="ieee")
    x += (tl.load(BIAS + c, mask=c < C, other=0.0) + tl.load(POSITION + c, mask=c < C, other=0.0))[None, :]
    first = (row // B * (BRANCHES * B) + row % B).to(tl.int64)
    for branch in tl.static_range(BRANCHES):
        tl.store(X + (first + branch * B)[:, None] * C + c[None, :], x, mask=inside)


def embed_words(
    words: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, position: torch.Tensor, branches: int
) -> torch.Tensor:
    """``words W^T + bias + position`` for every image, once for each of its rows.

    Args:
        words: ``[N, B, bits]`` fp32. weight: ``[C, bits]`` fp32. bias: ``[C]`` fp32. position: fp32, C values.
        branches: rows of an image.

    Returns: ``[N, branches B, C]`` fp32.
    """
    words = words.contiguous()
    (tokens, images, bits), width = words.shape, weight.shape[0]
    x = torch.empty((tokens, branches * images, width), dtype=torch.float32, device=words.device)
    total, rows, block = tokens * images, 32, 64
    _embed_words[(triton.cdiv(total, rows), triton.cdiv(width, block))](
        words, weight, bias, position, x, total, images, width,
        BITS=bits, WIDE=max(16, triton.next_power_of_2(bits)), BRANCHES=branches, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return x


@triton.jit
def _draw_bits(
    LOGITS, SEEDS, GUIDANCE, BITS, scale, count, B, V, certain, GUIDED: tl.constexpr, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = block * 0
    if NOISE:
        words = tl.philox(tl.load(SEEDS + image), block, zero + scale, zero, zero)
    for pair in tl.static_range(2):
        i = block.to(tl.int64) * 4 + 2 * pair
        ok = i < count
        token = i // V
        rows = B * (2 if GUIDED else 1)
        at = (token * rows + image) * V + i % V
        weight = tl.load(GUIDANCE)
        off = weight * tl.load(LOGITS + at, mask=ok, other=0.0)
        on = weight * tl.load(LOGITS + at + 1, mask=ok, other=0.0)
        if GUIDED:
            weight = tl.load(GUIDANCE + 1)
            off += weight * tl.load(LOGITS + at + B * V, mask=ok, other=0.0)
            on += weight * tl.load(LOGITS + at + B * V + 1, mask=ok, other=0.0)
        difference = on - off
        drawn = difference
        if NOISE:
            u_off = ((words[2 * pair] >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
            u_on = ((words[2 * pair + 1] >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            drawn += tl.log(-tl.log(u_off)) - tl.log(-tl.log(u_on))
            drawn = tl.where(tl.sigmoid(-tl.abs(difference)) <= certain, difference, drawn)
        bit = ((image * (count // V) + token) * V + i % V) // 2
        tl.store(BITS + bit, (drawn > 0).to(tl.int32), mask=ok)


def draw_bits(
    logits: torch.Tensor, seeds: torch.Tensor, guidance: torch.Tensor, scale: int, *, top_p: float, greedy: bool = False
) -> torch.Tensor:
    """The bits of one scale as `Infinity.sample` draws them, with the noise of `toprovar.profiles.noise.scale_noise`.

    Args:
        logits: ``[N, R, V]`` fp32 contiguous; channel 2j + b is the logit of bit j being b.
        seeds: ``[B]`` int64.
        guidance: ``[2]`` fp32 weights of the conditional and the unconditional row (R = 2 B), or ``[1]``.
        scale: index of the scale.
        top_p: a bit whose lesser probability is at most 1 - top_p is not drawn; 0: every bit is.
        greedy: no bit is drawn.

    Returns: ``[B, N, V / 2]`` int32.
    """
    (tokens, _, values), images = logits.shape, seeds.shape[0]
    bits = torch.empty((images, tokens, values // 2), dtype=torch.int32, device=logits.device)
    count, block = tokens * values, 256
    _draw_bits[(triton.cdiv(count, 4 * block), images)](
        logits,
        seeds,
        guidance,
        bits,
        scale,
        count,
        images,
        values,
        1.0 - top_p if top_p > 0 else -1.0,
        GUIDED=guidance.shape[0] == 2,
        NOISE=not greedy,
        BLOCK=block,
    )
    return bits
