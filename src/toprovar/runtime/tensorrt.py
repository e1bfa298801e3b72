"""Target `tensorrt`: the bundle's engines on one stream, every scale a CUDA graph of its own.

Memory is allocated and graphs are captured while a `Loop` is made; a picture after that allocates nothing on the device
and launches one CUDA graph per engine run. Engines share their working memory, because they run one behind the other.
The C++ runtime does the same (cpp/tensorrt_target.cpp).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toprovar.errors import BundleError, TargetError
from toprovar.plugins.device import describe_gpu
from toprovar.plugins.library import load_library
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.cuda import Cuda, open_cuda
from toprovar.runtime.target import Array, Buffer, Run

__all__ = ["EngineRun", "TensorRt", "open"]

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
class EngineRun:
    """One engine at the shapes of one scale, bound to its buffers; calling it queues it."""

    engine: str
    profile: int
    shapes: Mapping[str, tuple[int, ...]]
    """Of the inputs."""
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
        self._logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._runtime = tensorrt.Runtime(self._logger)
        self._engines = {str(name): self._load(bundle, str(name)) for name in bundle.manifest.graphs}
        sizes = [_first_of(engine, "device_memory_size_v2", "device_memory_size") for engine in self._engines.values()]
        self._scratch_bytes = max(1, *sizes)
        self._scratch = self._cuda.allocate(self._scratch_bytes)
        graphs = ", CUDA graphs" if cuda_graphs else ""
        self.description = f"tensorrt {tensorrt.__version__} {self.gpu.name}, CUDA driver {self.gpu.driver}{graphs}"

    def graph(self, name: str) -> _Engine:
        """``prefix``, ``step``, ``advance`` or ``decoder``."""
        return _Engine(self, name, self._engines[name])

    def allocate(self, size_bytes: int) -> int:
        """Zeroed memory of the GPU; it lives as long as the process."""
        return self._cuda.allocate(size_bytes)

    def write(self, buffer: Buffer, values: Array) -> None:
        """Host to buffer."""
        host = np.ascontiguousarray(values)
        self._cuda.write(buffer.memory + buffer.offset_bytes, host.ctypes.data, buffer.size_bytes)

    def read(self, buffer: Buffer) -> Array:
        """Buffer to host, as a copy."""
        host = np.empty(buffer.shape, buffer.dtype)
        self._cuda.read(host.ctypes.data, buffer.memory + buffer.offset_bytes, buffer.size_bytes)
        return host

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

    def _load(self, bundle: Bundle, name: str) -> Any:
        if name not in self.info.engines:
            raise TargetError(f"{bundle.root}: has no TensorRT engine of {name}; build the engines again")
        path = bundle.path(self.info.engines[name])
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise TargetError(
                f"{path}: TensorRT refuses the engine, its messages above say why; build the engines again"
            )
        return engine

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
    """One graph of the bundle; every binding has an execution context of its own."""

    def __init__(self, target: TensorRt, name: str, engine: Any):
        self._target, self._name, self._engine = target, name, engine

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> EngineRun:
        """Fix every address; see `toprovar.runtime.target.GraphRunner`."""
        target, engine, cuda = self._target, self._engine, self._target._cuda
        self._check_tensors(inputs, outputs)
        context = target._context(self._name, engine)
        profile = self._profile(inputs)
        if not context.set_optimization_profile_async(profile, cuda.stream):
            raise TargetError(f"target tensorrt: engine {self._name} refuses its profile; its messages above say why")
        for name, buffer in inputs.items():
            if not context.set_input_shape(name, buffer.shape):
                raise TargetError(f"target tensorrt: engine {self._name} refuses {name} of shape {list(buffer.shape)}")
        for name, buffer in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, buffer.memory + buffer.offset_bytes):
                raise TargetError(f"target tensorrt: engine {self._name} refuses the address of {name}")
        for name, buffer in outputs.items():
            found = tuple(context.get_tensor_shape(name))
            if found != buffer.shape:
                raise BundleError(
                    f"engine {self._name} gives {name} as {list(found)}, the loop needs {list(buffer.shape)}; export again"
                )

        def enqueue() -> None:
            if not context.execute_async_v3(cuda.stream):
                raise TargetError(f"target tensorrt: engine {self._name} failed to run; its messages above say why")

        enqueue()  # what TensorRT does once for new shapes must not be captured
        cuda.synchronize()
        launch: Run = enqueue
        if target._cuda_graphs:
            cuda.begin_capture()
            try:
                enqueue()
            finally:
                launch = cuda.end_capture()
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        return EngineRun(self._name, profile, shapes, launch, context)

    def _check_tensors(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        trt, engine = self._target._trt, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            True: {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT},
            False: {name for name in names if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT},
        }
        for kind, given in ((True, inputs), (False, outputs)):
            different = sorted(found[kind] ^ set(given))
            if different:
                word = "input" if kind else "output"
                raise BundleError(
                    f"engine {self._name} and its graph differ in the {word} {different[0]!r}; build the engines again"
                )
        for name, buffer in {**inputs, **outputs}.items():
            dtype = _dtype_name(trt, engine.get_tensor_dtype(name))
            if dtype != buffer.dtype:
                raise BundleError(
                    f"engine {self._name} takes {name} as {dtype}, its graph as {buffer.dtype}; build the engines again"
                )

    def _profile(self, inputs: Mapping[str, Buffer]) -> int:
        """The profile that was made for these shapes: the one whose best they are, else the first that takes them."""
        engine, fitting = self._engine, []
        for profile in range(engine.num_optimization_profiles):
            limits = {name: _profile_shape(engine, name, profile) for name in inputs}
            if all(tuple(limits[name][1]) == buffer.shape for name, buffer in inputs.items()):
                return profile
            if all(
                len(least) == len(shape) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
                for (least, _, most), shape in ((limits[name], buffer.shape) for name, buffer in inputs.items())
            ):
                fitting.append(profile)
        if not fitting:
            shapes = ", ".join(f"{name} {list(buffer.shape)}" for name, buffer in inputs.items())
            raise TargetError(
                f"target tensorrt: engine {self._name} has no profile for {shapes}; build the engines again"
            )
        return fitting[0]


def _profile_shape(engine: Any, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
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
