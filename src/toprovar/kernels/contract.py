"""The ops of toprovar, stated once and without torch: names, versions, tensors, dtypes, attributes, tolerances.

The torch registration (`ops.py`), the ONNX export, the C++ plugin header and the tests all read these tables, so that
a change here is a change everywhere. All tensors are sequence-first and contiguous in their last axis:

    N  queries, or tokens of the scale     P  past keys (may be 0)      M  tokens of the cached scale (hc * wc)
    R  rows = 2B under CFG                 L  new keys                  K  kept tokens, K <= N
    B  images                              H  heads                     D  head dim
    C  width                               h, w / hc, wc  grid of the scale / of the cached scale
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CONTRACT_VERSION",
    "DOMAIN",
    "DTYPES",
    "ENTROPY_MODES",
    "HEAD_DIMS",
    "KERNEL_REVISION",
    "MAX_HEAD_DIM",
    "MAX_SELECT_TOKENS",
    "ONNX_DTYPES",
    "OPS",
    "OPSET_VERSION",
    "PLUGIN_NAMESPACE",
    "PLUGIN_VERSION",
    "TOLERANCES",
    "AttributeSpec",
    "OpSpec",
    "TensorSpec",
    "Tolerance",
]

DOMAIN = "toprovar"
"""ONNX domain and torch namespace of every op."""
OPSET_VERSION = 1
PLUGIN_NAMESPACE = "toprovar"
PLUGIN_VERSION = "1"
"""TensorRT plugin version: raised for an incompatible change, the old creator stays registered."""
CONTRACT_VERSION = 1
"""Raised when tensors, attributes or meaning change: a cubin library or bundle of another version is refused."""
KERNEL_REVISION = 3
"""Raised when a kernel's speed or rounding changes: part of a plugin's timing-cache key and of every cubin library."""

DTYPES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Element types of the T tensors, with their size in bytes."""
ONNX_DTYPES: dict[str, int] = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}
"""onnx.TensorProto.DataType of every dtype used by an op."""

HEAD_DIMS = (64, 80, 96, 128)
"""Head dims compiled ahead of time. The torch op takes any; on a GPU multiples of 8 up to MAX_HEAD_DIM are fast."""
MAX_HEAD_DIM = 128
MAX_SELECT_TOKENS = 16384
"""Tokens that the GPU can choose from or keep (a 128 x 128 grid); PyTorch's implementation has no limit."""

ENTROPY_MODES: dict[str, int] = {"none": 0, "mean": 1, "head": 2}
"""Value of the `entropy` attribute. `head` (one value per head) is for calibration and exists in torch only."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dtype` is "T" (any of DTYPES, the same for every T of a node) or a dtype's name."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    doc: str


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of the ONNX node; `type` is "FLOAT" or "INT". `default` None: the node must carry it."""

    name: str
    type: str
    doc: str
    default: float | int | None = None
    choices: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """One op: `onnx_name` in DOMAIN for ONNX and TensorRT, `torch.ops.toprovar.<torch_name>` in torch."""

    onnx_name: str
    torch_name: str
    torch_schema: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    doc: str


_X = TensorSpec("x", "T", ("N", "R", "C"), "tokens of the scale")
_KEPT = TensorSpec("kept", "T", ("K", "R", "C"), "rows of the kept tokens, in the order of `indices`")
_INDICES = TensorSpec(
    "indices", "int32", ("B", "K"), "kept tokens of each image, ascending, each at most once; row r uses r % B"
)

OPS: dict[str, OpSpec] = {
    spec.torch_name: spec
    for spec in (
        OpSpec(
            onnx_name="EntropyAttention",
            torch_name="entropy_attention",
            torch_schema=(
                "(Tensor q, Tensor past_k, Tensor past_v, Tensor new_k, Tensor new_v, float scale, str entropy, "
                "bool return_lse) -> (Tensor out, Tensor entropy, Tensor lse)"
            ),
            inputs=(
                TensorSpec("q", "T", ("N", "R", "H", "D"), "queries, any subset of the scale's tokens"),
                TensorSpec("past_k", "T", ("P", "R", "H", "D"), "keys of earlier scales; P may be 0"),
                TensorSpec("past_v", "T", ("P", "R", "H", "D"), "values of earlier scales"),
                TensorSpec("new_k", "T", ("L", "R", "H", "D"), "keys of this scale, behind the past ones"),
                TensorSpec("new_v", "T", ("L", "R", "H", "D"), "values of this scale"),
            ),
            outputs=(
                TensorSpec("out", "T", ("N", "R", "H", "D"), "softmax(scale * q.k) v over past then new keys, no mask"),
                TensorSpec("entropy", "float32", ("R", "N"), "-sum p log p in nats over all keys, mean over heads"),
            ),
            attributes=(
                AttributeSpec("scale", "FLOAT", "softmax scale: 1 for cosine attention, else as the backbone says"),
                AttributeSpec(
                    "entropy", "INT", "0: only `out` is computed; 1: also `entropy`", 1, (("none", 0), ("mean", 1))
                ),
            ),
            doc="Attention over two pieces of keys with the entropy of every query, in one pass.",
        ),
        OpSpec(
            onnx_name="SelectTokens",
            torch_name="select_tokens",
            torch_schema="(Tensor entropy, Tensor keep_slots) -> Tensor",
            inputs=(
                TensorSpec("entropy", "float32", ("B", "N"), "score of every token; the lowest are kept"),
                TensorSpec("keep_slots", "int32", ("K",), "only its length counts: it carries K into a graph"),
            ),
            outputs=(_INDICES,),
            attributes=(),
            doc="The K lowest of N; equal values go to the lower index, NaN counts as highest; ascending by index.",
        ),
        OpSpec(
            onnx_name="GatherTokens",
            torch_name="gather_tokens",
            torch_schema="(Tensor x, Tensor indices) -> Tensor",
            inputs=(_X, _INDICES),
            outputs=(_KEPT,),
            attributes=(),
            doc="kept[k, r] = x[indices[r % B, k], r].",
        ),
        OpSpec(
            onnx_name="ScatterTokens",
            torch_name="scatter_tokens",
            torch_schema="(Tensor x, Tensor kept, Tensor indices) -> Tensor",
            inputs=(_X, _KEPT, _INDICES),
            outputs=(TensorSpec("y", "T", ("N", "R", "C"), "x with the kept rows written over it"),),
            attributes=(),
            doc="A copy of x in which token indices[r % B, k] of row r is kept[k, r].",
        ),
        OpSpec(
            onnx_name="RestoreTokens",
            torch_name="restore_tokens",
            torch_schema="(Tensor x, Tensor kept, Tensor indices, Tensor cache, Tensor rows, Tensor cols) -> Tensor",
            inputs=(
                _X,
                _KEPT,
                _INDICES,
                TensorSpec("cache", "T", ("M", "R", "C"), "branch output at the cached scale, M = hc * wc, row-major"),
                TensorSpec("rows", "float32", ("h", "hc"), "row matrix of the area resize, hc -> h"),
                TensorSpec("cols", "float32", ("w", "wc"), "column matrix of the area resize, wc -> w"),
            ),
            outputs=(TensorSpec("y", "T", ("N", "R", "C"), "kept rows as given, every other row x + resize(cache)"),),
            attributes=(),
            doc=(
                "y = x + rows . cache . cols^T on the grid, in fp32, rounded once; then the kept rows written over it. "
                "rows and cols must be the matrices of area resizing: a kernel may read no more than their shapes."
            ),
        ),
    )
}


@dataclass(frozen=True)
class Tolerance:
    """What an implementation may differ from the float64 oracle by.

    `out_relative` bounds ||out - oracle|| / ||oracle|| (Frobenius), `entropy_nats` and `lse_nats` the largest absolute
    difference. Tests ask for the larger of this and `factor` times the error of plain PyTorch in the same precision.
    """

    out_relative: float
    entropy_nats: float
    lse_nats: float
    factor: float = 2.0


TOLERANCES: dict[str, Tolerance] = {
    # out: the rounding of p and of the result, 2^-11 (fp16), 2^-8 (bf16); fp32: sums over 10^4 keys in fp32.
    # entropy, lse: scores reach 100 and are accumulated in fp32, whose last place at 100 is 8e-6; inputs are exact.
    "float16": Tolerance(out_relative=1e-3, entropy_nats=2e-3, lse_nats=1e-3),
    "bfloat16": Tolerance(out_relative=8e-3, entropy_nats=2e-3, lse_nats=1e-3),
    "float32": Tolerance(out_relative=1e-5, entropy_nats=2e-4, lse_nats=2e-4),
}
