"""Graphs of a bundle -> engines of a target: one optimisation profile per scale, strongly typed. No PyTorch here.

A builder turns one ONNX file and the shapes it will be run with into an engine; everything else (which shapes, where
files go, what the manifest says) is the same for every builder. TensorRT-RTX builds on a machine without a GPU, and
knows no plugins, so it is given the function bodies.
"""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import onnx.inliner

from ..errors import InputError, TargetError
from ..kernels.contract import CONTRACT_VERSION
from ..profiles.files import sha256_file, sha256_json, write_bytes
from ..profiles.manifest import (
    Condition,
    GraphInfo,
    ModelInfo,
    ScaleStep,
    Schedule,
    TargetInfo,
    TensorInfo,
    stage_name,
)
from .engine_stages import cut_graph

__all__ = [
    "BUILDERS",
    "BuiltEngine",
    "Builder",
    "EngineOptions",
    "ShapeProfile",
    "TensorRtRtxBuilder",
    "build_engines",
    "open_builder",
    "share_profiles",
    "shape_profiles",
]

_log = logging.getLogger(__name__)

_REVISION = 5
"""Of what is done to a graph before it is built and to the engine behind it; part of the cache key."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ShapeProfile:
    """The shapes of one optimisation profile: least, best and greatest of every input; equal where it is fixed."""

    least: Shapes
    best: Shapes
    greatest: Shapes
    tokens: int | None = None
    """Of the scale, where the profile may be shared with others."""

    @classmethod
    def fixed(cls, shapes: Shapes, tokens: int | None = None) -> ShapeProfile:
        """One shape for every input."""
        return cls(shapes, shapes, shapes, tokens)


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built; part of the cache key.

    Attributes:
        batch: images per run; engines take this number alone.
        tf32: let fp32 matrix products run in TF32. Products of fp16 values are exact in it, so an fp16 bundle loses
            nothing but the rounding of softmax; an fp32 bundle loses 13 bits.
        workspace_bytes: limit of scratch memory while running; None leaves it to the builder.
        optimization_level: 0 to 5; None is the builder's default.
        shared_tokens: ascending; the scales of at most so many tokens, and more than the number before, share one
            optimisation profile of ``step``, tuned for the largest of them. Scales above the last, or all where there is no
            number, have their own. A build takes as long as it has profiles.
        stages: engines of ``step``, which run one behind the other and can be built side by side.
        compute_capabilities: GPUs that the engine is for, like ``("8.9", "12.0")``; none: every one that the builder
            supports (without a GPU), or the one at hand.
    """

    batch: int = 1
    tf32: bool = True
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    shared_tokens: tuple[int, ...] = ()
    stages: int = 1
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"engines for a batch of {self.batch} images; give 1 or more")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization_level is {self.optimization_level}; valid is 0 to 5")
        if any(a >= b for a, b in pairwise((0, *self.shared_tokens))):
            raise InputError(f"shared_tokens are {list(self.shared_tokens)}; give numbers of tokens that ascend")


@dataclass(frozen=True)
class BuiltEngine:
    """What a builder made of one graph."""

    data: bytes
    layers: int
    """Of the network as it was parsed."""
    seconds: float
    warnings: tuple[str, ...] = field(default=(), compare=False)


class Builder(Protocol):
    """One target's builder.

    It may also have `identity`, what its engines depend on besides graph, shapes, options and version (part of the cache
    key), and `machine`, the fields of `TargetInfo` that say where it builds.
    """

    @property
    def target(self) -> Literal["tensorrt", "tensorrt-rtx"]:
        """As the manifest calls it."""

    @property
    def version(self) -> str:
        """Of the builder's library."""

    def build(self, graph: Path, profiles: Sequence[ShapeProfile], options: EngineOptions) -> BuiltEngine:
        """Build the engine of an ONNX file.

        Raises:
            TargetError: the target cannot parse or build it.
        """


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def shape_profiles(
    graph: GraphInfo,
    name: str,
    schedules: Mapping[str, Schedule],
    constants: Mapping[str, tuple[int, ...]],
    model: ModelInfo,
    condition: Condition,
    batch: int = 1,
) -> list[ShapeProfile]:
    """The shapes that the loop runs a graph with: one profile per scale, those of all prompt classes, each once.

    Args:
        name: prefix, step, advance or decoder.
        constants: shapes of the tensors of ``constants.safetensors``.

    Raises:
        ValueError: an input has a size that the loop does not know (a defect of the export).
    """
    # The loop pads every text to the longest. (For a range of lengths 8.6.0 built a fused attention that read out of bounds.)
    sizes = {"B": batch, "R": batch * model.rows_per_image, "T": condition.text_maximum_tokens or 1}
    turns: list[ScaleStep | None] = [None]
    if name in ("step", "advance"):
        turns = [step for schedule in schedules.values() for step in schedule.steps]
    profiles: list[ShapeProfile] = []
    for step in turns:
        known = dict(sizes)
        if step is not None:
            known |= {"N": step.tokens, "K": step.keep, "P_global": step.past_global, "P_detail": step.past_detail}
            known |= {"h": step.grid[0], "w": step.grid[1]}
            if {"area_rows", "area_cols"} <= set(step.constants):
                rows, cols = (constants[step.constants[key]] for key in ("area_rows", "area_cols"))
                known["M"] = rows[1] * cols[1]
        shapes = {info.name: _shape(info, step, constants, known) for info in graph.inputs}
        profile = ShapeProfile.fixed(shapes, step.tokens if step is not None and name == "step" else None)
        if profile not in profiles:
            profiles.append(profile)
    return profiles


def share_profiles(profiles: Sequence[ShapeProfile], bounds: Sequence[int]) -> list[ShapeProfile]:
    """One profile in place of those of the scales between two bounds (see `EngineOptions`); a runtime takes what fits.

    Only those of ``step``: an engine of ``advance`` that TensorRT 8.6.0 built for a range of grids gave a wrong ``next_x`` for
    grids of 2 x 2 and 3 x 3 (seen on an H200; it builds fast, so it keeps its profiles).
    """
    groups: dict[int, list[ShapeProfile]] = {bound: [] for bound in bounds}
    alone: list[ShapeProfile] = []
    for profile in profiles:
        bound = next((n for n in bounds if profile.tokens is not None and profile.tokens <= n), None)
        (alone if bound is None else groups[bound]).append(profile)
    return [*(_shared(group) for group in groups.values() if group), *alone]


def _shared(profiles: Sequence[ShapeProfile]) -> ShapeProfile:
    """From the least to the greatest shapes of some, tuned for the greatest."""
    if len(profiles) == 1:
        return profiles[0]

    def bound(pick: Callable[[Sequence[int]], int], shapes: Sequence[Shapes]) -> Shapes:
        return {
            name: tuple(pick(sizes) for sizes in zip(*(one[name] for one in shapes), strict=True)) for name in shapes[0]
        }

    most = bound(max, [profile.greatest for profile in profiles])
    return ShapeProfile(bound(min, [profile.least for profile in profiles]), most, most)


def _shape(
    info: TensorInfo, step: ScaleStep | None, constants: Mapping[str, tuple[int, ...]], known: Mapping[str, int]
) -> tuple[int, ...]:
    if step is not None and info.name in step.constants:
        return constants[step.constants[info.name]]
    unknown = [size for size in info.shape if isinstance(size, str) and size not in known]
    if unknown:
        raise ValueError(f"{info.name} has a size {unknown[0]!r} that no scale states; known are {', '.join(known)}")
    return tuple(known[size] if isinstance(size, str) else size for size in info.shape)


# ---------------------------------------------------------------------------------------------------------------------
# All graphs of a bundle


def build_engines(
    builder: Builder,
    folder: Path,
    graphs: Mapping[str, GraphInfo],
    schedules: Mapping[str, Schedule],
    constants: Mapping[str, tuple[int, ...]],
    model: ModelInfo,
    condition: Condition,
    options: EngineOptions | None = None,
    *,
    cache: Path | None = None,
    jobs: int = 1,
    make_builder: Callable[[], Builder] | None = None,
    on_engine: Callable[[str, int], None] | None = None,
) -> TargetInfo:
    """Build the engines of every graph into ``engines/<target>/`` of a bundle's folder.

    Args:
        folder: of the bundle, with the ONNX files.
        cache: a folder of engines by key; what is there is not built again.
        jobs: processes that build side by side; more than one needs `make_builder`, which each of them calls.
        on_engine: called with the engine's name and its number of profiles, before it is built; with more than one job,
            when it is done.

    Returns: the target's entry of the manifest; the caller hashes the files.

    Raises:
        InputError: the graph of a step cannot be cut into so many stages.
        TargetError: the target cannot build a graph, or a process ended.
    """
    options = options or EngineOptions()
    place = folder / "engines" / builder.target
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tasks, keys = [], {}
        for name, graph in graphs.items():
            path = folder / graph.file
            stages = [(path, graph)]
            if name == "step" and options.stages > 1:
                stages = cut_graph(path, options.stages, Path(scratch))
            weights = _weights_sha256(path)
            for stage, (file, info) in enumerate(stages):
                profiles = share_profiles(
                    shape_profiles(info, name, schedules, constants, model, condition, options.batch),
                    options.shared_tokens,
                )
                engine = stage_name(name, stage)
                keys[engine] = _cache_key(builder, file, weights, profiles, options)
                kept = cache / f"{keys[engine]}.engine" if cache is not None else None
                tasks.append(_Task(engine, file, profiles, options, place / f"{engine}.engine", kept))
        missing = [task for task in tasks if not task.take_kept()]
        if jobs > 1 and make_builder is not None:
            for task in _build_side_by_side(missing, jobs, make_builder):
                if on_engine:
                    on_engine(task.engine, len(task.profiles))
        else:
            for task in missing:
                if on_engine:
                    on_engine(task.engine, len(task.profiles))
                task.build(builder)
    return TargetInfo(
        engines={task.engine: f"engines/{builder.target}/{task.out.name}" for task in tasks},
        version=builder.version,
        batch=options.batch,
        cache_key=sha256_json(dict(sorted(keys.items()))),
        **getattr(builder, "machine", {}),
    )


@dataclass(frozen=True)
class _Task:
    """One engine to build."""

    engine: str
    graph: Path
    profiles: list[ShapeProfile]
    options: EngineOptions
    out: Path
    kept: Path | None
    """Where the engine is kept for the next time."""

    def take_kept(self) -> bool:
        """Whether the engine was built before and is there now."""
        if self.kept is None or not self.kept.is_file():
            return False
        write_bytes(self.out, self.kept.read_bytes())
        return True

    def build(self, builder: Builder) -> None:
        built = builder.build(self.graph, self.profiles, self.options)
        _log.info("%s: %d layers, %d profiles, %.1f s", self.engine, built.layers, len(self.profiles), built.seconds)
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.kept, built.data)
        write_bytes(self.out, built.data)


def _build_side_by_side(tasks: Sequence[_Task], jobs: int, make_builder: Callable[[], Builder]) -> Iterator[_Task]:
    """Build each in a process of its own, the longest first; gives each task when it is done. The first error ends all.

    A builder holds gigabytes, which its process gives back when it ends; starting one again takes seconds.
    """
    longest_first = sorted(tasks, key=lambda task: len(task.profiles) * task.graph.stat().st_size, reverse=True)
    others = set(multiprocessing.active_children())
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_build_apart, task, make_builder): task for task in longest_first}
        try:
            for done in as_completed(running):
                done.result()
                yield running[done]
        except BrokenProcessPool as error:
            raise TargetError(
                "a process that built an engine ended without a word, as when memory runs out; build with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):  # minutes of work that nobody waits for
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                time.sleep(0.1)


def _build_apart(task: _Task, make_builder: Callable[[], Builder]) -> None:
    processes = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
    with ProcessPoolExecutor(1, processes) as alone:
        alone.submit(_build_in_process, task, make_builder).result()


def _build_in_process(task: _Task, make_builder: Callable[[], Builder]) -> None:
    task.build(make_builder())


def _weights_sha256(graph: Path) -> str | None:
    weights = graph.with_name(graph.name + ".data")
    return sha256_file(weights) if weights.is_file() else None


def _cache_key(
    builder: Builder, graph: Path, weights: str | None, profiles: Sequence[ShapeProfile], options: EngineOptions
) -> str:
    """What an engine depends on: the bytes of graph and weights, shapes, options, and versions."""
    return sha256_json(
        {
            "graph": sha256_file(graph),
            "weights": weights,
            "profiles": [[dict(one.least), dict(one.best), dict(one.greatest)] for one in profiles],
            "options": asdict(options),
            "target": builder.target,
            "version": builder.version,
            "identity": dict(getattr(builder, "identity", {})),
            "contract": CONTRACT_VERSION,
            "revision": _REVISION,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT-RTX

_LONGEST_TOPK = 3840
"""TensorRT's TopK takes no more; our selection plugin does, its function body does not."""


class TensorRtRtxBuilder:
    """Builds with TensorRT-RTX: no GPU needed to build, one of compute capability 7.5, 8.6, 8.9 or 12.x to run.

    Raises:
        TargetError: the package tensorrt-rtx is not installed.
    """

    target: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt-rtx"

    def __init__(self) -> None:
        try:
            import tensorrt_rtx
        except (ImportError, OSError) as error:
            raise TargetError(
                f"target tensorrt-rtx: the builder cannot be imported ({error}); install it with "
                "pip install 'toprovar[tensorrt-rtx]'"
            ) from error
        self._trt: Any = tensorrt_rtx
        self.version = str(tensorrt_rtx.__version__)

    def build(self, graph: Path, profiles: Sequence[ShapeProfile], options: EngineOptions) -> BuiltEngine:
        """See `Builder.build`."""
        trt = self._trt
        start = time.perf_counter()
        _check_selection(graph, profiles)
        messages = _messages(trt)
        builder = trt.Builder(messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, messages)
        with tempfile.TemporaryDirectory() as scratch:
            inlined = _inlined(graph, profiles, Path(scratch))
            parsed = parser.parse(inlined.read_bytes(), str(graph))
        if not parsed:
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise TargetError(f"target tensorrt-rtx: cannot parse {graph.name}: {_first(errors + messages.errors)}")
        config = builder.create_builder_config()
        self._configure(config, options)
        add_profiles(builder, network, config, profiles, f"target tensorrt-rtx: {graph.name}")
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise TargetError(f"target tensorrt-rtx: cannot build {graph.name}: {_first(messages.errors)}")
        return BuiltEngine(bytes(data), network.num_layers, time.perf_counter() - start, tuple(messages.warnings))

    def _configure(self, config: Any, options: EngineOptions) -> None:
        trt = self._trt
        set_options(trt, config, options)
        if options.compute_capabilities:
            known = {_dotted(name): name for name in vars(trt.ComputeCapability) if name.startswith("SM")}
            unknown = [one for one in options.compute_capabilities if one not in known]
            if unknown:
                valid = ", ".join(sorted(known))
                raise InputError(f"compute capability {unknown[0]!r}: TensorRT-RTX builds for {valid}")
            config.num_compute_capabilities = len(options.compute_capabilities)
            for i, one in enumerate(options.compute_capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, known[one]), i)


def _dotted(name: str) -> str:
    """SM89 -> 8.9, SM120 -> 12.0"""
    return f"{name[2:-1]}.{name[-1]}"


def _messages(trt: Any) -> Any:
    """A logger that keeps warnings and errors, for one-line errors of ours."""

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
                _log.debug("%s", message)

    return Messages()


def set_options(trt: Any, config: Any, options: EngineOptions) -> None:
    """What every TensorRT takes from the options in the same way."""
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[ShapeProfile], what: str) -> None:
    """One optimisation profile for each of `profiles`; inputs of fixed shape have none, nor a network of nothing else.

    Raises:
        TargetError: the builder refuses the shapes; the message begins with `what`.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    for shapes in profiles if dynamic else ():
        profile = builder.create_optimization_profile()
        for name in dynamic:
            profile.set_shape(name, shapes.least[name], shapes.best[name], shapes.greatest[name])
        if config.add_optimization_profile(profile) < 0:
            raise TargetError(f"{what} refuses the shapes {dict(shapes.best)}")


def fixed_sizes(model: onnx.ModelProto, profiles: Sequence[ShapeProfile]) -> dict[str, int]:
    """Named sizes of a graph's inputs, such as rows and text, that are the same in every profile."""
    sizes: dict[str, set[int]] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                found = {shapes[value.name][axis] for one in profiles for shapes in (one.least, one.best, one.greatest)}
                sizes.setdefault(dim.dim_param, set()).update(found)
    return {name: min(found) for name, found in sizes.items() if len(found) == 1}


def fix_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """State sizes wherever their names stand: what is known needs no kernel for dynamic shapes."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _first(messages: Sequence[str]) -> str:
    return " ".join(messages[0].split())[:500] if messages else "the builder gave no reason"


def _inlined(graph: Path, profiles: Sequence[ShapeProfile], scratch: Path) -> Path:
    """A copy without functions, every node with a name of its own; external weights stay where they are."""
    model = onnx.load(str(graph), load_external_data=False)
    fix_sizes(model, fixed_sizes(model, profiles))
    inlined = scratch / graph.name
    onnx.save(onnx.inliner.inline_local_functions(model), str(inlined))
    return inlined


def _check_selection(graph: Path, profiles: Sequence[ShapeProfile]) -> None:
    most = max((shapes.greatest["keep_slots"][0] for shapes in profiles if "keep_slots" in shapes.greatest), default=0)
    if most > _LONGEST_TOPK:
        raise TargetError(
            f"target tensorrt-rtx: {graph.name} keeps {most} tokens at a scale; TensorRT's TopK ends at "
            f"{_LONGEST_TOPK}; keep fewer in the profile, drop that scale, or use a target with the selection plugin"
        )


def _tensorrt() -> Builder:
    from .engine_tensorrt import TensorRtBuilder

    return TensorRtBuilder()


BUILDERS: dict[str, Callable[[], Builder]] = {"tensorrt": _tensorrt, "tensorrt-rtx": TensorRtRtxBuilder}
"""Target -> its builder."""


def open_builder(target: str) -> Builder:
    """The builder of a target.

    Raises:
        TargetError: engines cannot be built for it, or its builder is not installed.
    """
    if target not in BUILDERS:
        raise TargetError(f"target {target!r}: no engines are built for it; valid: {', '.join(BUILDERS)}")
    return BUILDERS[target]()
