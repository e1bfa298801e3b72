"""Lowers an exported graph (opset 18 to 20) to what the ONNX parser of TensorRT 8.6 reads (opset 17, no functions).

The parser takes a newer opset for 17 and misreads it without a word: axes that are an input of a Reduce operator are
ignored, and so are `start` and `end` of Shape (onnx-tensorrt, branch 8.6-EA, builtin_op_importers.cpp). It also prefers
a function's body to the plugin of the same name. So the graph is rewritten, and what is left is compared with the list
of operators that this parser knows.

    Reduce*   axes input -> attribute             Split     num_outputs -> equal parts, which are the default
    Shape     start, end -> Shape and Slice       Resize    attributes of 18 and 19 with their defaults -> dropped
    Gelu      -> its formula                      Cast      saturate -> dropped
    CastLike  -> Cast to the type of its model    CumSum    -> MatMul; the parser makes a loop of it
    Concat    of constants -> a constant          InstanceNormalization -> its formula; the parser makes a plugin of
    functions -> dropped: ours become plugins         it that needs cuDNN
    MatMul    of a weight and three or more axes -> of two axes; the parser repeats the weight along the others
              of one computed row -> Mul and ReduceSum; the builder's attention misreads masks (see `_one_row`)

Precondition: opset 17 to 20 of the default domain, no control flow, no bfloat16, every other node is one of our plugins.
Postcondition: opset 17, no function, only operators of the parser's list, and ONNX's checker agrees.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import TargetError
from ..kernels import contract
from ..plugins.contract_header import PLUGINS
from .engine import fix_sizes

__all__ = ["LoweringError", "OPERATORS", "OPSET", "lower", "types_of"]

OPSET = 17
_NEWEST_OPSET = 20
_IR_VERSION = 8
"""What ONNX 1.13 writes, on which the parser is built."""

OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
    Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LRN
    LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor
    """.split()
)
"""What the parser of 8.6 imports (without control flow)."""

_LONGEST_TOPK = 3840
_NEW_RESIZE_DEFAULTS: Mapping[str, Any] = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}


class LoweringError(TargetError):
    """A graph that TensorRT 8.6 cannot be given, with the node that is the reason."""


class _Lowering:
    """One graph while it is rewritten."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = _constants_of(self.graph)
        self.types = types_of(self.graph)
        values = (*self.graph.input, *self.graph.output, *self.graph.value_info)
        self.shapes = {value.name: value.type.tensor_type.shape for value in values}
        self.taken = {name for node in self.graph.node for name in node.output} | set(self.types)
        self.nodes: list[onnx.NodeProto] = []

    def name(self, stem: str) -> str:
        name, count = stem, 0
        while name in self.taken:
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name

    def constant(self, stem: str, values: Any, dtype: np.dtype[Any] | type) -> str:
        name = self.name(stem)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def add(self, op_type: str, inputs: list[str], stem: str, output: str | None = None, **attributes: Any) -> str:
        output = output or self.name(stem)
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=self.name(f"{stem}.node"), **attributes))
        return output

    def type_of(self, node: onnx.NodeProto, value: str) -> int:
        if not self.types.get(value):
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)}: the type of {value!r} is not known; export the graph again"
            )
        return self.types[value]

    def constant_of(self, node: onnx.NodeProto, value: str) -> np.ndarray[Any, Any]:
        if value not in self.constants:
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)}: {value!r} is computed at run time; opset {OPSET} takes it as "
                "an attribute, so it must be a constant: use a target with a newer parser"
            )
        return numpy_helper.to_array(self.constants[value])


def _constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    return constants


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    """ONNX types of a graph's tensors by name: those that are stated, and of constants."""
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {name: tensor.data_type for name, tensor in _constants_of(graph).items()}


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _drop(node: onnx.NodeProto, *names: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _reduce(state: _Lowering, node: onnx.NodeProto) -> None:
    if node.op_type != "ReduceSum":  # takes its axes as an input since opset 13
        attributes = _attributes(node)
        axes = [int(axis) for axis in state.constant_of(node, node.input[1])] if len(node.input) > 1 else []
        if len(node.input) > 1:
            node.input.pop()
        _drop(node, "noop_with_empty_axes")
        if axes:
            node.attribute.append(helper.make_attribute("axes", axes))
        elif attributes.get("noop_with_empty_axes"):
            raise LoweringError(f"lowering to TensorRT 8.6: {_label(node)}: reduces nothing; export the graph again")
    state.nodes.append(node)


def _shape(state: _Lowering, node: onnx.NodeProto) -> None:
    attributes = _attributes(node)
    if not attributes:
        state.nodes.append(node)
        return
    stem = node.output[0]
    whole = state.add("Shape", [node.input[0]], f"{stem}.whole")
    bounds = [
        state.constant(f"{stem}.{key}", [attributes.get(key, default)], np.int64)
        for key, default in (("start", 0), ("end", np.iinfo(np.int64).max))
    ]
    axis = state.constant(f"{stem}.axis", [0], np.int64)
    state.add("Slice", [whole, *bounds, axis], stem, output=stem)


def _gelu(state: _Lowering, node: onnx.NodeProto) -> None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), or with erf; in the order of the ONNX function."""
    approximate = _attributes(node).get("approximate", b"none")
    (x,), stem = node.input, node.output[0]
    dtype = helper.tensor_dtype_to_np_dtype(state.type_of(node, x))

    def scalar(key: str, value: float) -> str:
        return state.constant(f"{stem}.{key}", value, dtype)

    if approximate == b"tanh":
        square = state.add("Mul", [x, x], f"{stem}.square")
        cube = state.add("Mul", [square, x], f"{stem}.cube")
        small = state.add("Mul", [cube, scalar("c", 0.044715)], f"{stem}.small")
        inner = state.add("Add", [x, small], f"{stem}.inner")
        scaled = state.add("Mul", [inner, scalar("sqrt_2_pi", math.sqrt(2 / math.pi))], f"{stem}.scaled")
        curve = state.add("Tanh", [scaled], f"{stem}.tanh")
    elif approximate == b"none":
        scaled = state.add("Mul", [x, scalar("sqrt_half", math.sqrt(0.5))], f"{stem}.scaled")
        curve = state.add("Erf", [scaled], f"{stem}.erf")
    else:
        raise LoweringError(
            f"lowering to TensorRT 8.6: {_label(node)}: approximate is {approximate!r}; valid: none, tanh"
        )
    raised = state.add("Add", [curve, scalar("one", 1.0)], f"{stem}.raised")
    half = state.add("Mul", [x, scalar("half", 0.5)], f"{stem}.halved")
    state.add("Mul", [half, raised], stem, output=stem)


def _instance_normalization(state: _Lowering, node: onnx.NodeProto) -> None:
    """scale (x - mean) / sqrt(variance + epsilon) + bias, over all axes behind the channels."""
    x, scale, bias = node.input
    stem, shape = node.output[0], state.shapes.get(x)
    if shape is None or len(shape.dim) < 3:
        raise LoweringError(
            f"lowering to TensorRT 8.6: {_label(node)}: the rank of {x!r} is not known; export the graph again"
        )
    axes = list(range(2, len(shape.dim)))
    dtype = helper.tensor_dtype_to_np_dtype(state.type_of(node, x))
    channels = state.constant(f"{stem}.channels", [axis - 1 for axis in axes], np.int64)
    epsilon = state.constant(f"{stem}.epsilon", _attributes(node).get("epsilon", 1e-5), dtype)
    mean = state.add("ReduceMean", [x], f"{stem}.mean", axes=axes, keepdims=1)
    centred = state.add("Sub", [x, mean], f"{stem}.centred")
    square = state.add("Mul", [centred, centred], f"{stem}.square")
    variance = state.add("ReduceMean", [square], f"{stem}.variance", axes=axes, keepdims=1)
    raised = state.add("Add", [variance, epsilon], f"{stem}.raised")
    deviation = state.add("Sqrt", [raised], f"{stem}.deviation")
    normal = state.add("Div", [centred, deviation], f"{stem}.normal")
    factors = [state.add("Unsqueeze", [value, channels], f"{stem}.channel") for value in (scale, bias)]
    scaled = state.add("Mul", [normal, factors[0]], f"{stem}.scaled")
    state.add("Add", [scaled, factors[1]], stem, output=stem)


def _cumsum(state: _Lowering, node: onnx.NodeProto) -> None:
    """A product with a triangle of ones. TF32 keeps 11 bits of a factor, so the value goes in as two halves of its bits."""
    attributes, (x, axis_name), stem = _attributes(node), node.input, node.output[0]
    axis = int(state.constant_of(node, axis_name).reshape(-1)[0])
    shape = state.shapes.get(x)
    rank = len(shape.dim) if shape is not None else 0
    count = shape.dim[-1].dim_value if shape is not None and rank else 0
    if axis not in (-1, rank - 1) or not count or state.type_of(node, x) != onnx.TensorProto.FLOAT:
        raise LoweringError(
            f"lowering to TensorRT 8.6: {_label(node)}: sums along axis {axis} of {rank}, {count or 'an unknown number of'} "
            "values; it must be fp32 along the last axis with a known size: export the graph again"
        )
    ones = np.triu(np.ones((count, count), np.float32), 1 if attributes.get("exclusive") else 0)
    triangle = state.constant(f"{stem}.triangle", ones.T if attributes.get("reverse") else ones, np.float32)
    short = state.add("Cast", [x], f"{stem}.short", to=onnx.TensorProto.FLOAT16)
    high = state.add("Cast", [short], f"{stem}.high", to=onnx.TensorProto.FLOAT)
    low = state.add("Sub", [x, high], f"{stem}.low")
    parts = [state.add("MatMul", [part, triangle], f"{stem}.part") for part in (high, low)]
    state.add("Add", parts, stem, output=stem)


def _concat(state: _Lowering, node: onnx.NodeProto) -> None:
    """Weights that are put together in the graph: a convolution of 8.6 takes them as a constant only."""
    found = [state.constants.get(name) for name in node.input]
    known = [tensor for tensor in found if tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL]
    if len(known) < len(found):
        state.nodes.append(node)
        return
    joined = np.concatenate([numpy_helper.to_array(tensor) for tensor in known], axis=_attributes(node)["axis"])
    state.graph.initializer.append(numpy_helper.from_array(joined, node.output[0]))
    state.constants[node.output[0]] = state.graph.initializer[-1]


def _cast_like(state: _Lowering, node: onnx.NodeProto) -> None:
    value, model = node.input
    state.add("Cast", [value], node.output[0], output=node.output[0], to=state.type_of(node, model))


def _cast(state: _Lowering, node: onnx.NodeProto) -> None:
    _drop(node, "saturate")
    state.nodes.append(node)


def _split(state: _Lowering, node: onnx.NodeProto) -> None:
    if len(node.input) < 2:
        axis = _attributes(node).get("axis", 0)
        shape = state.shapes.get(node.input[0])
        size = shape.dim[axis].dim_value if shape is not None and -len(shape.dim) <= axis < len(shape.dim) else 0
        if not size or size % len(node.output):
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)}: splits {size or 'an unknown number'} into {len(node.output)}; "
                f"opset {OPSET} splits into equal parts: export the graph again with a size that is a multiple"
            )
    _drop(node, "num_outputs")
    state.nodes.append(node)


def _resize(state: _Lowering, node: onnx.NodeProto) -> None:
    attributes = _attributes(node)
    for key, default in _NEW_RESIZE_DEFAULTS.items():
        if attributes.get(key, default) != default:
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)}: {key} is {attributes[key]!r}; opset {OPSET} knows only "
                f"{default!r}: use a target with a newer parser"
            )
    if "axes" in attributes:
        raise LoweringError(f"lowering to TensorRT 8.6: {_label(node)}: has axes, which opset {OPSET} does not know")
    _drop(node, *_NEW_RESIZE_DEFAULTS)
    state.nodes.append(node)


def _matmul(state: _Lowering, node: onnx.NodeProto) -> None:
    """Rows are put together where the weight is one matrix and one axis at most is not known, so that -1 can stand for it."""
    x, weight = node.input
    shape, matrix = state.shapes.get(x), state.constants.get(weight)
    leading = list(shape.dim)[:-1] if shape is not None else []
    sizes = [dim.dim_value or -1 for dim in leading]
    if len(leading) > 1 and sizes[-1] == 1 and matrix is None:
        _one_row(state, node, axes=len(sizes) + 1)
        return
    if matrix is None or len(matrix.dims) != 2 or len(leading) < 2 or sizes.count(-1) > 1:
        state.nodes.append(node)
        return
    stem, (depth, width) = node.output[0], matrix.dims
    flat = state.constant(f"{stem}.flat", [-1, depth], np.int64)
    rows = state.add("Reshape", [x, flat], f"{stem}.rows")
    product = state.add("MatMul", [rows, weight], f"{stem}.product")
    whole = state.constant(f"{stem}.shape", [*sizes, width], np.int64)
    state.add("Reshape", [product, whole], stem, output=stem)


def _one_row(state: _Lowering, node: onnx.NodeProto, axes: int) -> None:
    """[..., 1, D] times a computed [..., D, T], as an attention with one query has it.

    8.6.0 makes one kernel of such an attention (`mha0`), which reads the mask of all rows of text but the first out of bounds:
    compute-sanitizer saw it in Infinity's `prefix`. It finds the attention by its products, whatever stands between them.
    """
    (x, other), stem = node.input, node.output[0]
    column = state.add("Transpose", [x], f"{stem}.column", perm=[*range(axes - 2), axes - 1, axes - 2])
    products = state.add("Mul", [column, other], f"{stem}.products")
    axis = state.constant(f"{stem}.axis", [-2], np.int64)
    state.add("ReduceSum", [products, axis], stem, output=stem, keepdims=1)


def _pad(state: _Lowering, node: onnx.NodeProto) -> None:
    if len(node.input) > 3:
        raise LoweringError(f"lowering to TensorRT 8.6: {_label(node)}: has axes, which opset {OPSET} does not know")
    state.nodes.append(node)


def _topk(state: _Lowering, node: onnx.NodeProto) -> None:
    k = int(state.constant_of(node, node.input[1]).reshape(-1)[0])
    if k > _LONGEST_TOPK:
        raise LoweringError(
            f"lowering to TensorRT 8.6: {_label(node)}: K is {k}; TensorRT's TopK ends at {_LONGEST_TOPK}: sample with a "
            f"top_k of {_LONGEST_TOPK} or less"
        )
    state.nodes.append(node)


_RULES: dict[str, Callable[[_Lowering, onnx.NodeProto], None]] = {
    **{name: _reduce for name in OPERATORS if name.startswith("Reduce")},
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "CumSum": _cumsum,
    "Gelu": _gelu,
    "InstanceNormalization": _instance_normalization,
    "MatMul": _matmul,
    "Pad": _pad,
    "Resize": _resize,
    "Shape": _shape,
    "Split": _split,
    "TopK": _topk,
}


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph for the parser of TensorRT 8.6; weights in files of their own stay there.

    Raises:
        LoweringError: the graph does not meet the precondition, or has something that opset 17 cannot say.
    """
    opset = _check_precondition(model)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True) if opset else model
    lowered = onnx.ModelProto()
    lowered.CopyFrom(inferred)
    state = _Lowering(lowered)
    for node in inferred.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rule = None if node.domain else _RULES.get(node.op_type)
        if rule is None:
            state.nodes.append(copy)
        else:
            rule(state, copy)
    del lowered.graph.node[:]
    lowered.graph.node.extend(state.nodes)
    del lowered.functions[:]
    del lowered.graph.value_info[:]  # of a newer opset
    del lowered.opset_import[:]
    lowered.opset_import.append(helper.make_opsetid("", OPSET))
    if any(node.domain for node in lowered.graph.node):
        lowered.opset_import.append(helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION))
    lowered.ir_version = _IR_VERSION
    _check_postcondition(lowered)
    return lowered


def _check_precondition(model: onnx.ModelProto) -> int:
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if not OPSET <= opset <= _NEWEST_OPSET:
        raise LoweringError(
            f"lowering to TensorRT 8.6: the graph has opset {opset}; valid are {OPSET} to {_NEWEST_OPSET}: export it with "
            "this version of toprovar"
        )
    plugins = {plugin.name for plugin in PLUGINS}
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise LoweringError(f"lowering to TensorRT 8.6: {_label(node)} has a graph of its own; it is not supported")
        if node.domain and (node.domain != contract.DOMAIN or node.op_type not in plugins):
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)} is of domain {node.domain!r}; valid there are our plugins: "
                f"{', '.join(sorted(plugins))}"
            )
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = [value.type.tensor_type.elem_type for value in values] + [t.data_type for t in model.graph.initializer]
    if onnx.TensorProto.BFLOAT16 in types:
        raise LoweringError(
            "lowering to TensorRT 8.6: the graph has bfloat16, which 8.6 does not know; export it with --precision fp16"
        )
    return opset


def _check_postcondition(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if not node.domain and node.op_type not in OPERATORS:
            raise LoweringError(
                f"lowering to TensorRT 8.6: {_label(node)}: its parser knows no {node.op_type}; use a newer TensorRT"
            )
    try:
        onnx.checker.check_model(_without_files(model))
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise LoweringError(f"lowering to TensorRT 8.6: left a graph that is not valid: {reason}") from error


def _without_files(model: onnx.ModelProto) -> onnx.ModelProto:
    """With weights in files of their own as inputs: the checker looks for those files in the working folder."""
    apart = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if not apart:
        return model  # may be gigabytes
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {tensor.name for tensor in apart}
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    copy.graph.input.extend(helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in apart)
    return copy


def _size(words: str) -> tuple[str, int]:
    name, _, size = words.partition("=")
    if not name or not size.isdecimal():
        raise LoweringError(f"--size {words}: give a name and a size, like R=2")
    return name, int(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m toprovar.exporter.lower86 IN.onnx OUT.onnx`."""
    parser = argparse.ArgumentParser(
        prog="python -m toprovar.exporter.lower86", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("graph", type=Path)
    parser.add_argument("out", type=Path, help="in the same folder where the graph has weights in a file of their own")
    parser.add_argument("--size", metavar="NAME=SIZE", action="append", default=[], help="state a size, such as R=2")
    given = parser.parse_args(arguments)
    try:
        model = onnx.load(str(given.graph), load_external_data=False)
        fix_sizes(model, dict(_size(words) for words in given.size))
        onnx.save(lower(model), str(given.out))
    except LoweringError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
