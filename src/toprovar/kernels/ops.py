"""The ops of `contract.py` as torch custom ops: `torch.ops.toprovar.*`, and the functions to call them by.

Every op has a fake implementation (torch.export and torch.compile pass through it as one node), a CPU implementation
and a CUDA one. None is differentiable. Wrong shapes, dtypes or devices raise `InputError`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, TargetError
from . import contract, portable

__all__ = [
    "EntropyAttentionOutput",
    "entropy_attention",
    "gather_tokens",
    "restore_tokens",
    "scatter_tokens",
    "select_tokens",
]


class EntropyAttentionOutput(NamedTuple):
    """out [N,R,H,D] in q's dtype; entropy in nats, [R,N] ("mean"), [R,H,N] ("head") or None; lse [R,H,N] or None."""

    out: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def entropy_attention(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    *,
    scale: float,
    entropy: str = "mean",
    return_lse: bool = False,
) -> EntropyAttentionOutput:
    """Attention of q over past then new keys, without mask, and the entropy of each query's distribution, in one pass.

    Args:
        q: [N,R,H,D] queries, fp16, bf16 or fp32; any subset of the scale's tokens.
        past_k, past_v: [P,R,H,D], P may be 0. new_k, new_v: [L,R,H,D].
        scale: softmax scale, p = softmax(scale * q.k). 1 for cosine attention.
        entropy: "mean" over heads, per "head", or "none". H = -sum p log p in nats over all P + L keys (paper.md 1.1).
        return_lse: also the log-sum-exp of the scores.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or no key is given.
    """
    _require_tensors("entropy_attention", q=q, past_k=past_k, past_v=past_v, new_k=new_k, new_v=new_v)
    _check_options(scale, entropy)
    out, given, lse = torch.ops.toprovar.entropy_attention.default(
        q, past_k, past_v, new_k, new_v, float(scale), entropy, bool(return_lse)
    )
    return EntropyAttentionOutput(out, None if entropy == "none" else given, lse if return_lse else None)


def select_tokens(entropy: Tensor, keep_slots: Tensor) -> Tensor:
    """The K = len(keep_slots) tokens of lowest entropy, for each image.

    Args: entropy [B,N] fp32; keep_slots [K], only its length matters (a graph carries K as a shape).
    Returns: int32 [B,K], ascending by index. Equal values: the lower index; NaN counts as the highest.
    Raises: InputError for other shapes or dtypes, K = 0 or K > N.
    """
    _require_tensors("select_tokens", entropy=entropy, keep_slots=keep_slots)
    return torch.ops.toprovar.select_tokens.default(entropy, keep_slots)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """kept[k, r] = x[indices[r % B, k], r]: x [N,R,C], indices [B,K] int32 -> [K,R,C]. Raises InputError."""
    _require_tensors("gather_tokens", x=x, indices=indices)
    return torch.ops.toprovar.gather_tokens.default(x, indices)


def scatter_tokens(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    """A copy of x [N,R,C] with the rows kept [K,R,C] written at indices [B,K]; row r uses r % B. Raises InputError."""
    _require_tensors("scatter_tokens", x=x, kept=kept, indices=indices)
    return torch.ops.toprovar.scatter_tokens.default(x, kept, indices)


def restore_tokens(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x plus the resized cache, with the kept rows written over it, in one pass.

    Args:
        x: [h*w,R,C] tokens before the span. kept: [K,R,C] their successors at indices [B,K] int32; row r uses r % B.
        cache: [hc*wc,R,C] the span's delta at the cached scale.
        rows, cols: fp32 [h,hc] and [w,wc], the matrices of the area resize (`area_matrix`).

    Returns: [h*w,R,C] in x's dtype; the sum is formed in fp32 and rounded once.
    Raises: InputError when shapes, dtypes or devices do not fit together.
    """
    _require_tensors("restore_tokens", x=x, kept=kept, indices=indices, cache=cache, rows=rows, cols=cols)
    return torch.ops.toprovar.restore_tokens.default(x, kept, indices, cache, rows, cols)


# --- checks ---------------------------------------------------------------------------------------------------------
# Sizes are compared where they are concrete (in the implementations). The fake implementations check ranks and dtypes
# only: comparing symbolic sizes there would force relations between dimensions that torch.export cannot state.


def _require_tensors(op: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{op}: {name} is a {type(value).__name__}; it must be a torch.Tensor")


def _check_options(scale: float, entropy: str) -> None:
    if entropy not in contract.ENTROPY_MODES:
        raise InputError(
            f"entropy_attention: entropy is {entropy!r}; it must be one of "
            + ", ".join(map(repr, contract.ENTROPY_MODES))
        )
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"entropy_attention: scale is {scale}; it must be a finite number above 0")


def _check_tensors(op: str, tensors: dict[str, Tensor]) -> None:
    """Ranks, dtypes and devices against the contract."""
    spec = contract.OPS[op]
    first = next(iter(tensors.values()))
    for expected in spec.inputs:
        tensor = tensors[expected.name]
        if tensor.dim() != len(expected.shape):
            raise InputError(
                f"{op}: {expected.name} has shape {list(tensor.shape)}; it must be [{','.join(expected.shape)}] "
                f"({expected.doc})"
            )
        found = str(tensor.dtype).removeprefix("torch.")
        if expected.name == "keep_slots":
            continue  # carries a length: its values are never read, wherever they are
        if expected.dtype == "T":
            wanted = str(first.dtype).removeprefix("torch.")
            if found not in contract.DTYPES:
                raise InputError(f"{op}: {expected.name} is {found}; it must be {', '.join(contract.DTYPES)}")
            if found != wanted:
                raise InputError(f"{op}: {expected.name} is {found} but {spec.inputs[0].name} is {wanted}; convert one")
        elif found != expected.dtype:
            raise InputError(f"{op}: {expected.name} is {found}; it must be {expected.dtype}")
        if tensor.device != first.device:
            raise InputError(
                f"{op}: {expected.name} is on {tensor.device} but {spec.inputs[0].name} is on {first.device}; "
                "move them to one device"
            )


def _check_equal(op: str, name: str, axes: str, found: tuple[int, ...], wanted: tuple[int, ...], why: str) -> None:
    if found != wanted:
        raise InputError(f"{op}: {name} has [{axes}] = {list(found)}; {why} asks for {list(wanted)}")


def _check_attention(
    q: Tensor, past_k: Tensor, past_v: Tensor, new_k: Tensor, new_v: Tensor, scale: float, entropy: str
) -> None:
    op = "entropy_attention"
    _check_options(scale, entropy)
    _check_tensors(op, {"q": q, "past_k": past_k, "past_v": past_v, "new_k": new_k, "new_v": new_v})
    shape = tuple(q.shape)
    if 0 in shape:
        raise InputError(f"{op}: q has shape {list(shape)}; no axis of [N,R,H,D] may be 0")
    for name, tensor in (("past_k", past_k), ("past_v", past_v), ("new_k", new_k), ("new_v", new_v)):
        _check_equal(op, name, "R,H,D", tuple(tensor.shape[1:]), shape[1:], f"q {list(shape)}")
    for name, keys, values in (("past", past_k, past_v), ("new", new_k, new_v)):
        if keys.shape[0] != values.shape[0]:
            raise InputError(
                f"{op}: {name}_k holds {keys.shape[0]} keys but {name}_v {values.shape[0]} values; they must agree"
            )
    if past_k.shape[0] + new_k.shape[0] == 0:
        raise InputError(f"{op}: no key is given (P = 0 and L = 0); a softmax needs at least one")


def _check_indices(op: str, x: Tensor, indices: Tensor) -> None:
    images, keep = indices.shape
    if 0 in x.shape or 0 in indices.shape:
        raise InputError(f"{op}: x has shape {list(x.shape)} and indices {list(indices.shape)}; no axis may be 0")
    if x.shape[1] % images:
        raise InputError(
            f"{op}: x has R = {x.shape[1]} rows, indices B = {images} images; R must be a multiple of B "
            "(row r uses r % B)"
        )
    if keep > x.shape[0]:
        raise InputError(f"{op}: indices keep K = {keep} of N = {x.shape[0]} tokens; K must not exceed N")


def _check_select(entropy: Tensor, keep_slots: Tensor) -> None:
    _check_tensors("select_tokens", {"entropy": entropy, "keep_slots": keep_slots})
    images, tokens, keep = *entropy.shape, keep_slots.shape[0]
    if images == 0 or not 1 <= keep <= tokens:
        raise InputError(
            f"select_tokens: entropy has [B,N] = {[images, tokens]} and keep_slots K = {keep}; "
            "valid is B >= 1, 1 <= K <= N"
        )


def _check_gather(x: Tensor, indices: Tensor) -> None:
    _check_tensors("gather_tokens", {"x": x, "indices": indices})
    _check_indices("gather_tokens", x, indices)


def _check_scatter(x: Tensor, kept: Tensor, indices: Tensor) -> None:
    _check_tensors("scatter_tokens", {"x": x, "kept": kept, "indices": indices})
    _check_indices("scatter_tokens", x, indices)
    wanted = (indices.shape[1], *x.shape[1:])
    _check_equal("scatter_tokens", "kept", "K,R,C", tuple(kept.shape), wanted, "indices and x")


def _check_restore(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> None:
    op = "restore_tokens"
    _check_tensors(op, {"x": x, "kept": kept, "indices": indices, "cache": cache, "rows": rows, "cols": cols})
    _check_indices(op, x, indices)
    _check_equal(op, "kept", "K,R,C", tuple(kept.shape), (indices.shape[1], *x.shape[1:]), "indices and x")
    (h, hc), (w, wc) = rows.shape, cols.shape
    if h * w != x.shape[0]:
        raise InputError(f"{op}: rows and cols make a grid of {h} x {w} = {h * w} tokens; x has N = {x.shape[0]}")
    _check_equal(op, "cache", "M,R,C", tuple(cache.shape), (hc * wc, *x.shape[1:]), f"the cached grid {hc} x {wc}")


# --- implementations ------------------------------------------------------------------------------------------------


def _attention_portable(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_attention(q, past_k, past_v, new_k, new_v, scale, entropy)
    return portable.entropy_attention(q, past_k, past_v, new_k, new_v, scale, entropy, return_lse)


def _attention_fake(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_options(scale, entropy)
    _check_tensors("entropy_attention", {"q": q, "past_k": past_k, "past_v": past_v, "new_k": new_k, "new_v": new_v})
    n, r, h, _ = q.shape
    shapes = {"none": (0,), "mean": (r, n), "head": (r, h, n)}
    lse_shape = (r, h, n) if return_lse else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(shapes[entropy], dtype=torch.float32),
        q.new_empty(lse_shape, dtype=torch.float32),
    )


def _select_portable(entropy: Tensor, keep_slots: Tensor) -> Tensor:
    _check_select(entropy, keep_slots)
    return portable.select_tokens(entropy, keep_slots.shape[0])


def _select_fake(entropy: Tensor, keep_slots: Tensor) -> Tensor:
    _check_tensors("select_tokens", {"entropy": entropy, "keep_slots": keep_slots})
    return entropy.new_empty((entropy.shape[0], keep_slots.shape[0]), dtype=torch.int32)


def _gather_portable(x: Tensor, indices: Tensor) -> Tensor:
    _check_gather(x, indices)
    return portable.gather_tokens(x, indices)


def _gather_fake(x: Tensor, indices: Tensor) -> Tensor:
    _check_tensors("gather_tokens", {"x": x, "indices": indices})
    return x.new_empty((indices.shape[1], x.shape[1], x.shape[2]))


def _scatter_portable(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    _check_scatter(x, kept, indices)
    return portable.scatter_tokens(x, kept, indices)


def _scatter_fake(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    _check_tensors("scatter_tokens", {"x": x, "kept": kept, "indices": indices})
    return x.new_empty(x.shape)


def _restore_portable(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    _check_restore(x, kept, indices, cache, rows, cols)
    return portable.restore_tokens(x, kept, indices, cache, rows, cols)


def _restore_fake(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    _check_tensors(
        "restore_tokens", {"x": x, "kept": kept, "indices": indices, "cache": cache, "rows": rows, "cols": cols}
    )
    return x.new_empty(x.shape)


# --- CUDA: the Hopper kernel where it applies, else Triton, else PyTorch ---------------------------------------------


@cache
def _kernel_module(name: str) -> ModuleType | None:
    """`launch` (needs Triton) or `hopper`, None where it is not installed. A defect inside either still raises."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name == "triton" or error.name == f"{__package__}.{name}":
            return None
        raise


def _triton(device: torch.device, head_dim: int | None = None) -> ModuleType | None:
    launch = _kernel_module("launch")
    return launch if launch is not None and launch.supports(device, head_dim) else None


def _attention_cuda(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_attention(q, past_k, past_v, new_k, new_v, scale, entropy)
    n, _, _, d = q.shape
    arguments = (q, past_k, past_v, new_k, new_v, scale, entropy, return_lse)
    hopper = _kernel_module("hopper")
    if (
        hopper is not None
        and hopper.available(q.device)
        and hopper.supports(q.dtype, d, n, past_k.shape[0] + new_k.shape[0], scale)
    ):
        try:
            out, given, lse = hopper.forward(*arguments)
        except TargetError as error:  # no CUDA compiler here
            _warn_once(f"{error}; entropy_attention runs its Triton kernel instead")
        else:
            return out, _or_empty(q, given), _or_empty(q, lse)
    return (_triton(q.device, d) or portable).entropy_attention(*arguments)


def _or_empty(q: Tensor, tensor: Tensor | None) -> Tensor:
    return q.new_empty(0, dtype=torch.float32) if tensor is None else tensor


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _select_cuda(entropy: Tensor, keep_slots: Tensor) -> Tensor:
    _check_select(entropy, keep_slots)
    launch = _triton(entropy.device) if entropy.shape[1] <= contract.MAX_SELECT_TOKENS else None
    return (launch or portable).select_tokens(entropy, keep_slots.shape[0])


def _gather_cuda(x: Tensor, indices: Tensor) -> Tensor:
    _check_gather(x, indices)
    return (_triton(x.device) or portable).gather_tokens(x, indices)


def _scatter_cuda(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    _check_scatter(x, kept, indices)
    launch = _triton(x.device)
    if launch is None or indices.shape[1] > contract.MAX_SELECT_TOKENS:
        return portable.scatter_tokens(x, kept, indices)
    return launch.restore_tokens(x, kept, indices, None, (x.shape[0], 1, 1, 1))


def _restore_cuda(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    _check_restore(x, kept, indices, cache, rows, cols)
    launch = _triton(x.device)
    if launch is None or indices.shape[1] > contract.MAX_SELECT_TOKENS:
        return portable.restore_tokens(x, kept, indices, cache, rows, cols)
    (h, hc), (w, wc) = rows.shape, cols.shape
    return launch.restore_tokens(x, kept, indices, cache, (h, w, hc, wc))


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "entropy_attention": (_attention_fake, _attention_portable, _attention_cuda),
    "select_tokens": (_select_fake, _select_portable, _select_cuda),
    "gather_tokens": (_gather_fake, _gather_portable, _gather_cuda),
    "scatter_tokens": (_scatter_fake, _scatter_portable, _scatter_cuda),
    "restore_tokens": (_restore_fake, _restore_portable, _restore_cuda),
}

_library = torch.library.Library(contract.DOMAIN, "FRAGMENT")
for _name, (_fake, _cpu, _cuda) in _IMPLEMENTATIONS.items():
    _library.define(_name + contract.OPS[_name].torch_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"{contract.DOMAIN}::{_name}", _fake, lib=_library)
