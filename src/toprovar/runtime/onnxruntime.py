"""Target `onnxruntime`: the bundle's graphs as they are, on the CPU or through the CUDA provider.

Every graph is bound to fixed addresses (I/O binding by pointer), one binding per scale; running it is one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from toprovar.errors import TargetError
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.machine import usable_cores
from toprovar.runtime.target import Array, Buffer, Run

__all__ = ["OnnxRuntime", "open"]

PROVIDERS = ("auto", "cpu", "cuda")
# onnx.TensorProto.DataType: ONNX Runtime takes the number, and NumPy has no name for bfloat16.
ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
_ERRORS_ONLY = 3


def open(bundle: Bundle, *, provider: str = "auto", threads: int | None = None) -> OnnxRuntime:
    """Load a bundle's graphs.

    Args:
        bundle: the bundle.
        provider: ``cpu``, ``cuda``, or ``auto``: ``cuda`` where this build of ONNX Runtime has it.
        threads: that share one operator; default: as many as the process may use cores.

    Raises:
        TargetError: ONNX Runtime is not installed, has no such provider, or refuses a graph.
    """
    return OnnxRuntime(bundle, provider, threads)


class OnnxRuntime:
    """The graphs of one bundle in ONNX Runtime, with memory on the provider's device."""

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetError("target onnxruntime: it is not installed; pip install 'toprovar[run]'") from error
        if provider not in PROVIDERS:
            raise TargetError(f"target onnxruntime: no provider {provider!r}; valid: {', '.join(PROVIDERS)}")
        if threads is not None and threads < 1:
            raise TargetError(f"target onnxruntime: {threads} threads; give 1 or more")
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if provider == "cuda" and not cuda:
            raise TargetError(
                "target onnxruntime: this build has no CUDA provider; use cpu, or pip install 'toprovar[gpu]' not [run]"
            )
        self.device = "cuda" if provider == "cuda" or (provider == "auto" and cuda) else "cpu"
        self.threads = threads or usable_cores()
        self.description = f"onnxruntime {onnxruntime.__version__} {self.device}"
        self._runtime = onnxruntime
        self._sessions = {str(name): self._load(bundle, name) for name in bundle.manifest.graphs}

    def graph(self, name: str) -> _Graph:
        """``prefix``, ``step``, ``advance`` or ``decoder``."""
        return _Graph(self._sessions[name], self.device)

    def allocate(self, size_bytes: int) -> Any:
        """Zeroed memory: an array of bytes, or an OrtValue of bytes on the GPU."""
        zeros = np.zeros(size_bytes, np.uint8)
        return zeros if self.device == "cpu" else self._runtime.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    def write(self, buffer: Buffer, values: Array) -> None:
        """Host to buffer."""
        begin, end = buffer.offset_bytes, buffer.offset_bytes + buffer.size_bytes
        # A GPU tensor is replaced as a whole, so what a view leaves out is read first.
        whole = buffer.size_bytes == buffer.capacity_bytes
        host = buffer.memory if self.device == "cpu" else _host(buffer, read=not whole)
        host[begin:end] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if self.device != "cpu":
            buffer.memory.update_inplace(host)

    def read(self, buffer: Buffer) -> Array:
        """Buffer to host, as a copy."""
        host = buffer.memory if self.device == "cpu" else _host(buffer, read=True)
        begin, end = buffer.offset_bytes, buffer.offset_bytes + buffer.size_bytes
        return host[begin:end].view(buffer.dtype).reshape(buffer.shape).copy()

    def synchronize(self) -> None:
        """Nothing to wait for: ONNX Runtime waits for the device at the end of every run."""

    def _load(self, bundle: Bundle, name: str) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _ERRORS_ONLY
        # Threads that wait by spinning take the cores from the next graph's threads and from everyone else on the
        # machine: 2.0 s of processor time per picture of the demo checkpoint instead of 1.2.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        if self.device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        path = bundle.path(bundle.graph(name).file)
        try:
            session = self._runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            reason = " ".join(str(error).split())[:300]
            raise TargetError(f"target onnxruntime: refuses {path}: {reason}") from error
        if self.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            raise TargetError(
                "target onnxruntime: the CUDA provider does not start (no GPU or CUDA libraries); use cpu"
            )
        return session


class _Graph:
    def __init__(self, session: Any, device: str):
        self._session = session
        self._device = device

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Fix every address; see `toprovar.runtime.target.GraphRunner`."""
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_input(name, self._device, 0, ELEMENT_TYPES[buffer.dtype], buffer.shape, _address(buffer))
        for name, buffer in outputs.items():
            binding.bind_output(name, self._device, 0, ELEMENT_TYPES[buffer.dtype], buffer.shape, _address(buffer))
        keep_alive = (dict(inputs), dict(outputs))

        def run(session: Any = self._session, _alive: Any = keep_alive) -> None:
            session.run_with_iobinding(binding)

        return run


def _address(buffer: Buffer) -> int:
    memory = buffer.memory
    base: int = memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data_ptr()
    return base + buffer.offset_bytes


def _host(buffer: Buffer, *, read: bool) -> Array:
    return np.array(buffer.memory.numpy()) if read else np.zeros(buffer.capacity_bytes, np.uint8)
