"""Engines of the full TensorRT, with our plugins inside: 10.15 to 11 strongly typed, and 8.6. No PyTorch here.

One engine per graph with an optimisation profile per scale and one set of weights. After parsing, every plugin node of
the graph must be a plugin layer: where TensorRT does not find a plugin it takes the function's body, without a word.

8.6 is weakly typed. So that it computes in the types that the graph states, every layer is given the type of its output
and the builder is told to obey; the graph itself goes through `lower86`.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import onnx

from ..errors import BundleError, FormatError, InputError, TargetError, ToprovarError
from ..kernels import contract
from ..plugins.device import Gpu, describe_gpu
from ..plugins.library import find_library, library_name, library_sha256, load_library
from ..profiles.files import model_from_json, sha256_file, sha256_json, write_bytes
from ..profiles.manifest import FileInfo, Manifest, TargetInfo
from .check_engine import find_fault
from .engine import (
    Builder,
    BuiltEngine,
    EngineOptions,
    ShapeProfile,
    Shapes,
    _first,
    _messages,
    add_profiles,
    build_engines,
    fix_sizes,
    fixed_sizes,
    set_options,
    shape_profiles,
    share_profiles,
)
from .engine_stages import link_weights
from .lower86 import lower, types_of

__all__ = ["TensorRtBuilder", "add_engines", "check_plugin_layers", "emit_trtexec", "trtexec_commands"]

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, steps done and steps in all."""

_ATTEMPTS = 3
"""At an engine that can be used: of 61 profiles of `step` that 8.6.0 built in one run, two cannot be (see `check_engine`)."""


class TensorRtBuilder:
    """Builds with the TensorRT of this Python, on the GPU that the engines are for.

    Args:
        timing_cache: file of measured kernels, read and written back; default: one per version, GPU and driver in the
            user's cache folder.
        progress: told how far a build is, where TensorRT says so (10 and 11).

    Raises:
        TargetError: TensorRT, its GPU or the plugin library is not there.
    """

    target: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt"

    def __init__(self, timing_cache: Path | None = None, progress: Progress | None = None) -> None:
        try:
            import tensorrt
        except (ImportError, OSError) as error:
            raise TargetError(
                f"target tensorrt: the builder cannot be imported ({error}); use an NVIDIA container, or install TensorRT "
                "8.6, or 10.15 to 11, with its Python binding"
            ) from error
        self._trt: Any = tensorrt
        self.version = str(tensorrt.__version__)
        self._major = int(self.version.split(".")[0])
        self.gpu: Gpu = describe_gpu()
        self.plugins = load_library(tensorrt)
        self._progress = progress
        self._builder: Any = None
        self._messages: Any = None
        self._timing_cache = timing_cache or _default_timing_cache(self.version, self.gpu)

    @property
    def identity(self) -> dict[str, str]:
        """What an engine depends on besides graph, shapes, options and version; part of the cache key."""
        return {**asdict(self.gpu), "plugins": library_sha256(self.plugins)}

    @property
    def machine(self) -> dict[str, str]:
        """What the manifest says of where the engines were built."""
        return {
            "gpu": self.gpu.name,
            "driver": self.gpu.driver,
            "compute_capability": self.gpu.compute_capability,
        }

    def build(self, graph: Path, profiles: Sequence[ShapeProfile], options: EngineOptions) -> BuiltEngine:
        """See `toprovar.exporter.engine.Builder.build`.

        Raises:
            TargetError: besides, of `_ATTEMPTS` engines none can be used.
        """
        if options.compute_capabilities and options.compute_capabilities != (self.gpu.compute_capability,):
            raise InputError(
                f"target tensorrt: engines for {', '.join(options.compute_capabilities)}; TensorRT builds for the GPU at "
                f"hand, {self.gpu.compute_capability}: leave compute_capabilities empty"
            )
        fault: str | None = None
        for _ in range(_ATTEMPTS):
            # What was measured for an engine that cannot be used may lead to it again.
            built, cache = self._build(graph, profiles, options, measured=fault is None)
            fault = find_fault(built.data, graph.name)
            if fault is None:
                self._write_timing_cache(cache)
                return built
            _log.warning("%s: TensorRT wrote an engine that cannot be used: %s", graph.name, fault)
        raise TargetError(
            f"target tensorrt: {graph.name}: of {_ATTEMPTS} engines that TensorRT {self.version} wrote none can be used; the "
            f"last: {fault}"
        )

    def _build(
        self, graph: Path, profiles: Sequence[ShapeProfile], options: EngineOptions, *, measured: bool
    ) -> tuple[BuiltEngine, Any]:
        """An engine, and its timing cache, which starts from what was measured before or anew."""
        trt, start = self._trt, time.perf_counter()
        builder, messages = self._start()
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, messages)
        with _readable(graph, profiles, self._major) as (path, types):
            parsed = parser.parse_from_file(str(path))
        if not parsed:
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise TargetError(f"target tensorrt: cannot parse {graph.name}: {_first(errors + messages.errors)}")
        check_plugin_layers(trt, network, graph)
        config = builder.create_builder_config()
        self._configure(config, options)
        if self._major == 8:
            _state_types(trt, network, types)
        add_profiles(builder, network, config, profiles, f"target tensorrt: {graph.name}")
        cache = self._set_timing_cache(config, measured)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise TargetError(f"target tensorrt: cannot build {graph.name}: {_first(messages.errors)}")
        return BuiltEngine(
            bytes(data), network.num_layers, time.perf_counter() - start, tuple(messages.warnings)
        ), cache

    def _start(self) -> tuple[Any, Any]:
        """The builder and its messages, which are of this build alone. Starting one takes seconds, so all graphs share it."""
        if self._builder is None:
            self._messages = _messages(self._trt)
            try:
                self._builder = self._trt.Builder(self._messages)
            except TypeError:  # what the binding makes of a null pointer
                pass
            if self._builder is None:
                raise TargetError(f"target tensorrt: the builder does not start: {_first(self._messages.errors)}")
        self._messages.errors.clear()
        self._messages.warnings.clear()
        return self._builder, self._messages

    def _network_flags(self) -> int:
        flags = self._trt.NetworkDefinitionCreationFlag
        # The numbers of these flags changed between 10 and 11, so they are asked for by name; 11 knows no other network.
        name = "EXPLICIT_BATCH" if self._major == 8 else "STRONGLY_TYPED"
        return 1 << int(getattr(flags, name)) if hasattr(flags, name) else 0

    def _configure(self, config: Any, options: EngineOptions) -> None:
        trt = self._trt
        set_options(trt, config, options)
        if self._major == 8:
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            # Contexts of several scales share a profile; with a plugin, 8.6 wants cuBLAS handles unless told otherwise.
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
            sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if self._progress is not None and hasattr(trt, "IProgressMonitor"):
            self._monitor = _monitor(trt, self._progress)  # TensorRT does not keep it alive
            config.progress_monitor = self._monitor

    def _set_timing_cache(self, config: Any, measured: bool) -> Any:
        path = self._timing_cache
        cache = config.create_timing_cache(path.read_bytes() if measured and path.is_file() else b"")
        if cache is None:
            _log.warning("%s is no timing cache of this TensorRT; starting a new one", path)
            cache = config.create_timing_cache(b"")
        # A cache knows the card that it was measured on; another of the same model will do, and the file is of one model.
        config.set_timing_cache(cache, ignore_mismatch=True)
        return cache

    def _write_timing_cache(self, cache: Any) -> None:
        """The file becomes what this build read and measured; of builds side by side, that of the last one stays."""
        try:
            self._timing_cache.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._timing_cache, bytes(cache.serialize()))
        except OSError as error:  # a read-only home: measured again next time
            _log.warning("%s cannot be written: %s", self._timing_cache, error)


def _default_timing_cache(version: str, gpu: Gpu) -> Path:
    root = os.environ.get("TOPROVAR_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "toprovar"
    )
    key = sha256_json({"version": version, **asdict(gpu)})[:16]
    return Path(root) / "tensorrt" / f"timing-{version}-{key}.cache"


@contextmanager
def _readable(graph: Path, profiles: Sequence[ShapeProfile], major: int) -> Iterator[tuple[Path, dict[str, int]]]:
    """A copy for the parser, with the sizes stated that never change and lowered for 8.6, beside links to its weights.

    And for 8.6 the types of its tensors, see `_lowered`.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / graph.name
        types: dict[str, int] = {}
        model = onnx.load(str(graph), load_external_data=False)
        fix_sizes(model, fixed_sizes(model, profiles))
        if major == 8:
            model, types = _lowered(model)
        onnx.save(model, str(copy))
        link_weights(model, graph.parent, Path(folder))
        yield copy, types


def _lowered(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A graph for the parser of 8.6, and the ONNX types of the tensors that it had and of its constants, by name."""
    lowered, inferred = lower(model), onnx.shape_inference.infer_shapes(model)
    return lowered, types_of(lowered.graph) | types_of(inferred.graph)


def check_plugin_layers(trt: Any, network: Any, graph: Path) -> None:
    """Every plugin node of the graph is a plugin layer of the network.

    Raises:
        TargetError: some are not: TensorRT took the function's body, or dropped them.
    """
    model = onnx.load(str(graph), load_external_data=False)
    wanted = Counter(node.op_type for node in model.graph.node if node.domain == contract.DOMAIN)
    kinds = {getattr(trt.LayerType, name) for name in ("PLUGIN_V2", "PLUGIN_V3") if hasattr(trt.LayerType, name)}
    found = sum(network.get_layer(i).type in kinds for i in range(network.num_layers))
    if found != sum(wanted.values()):
        names = ", ".join(f"{count} {name}" for name, count in sorted(wanted.items()))
        raise TargetError(
            f"target tensorrt: {graph.name} has {names}, the parsed network {found} plugin layers; TensorRT "
            f"{trt.__version__} did not find the plugins of namespace {contract.PLUGIN_NAMESPACE!r}: build the plugin "
            "library for this version"
        )


def _state_types(trt: Any, network: Any, types: Mapping[str, int]) -> None:
    """Weak typing, made strict: each layer computes and returns the floating-point type that the graph states.

    The network does not know it: before a build every floating-point tensor but its inputs reads as fp32, behind a cast to
    fp16, too, and constants as well. Tensors that the parser or the lowering made have the type of what they are made from.
    """
    kinds = {onnx.TensorProto.FLOAT: trt.float32, onnx.TensorProto.FLOAT16: trt.float16}
    floats, layers = tuple(kinds.values()), trt.LayerType
    found = {network.get_input(i).name: network.get_input(i).dtype for i in range(network.num_inputs)}
    # Plugins choose by format, casts say it themselves, constants and shapes compute nothing.
    left_alone = {layers.PLUGIN_V2, layers.CAST, layers.CONSTANT, layers.SHAPE}
    if onnx.TensorProto.FLOAT16 in types.values():
        # Told a type, what only moves values keeps 8.6.0's compiler from building a graph of both types ("Mismatched type
        # for tensor ... [Shuffle]"). In one of fp32 alone it must be told, or values may be moved as fp16: some builds of
        # `advance` gave wrong tokens, as it does where the threshold of its logits is rounded so (docs/tensorrt.md).
        left_alone |= {layers.SHUFFLE, layers.SLICE, layers.GATHER}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        read = next((found[one.name] for one in inputs if one is not None and found.get(one.name) in floats), None)
        for j in range(layer.num_outputs):
            output = layer.get_output(j)
            if output.dtype not in floats:
                continue
            stated = types.get(output.name) or types.get(layer.name, 0)  # a constant's layer has its name
            found[output.name] = kinds.get(stated, read or output.dtype)
            if layer.type not in left_alone:
                layer.set_output_type(j, found[output.name])
                if not j:
                    layer.precision = found[output.name]


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Passes on what TensorRT says; nested phases are named by their path."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            progress(phase_name, steps, steps)

    return Monitor()


# ---------------------------------------------------------------------------------------------------------------------
# trtexec


def emit_trtexec(
    version: str,
    graph: Path,
    profiles: Sequence[ShapeProfile],
    options: EngineOptions,
    plugins: Path,
    engine: Path,
    stated: Collection[str] = (),
    types: Mapping[str, str] | None = None,
) -> list[str]:
    """The trtexec commands that build the same engine.

    One command; for 8.6, whose trtexec has no option for profiles, one per profile, to engines numbered like them. Its
    graph must have been lowered (`python -m toprovar.exporter.lower86` writes it). Sizes that are the same in every
    profile, which we state in the graph, are dynamic for trtexec of 10 and 11, with one size as all three limits.

    Args:
        stated: inputs all sizes of which the graph states; trtexec refuses shapes where every input is one of them.
        types: for 8.6, of layers' outputs by the layer's name, as trtexec writes them: ``fp16``, ``fp32+int32``.
    """
    major = int(version.split(".")[0])
    base = ["trtexec", f"--onnx={graph}", f"--dynamicPlugins={plugins}"]
    base += ["--fp16", "--precisionConstraints=obey"] if major == 8 else []
    if types:
        spec = [f"{name}:{outputs}" for name, outputs in types.items()]
        base.append(f"--layerOutputTypes={','.join(spec)}")
        base.append(f"--layerPrecisions={','.join(one.split('+')[0] for one in spec)}")
    base += ["--stronglyTyped"] if major == 10 else []
    base += [] if options.tf32 else ["--noTF32"]
    if options.workspace_bytes is not None:
        base.append(f"--memPoolSize=workspace:{options.workspace_bytes / 2**20:g}")
    if options.optimization_level is not None:
        base.append(f"--builderOptimizationLevel={options.optimization_level}")
    if major == 8:
        base.append("--tacticSources=-CUDNN,-CUBLAS,-CUBLAS_LT")
        commands = [
            [*base, *_shape_options(profile, stated), f"--saveEngine={engine.with_suffix('')}.{i}{engine.suffix}"]
            for i, profile in enumerate(profiles)
        ]
    else:
        words = list(base)
        for i, profile in enumerate(profiles):
            words += [f"--profile={i}", *_shape_options(profile, stated)]
        commands = [[*words, f"--saveEngine={engine}"]]
    return [shlex.join([*words, "--skipInference"]) for words in commands]


_MOVES = frozenset(
    "Expand Flatten Gather GatherElements GatherND Pad Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split()
)
"""Operators whose layers move values (see `_state_types`)."""


def _layer_types(model: onnx.ModelProto) -> dict[str, str]:
    """What `_state_types` tells the layers of a graph, by the names of the lowered nodes that become them."""
    lowered, types = _lowered(model)
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    left_alone = {"Cast", "Constant", "Shape", *(_MOVES if onnx.TensorProto.FLOAT16 in types.values() else ())}
    found = {}
    for node in lowered.graph.node:
        read = next((types[name] for name in node.input if types.get(name) in kinds), 0)
        if node.op_type == "Cast":
            read = next(one.i for one in node.attribute if one.name == "to")
        for name in node.output:
            types.setdefault(name, read)
        if not node.domain and node.op_type not in left_alone and types[node.output[0]] in kinds:
            found[node.name] = "+".join(kinds.get(types[name], "int32") for name in node.output)
    return found


def _shape_options(profile: ShapeProfile, stated: Collection[str]) -> list[str]:
    names = [name for name, shape in profile.best.items() if shape and name not in stated]

    def shapes(of: Shapes) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, of[name]))}" for name in names)

    if not names:
        return []
    return [
        f"--minShapes={shapes(profile.least)}",
        f"--optShapes={shapes(profile.best)}",
        f"--maxShapes={shapes(profile.greatest)}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Engines for a bundle that exists


def add_engines(
    folder: Path,
    builder: Builder,
    options: EngineOptions | None = None,
    *,
    cache: Path | None = None,
    jobs: int = 1,
    make_builder: Callable[[], Builder] | None = None,
    on_engine: Callable[[str, int], None] | None = None,
) -> TargetInfo:
    """Build the engines of a bundle that was exported elsewhere, and enter them into its manifest.

    So a bundle can be exported where PyTorch is, and built where the GPU is. The manifest is replaced last: until then
    the bundle is what it was. `cache`, `jobs`, `make_builder`, `on_engine`: see `build_engines`.

    Raises:
        BundleError: the folder holds no bundle of this version, or a graph has changed since it was written.
        TargetError: the target cannot build a graph.
    """
    manifest = _read_manifest(folder)
    for graph in manifest.graphs.values():
        found = sha256_file(folder / graph.file)
        if found != manifest.files[graph.file].sha256:
            raise BundleError(f"{folder}: {graph.file} has changed since the bundle was written; copy the bundle again")
    info = build_engines(
        builder,
        folder,
        {str(name): graph for name, graph in manifest.graphs.items()},
        manifest.schedules,
        _tensor_shapes(folder / "constants.safetensors"),
        manifest.model,
        manifest.condition,
        options,
        cache=cache,
        jobs=jobs,
        make_builder=make_builder,
        on_engine=on_engine,
    )
    files = dict(manifest.files)
    for name in info.engines.values():
        path = folder / name
        files[name] = FileInfo(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    targets = {**manifest.targets, builder.target: info}
    # Checked as a whole again, as a reader will.
    document = manifest.model_copy(update={"targets": targets, "files": files}).model_dump(mode="json", by_alias=True)
    text = json.dumps(document, indent=1) + "\n"
    model_from_json(Manifest, text.encode(), str(folder / _MANIFEST), "manifest")
    write_bytes(folder / _MANIFEST, text.encode())
    return info


_MANIFEST = "manifest.json"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: has no {_MANIFEST}; a bundle is a folder written by toprovar export")
    try:
        manifest = model_from_json(Manifest, path.read_bytes(), str(path), "manifest")
    except FormatError as error:
        raise BundleError(str(error)) from error
    if manifest.contract_version != contract.CONTRACT_VERSION:
        raise BundleError(
            f"{folder}: made for version {manifest.contract_version} of the op contract, this toprovar has version "
            f"{contract.CONTRACT_VERSION}; export the bundle again"
        )
    return manifest


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file: its header alone is read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, path.stat().st_size)))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m toprovar.exporter.engine_tensorrt BUNDLE`."""
    parser = argparse.ArgumentParser(
        prog="python -m toprovar.exporter.engine_tensorrt",
        description="Build TensorRT engines for a bundle, on the GPU that will run them. Needs no PyTorch.",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--no-tf32", action="store_true", help="compute fp32 products in fp32")
    parser.add_argument("--workspace-mib", type=int, help="limit of scratch memory")
    parser.add_argument("--optimization-level", type=int, choices=range(6))
    parser.add_argument(
        "--shared-tokens",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="scales of at most N tokens (and more than the N before) share a profile: builds faster",
    )
    parser.add_argument(
        "--stages", type=int, default=1, help="cut step into so many engines, which run one behind the other"
    )
    parser.add_argument("--jobs", type=int, default=1, help="build so many engines side by side, each in a process")
    parser.add_argument("--timing-cache", type=Path, help="file of kernels measured on this GPU model")
    parser.add_argument("--engine-cache", type=Path, help="folder of engines that are not built again")
    parser.add_argument("--emit-trtexec", action="store_true", help="build nothing; print the equal trtexec commands")
    given = parser.parse_args(arguments)
    try:
        options = EngineOptions(
            batch=given.batch,
            tf32=not given.no_tf32,
            workspace_bytes=None if given.workspace_mib is None else given.workspace_mib << 20,
            optimization_level=given.optimization_level,
            shared_tokens=tuple(given.shared_tokens),
            stages=given.stages,
        )
        if given.emit_trtexec:
            if given.stages > 1:
                raise InputError("--emit-trtexec: trtexec builds whole graphs; leave out --stages")
            for line in trtexec_commands(given.bundle, options):
                print(line)
            return 0
        builder = TensorRtBuilder(given.timing_cache)
        info = add_engines(
            given.bundle,
            builder,
            options,
            cache=given.engine_cache,
            jobs=given.jobs,
            make_builder=functools.partial(TensorRtBuilder, given.timing_cache),
            on_engine=lambda name, shapes: print(f"engine {name}, {shapes} shapes", file=sys.stderr, flush=True),
        )
    except ToprovarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.bundle}: engines for TensorRT {info.version} on {info.gpu}")
    return 0


def trtexec_commands(folder: Path, options: EngineOptions, version: str | None = None) -> list[str]:
    """`emit_trtexec` for every graph of a bundle. `version` None: of the TensorRT of this Python.

    Raises:
        BundleError: the folder holds no bundle. TargetError: no version is given and there is no TensorRT.
    """
    manifest = _read_manifest(folder)
    if version is None:
        try:
            import tensorrt
        except (ImportError, OSError) as error:
            raise TargetError(
                f"--emit-trtexec: TensorRT cannot be imported ({error}); its version decides the options"
            ) from error
        version = str(tensorrt.__version__)
    try:
        plugins = find_library(version)
    except TargetError:
        plugins = Path(library_name(version))
    constants = _tensor_shapes(folder / "constants.safetensors")
    lines = []
    for name, graph in manifest.graphs.items():
        profiles = share_profiles(
            shape_profiles(
                graph, name, manifest.schedules, constants, manifest.model, manifest.condition, options.batch
            ),
            options.shared_tokens,
        )
        path, stated, types = folder / graph.file, [], None
        if version.startswith("8."):
            lowered = path.with_suffix(".opset17.onnx")
            model = onnx.load(str(path), load_external_data=False)
            sizes = fixed_sizes(model, profiles)
            fix_sizes(model, sizes)
            types = _layer_types(model)
            words = [f"--size={size}={value}" for size, value in sizes.items()]
            lines.append(shlex.join(["python", "-m", "toprovar.exporter.lower86", str(path), str(lowered), *words]))
            path = lowered
            stated = [one.name for one in graph.inputs if all(not isinstance(n, str) or n in sizes for n in one.shape)]
        lines += emit_trtexec(version, path, profiles, options, plugins, folder / f"{name}.engine", stated, types)
    return lines


if __name__ == "__main__":
    sys.exit(main())
