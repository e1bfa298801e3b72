"""Target `tensorrt`: the bundle's engines on one stream, every scale a CUDA graph of its own.

Memory is allocated and graphs are captured while a `Loop` is made; a picture after that allocates nothing on the device
and launches one CUDA graph per engine run. Engines share their working memory, because they run one behind the other.
The C++ runtime does the same (cpp/tensorrt_target.cpp).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toprovar.errors import BundleError, TargetError
from toprovar.plugins.device import describe_gpu
from toprovar.plugins.library import load_library, noise_of
from toprovar.profiles.manifest import stage_name
from toprovar.profiles.noise import check_noise
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.cuda import Cuda, open_cuda
from toprovar.runtime.target import Array, Buffer, Run

__all__ = ["EngineInputs", "EngineRun", "TensorRt", "open"]

NAME = "tensorrt"


def open(bundle: Bundle, *, device: int = 0, cuda_graphs: bool = True) -> TensorRt:
    """Load a bundle's engines.

    Args:
        bundle: with engines for the TensorRT and the GPU at hand.
        device: number of the GPU.
        cuda_graphs: capture every engine run; without, the host launches every kernel.

    Raises:
        TargetError: TensorRT, GPU, plugins or engines are missing, or the engines were built for others.
    """
    return TensorRt(bundle, device, cuda_graphs)


@dataclass(frozen=True)
class EngineInputs:
    """One engine at the shapes of one scale."""

    engine: str
    """Among those of the manifest."""
    profile: int
    inputs: Mapping[str, Buffer]


@dataclass(frozen=True)
class EngineRun:
    """One graph at the shapes of one scale, bound to its buffers; calling it queues it."""

    stages: tuple[EngineInputs, ...]
    """The engines that run, one behind the other; most graphs have one."""
    _launch: Run
    _alive: Any = field(repr=False)
    """What a captured graph uses and does not hold."""

    def __call__(self) -> None:
        self._launch()


class TensorRt:
    """The engines of one bundle."""

    def __init__(self, bundle: Bundle, device: int = 0, cuda_graphs: bool = True):
        try:
            import tensorrt
        except (ImportError, OSError) as error:
            raise TargetError(
                f"target tensorrt: TensorRT cannot be imported ({error}); use an NVIDIA container, or install TensorRT 8.6, "
                "or 10.15 to 11, with its Python binding"
            ) from error
        self._trt: Any = tensorrt
        self._cuda_graphs = cuda_graphs
        self._check(bundle, device)
        self._cuda: Cuda = open_cuda(device)
        self.plugins: Path = load_library(tensorrt)
        self._noise = noise_of(self.plugins)
        self._logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._runtime = tensorrt.Runtime(self._logger)
        self._stages = {str(name): self._load(bundle, str(name)) for name in bundle.manifest.graphs}
        engines = [engine for stages in self._stages.values() for engine in stages.values()]
        sizes = [_first_of(engine, "device_memory_size_v2", "device_memory_size") for engine in engines]
        self._scratch_bytes = max(1, *sizes)
        self._scratch = self._cuda.allocate(self._scratch_bytes)
        graphs = ", CUDA graphs" if cuda_graphs else ""
        self.description = f"tensorrt {tensorrt.__version__} {self.gpu.name}, CUDA driver {self.gpu.driver}{graphs}"

    def graph(self, name: str) -> _Engine:
        """``prefix``, ``step``, ``advance`` or ``decoder``."""
        return _Engine(self, name, self._stages[name])

    def allocate(self, size_bytes: int) -> int:
        """Zeroed memory of the GPU; it lives as long as the process."""
        return self._cuda.allocate(size_bytes)

    def write(self, buffer: Buffer, values: Array) -> None:
        """Host to buffer."""
        host = np.ascontiguousarray(values)
        self._cuda.write(buffer.memory + buffer.offset_bytes, host.ctypes.data, buffer.size_bytes)

    def read(self, buffer: Buffer) -> Array:
        """Buffer to host, as a copy."""
        return self.read_bytes(buffer).view(buffer.dtype).reshape(buffer.shape)

    def read_bytes(self, buffer: Buffer) -> Array:
        """As `read`, whatever the type: its bytes."""
        host = np.empty(buffer.size_bytes, np.uint8)
        self._cuda.read(host.ctypes.data, buffer.memory + buffer.offset_bytes, buffer.size_bytes)
        return host

    def scale_noise(self, seeds: Sequence[int], scale: int, tokens: int, logits: int) -> Array:
        """See `toprovar.profiles.noise.scale_noise`."""
        for seed in seeds:
            check_noise(seed, scale, tokens * logits)
        return self._noise(seeds, scale, tokens, logits)

    def elapsed(self, run: Run, count: int) -> list[float]:
        """Milliseconds on the GPU of each of so many runs, queued behind each other."""
        return self._cuda.elapsed(run, count)

    def synchronize(self) -> None:
        """Wait until everything queued has run."""
        self._cuda.synchronize()

    # -----------------------------------------------------------------------------------------------------------------

    def _check(self, bundle: Bundle, device: int) -> None:
        """Whether the bundle's engines are for what is here."""
        targets = {str(name): info for name, info in bundle.manifest.targets.items()}
        if NAME not in targets:
            raise TargetError(
                f"{bundle.root}: has no engines for TensorRT; export it with --target tensorrt, or add them with "
                f"`python -m toprovar.exporter.engine_tensorrt {bundle.root}` on this machine"
            )
        info = self.info = targets[NAME]
        self.gpu = describe_gpu(device)
        for what, built, here in (
            ("TensorRT", info.version, str(self._trt.__version__)),
            ("GPU", info.gpu, self.gpu.name),
            ("compute capability", info.compute_capability, self.gpu.compute_capability),
        ):
            if built is not None and _three_parts(built) != _three_parts(here):
                raise TargetError(
                    f"{bundle.root}: its engines were built for {what} {built}, here is {here}; build them here with "
                    f"`python -m toprovar.exporter.engine_tensorrt {bundle.root}`"
                )

    def _load(self, bundle: Bundle, graph: str) -> dict[str, Any]:
        """The engines of a graph in the order in which they run."""
        if graph not in self.info.engines:
            raise TargetError(f"{bundle.root}: has no TensorRT engine of {graph}; build the engines again")
        engines: dict[str, Any] = {}
        while (name := stage_name(graph, len(engines))) in self.info.engines:
            path = bundle.path(self.info.engines[name])
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engines[name] = self._runtime.deserialize_cuda_engine(content)
            if engines[name] is None:
                raise TargetError(
                    f"{path}: TensorRT refuses the engine, its messages above say why; build the engines again"
                )
        return engines

    def _context(self, name: str, engine: Any) -> Any:
        strategy = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if strategy is None:  # 8.6
            context = engine.create_execution_context_without_device_memory()
        else:
            context = engine.create_execution_context(strategy.USER_MANAGED)
        if context is None:
            raise TargetError(f"target tensorrt: engine {name} gives no execution context; free GPU memory")
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch, self._scratch_bytes)
        else:
            context.device_memory = self._scratch
        return context


class _Engine:
    """One graph of the bundle; every binding has execution contexts of its own."""

    def __init__(self, target: TensorRt, name: str, stages: Mapping[str, Any]):
        self._target, self._name, self._stages = target, name, stages
        self._sizes: dict[str, int] = {}
        made: set[str] = set()
        for engine in stages.values():
            inputs, outputs = self._tensors(engine)
            for tensor in made & set(inputs):
                size = max(self._bytes(engine, tensor, profile) for profile in range(engine.num_optimization_profiles))
                self._sizes[tensor] = max(size, self._sizes.get(tensor, 1))
            made |= set(outputs)
        self._between = {tensor: target.allocate(size) for tensor, size in self._sizes.items()}
        """Memory of what one stage leaves to a later one. Scales run one behind the other, so they share it."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> EngineRun:
        """Fix every address; see `toprovar.runtime.target.GraphRunner`."""
        cuda, buffers = self._target._cuda, {**inputs, **outputs}
        self._check_names(inputs, outputs)
        stages, contexts = [], []
        for name, engine in self._stages.items():
            stage, context = self._bind_stage(name, engine, buffers)
            stages.append(stage)
            contexts.append(context)

        def enqueue() -> None:
            for stage, context in zip(stages, contexts, strict=True):
                if not context.execute_async_v3(cuda.stream):
                    raise TargetError(
                        f"target tensorrt: engine {stage.engine} failed to run; its messages above say why"
                    )

        enqueue()  # what TensorRT does once for new shapes must not be captured
        cuda.synchronize()
        launch: Run = enqueue
        if self._target._cuda_graphs:
            cuda.begin_capture()
            try:
                enqueue()
            finally:
                launch = cuda.end_capture()
        return EngineRun(tuple(stages), launch, contexts)

    def _bind_stage(self, name: str, engine: Any, buffers: dict[str, Buffer]) -> tuple[EngineInputs, Any]:
        """One engine on its buffers; what it leaves to later ones is entered into `buffers`."""
        target = self._target
        context = target._context(name, engine)
        inputs, outputs = self._tensors(engine)
        profile = self._profile(name, engine, {tensor: buffers[tensor] for tensor in inputs})
        if not context.set_optimization_profile_async(profile, target._cuda.stream):
            raise TargetError(f"target tensorrt: engine {name} refuses its profile; its messages above say why")
        for tensor in inputs:
            if not context.set_input_shape(tensor, buffers[tensor].shape):
                found = list(buffers[tensor].shape)
                raise TargetError(f"target tensorrt: engine {name} refuses {tensor} of shape {found}")
        for tensor in outputs:
            shape = tuple(context.get_tensor_shape(tensor))
            if tensor not in buffers:
                dtype = _dtype_name(target._trt, engine.get_tensor_dtype(tensor))
                buffers[tensor] = Buffer(self._between[tensor], self._sizes[tensor], dtype, shape)
            elif shape != buffers[tensor].shape:
                raise BundleError(
                    f"engine {name} gives {tensor} as {list(shape)}, the loop needs {list(buffers[tensor].shape)}; "
                    "export again"
                )
        for tensor in (*inputs, *outputs):
            buffer, dtype = buffers[tensor], _dtype_name(target._trt, engine.get_tensor_dtype(tensor))
            if dtype != buffer.dtype:
                raise BundleError(
                    f"engine {name} takes {tensor} as {dtype}, its graph as {buffer.dtype}; build the engines again"
                )
            if not context.set_tensor_address(tensor, buffer.memory + buffer.offset_bytes):
                raise TargetError(f"target tensorrt: engine {name} refuses the address of {tensor}")
        return EngineInputs(name, profile, {tensor: buffers[tensor] for tensor in inputs}), context

    def _tensors(self, engine: Any) -> tuple[list[str], list[str]]:
        """Names of inputs and of outputs."""
        mode, names = self._target._trt.TensorIOMode, [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        return inputs, [name for name in names if name not in inputs]

    def _bytes(self, engine: Any, tensor: str, profile: int) -> int:
        """The most that an input takes in a profile."""
        dtype = _dtype_name(self._target._trt, engine.get_tensor_dtype(tensor))
        return Buffer(0, 0, dtype, _profile_shape(engine, tensor, profile)[2]).size_bytes

    def _check_names(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        found: tuple[set[str], set[str]] = (set(), set())
        inside = set(self._between) - set(outputs)
        for engine in self._stages.values():
            for names, more in zip(found, self._tensors(engine), strict=True):
                names.update(set(more) - inside)
        found[0].difference_update(outputs)
        for word, names, given in zip(("input", "output"), found, (inputs, outputs), strict=True):
            different = sorted(names ^ set(given))
            if different:
                raise BundleError(
                    f"engine {self._name} and its graph differ in the {word} {different[0]!r}; build the engines again"
                )

    def _profile(self, name: str, engine: Any, inputs: Mapping[str, Buffer]) -> int:
        """The profile that was made for these shapes: the one whose best they are, else the first that takes them."""
        fitting = []
        for profile in range(engine.num_optimization_profiles):
            limits = {tensor: _profile_shape(engine, tensor, profile) for tensor in inputs}
            if all(tuple(limits[tensor][1]) == buffer.shape for tensor, buffer in inputs.items()):
                return profile
            if all(
                len(least) == len(shape) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
                for (least, _, most), shape in ((limits[tensor], buffer.shape) for tensor, buffer in inputs.items())
            ):
                fitting.append(profile)
        if not fitting:
            shapes = ", ".join(f"{tensor} {list(buffer.shape)}" for tensor, buffer in inputs.items())
            raise TargetError(f"target tensorrt: engine {name} has no profile for {shapes}; build the engines again")
        return fitting[0]


def _profile_shape(engine: Any, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
    """Least, best and greatest; a tensor of fixed shape is in no profile."""
    fixed = tuple(engine.get_tensor_shape(name))
    if -1 not in fixed:
        return fixed, fixed, fixed
    return tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile))


def _dtype_name(trt: Any, dtype: Any) -> str:
    for name in ("float32", "float16", "bfloat16", "int32", "int64", "bool"):
        if hasattr(trt, name) and getattr(trt, name) == dtype:
            return name
    return str(dtype)


def _first_of(thing: Any, *names: str) -> int:
    return next(int(getattr(thing, name)) for name in names if hasattr(thing, name))


def _three_parts(version: str) -> str:
    """Versions are compared without their build number; other words are left as they are."""
    parts = version.split(".")
    return ".".join(parts[:3]) if all(part.isdecimal() for part in parts) else version
