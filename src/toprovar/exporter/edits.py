"""Edits of an ONNX graph in memory, each with a precondition and a postcondition.

torch.onnx gives a correct graph with names of its own, weights that are transposed at run time, and traces of the
source code. These edits make it the graph that is shipped. An edit leaves a graph that it has checked, or raises; what
it raises is a defect of toprovar (or news from PyTorch), never a user's mistake.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import onnx
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

__all__ = [
    "BLOCK",
    "BlockTemplate",
    "GraphEditError",
    "PostconditionError",
    "PreconditionError",
    "attach_functions",
    "drop_broadcast_expands",
    "drop_unused",
    "expand_blocks",
    "fix_reshapes",
    "gather_slices",
    "name_dims",
    "name_nodes",
    "name_ports",
    "name_weights",
    "strip_traces",
    "transpose_weights",
    "weights_as_inputs",
]

BLOCK = ("toprovar.export", "Block")
"""Domain and type of the node that stands for one transformer layer until `expand_blocks`."""


class GraphEditError(RuntimeError):
    """An edit cannot be made, or did not do what it says."""


class PreconditionError(GraphEditError):
    """The graph is not what the edit takes; nothing was changed."""


class PostconditionError(GraphEditError):
    """The edit left a graph that it should not have left."""


def _require(holds: bool, edit: str, message: str) -> None:
    if not holds:
        raise PreconditionError(f"{edit}: {message}")


def _ensure(holds: bool, edit: str, message: str) -> None:
    if not holds:
        raise PostconditionError(f"{edit}: {message}")


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


# ---------------------------------------------------------------------------------------------------------------------
# Names


def name_ports(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs, in order.

    Raises:
        PreconditionError: other numbers of names than of ports, a name twice, one value that is two outputs.
    """
    graph = model.graph
    for kind, names, ports in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        _require(len(names) == len(ports), "name_ports", f"{len(names)} {kind} names for {len(ports)} {kind}s")
        _require(len(set(map(id, ports))) == len(ports), "name_ports", f"one value is given as two {kind}s")
    both = [*inputs, *outputs]
    twice = sorted(name for name, count in Counter(both).items() if count > 1)
    _require(not twice, "name_ports", f"names given twice: {', '.join(twice)}")
    _require(
        not {id(value) for value in graph.inputs} & {id(value) for value in graph.outputs},
        "name_ports",
        "an input is returned as an output",
    )
    ports = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in _values(graph):  # out of the way first
        if value.name in both and id(value) not in ports:
            _rename(graph, value, f"{value.name}_inner")
    for value, name in zip((*graph.inputs, *graph.outputs), both, strict=True):
        value.name = name
    names = [value.name for value in _values(graph)]
    _ensure(len(set(names)) == len(names), "name_ports", "two values share a name")


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name in graph.initializers and graph.initializers[value.name] is value:
        del graph.initializers[value.name]
        value.name = name
        graph.initializers[name] = value
    else:
        value.name = name


def name_weights(model: ir.Model, prefix: str) -> set[str]:
    """Take `prefix` off the names of the weights, so that they are those of the backbone's parameters.

    Returns: the names of the weights.

    Raises:
        PreconditionError: two weights would share a name.
    """
    graph = model.graph
    renamed = {name: name.removeprefix(prefix) for name in graph.initializers}
    _require(len(set(renamed.values())) == len(renamed), "name_weights", f"without {prefix!r} two weights share a name")
    weights = {new for old, new in renamed.items() if old != new}
    for old, new in renamed.items():
        if old != new:
            _rename(graph, graph.initializers[old], new)
    _ensure(weights <= set(graph.initializers), "name_weights", "a weight is gone")
    return weights


_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model, weights: Collection[str], root: str, prefix: str = "") -> None:
    """Name nodes by module and operator, ``blocks.0.ffn.MatMul_1``, and the values between them after their node.

    Args:
        weights: initializers that have a name already; the others are constants that the exporter made.
        root: module path that is left out at the front.
        prefix: what stands there instead.
    """
    graph = model.graph
    counts: Counter[str] = Counter()
    ports = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        scope = _module_of(node).removeprefix(root).strip(".")
        stem = ".".join(part for part in (prefix, scope, node.op_type) if part)
        node.name = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        for i, output in enumerate(node.outputs):
            if id(output) not in ports:
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
    for i, value in enumerate([v for name, v in graph.initializers.items() if name not in weights]):
        _rename(graph, value, ".".join(part for part in (prefix, f"constant_{i}") if part))
    names = [value.name for value in _values(graph)]
    _ensure(len(set(names)) == len(names), "name_nodes", "two values share a name")
    _ensure(len({node.name for node in graph}) == len(list(graph)), "name_nodes", "two nodes share a name")


def _module_of(node: ir.Node) -> str:
    """Path of the innermost module that the node was traced in, from torch.onnx's metadata."""
    text = node.metadata_props.get(_SCOPES, "")
    scopes = re.findall(r"'([^']*)'", text)[:-1]  # the last is the name of the traced operation
    modules = [scope for scope in scopes if "metadata_hook" not in scope]
    return modules[-1] if modules else ""


def name_dims(model: ir.Model, dims: Sequence[Sequence[int | str]], extra: Mapping[str, str] | None = None) -> None:
    """Give symbolic dimensions the names of the design (N, R, K, P_global, ...) in every shape of the graph.

    A dimension that is an expression of named ones keeps the expression; one that holds another symbol is left open.

    Args:
        dims: of every input, in order, as they are to be named.
        extra: names of expressions of one named dimension: ``{"2*B": "R"}``.

    Raises:
        PreconditionError: a size of an input is not the one given, or its rank is another.
    """
    exact: dict[str, str] = {}
    for value, wanted in zip(model.graph.inputs, dims, strict=True):
        shape = value.shape
        _require(shape is not None and len(shape) == len(wanted), "name_dims", f"{value.name} has shape {shape}")
        assert shape is not None
        for found, name in zip(shape, wanted, strict=True):
            if isinstance(name, int):
                _require(found == name, "name_dims", f"{value.name} has a size {found}, expected {name}")
            else:
                symbol = found.value if isinstance(found, ir.SymbolicDim) else None
                _require(symbol is not None, "name_dims", f"{value.name} has a fixed size {found} for {name}")
                exact.setdefault(str(symbol), name)
    symbols = {symbol: name for symbol, name in exact.items() if symbol.isidentifier()}
    for expression, name in (extra or {}).items():  # an input that is 2*s0 and named R makes s0 known as B
        pattern = re.sub(r"[A-Za-z_]\w*", r"([A-Za-z_]\\w*)", re.escape(expression))
        (base,) = re.findall(r"[A-Za-z_]\w*", expression)
        for symbol in [symbol for symbol, given in exact.items() if given == name]:
            if match := re.fullmatch(pattern, symbol):
                symbols.setdefault(match[1], base)

    def named(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        if dim.value in exact:
            return ir.SymbolicDim(exact[dim.value])
        words = set(re.findall(r"[A-Za-z_]\w*", dim.value))
        if not words <= set(symbols):
            return ir.SymbolicDim(None)
        text = re.sub(r"[A-Za-z_]\w*", lambda match: symbols[match[0]], dim.value)
        return ir.SymbolicDim((extra or {}).get(text, text))

    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([named(dim) for dim in value.shape])
    for value, wanted in zip(model.graph.inputs, dims, strict=True):
        value.shape = ir.Shape(list(wanted))
    left = sorted(
        str(value.name)
        for value in model.graph.outputs
        if value.shape is None or any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape)
    )
    _ensure(not left, "name_dims", f"outputs with a size that no input has: {', '.join(left)}")


# ---------------------------------------------------------------------------------------------------------------------
# What is left out


def strip_traces(model: ir.Model) -> None:
    """Forget where nodes came from: source paths and lines of the machine that exported them do not travel."""
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    left = [node.name for node in model.graph if node.metadata_props]
    _ensure(not left, "strip_traces", f"metadata left on {left[:3]}")


def drop_unused(model: ir.Model, *, inputs: bool = True) -> list[str]:
    """Drop nodes, weights and, if asked for, inputs that no output depends on.

    Returns: the names of the inputs dropped.
    """
    graph = model.graph
    outputs = {id(value) for value in graph.outputs}

    def unused(value: ir.Value) -> bool:
        return not value.uses() and id(value) not in outputs

    for node in reversed(list(graph)):
        if all(unused(output) for output in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if unused(value)]:
        del graph.initializers[name]
    dropped: list[str] = []
    if inputs:
        dropped = [str(value.name) for value in graph.inputs if unused(value)]
        kept = [value for value in graph.inputs if not unused(value)]
        graph.inputs.clear()
        graph.inputs.extend(kept)
    left = [value.name for value in graph.initializers.values() if unused(value)]
    _ensure(not left, "drop_unused", f"still unused: {left[:3]}")
    return dropped


_BROADCASTING = {"Add", "Div", "Mul", "Sub"}


def drop_broadcast_expands(model: ir.Model) -> int:
    """Let elementwise operators broadcast by themselves: Expand(a, shape) -> a, where the other operand has that shape.

    `F.normalize` is traced with an Expand of the norms to the full tensor, which would be written to memory and read.

    Returns: how many were dropped.
    """
    graph = model.graph
    dropped = 0
    for node in list(graph):
        if node.op_type != "Expand" or node.outputs[0].is_graph_output() or not node.outputs[0].uses():
            continue
        source, expanded = node.inputs[0], node.outputs[0]
        if source is None or expanded.shape is None:
            continue
        if not all(_broadcasts(use.node, expanded) for use in expanded.uses()):
            continue
        for use in list(expanded.uses()):
            use.node.replace_input_with(use.idx, source)
        graph.remove(node, safe=True)
        dropped += 1
    left = [node.name for node in graph if None in node.inputs and node.op_type in _BROADCASTING]
    _ensure(not left, "drop_broadcast_expands", f"operators without an operand: {left[:3]}")
    return dropped


def _broadcasts(user: ir.Node, expanded: ir.Value) -> bool:
    """Whether the user is elementwise and its other operand alone gives the result its shape."""
    if user.domain not in ("", "ai.onnx") or user.op_type not in _BROADCASTING:
        return False
    others = [value for value in user.inputs if value is not expanded]
    return len(others) == 1 and others[0] is not None and others[0].shape == expanded.shape


def gather_slices(model: ir.Model) -> int:
    """Squeeze(Slice(x, [k], [k + 1], [axis]), [axis]) -> Gather(x, k, axis): what `unbind` is traced as, in one node.

    Returns: how many pairs were replaced.
    """
    graph = model.graph
    indices: dict[int, ir.Value] = {}
    replaced = 0
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2 or node.inputs[0] is None:
            continue
        cut = node.inputs[0].producer()
        if cut is None or cut.op_type != "Slice" or len(cut.inputs) != 4 or cut.inputs[0] is None:
            continue
        start, end, axis, squeezed = (_integer(value) for value in (*cut.inputs[1:], node.inputs[1]))
        if start is None or axis is None or axis < 0 or squeezed != axis or end != start + 1 or end == 0:
            continue
        if start not in indices:
            name = f"index_{start}"
            _require(name not in graph.initializers, "gather_slices", f"there is an initializer {name} already")
            indices[start] = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
            indices[start].const_value = ir.tensor(start, dtype=ir.DataType.INT64, name=name)
            graph.initializers[name] = indices[start]
        old = node.outputs[0]
        gather = ir.Node("", "Gather", [cut.inputs[0], indices[start]], [ir.AttrInt64("axis", axis)], name=node.name)
        gather.outputs[0].name, gather.outputs[0].type, gather.outputs[0].shape = old.name, old.type, old.shape
        gather.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [gather], [old], [gather.outputs[0]])
        if not cut.outputs[0].uses() and not cut.outputs[0].is_graph_output():
            graph.remove(cut, safe=True)
        replaced += 1
    _ensure(all(value.uses() for value in indices.values()), "gather_slices", "an index that nothing uses")
    return replaced


def _integer(value: ir.Value | None) -> int | None:
    """The number that a constant of one element holds."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return int(value.const_value.numpy().reshape(-1)[0])


def fix_reshapes(model: ir.Model) -> int:
    """Reshape(x, computed shape) -> Reshape(x, constant): axes that keep their size are written as 0, one more as -1.

    `x.flatten(-2)` of an [N, R, H, D] is traced with half a dozen nodes that put N and R together again.

    Returns: how many shapes became constants.
    """
    graph = model.graph
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if node.inputs[1].const_value is not None or before is None or after is None:
            continue
        sizes = tuple(_reshape_size(dim, before[i] if i < len(before) else None) for i, dim in enumerate(after))
        if None in sizes or sizes.count(-1) > 1 or 0 in [dim for dim in after if isinstance(dim, int)]:
            continue
        key = tuple(size for size in sizes if size is not None)
        if key not in constants:
            name = "shape_" + "_".join(str(size).replace("-", "m") for size in key)
            _require(name not in graph.initializers, "fix_reshapes", f"there is an initializer {name} already")
            constants[key] = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(key)]))
            constants[key].const_value = ir.tensor(list(key), dtype=ir.DataType.INT64, name=name)
            graph.initializers[name] = constants[key]
        node.replace_input_with(1, constants[key])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    drop_unused(model, inputs=False)
    left = [name for name, value in graph.initializers.items() if not value.uses()]
    _ensure(not left, "fix_reshapes", f"unused shapes: {left[:3]}")
    return len(constants)


def _reshape_size(after: int | ir.SymbolicDim, before: int | ir.SymbolicDim | None) -> int | None:
    """How a Reshape states a size: itself, 0 where the axis keeps it, -1 where it follows from the others."""
    if isinstance(after, int):
        return after
    if after.value is None:
        return None
    return 0 if isinstance(before, ir.SymbolicDim) and before.value == after.value else -1


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@contextmanager
def weights_as_inputs(model: ir.Model, weights: Collection[str]) -> Iterator[None]:
    """While this is open, weights are inputs that nothing is known of.

    An optimiser would fold them, which copies them, and would merge those of equal content: two biases of zeros would
    be one, in the template of a layer too, whose copies have other weights.

    Raises:
        PreconditionError: a name is no weight of the graph.
    """
    graph = model.graph
    absent = sorted(set(weights) - set(graph.initializers))
    _require(not absent, "weights_as_inputs", f"no such weights: {', '.join(absent[:3])}")
    held = [(value, value.const_value) for name, value in graph.initializers.items() if name in weights]
    for value, _ in held:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        ours = {id(value) for value, _ in held}
        inputs = [value for value in graph.inputs if id(value) not in ours]
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        for value, tensor in held:
            value.const_value = tensor
            graph.initializers[str(value.name)] = value
    _ensure(set(weights) <= set(graph.initializers), "weights_as_inputs", "a weight is gone")


def transpose_weights(model: ir.Model) -> int:
    """MatMul(x, Transpose(W)) -> MatMul(x, W_T), the weight transposed when it is written.

    A Linear's weight is stored [out, in]. Transposed on the fly, one at a time while the file is written, it costs no
    memory here and no time in the runtime's session, which would otherwise fold every one of them.

    Returns: how many weights.
    """
    graph = model.graph
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        weight, output = node.inputs[0], node.outputs[0]
        if weight is None or weight.const_value is None or not weight.is_initializer() or output.is_graph_output():
            continue
        if weight.shape is None or len(weight.shape) != 2:
            continue
        permutation = node.attributes.get("perm")
        if permutation is not None and list(permutation.as_ints()) != [1, 0]:
            continue
        name = f"{weight.name}_T"
        if name not in made:
            _require(name not in graph.initializers, "transpose_weights", f"there is a weight {name} already")
            made[name] = _transposed(weight, name)
            graph.initializers[name] = made[name]
        for use in list(output.uses()):
            use.node.replace_input_with(use.idx, made[name])
        graph.remove(node, safe=True)
    drop_unused(model, inputs=False)
    left = [
        node.name
        for node in graph
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].name in made
    ]
    _ensure(not left, "transpose_weights", f"weights transposed twice: {left[:3]}")
    return len(made)


def _transposed(weight: ir.Value, name: str) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    shape = ir.Shape(list(reversed(tensor.shape.numpy())))

    def evaluate() -> ir.TensorProtocol:
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, torch.Tensor):
            return tensor_adapters.TorchTensor(raw.detach().t().contiguous(), name=name)
        return ir.tensor(tensor.numpy().T.copy(), name=name)

    value = ir.Value(name=name, type=weight.type, shape=shape)
    value.const_value = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=name)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Functions and layers


def attach_functions(model: ir.Model, protos: Mapping[str, onnx.FunctionProto], domain: str) -> None:
    """Give every node of `domain` the model-local function of its name; others stay away.

    After the export, because the exporter inlines functions.

    Raises:
        PreconditionError: a node without a function, or with other numbers of inputs or outputs than it.
    """
    used = sorted({node.op_type for node in model.graph if node.domain == domain})
    for node in model.graph:
        if node.domain != domain:
            continue
        known = ", ".join(protos)
        _require(node.op_type in protos, "attach_functions", f"{node.name} is a {node.op_type}; functions are {known}")
        proto = protos[node.op_type]
        for kind, found, expected in (("inputs", node.inputs, proto.input), ("outputs", node.outputs, proto.output)):
            _require(
                len(found) == len(expected),
                "attach_functions",
                f"{node.name} has {len(found)} {kind}, the function {node.op_type} has {len(expected)}",
            )
    for name in used:
        function = ir.serde.deserialize_function(protos[name])
        for imported, version in function.opset_imports.items():
            found = model.opset_imports.setdefault(imported, version)
            what = f"opset {imported or 'ai.onnx'}"
            _require(found == version, "attach_functions", f"{what} is {found}, the function {name} has {version}")
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[domain] = next(iter(model.functions.values())).opset_imports.get(domain, 1)
    attached = {identifier[1] for identifier in model.functions if identifier[0] == domain}
    _ensure(attached == set(used), "attach_functions", f"attached {sorted(attached)} for nodes {used}")


@dataclass(frozen=True)
class BlockTemplate:
    """One transformer layer, traced once: inputs and outputs are the `BLOCK` node's, weights are named within."""

    model: ir.Model
    weights: frozenset[str]


def expand_blocks(
    model: ir.Model,
    templates: Callable[[int, str], BlockTemplate],
    weight: Callable[[int, str], torch.Tensor],
) -> int:
    """Put a copy of the layer's template in place of every `BLOCK` node, with the weights of that layer.

    The time of an export does not grow with the depth of the model, nor does a weight exist twice.

    Args:
        templates: (layer, entropy mode) -> template.
        weight: (layer, name in the layer) -> the parameter or buffer.

    Returns: how many layers.

    Raises:
        PreconditionError: a node has other numbers of inputs or outputs than its template.
    """
    graph = model.graph
    layers = [node for node in graph if (node.domain, node.op_type) == BLOCK]
    for node in layers:
        layer, mode = node.attributes["layer"].as_int(), node.attributes["entropy"].as_string()
        template = templates(layer, mode)
        inner = template.model.graph
        given = [value for value in node.inputs if value is not None]
        for kind, found, expected in (("inputs", given, inner.inputs), ("outputs", node.outputs, inner.outputs)):
            _require(
                len(found) == len(expected),
                "expand_blocks",
                f"layer {layer} has {len(found)} {kind}, its template has {len(expected)}",
            )
        _expand(graph, node, f"blocks.{layer}", template, given, partial(weight, layer))
    left = [node.name for node in graph if (node.domain, node.op_type) == BLOCK]
    _ensure(not left, "expand_blocks", f"layers left: {left}")
    model.opset_imports.pop(BLOCK[0], None)
    return len(layers)


def _expand(
    graph: ir.Graph,
    node: ir.Node,
    prefix: str,
    template: BlockTemplate,
    given: Sequence[ir.Value],
    weight: Callable[[str], torch.Tensor],
) -> None:
    inner = template.model.graph
    mapped: dict[ir.Value, ir.Value] = dict(zip(inner.inputs, given, strict=True))
    dims = _dims_at(inner.inputs, given)
    for name, value in inner.initializers.items():
        copied = ir.Value(name=f"{prefix}.{name}", type=value.type, shape=value.shape)
        if name in template.weights:
            tensor = weight(name)
            copied.const_value = tensor_adapters.TorchTensor(tensor, name=copied.name)
            copied.shape = ir.Shape(list(tensor.shape))
        else:
            copied.const_value = value.const_value
        _require(copied.name not in graph.initializers, "expand_blocks", f"there is a weight {copied.name} already")
        graph.initializers[str(copied.name)] = copied
        mapped[value] = copied
    copies = []
    for original in inner:
        kinds = {attribute.type for attribute in original.attributes.values()}
        subgraphs = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
        _require(not subgraphs, "expand_blocks", f"{original.name} has a subgraph")
        copy = ir.Node(
            original.domain,
            original.op_type,
            [None if value is None else mapped[value] for value in original.inputs],
            list(original.attributes.values()),
            num_outputs=len(original.outputs),
            version=original.version,
            name=f"{prefix}.{original.name}",
        )
        for value, output in zip(original.outputs, copy.outputs, strict=True):
            output.name, output.type = f"{prefix}.{value.name}", value.type
            output.shape = _substituted(value.shape, dims)
            mapped[value] = output
        copies.append(copy)
    results = [mapped[value] for value in inner.outputs]
    for value, output in zip(inner.outputs, node.outputs, strict=True):
        if not output.is_graph_output():
            output.name = f"{prefix}.{value.name}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], copies, list(node.outputs), results)


def _dims_at(inner: Iterable[ir.Value], given: Iterable[ir.Value]) -> dict[str, str | int]:
    """What the template's dimensions are called where it is used."""
    dims: dict[str, str | int] = {}
    for ours, theirs in zip(inner, given, strict=True):
        if ours.shape is None or theirs.shape is None:
            continue
        for name, found in zip(ours.shape, theirs.shape, strict=True):
            if isinstance(name, ir.SymbolicDim) and name.value is not None:
                value = found if isinstance(found, int) else found.value
                if value is not None:
                    dims.setdefault(name.value, value)
    return dims


def _substituted(shape: ir.Shape | None, dims: Mapping[str, str | int]) -> ir.Shape | None:
    if shape is None:
        return None
    sizes: list[int | str | None] = []
    for dim in shape:
        if isinstance(dim, int) or dim.value is None:
            sizes.append(dim if isinstance(dim, int) else None)
        elif dim.value in dims:
            sizes.append(dims[dim.value])
        elif set(re.findall(r"[A-Za-z_]\w*", dim.value)) <= set(dims):
            sizes.append(re.sub(r"[A-Za-z_]\w*", lambda match: str(dims[match[0]]), dim.value))
        else:
            sizes.append(None)
    return ir.Shape(sizes)
