"""The ops of `kernels/contract.py` in ONNX: nodes of domain `toprovar`, and a body of standard operators for each.

An exported node carries ``plugin_namespace`` and ``plugin_version``: TensorRT takes the plugin where one is registered.
Every other runtime inlines the model-local function of the same name, written here, and computes the same numbers.
Attention without entropy has an ONNX name of its own, `CachedAttention`; inputs and attributes are the contract's.
A body is written for what runs bodies: ONNX Runtime on a CPU first, then TensorRT-RTX, whose parser takes no plugin.

Rules that hold for all bodies:

- Softmax, entropy and the restore sum are fp32 whatever the tensors are: in fp16 ``p log p`` underflows to NaN.
- The softmax scale multiplies the product, not q: ONNX Runtime fuses it into the matrix product, and products of fp16
  values stay exact where a GPU multiplies fp32 matrices in TF32.
- Every node has a name that no other function uses, because TensorRT warns about layers of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import BOOL, FLOAT, INT32, script
from onnxscript import opset20 as op
from onnxscript.values import Op, Opset

from ..errors import InputError
from ..kernels import contract

__all__ = ["OPSET", "function_protos", "translation_table"]

OPSET = 20
"""Version of the standard operators of every exported graph.

20 is the least with `Gelu` (one node for the feed-forward's activation, tanh form included), and everything that runs
our graphs knows it: ONNX Runtime since 1.17, TensorRT 10 and 11, TensorRT-RTX. 23 would add `Attention`, which gives no
entropy and which the TensorRT parser takes without past keys only. TensorRT 8.6 stops at 17.
"""

_DOMAIN = Opset(contract.DOMAIN, contract.OPSET_VERSION)

# mypy cannot read the bodies: onnxscript compiles their text, the types are ONNX tensor types.
# mypy: disable-error-code="no-untyped-def,operator,return-value,valid-type,misc,assignment"


@script(_DOMAIN, default_opset=op)
def EntropyAttention(
    q: FLOAT, past_k: FLOAT, past_v: FLOAT, new_k: FLOAT, new_v: FLOAT, scale: float, entropy: int = 1
) -> tuple[FLOAT, FLOAT]:
    """H = LSE - sum p s, with LSE = max s - log max p: ReduceLogSumExp takes far longer than two maxima.

    Milliseconds in ONNX Runtime 1.31 on two cores (1024 queries, 2130 keys, 2 rows, 4 heads of 64), idle and with
    memory shared with other work: without entropy 15 and 48, this 21 and 77, centred at max s 24 and 124, K as V 23
    and 95, LogSoftmax 21 and 102, ReduceLogSumExp 51 and more. Errors for scores of 100: 2.6e-5 nats, centred 1e-5; for
    scores of 6 all 1e-6. TensorRT computes LogSoftmax as log(softmax), infinite where p underflows. `entropy` is 1 in
    every node of this name; see `CachedAttention`.
    """
    keys = op.Transpose(op.Cast(op.Concat(past_k, new_k, axis=0), to=1), perm=[1, 2, 3, 0])
    values = op.Transpose(op.Cast(op.Concat(past_v, new_v, axis=0), to=1), perm=[1, 2, 0, 3])
    queries = op.Transpose(op.Cast(q, to=1), perm=[1, 2, 0, 3])
    scores = op.MatMul(queries, keys) * op.Constant(value_float=scale)
    p = op.Softmax(scores, axis=-1)
    out = op.CastLike(op.Transpose(op.MatMul(p, values), perm=[2, 0, 1, 3]), q)
    last = op.Constant(value_ints=[-1])
    lse = op.ReduceMax(scores, last, keepdims=0) - op.Log(op.ReduceMax(p, last, keepdims=0))
    head_entropy = lse - op.ReduceSum(p * scores, last, keepdims=0)
    mean_entropy = op.ReduceMean(head_entropy, op.Constant(value_ints=[1]), keepdims=0)
    return out, mean_entropy


@script(_DOMAIN, default_opset=op)
def CachedAttention(
    q: FLOAT, past_k: FLOAT, past_v: FLOAT, new_k: FLOAT, new_v: FLOAT, scale: float, entropy: int = 0
) -> FLOAT:
    """EntropyAttention with `entropy` 0, under a name of its own because a function has one body and all its outputs.

    A body cannot branch on an attribute. Leaving the second output of a node away is no way out either: ONNX's shape
    inference and TensorRT's parser refuse it, and ONNX Runtime computes the dead part all the same.
    """
    keys = op.Transpose(op.Cast(op.Concat(past_k, new_k, axis=0), to=1), perm=[1, 2, 3, 0])
    values = op.Transpose(op.Cast(op.Concat(past_v, new_v, axis=0), to=1), perm=[1, 2, 0, 3])
    queries = op.Transpose(op.Cast(q, to=1), perm=[1, 2, 0, 3])
    p = op.Softmax(op.MatMul(queries, keys) * op.Constant(value_float=scale), axis=-1)
    out = op.CastLike(op.Transpose(op.MatMul(p, values), perm=[2, 0, 1, 3]), q)
    return out


@script(_DOMAIN, default_opset=op)
def SelectTokens(entropy: FLOAT, keep_slots: INT32) -> INT32:
    """TopK gives ties to the lower index, as the contract wants. TensorRT's TopK stops at K = 3840."""
    undefined: BOOL = op.IsNaN(entropy)
    score = op.Where(undefined, op.Constant(value_float=3.0e38), entropy)
    keep = op.Shape(keep_slots)
    _lowest, index = op.TopK(score, keep, axis=1, largest=0, sorted=1)
    ascending, _order = op.TopK(op.Cast(index, to=6), keep, axis=1, largest=0, sorted=1)
    return ascending


@script(_DOMAIN, default_opset=op)
def GatherTokens(x: FLOAT, indices: INT32) -> FLOAT:
    """One Gather of whole rows of x seen as [N * R, C]: row indices[r % B, k] * R + r."""
    rows = op.Shape(x, start=1, end=2)
    images = op.Shape(indices, start=0, end=1)
    one = op.Constant(value_ints=[1])
    by_row = op.Tile(op.Transpose(indices, perm=[1, 0]), op.Concat(one, rows / images, axis=0))
    number = op.Cast(op.Range(op.Constant(value_int=0), op.Squeeze(rows), op.Constant(value_int=1)), to=6)
    flat_index = by_row * op.Cast(rows, to=6) + number
    flat = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), op.Shape(x, start=2, end=3), axis=0))
    return op.Gather(flat, flat_index, axis=0)


@script(_DOMAIN, default_opset=op)
def ScatterTokens(x: FLOAT, kept: FLOAT, indices: INT32) -> FLOAT:
    """One ScatterND of whole rows into x seen as [N * R, C]."""
    rows = op.Shape(x, start=1, end=2)
    images = op.Shape(indices, start=0, end=1)
    one = op.Constant(value_ints=[1])
    by_row = op.Tile(op.Transpose(indices, perm=[1, 0]), op.Concat(one, rows / images, axis=0))
    number = op.Range(op.Constant(value_int=0), op.Squeeze(rows), op.Constant(value_int=1))
    flat_index = op.Reshape(op.Cast(by_row, to=7) * rows + number, op.Constant(value_ints=[-1, 1]))
    flat_shape = op.Concat(op.Constant(value_ints=[-1]), op.Shape(x, start=2, end=3), axis=0)
    flat = op.ScatterND(op.Reshape(x, flat_shape), flat_index, op.Reshape(kept, flat_shape))
    return op.Reshape(flat, op.Shape(x))


@script(_DOMAIN, default_opset=op)
def RestoreTokens(x: FLOAT, kept: FLOAT, indices: INT32, cache: FLOAT, rows: FLOAT, cols: FLOAT) -> FLOAT:
    """x + rows . cache . cols^T on the grid in two small matrix products, rounded once; then as ScatterTokens."""
    x_rows = op.Shape(x, start=1, end=2)
    images = op.Shape(indices, start=0, end=1)
    one = op.Constant(value_ints=[1])
    any_size = op.Constant(value_ints=[-1])
    by_row = op.Tile(op.Transpose(indices, perm=[1, 0]), op.Concat(one, x_rows / images, axis=0))
    number = op.Range(op.Constant(value_int=0), op.Squeeze(x_rows), op.Constant(value_int=1))
    flat_index = op.Reshape(op.Cast(by_row, to=7) * x_rows + number, op.Constant(value_ints=[-1, 1]))
    height = op.Shape(rows, start=0, end=1)
    cached_height = op.Shape(rows, start=1, end=2)
    cached_width = op.Shape(cols, start=1, end=2)
    cached = op.Reshape(op.Cast(cache, to=1), op.Concat(cached_height, any_size, axis=0))
    tall = op.Reshape(op.MatMul(rows, cached), op.Concat(height, cached_width, any_size, axis=0))
    resized = op.Reshape(op.MatMul(cols, tall), op.Shape(x))
    restored = op.CastLike(op.Cast(x, to=1) + resized, x)
    flat_shape = op.Concat(any_size, op.Shape(x, start=2, end=3), axis=0)
    flat = op.ScatterND(op.Reshape(restored, flat_shape), flat_index, op.Reshape(kept, flat_shape))
    return op.Reshape(flat, op.Shape(x))


@dataclass(frozen=True)
class _OnnxOp:
    """One ONNX op: its contract, how many of the contract's outputs it has, and the default of attribute `entropy`."""

    spec: contract.OpSpec
    body: Any
    outputs: int

    @property
    def name(self) -> str:
        return str(self.body.name)


_OPS = {
    one.name: one
    for one in (
        _OnnxOp(contract.OPS["entropy_attention"], EntropyAttention, outputs=2),
        _OnnxOp(contract.OPS["entropy_attention"], CachedAttention, outputs=1),
        _OnnxOp(contract.OPS["select_tokens"], SelectTokens, outputs=1),
        _OnnxOp(contract.OPS["gather_tokens"], GatherTokens, outputs=1),
        _OnnxOp(contract.OPS["scatter_tokens"], ScatterTokens, outputs=1),
        _OnnxOp(contract.OPS["restore_tokens"], RestoreTokens, outputs=1),
    )
}


@cache
def function_protos() -> dict[str, onnx.FunctionProto]:
    """The model-local function of every op, by ONNX name: those of the contract, and `CachedAttention`.

    Inputs, outputs and attributes are named and ordered as in the contract.
    """
    protos = {}
    for name, onnx_op in _OPS.items():
        proto = onnx_op.body.to_function_proto()
        proto.doc_string = onnx_op.spec.doc
        # onnxscript calls an output after the variable that is returned; the contract's names go in their place.
        wanted = [tensor.name for tensor in onnx_op.spec.outputs[: onnx_op.outputs]]
        _rename_values(proto, dict(zip(proto.output, wanted, strict=True)))
        for i, node in enumerate(proto.node):
            label = f"{node.op_type}_{i}" if node.output[0].startswith("tmp") else node.output[0]
            node.name = f"{name}.{label}"
        protos[name] = proto
    return protos


def _rename_values(proto: onnx.FunctionProto, names: dict[str, str]) -> None:
    taken = {name for node in proto.node for name in node.output} | set(proto.input)
    names = {old: new for old, new in names.items() if old != new}
    names |= {new: f"{new}_" for new in names.values() if new in taken}
    for node in proto.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = names.get(value, value)
    for i, value in enumerate(proto.output):
        proto.output[i] = names.get(value, value)


def _schema(onnx_op: _OnnxOp) -> onnx.defs.OpSchema:
    """The op as ONNX sees it, so that the exporter knows how many outputs a node has and of which types."""
    schema, spec = onnx.defs.OpSchema, onnx_op.spec
    outputs = spec.outputs[: onnx_op.outputs]
    onnx_types = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32"}
    names = {dtype: f"tensor({name})" for dtype, name in onnx_types.items()}
    constraints = {"T": [names[dtype] for dtype in contract.DTYPES]} | {f"T_{dtype}": [names[dtype]] for dtype in names}
    used = {_type_name(tensor) for tensor in (*spec.inputs, *outputs)}
    attributes = [
        schema.Attribute(attribute.name, getattr(schema.AttrType, attribute.type), attribute.doc, required=False)
        for attribute in spec.attributes
    ]
    attributes += [
        schema.Attribute(name, schema.AttrType.STRING, "for the TensorRT parser", required=False)
        for name in ("plugin_namespace", "plugin_version")
    ]
    return schema(
        onnx_op.name,
        contract.DOMAIN,
        contract.OPSET_VERSION,
        doc=spec.doc,
        inputs=[schema.FormalParameter(tensor.name, _type_name(tensor)) for tensor in spec.inputs],
        outputs=[schema.FormalParameter(tensor.name, _type_name(tensor)) for tensor in outputs],
        type_constraints=[(name, types, "") for name, types in constraints.items() if name in used],
        attributes=attributes,
    )


def _type_name(tensor: contract.TensorSpec) -> str:
    return "T" if tensor.dtype == "T" else f"T_{tensor.dtype}"


def _node(name: str) -> Callable[..., Any]:
    """A plain function that makes one node: an onnxscript function in the table would be inlined, the node gone."""
    make = Op(_DOMAIN, name, _schema(_OPS[name]))
    plugin = {"plugin_namespace": contract.PLUGIN_NAMESPACE, "plugin_version": contract.PLUGIN_VERSION}

    def node(*tensors: Any, **attributes: Any) -> Any:
        return make(*tensors, **attributes, **plugin)

    return node


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` of torch.onnx.export: every `torch.ops.toprovar` op to its ONNX node."""
    from ..kernels import ops as _registered  # noqa: F401  (the torch ops exist once their module is imported)

    with_entropy, without = _node("EntropyAttention"), _node("CachedAttention")
    modes = contract.ENTROPY_MODES

    def attention(
        q: Any, past_k: Any, past_v: Any, new_k: Any, new_v: Any, scale: float, entropy: str, return_lse: bool
    ) -> Any:
        pieces = (q, past_k, past_v, new_k, new_v)
        if return_lse or entropy not in ("mean", "none"):
            raise InputError(
                f"entropy_attention(entropy={entropy!r}, return_lse={return_lse}) has no ONNX form; a graph takes "
                "entropy 'mean' or 'none' and no log-sum-exp"
            )
        # The torch op returns empty tensors for what is not asked for; a value without a producer stands for each.
        if entropy == "none":
            return without(*pieces, scale=scale, entropy=modes["none"]), ir.Value(), ir.Value()
        return *with_entropy(*pieces, scale=scale, entropy=modes["mean"]), ir.Value()

    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.toprovar.entropy_attention.default: attention}
    for spec in contract.OPS.values():
        if spec.torch_name != "entropy_attention":
            table[getattr(torch.ops.toprovar, spec.torch_name).default] = _node(spec.onnx_name)
    return table
