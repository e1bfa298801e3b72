"""Backbone -> the four ONNX graphs: prefix, step, advance, decoder (see the design, "The graphs").

Inputs and outputs have the names of `profiles.manifest.LoopNames`, those of `Backbone.prefix`'s context and those of
`Backbone.scale_constants`; a runtime finds each by name. Every size that changes between scales or batches is symbolic:

    N  tokens of the scale     K  kept tokens       P_global, P_detail  past of a layer, by role
    B  images, R rows          M  cached tokens     T  text length

A layer is traced once for each kind of attention it needs and copied with the weights of the others, so the time of an
export does not grow with the depth. Weights are never copied in memory: a graph refers to the backbone's own tensors
until it is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ..backbones.base import Backbone, BlockOutput, Context, EntropyMode
from ..backbones.step import Step
from ..errors import InputError
from ..kernels import contract
from ..profiles.files import sha256_json
from ..profiles.manifest import LoopNames as Names
from ..profiles.manifest import TensorInfo
from . import edits
from .functions import OPSET, function_protos, translation_table

__all__ = ["EXTERNAL_DATA_BYTES", "GRAPHS", "IR_VERSION", "Graph", "GraphExporter", "quiet", "save_graph"]

GRAPHS = ("prefix", "step", "advance", "decoder")
EXTERNAL_DATA_BYTES = 1_800_000_000
"""Weights above this go to a file of their own: a protobuf, graph and all, ends at 2^31 bytes."""

IR_VERSION = 10
"""Of ONNX 1.16: runtimes of the last two years read it. Default attributes of functions came with 9."""

_CHECKED = "toprovar.checked"

_FOLDED = 1 << 16
"""Elements of the largest weight that is computed with while exporting; matrices stay as they are in the checkpoint."""

# Sizes while tracing. Those of different dimensions differ, and none is 0 or 1, which torch.export takes for constants.
_SIZES = {"N": 6, "K": 3, "P": 7, "P_global": 7, "P_detail": 5, "M": 4, "h": 2, "w": 3, "hc": 8, "wc": 9}


@dataclass(frozen=True)
class Graph:
    """An exported graph. Its weights are the backbone's own tensors until `save_graph`."""

    name: str
    model: ir.Model
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(value.const_value.nbytes for value in self.model.graph.initializers.values() if value.const_value)


@dataclass(frozen=True)
class _Port:
    """One input while tracing: its name, and its sizes as numbers or names of dimensions."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]


class GraphExporter:
    """Exports the graphs of one backbone; each kind is exported once, however many plans ask for it.

    Args:
        backbone: in evaluation mode; its weights, sampling and precision are those of the graphs. It must not change
            while the exporter is in use.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self._graphs: dict[tuple[str, ...], Graph] = {}
        self._templates: dict[tuple[str, str], edits.BlockTemplate] = {}
        self._table: dict[Callable[..., Any], Callable[..., Any]] | None = None

    def graph(self, name: str, roles: str | None = None, restore: Literal["cache", "identity"] = "cache") -> Graph:
        """One of `GRAPHS`; `roles` and `restore` are those of `Step` and matter to ``step`` alone."""
        if name not in GRAPHS:
            raise InputError(f"graph {name!r} is not known; it is one of {', '.join(GRAPHS)}")
        key: tuple[str, ...] = (name,)
        if name == "step":
            roles = "g" * self.backbone.spec.depth if roles is None else roles
            key = (name, roles, restore if "d" in roles else "cache")
        if key not in self._graphs:
            make: dict[str, Callable[[], Graph]] = {
                "prefix": self._prefix,
                "step": lambda: self._step(Step(self.backbone, roles, restore)),
                "advance": self._advance,
                "decoder": self._decoder,
            }
            with torch.no_grad(), quiet():
                self._graphs[key] = make[name]()
        return self._graphs[key]

    # -- the four graphs ----------------------------------------------------------------------------------------------

    def _prefix(self) -> Graph:
        """The condition -> first input `x`, and the context by its own names."""
        outputs = [Names.X.value, *self._context]

        def forward(tensors: list[Tensor]) -> list[Tensor]:
            prefix = self.backbone.prefix(*tensors)
            return [prefix.x0, *(prefix.context[name] for name in outputs[1:])]

        return self._export("prefix", forward, self._condition, outputs)

    def _step(self, step: Step) -> Graph:
        """One scale through all layers: see `Step`."""
        backbone, spec, spans = self.backbone, self.backbone.spec, step.spans
        pruned = bool(spans)
        restored = pruned and step.restore == "cache"
        x = _Port(Names.X.value, torch.float32, ("N", "R", spec.width))
        ports = [x, *self._context.values()]
        if spec.rope_width:
            ports.append(_Port("rope", torch.float32, ("N", 1, spec.rope_width)))
        if pruned:
            ports.append(_Port(Names.KEEP_SLOTS.value, torch.int32, ("K",)))
        if restored:
            ports.append(_Port(Names.AREA_ROWS.value, torch.float32, ("h", "hc")))
            ports.append(_Port(Names.AREA_COLS.value, torch.float32, ("w", "wc")))
        past: list[str] = []
        for layer, role in enumerate(step.roles):
            dims = ("P_global" if role == "g" else "P_detail", "R", spec.heads, spec.head_dim)
            for name in (Names.PAST_K, Names.PAST_V):
                past.append(name.format(i=layer))
                ports.append(_Port(past[-1], backbone.dtype, dims))
        caches = [Names.SPAN_CACHE.format(i=i) for i in range(len(spans))] if restored else []
        ports += [_Port(name, torch.float32, ("M", "R", spec.width)) for name in caches]
        outputs = [Names.LOGITS.value]
        for layer in range(spec.depth):
            outputs += [Names.NEW_K.format(i=layer), Names.NEW_V.format(i=layer)]
        outputs += [Names.SPAN_DELTA.format(i=i) for i in range(len(caches))]

        opaque = Step(cast(Backbone, _OpaqueBlocks(backbone)), step.roles, step.restore)
        names = [port.name for port in ports]

        def forward(tensors: list[Tensor]) -> list[Tensor]:
            given = dict(zip(names, tensors, strict=True))
            logits, new_kv, deltas = opaque(
                given[Names.X],
                {name: given[name] for name in self._context},
                given.get("rope"),
                given.get(Names.KEEP_SLOTS),
                given.get(Names.AREA_ROWS),
                given.get(Names.AREA_COLS),
                [given[name] for name in past],
                [given[name] for name in caches],
            )
            return [logits, *new_kv, *deltas]

        return self._export("step", forward, ports, outputs)

    def _advance(self) -> Graph:
        """Logits and noise -> tokens, codes, input of the next scale."""
        backbone, spec = self.backbone, self.backbone.spec
        constants = [port for port in self._constants if port.name != "rope"]
        ports = [
            _Port(Names.LOGITS.value, torch.float32, ("N", "R", spec.vocab)),
            _Port(Names.NOISE.value, torch.float32, ("N", "B", spec.vocab)),
            _Port(Names.CODES.value, torch.float32, ("B", spec.latent_channels, *spec.latent_grid)),
        ]

        def forward(tensors: list[Tensor]) -> list[Tensor]:
            logits, noise, codes, *rest = tensors
            given = {port.name: tensor for port, tensor in zip(constants, rest, strict=True)}
            tokens, codes, next_x = backbone.advance(logits, noise, codes, given)
            assert next_x is not None
            return [tokens, codes, next_x]

        outputs = [Names.TOKENS.value, Names.CODES_OUT.value, Names.NEXT_X.value]
        return self._export("advance", forward, [*ports, *constants], outputs, sizes=self._largest_scale)

    def _decoder(self) -> Graph:
        """Codes -> picture."""
        spec = self.backbone.spec
        port = _Port(Names.CODES.value, torch.float32, ("B", spec.latent_channels, *spec.latent_grid))

        def forward(tensors: list[Tensor]) -> list[Tensor]:
            return [self.backbone.decode(tensors[0])]

        return self._export("decoder", forward, [port], [Names.IMAGE.value])

    # -- what the backbone's tensors look like ------------------------------------------------------------------------

    @cached_property
    def _condition(self) -> list[_Port]:
        """What `Backbone.prefix` takes: a class label, or text features where the backbone has a text width."""
        width = getattr(self.backbone.spec, "text_width", None)
        if width is None:
            return [_Port(Names.LABELS.value, torch.int32, ("B",))]
        return [
            _Port(Names.TEXT_FEATURES.value, torch.float32, ("B", "T", width)),
            _Port(Names.TEXT_LENGTHS.value, torch.int32, ("B",)),
        ]

    @cached_property
    def _context(self) -> dict[str, _Port]:
        """The context of `Backbone.prefix`; sizes that follow the batch or the text are found by varying both."""
        runs = []
        for images, text in ((2, 5), (3, 11)):
            sizes = self._sizes(images, text)
            with FakeTensorMode(allow_non_fake_inputs=True):
                condition = [torch.zeros(_resolve(port, sizes), dtype=port.dtype) for port in self._condition]
                runs.append((sizes, self.backbone.prefix(*condition).context))
        (first, one), (second, other) = runs
        ports = {}
        for name, tensor in one.items():
            dims: list[int | str] = []
            for a, b in zip(tensor.shape, other[name].shape, strict=True):
                matches = [dim for dim in ("R", "B", "T") if (a, b) == (first[dim], second[dim])]
                if a != b and not matches:
                    raise ValueError(f"context {name}: a size follows neither B, R nor T: {a} and {b}")
                dims.append(matches[0] if a != b else a)
            ports[name] = _Port(name, tensor.dtype, tuple(dims))
        return ports

    @cached_property
    def _constants(self) -> list[_Port]:
        """The tensors of `Backbone.scale_constants`; the sizes in which scales differ are named by what they equal."""
        spec = self.backbone.spec
        last = spec.scales - 1
        # Behind the last scale the first one stands in as the next: one graph has one set of inputs.
        runs = [self.backbone.scale_constants(scale, (scale + 1) % spec.scales) for scale in range(spec.scales)]
        following = [(scale + 1) % spec.scales for scale in range(spec.scales)]
        known: dict[str, list[int]] = {
            "N": [spec.tokens[s] for s in range(spec.scales)],
            "h": [spec.grids[s][0] for s in range(spec.scales)],
            "w": [spec.grids[s][1] for s in range(spec.scales)],
            "N_next": [spec.tokens[s] for s in following],
            "h_next": [spec.grids[s][0] for s in following],
            "w_next": [spec.grids[s][1] for s in following],
        }
        ports = []
        for name, tensor in runs[last].items():
            dims: list[int | str] = []
            for axis in range(tensor.dim()):
                sizes = [run[name].shape[axis] for run in runs]
                if len(set(sizes)) == 1:
                    dims.append(sizes[0])
                    continue
                candidates = [dim for dim, values in known.items() if values == sizes]
                candidates.sort(key=lambda dim: dim.startswith("w") != ("cols" in name))
                dims.append(candidates[0] if candidates else f"{name}_{axis}")
            ports.append(_Port(name, tensor.dtype, tuple(dims)))
        return ports

    @cached_property
    def _largest_scale(self) -> dict[str, int]:
        """Sizes for tracing `advance`: the constants must fit together, and the last scale has no size of 1."""
        scale = self.backbone.spec.scales - 1
        constants = self.backbone.scale_constants(scale, scale)
        sizes = {"N": self.backbone.spec.tokens[scale]}
        for port in self._constants:
            shape = constants[port.name].shape
            sizes |= {dim: size for dim, size in zip(port.dims, shape, strict=True) if isinstance(dim, str)}
        return sizes

    def _sizes(self, images: int = 2, text: int = 5) -> dict[str, int]:
        return _SIZES | {"B": images, "R": images * self.backbone.branches, "T": text}

    # -- tracing ------------------------------------------------------------------------------------------------------

    def _export(
        self,
        name: str,
        forward: Callable[[list[Tensor]], list[Tensor]],
        ports: Sequence[_Port],
        outputs: Sequence[str],
        sizes: Mapping[str, int] | None = None,
    ) -> Graph:
        """Trace, then edit until it is the graph that is shipped."""
        model = self._trace(_Traced(self.backbone, forward), ports, self._sizes() | dict(sizes or {}))
        edits.name_ports(model, [port.name for port in ports], outputs)
        weights = edits.name_weights(model, "backbone.")
        edits.name_nodes(model, weights, "backbone", name)
        edits.expand_blocks(model, self._template, self._block_weight)
        edits.strip_traces(model)
        edits.drop_unused(model)
        edits.transpose_weights(model)
        # What small weights alone decide, such as biases put together: TensorRT would compute it in every run.
        onnxscript.optimizer.fold_constants(
            model, onnx_shape_inference=False, input_size_limit=_FOLDED, output_size_limit=_FOLDED
        )
        edits.drop_unused(model, inputs=False)
        edits.attach_functions(model, function_protos(), contract.DOMAIN)
        model.graph.name = name
        model.ir_version = IR_VERSION
        model.producer_name, model.producer_version = "toprovar", None
        graph = Graph(name, model, _infos(model.graph.inputs), _infos(model.graph.outputs))
        wanted = [port.name for port in ports]
        left_out = {info.name for info in graph.inputs} ^ set(wanted)
        if unexpected := left_out - {Names.NOISE.value, *(port.name for port in self._constants)}:
            raise edits.PostconditionError(f"{name}: inputs that nothing depends on: {', '.join(sorted(unexpected))}")
        return graph

    def _trace(self, module: nn.Module, ports: Sequence[_Port], sizes: Mapping[str, int]) -> ir.Model:
        """torch.export and torch.onnx, constants folded, dimensions named; the weights are left as they are."""
        if self._table is None:
            self._table = translation_table() | {torch.ops.toprovar_export.block.default: _translate_block}
        example = [torch.zeros(_resolve(port, sizes), dtype=port.dtype) for port in ports]
        symbols = self._symbols(ports)
        dynamic = [{a: symbols[d] for a, d in enumerate(port.dims) if isinstance(d, str)} or None for port in ports]
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=(dynamic,), strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=self._table,
            optimize=False,
        )
        assert exported is not None
        model = exported.model
        edits.drop_unused(model, inputs=False)
        weights = set(model.graph.initializers) & (set(program.state_dict) | set(program.constants))
        with edits.weights_as_inputs(model, weights):
            onnxscript.optimizer.optimize_ir(model, onnx_shape_inference=False)
        edits.name_dims(model, [port.dims for port in ports], {"2*B": "R"})
        edits.drop_broadcast_expands(model)
        edits.gather_slices(model)
        edits.fix_reshapes(model)
        return model

    def _symbols(self, ports: Sequence[_Port]) -> dict[str, Any]:
        """The dimensions as torch.export takes them; R is 2 B where both branches of the guidance run."""
        names = {dim for port in ports for dim in port.dims if isinstance(dim, str)}
        limits = {"T": getattr(self.backbone.spec, "text_maximum_tokens", None)}
        symbols: dict[str, Any] = {name: Dim(name, max=limits.get(name)) for name in names}
        if "R" in names:
            images = symbols.setdefault("B", Dim("B"))
            symbols["R"] = self.backbone.branches * images if self.backbone.branches > 1 else images
        return symbols

    # -- layers -------------------------------------------------------------------------------------------------------

    def _template(self, layer: int, mode: str) -> edits.BlockTemplate:
        """The graph of a layer; layers that are built alike share one."""
        block = self.backbone.blocks[layer]
        spec = self.backbone.spec
        sizes = self._sizes()
        with FakeTensorMode(allow_non_fake_inputs=True):
            whole = {name: torch.zeros(_resolve(port, sizes), dtype=port.dtype) for name, port in self._context.items()}
            share = self.backbone.layer_context(layer, whole)
        context = []
        for name, tensor in share.items():
            # A share is the whole without leading axes (the layer); what is not in the context is a weight.
            dims = self._context[name].dims[-tensor.dim() :] if name in self._context else tuple(tensor.shape)
            context.append(_Port(name, tensor.dtype, dims))
        key = (sha256_json([_construction(block), [[p.name, str(p.dtype), list(p.dims)] for p in context]]), mode)
        if key not in self._templates:
            past = [_Port(name, self.backbone.dtype, ("P", "R", spec.heads, spec.head_dim)) for name in ("k", "v")]
            rope = [_Port("rope", torch.float32, ("N", "Q", spec.rope_width))] if spec.rope_width else []
            ports = [_Port("x", torch.float32, ("N", "R", spec.width)), *context, *past, *rope]

            def forward(tensors: list[Tensor]) -> list[Tensor]:
                x, *rest = tensors
                given = dict(zip(share, rest, strict=False))
                past_k, past_v, *table = rest[len(share) :]
                output = block(x, given, past_k, past_v, rope=table[0] if table else None, entropy=mode)
                return [t for t in output if t is not None]

            model = self._trace(_Traced(block, forward), ports, sizes | {"Q": sizes["R"]})
            weights = edits.name_weights(model, "backbone.")
            outputs = ["x_out", "new_k", "new_v", "entropy"][: len(model.graph.outputs)]
            edits.name_ports(model, [port.name for port in ports], outputs)
            edits.name_nodes(model, weights, "backbone")
            edits.strip_traces(model)
            self._templates[key] = edits.BlockTemplate(model, frozenset(weights))
        return self._templates[key]

    def _block_weight(self, layer: int, name: str) -> Tensor:
        return dict(_tensors_of(self.backbone.blocks[layer]))[name]


# ---------------------------------------------------------------------------------------------------------------------
# Opaque layers: Step is traced with a node in place of every layer


class _OpaqueBlock:
    """Called like a layer of `Backbone.blocks`; leaves one node in the trace."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self,
        x: Tensor,
        context: Context,
        past_k: Tensor,
        past_v: Tensor,
        rope: Tensor | None = None,
        entropy: EntropyMode = "none",
    ) -> BlockOutput:
        outputs = torch.ops.toprovar_export.block(x, list(context.values()), past_k, past_v, rope, self.layer, entropy)
        x_out, new_k, new_v, given = outputs
        return BlockOutput(x_out, new_k, new_v, given if entropy != "none" else None)


class _OpaqueBlocks(nn.Module):
    """The backbone as `Step` sees it, with opaque layers."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.spec, self.branches = backbone.spec, backbone.branches
        self.layer_context, self.head = backbone.layer_context, backbone.head
        self.blocks = [_OpaqueBlock(layer) for layer in range(backbone.spec.depth)]


_library = torch.library.Library("toprovar_export", "FRAGMENT")
_library.define(
    "block(Tensor x, Tensor[] context, Tensor past_k, Tensor past_v, Tensor? rope, int layer, str entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _block_shapes(
    x: Tensor, context: list[Tensor], past_k: Tensor, past_v: Tensor, rope: Tensor | None, layer: int, entropy: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, r, _ = x.shape
    new = past_k.new_empty((n, *past_k.shape[1:]))
    entropy_shape = (r, n) if entropy == "mean" else (0,)
    return x.new_empty(x.shape), new, past_v.new_empty(new.shape), x.new_empty(entropy_shape, dtype=torch.float32)


torch.library.register_fake("toprovar_export::block", _block_shapes, lib=_library)

_BLOCK_NODES = {
    outputs: onnxscript.values.Op(
        onnxscript.values.Opset(edits.BLOCK[0], 1),
        edits.BLOCK[1],
        onnx.defs.OpSchema(
            edits.BLOCK[1],
            edits.BLOCK[0],
            1,
            inputs=[
                onnx.defs.OpSchema.FormalParameter(
                    "tensors", "T", param_option=onnx.defs.OpSchema.FormalParameterOption.Variadic, is_homogeneous=False
                )
            ],
            outputs=[onnx.defs.OpSchema.FormalParameter(f"output_{i}", "T") for i in range(outputs)],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)"], "")],
            attributes=[
                onnx.defs.OpSchema.Attribute("layer", onnx.defs.OpSchema.AttrType.INT, required=True),
                onnx.defs.OpSchema.Attribute("entropy", onnx.defs.OpSchema.AttrType.STRING, required=True),
            ],
        ),
    )
    for outputs in (3, 4)
}


def _translate_block(
    x: Any, context: Sequence[Any], past_k: Any, past_v: Any, rope: Any, layer: int, entropy: str
) -> Any:
    tensors = [x, *context, past_k, past_v, *([] if rope is None else [rope])]
    outputs = _BLOCK_NODES[3 if entropy == "none" else 4](*tensors, layer=layer, entropy=entropy)
    return (*outputs, ir.Value()) if entropy == "none" else outputs


class _Traced(nn.Module):
    """A function of tensors as torch.export takes it. `backbone` makes its weights known under their own names."""

    def __init__(self, backbone: nn.Module, forward: Callable[[list[Tensor]], list[Tensor]]):
        super().__init__()
        self.backbone = backbone
        self._forward = forward

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._forward(tensors)


def _tensors_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _construction(block: nn.Module) -> list[Any]:
    """What a layer's graph depends on besides its weights: classes, sizes, and plain attributes, as JSON."""
    plain = (bool, int, float, str, type(None))
    modules = [
        [name, type(module).__qualname__, {k: v for k, v in vars(module).items() if isinstance(v, plain)}]
        for name, module in block.named_modules()
    ]
    return [modules, [[name, str(t.dtype), list(t.shape)] for name, t in _tensors_of(block)]]


def _resolve(port: _Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims)


def _infos(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    names = {
        ir.DataType.FLOAT: "float32",
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
        ir.DataType.INT32: "int32",
        ir.DataType.INT64: "int64",
        ir.DataType.BOOL: "bool",
    }
    infos = []
    for value in values:
        assert value.shape is not None and value.dtype is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        infos.append(TensorInfo(name=str(value.name), dtype=cast(Any, names[value.dtype]), shape=shape))
    return tuple(infos)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx warns of what is none of the user's business: torchvision is absent, a pytree name is deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*dynamic_shapes.*")
            yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_graph(
    graph: Graph, path: Path, metadata: Mapping[str, str], *, external_data: bool | None = None, check: bool = True
) -> list[Path]:
    """Write a graph, and check what was written.

    Args:
        path: of the ``.onnx`` file; weights go beside it to ``<name>.onnx.data`` where they do not go into it.
        metadata: the model's metadata_props.
        external_data: None decides by size.
        check: run ONNX's checker and shape inference on the file.

    Returns: the files written.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid ONNX (a defect).
    """
    graph.model.metadata_props.clear()
    graph.model.metadata_props.update(metadata)
    external = graph.weight_bytes > EXTERNAL_DATA_BYTES if external_data is None else external_data
    data = path.name + ".data"
    ir.save(graph.model, path, external_data=data if external else None)
    files = [path, path.with_name(data)] if external and path.with_name(data).exists() else [path]
    if check and not graph.model.meta.get(_CHECKED):  # once: in another bundle only the metadata differ
        onnx.checker.check_model(str(path), full_check=True)
        graph.model.meta[_CHECKED] = True
    return files
