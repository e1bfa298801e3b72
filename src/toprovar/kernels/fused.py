"""Fused memory-bound kernels of a transformer block and of a convolutional decoder (Triton).

The matrix products and attention of a scale are bound by arithmetic; everything between them only moves bytes, so
each of these kernels reads its inputs once and writes its outputs once:

``residual_norm``     x += gamma * branch, then LayerNorm and modulation of the new x for the next branch
``qk_norm_rope``      split of a QKV product: L2 norm of q and k, head multiplier, rotary embedding; v copied
``group_norm_silu``   GroupNorm and SiLU of channels-last activations, with the bias of the convolution before it
``add_bias``          sum of two channels-last activations and the bias of the convolution that made the first
``philox_uniform``    the noise of a scale from the seeds of a batch: `toprovar.profiles.noise`, number for number

They compute in fp32 whatever the tensors are. The PyTorch modules in `toprovar.backbones` are their reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_bias", "group_norm_silu", "philox_uniform", "qk_norm_rope", "residual_norm"]


@triton.jit
def _residual_norm(
    X,
    BRANCH,
    GAMMA,
    SCALE,
    SHIFT,
    X_OUT,
    NORMED,
    R,
    eps,
    gamma_row,
    modulation_row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token % R
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(X + token * C + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        y = tl.load(BRANCH + token * C + c, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAMMA:
            y = y * tl.load(GAMMA + row * gamma_row + c, mask=inside, other=0.0).to(tl.float32)
        x = x + y
        tl.store(X_OUT + token * C + c, x.to(X_OUT.dtype.element_ty), mask=inside)
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
    dtype: torch.dtype | None = None,
    affine: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x += gamma * branch`` in place, and ``LayerNorm(x) * (1 + scale) + shift`` of the result.

    Args:
        x: ``[N, R, C]`` residual stream, contiguous; written in place when a branch is given.
        branch: ``[N, R, C]`` output of the last branch, or None.
        gamma: ``[R, C]`` gate of the branch (rows may be strided), or None for 1.
        scale, shift: ``[R, C]`` modulation, or ``[C]`` when ``affine``; None skips the norm.
        dtype: of the normed output; x's when None.
        affine: multiply by ``scale`` rather than ``1 + scale`` (a LayerNorm with weight and bias).

    Returns:
        (x, normed ``[N, R, C]`` or None).
    """
    n, rows, width = x.shape
    norm = scale is not None
    normed = torch.empty((n, rows, width), dtype=dtype or x.dtype, device=x.device) if norm else None
    if n == 0:
        return x, normed
    modulation_row = 0 if (scale is None or affine) else scale.stride(0)
    _residual_norm[(n * rows,)](
        x,
        x if branch is None else branch,
        x if gamma is None else gamma,
        x if scale is None else scale,
        x if shift is None else shift,
        x,
        x if normed is None else normed,
        rows,
        eps,
        0 if gamma is None else gamma.stride(0),
        modulation_row,
        C=width,
        BLOCK=triton.next_power_of_2(width),
        HAS_BRANCH=branch is not None,
        HAS_GAMMA=gamma is not None,
        HAS_NORM=norm,
        ONE_PLUS=not affine,
        num_warps=4 if width <= 2048 else 8,
    )
    return x, normed


@triton.jit
def _qk_norm_rope(
    QKV,
    MULTIPLIER,
    COS,
    SIN,
    Q,
    K,
    V,
    R,
    rope_rows,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = token // R
    row = token % R
    h = tl.arange(0, HEADS)
    p = tl.arange(0, HALF)
    ok = (h < H)[:, None] & (p < D // 2)[None, :]
    even = h[:, None] * D + 2 * p[None, :]
    base = QKV + token * (3 * H * D)
    if ROPE:
        angle = (n * rope_rows + row % rope_rows) * (D // 2) + p
        cos = tl.load(COS + angle, mask=p < D // 2, other=1.0)[None, :]
        sin = tl.load(SIN + angle, mask=p < D // 2, other=0.0)[None, :]
    for part in tl.static_range(2):
        a = tl.load(base + part * H * D + even, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(base + part * H * D + even + 1, mask=ok, other=0.0).to(tl.float32)
        if NORMALISE:
            # torch.nn.functional.normalize: x / max(|x|, 1e-12)
            inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(a * a + b * b, 1)), 1e-12)
            if part == 0:
                inverse = inverse * tl.load(MULTIPLIER + h, mask=h < H, other=0.0)
            a = a * inverse[:, None]
            b = b * inverse[:, None]
        if ROPE:
            a, b = a * cos - b * sin, a * sin + b * cos
        OUT = Q if part == 0 else K
        out = OUT + token * (H * D) + even
        tl.store(out, a.to(OUT.dtype.element_ty), mask=ok)
        tl.store(out + 1, b.to(OUT.dtype.element_ty), mask=ok)
    a = tl.load(base + 2 * H * D + even, mask=ok, other=0.0)
    b = tl.load(base + 2 * H * D + even + 1, mask=ok, other=0.0)
    tl.store(V + token * (H * D) + even, a.to(V.dtype.element_ty), mask=ok)
    tl.store(V + token * (H * D) + even + 1, b.to(V.dtype.element_ty), mask=ok)


def qk_norm_rope(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    multiplier: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """Writes q, k, v (k and v straight into the cache) from one QKV product.

    Args:
        qkv: ``[N, R, 3, H, D]`` contiguous.
        q, k, v: ``[N, R, H, D]`` contiguous, written.
        multiplier: ``[H]`` fp32 factor of q after the L2 norm of q and k (cosine attention); None: no norm.
        cos, sin: ``[N, 1 or R', D / 2]`` fp32 of interleaved pairs (R' divides R: row r uses r % R'); None: no rotation.
    """
    n, rows, three, heads, dim = qkv.shape
    if three != 3 or not qkv.is_contiguous():
        raise ValueError(f"qkv is [N, R, 3, H, D] and contiguous; found {tuple(qkv.shape)}")
    if n == 0:
        return
    _qk_norm_rope[(n * rows,)](
        qkv,
        qkv if multiplier is None else multiplier,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        q,
        k,
        v,
        rows,
        1 if cos is None else cos.shape[1],
        H=heads,
        HEADS=triton.next_power_of_2(heads),
        D=dim,
        HALF=triton.next_power_of_2(dim // 2),
        NORMALISE=multiplier is not None,
        ROPE=cos is not None,
        num_warps=4,
    )


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
    """Mean and sum of squared deviations of every group over one chunk of rows (Chan's merge between tiles)."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    width: tl.constexpr = C // GROUPS
    c = tl.arange(0, C)
    count = 0.0
    mean = tl.zeros([GROUPS], tl.float32)
    m2 = tl.zeros([GROUPS], tl.float32)
    for step in range(STEPS):
        start = (part * STEPS + step) * ROWS
        r = start + tl.arange(0, ROWS)
        ok = r < HW
        x = tl.load(X + (b * HW + r[:, None]) * C + c[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
        if HAS_PRE_BIAS:
            x = tl.where(ok[:, None], x + tl.load(PRE_BIAS + c).to(tl.float32)[None, :], 0.0)
        n = tl.maximum(tl.minimum(HW - start, ROWS), 0).to(tl.float32) * width
        tile_mean = tl.sum(tl.reshape(tl.sum(x, 0), [GROUPS, width]), 1) / tl.maximum(n, 1.0)
        spread = tl.reshape(tl.broadcast_to(tile_mean[:, None], [GROUPS, width]), [C])
        d = tl.where(ok[:, None], x - spread[None, :], 0.0)
        tile_m2 = tl.sum(tl.reshape(tl.sum(d * d, 0), [GROUPS, width]), 1)
        delta = tile_mean - mean
        total = tl.maximum(count + n, 1.0)
        mean += delta * (n / total)
        m2 += tile_m2 + delta * delta * (count * n / total)
        count += n
    g = tl.arange(0, GROUPS)
    out = PARTIAL + ((b * tl.num_programs(1) + part) * 3) * GROUPS
    tl.store(out + g, mean)
    tl.store(out + GROUPS + g, m2)
    tl.store(out + 2 * GROUPS + g, tl.zeros([GROUPS], tl.float32) + count)


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
    HAS_PRE_BIAS: tl.constexpr,
):
    """All parts at once: M2 = sum of M2_p + n_p (mean_p - mean)^2, exact and without cancellation."""
    b = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = C // GROUPS
    part = tl.arange(0, PARTS)[:, None]
    at = PARTIAL + (b * parts + part) * 3 * GROUPS + tl.arange(0, GROUPS)[None, :]
    ok = part < parts
    part_mean = tl.load(at, mask=ok, other=0.0)
    part_m2 = tl.load(at + GROUPS, mask=ok, other=0.0)
    n = tl.load(at + 2 * GROUPS, mask=ok, other=0.0)
    count = tl.sum(n, 0)
    mean = tl.sum(n * part_mean, 0) / count
    deviation = part_mean - mean[None, :]
    m2 = tl.sum(part_m2 + n * deviation * deviation, 0)
    inverse = tl.rsqrt(m2 / count + eps)
    c = tl.arange(0, C)
    mean_c = tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, width]), [C])
    inverse_c = tl.reshape(tl.broadcast_to(inverse[:, None], [GROUPS, width]), [C])
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
    # About two programs a multiprocessor of a large GPU, each reading a whole number of tiles.
    steps = max(1, triton.cdiv(triton.cdiv(pixels, rows), 264))
    parts = triton.cdiv(pixels, steps * rows)
    partial = torch.empty((batch, parts, 3, groups), dtype=torch.float32, device=x.device)
    affine = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    before = weight if pre_bias is None else pre_bias
    has = pre_bias is not None
    _group_statistics[(batch, parts)](
        x, before, partial, pixels, C=channels, GROUPS=groups, ROWS=rows, STEPS=steps, HAS_PRE_BIAS=has
    )
    _group_merge[(batch,)](
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
def _philox_uniform(SEEDS, OUT, scale, count, B, V, BLOCK: tl.constexpr):
    image = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(SEEDS + image)
    zero = block * 0
    words = tl.philox(seed, block, zero + scale, zero, zero)
    for lane in tl.static_range(4):
        i = block.to(tl.int64) * 4 + lane
        u = ((words[lane] >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        token = i // V
        tl.store(OUT + (token * B + image) * V + i % V, u, mask=i < count)


def philox_uniform(seeds: torch.Tensor, scale: int, tokens: int, values: int) -> torch.Tensor:
    """Uniform noise ``[N, B, V]`` fp32 of one scale: what `toprovar.profiles.noise.scale_noise` gives, on the device.

    Args:
        seeds: ``[B]`` int64.
        scale: index of the scale. tokens, values: N and V.
    """
    images, count = seeds.shape[0], tokens * values
    out = torch.empty((tokens, images, values), dtype=torch.float32, device=seeds.device)
    block = 256
    _philox_uniform[(triton.cdiv(count, 4 * block), images)](seeds, out, scale, count, images, values, BLOCK=block)
    return out
