"""The mathematics of the op: contract, float64 oracle, kernels, ahead-of-time cubins, torch custom ops.

`contract`, `tuning` and `loader` import no torch, so attributes are resolved on first use (PEP 562):

    from toprovar.kernels import entropy_attention
    out, entropy, _ = entropy_attention(q, past_k, past_v, new_k, new_v, scale=1.0)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import (
        EntropyAttentionOutput,
        entropy_attention,
        gather_tokens,
        restore_tokens,
        scatter_tokens,
        select_tokens,
    )
    from .oracle import area_matrix

__all__ = [
    "EntropyAttentionOutput",
    "area_matrix",
    "entropy_attention",
    "gather_tokens",
    "restore_tokens",
    "scatter_tokens",
    "select_tokens",
]

_HOME = {name: "ops" for name in __all__} | {"area_matrix": "oracle"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'toprovar.kernels' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
