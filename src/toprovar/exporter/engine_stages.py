"""A graph cut into stages: engines that run one behind the other in place of one engine.

TensorRT 8.6 compiles every layer of every profile anew, on one core. Stages are built side by side, and each weight is
in one of them. A cut is behind a transformer block (`blocks.N.x_out`, see `toprovar.exporter.graph`); what is computed
before a cut and read behind it is an output of one stage and an input of another. Sizes (64-bit integers) are computed
again instead: TensorRT 8.6 takes none as an input.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ..errors import InputError
from ..profiles.manifest import GraphInfo, TensorInfo

__all__ = ["cut_graph", "link_weights"]

_BLOCK_END = re.compile(r"blocks\.\d+\.x_out")


def cut_graph(path: Path, stages: int, folder: Path) -> list[tuple[Path, GraphInfo]]:
    """Write the stages of an ONNX file, each to a folder of its own with links to the weights.

    Args:
        stages: how many; blocks are shared out evenly.
        folder: exists; `folder/0`, `folder/1`, ... are made.

    Returns: every stage's file and its inputs and outputs, in the order in which they run.

    Raises:
        InputError: the graph has fewer blocks than there are stages, or type or shape of a tensor at a cut are not known.
    """
    model = onnx.load(str(path), load_external_data=False)
    nodes = list(model.graph.node)
    ends = [i + 1 for i, node in enumerate(nodes) if _BLOCK_END.fullmatch(node.output[0])]
    if not 1 <= stages <= len(ends):
        raise InputError(f"{path.name}: {stages} stages; valid is 1 to {len(ends)}, as many as it has blocks")
    bounds = [0, *(ends[round(i * len(ends) / stages) - 1] for i in range(1, stages)), len(nodes)]
    found = []
    for stage in range(stages):
        place = folder / str(stage)
        place.mkdir()
        found.append(
            (place / path.name, _write_stage(model, nodes, bounds[stage], bounds[stage + 1], place / path.name))
        )
        link_weights(model, path.parent, place)
    return found


def link_weights(model: onnx.ModelProto, source: Path, folder: Path) -> None:
    """Links in `folder` to the files of weights that a graph of `source` has; none where they are in the graph."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    for file in {entry.value for entry in entries if entry.key == "location"}:
        (folder / file).symlink_to((source / file).resolve())


def _write_stage(model: onnx.ModelProto, nodes: list[onnx.NodeProto], begin: int, end: int, path: Path) -> GraphInfo:
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    maker = {name: node for node in nodes for name in node.output}
    own = _with_sizes(nodes[begin:end], maker, known)
    made = {name for node in own for name in node.output}
    read = {name for node in own for name in node.input if name} - made
    read_later = {name for node in nodes[end:] for name in node.input}
    given, wanted = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    made_here = [name for node in nodes[begin:end] for name in node.output]
    inputs = [*(name for name in given if name in read), *(name for name in maker if name in read)]
    outputs = [name for name in made_here if name in wanted]
    outputs += [
        name for name in made_here if name in read_later and name not in wanted and not _is_size(name, maker, known)
    ]
    missing = [name for name in (*inputs, *outputs) if name not in known]
    if missing:
        raise InputError(f"{path.name}: cannot be cut: the shape of {missing[0]!r} is not known; build it in one stage")

    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    for field, kept in (
        (graph.node, own),
        (graph.input, [known[name] for name in inputs]),
        (graph.output, [known[name] for name in outputs]),
        (graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in read]),
        (graph.value_info, [value for value in model.graph.value_info if value.name in made - set(outputs)]),
    ):
        del field[:]
        field.extend(kept)
    onnx.save(part, str(path))
    return GraphInfo(
        file=path.name,
        inputs=tuple(_tensor(known[name]) for name in inputs),
        outputs=tuple(_tensor(known[name]) for name in outputs),
    )


def _with_sizes(
    own: list[onnx.NodeProto], maker: dict[str, onnx.NodeProto], known: dict[str, onnx.ValueInfoProto]
) -> list[onnx.NodeProto]:
    """The nodes of a stage behind those of earlier ones that make the sizes and constants it reads."""
    made = {name for node in own for name in node.output}
    earlier: list[onnx.NodeProto] = []
    todo = [name for node in own for name in node.input]
    while todo:
        name = todo.pop()
        if name in made or name not in maker or not _is_size(name, maker, known):
            continue
        node = maker[name]
        made.update(node.output)
        earlier.append(node)
        todo += node.input
    order = {node.output[0]: i for i, node in enumerate(maker.values())}
    return sorted(earlier, key=lambda node: order[node.output[0]]) + own


def _is_size(name: str, maker: dict[str, onnx.NodeProto], known: dict[str, onnx.ValueInfoProto]) -> bool:
    """Whether a tensor is made again where it is read: a constant, the shape of a tensor, or computed from those."""
    node = maker[name]
    if node.op_type in ("Constant", "Shape"):
        return True
    value = known.get(name)
    return value is not None and value.type.tensor_type.elem_type == TensorProto.INT64


def _tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    dtype = {TensorProto.BFLOAT16: "bfloat16"}.get(kind.elem_type, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorInfo.model_validate({"name": value.name, "dtype": dtype, "shape": shape})
