"""The CUDA driver API as the TensorRT target uses it, through ctypes: no CUDA package, and one binding for CUDA 12 and 13.

The names are those that the driver has kept since CUDA 12.0 (`cuMemAlloc_v2` is what `cuMemAlloc` means in C).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from ..errors import TargetError

__all__ = ["Cuda", "Graph", "open_cuda"]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.c_void_p, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.c_void_p, ctypes.c_int),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.c_void_p, ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemsetD8Async": (ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "cuStreamCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuStreamSynchronize": (ctypes.c_void_p,),
    "cuStreamBeginCapture_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuStreamEndCapture": (ctypes.c_void_p, ctypes.c_void_p),
    "cuGraphInstantiateWithFlags": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong),
    "cuGraphDestroy": (ctypes.c_void_p,),
    "cuGraphExecDestroy": (ctypes.c_void_p,),
    "cuGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuEventDestroy_v2": (ctypes.c_void_p,),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventElapsedTime": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
}


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, cuda: Cuda, handle: int) -> None:
        self._cuda, self._handle = cuda, handle

    def __call__(self) -> None:
        self._cuda.call("cuGraphLaunch", "running a CUDA graph", self._handle, self._cuda.stream)

    def __del__(self) -> None:
        self._cuda.driver.cuGraphExecDestroy(self._handle)


class Cuda:
    """One GPU's primary context and one stream in it.

    Raises:
        TargetError: no driver, no GPU of this number, or a call that fails.
    """

    def __init__(self, device: int = 0) -> None:
        self.driver = _driver()
        handle, pointer = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", f"opening GPU {device}", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", "starting the GPU", ctypes.byref(pointer), handle.value)
        self.call("cuCtxSetCurrent", "starting the GPU", pointer.value)
        self.call("cuStreamCreate", "making a stream", ctypes.byref(pointer), _NON_BLOCKING)
        assert pointer.value is not None
        self.stream: int = pointer.value

    def call(self, name: str, what: str, *arguments: object) -> None:
        """Call the driver; `what` is what the error says was tried."""
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise TargetError(f"target tensorrt: {what} failed with {_reason(self.driver, code)}")

    def allocate(self, size_bytes: int) -> int:
        """Zeroed device memory."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", f"allocating {size_bytes} bytes of GPU memory", ctypes.byref(address), size_bytes)
        self.call("cuMemsetD8Async", "clearing GPU memory", address.value, 0, size_bytes, self.stream)
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self.driver.cuMemFree_v2(address)

    def write(self, address: int, host: int, size_bytes: int) -> None:
        """Copy to the device; the host memory may be reused afterwards."""
        self.call("cuMemcpyHtoDAsync_v2", "copying to the GPU", address, host, size_bytes, self.stream)
        self.synchronize()

    def read(self, host: int, address: int, size_bytes: int) -> None:
        """Copy from the device, after everything queued has run."""
        self.call("cuMemcpyDtoHAsync_v2", "copying from the GPU", host, address, size_bytes, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.call("cuStreamSynchronize", "running on the GPU", self.stream)

    def elapsed(self, run: Callable[[], None], count: int) -> list[float]:
        """Milliseconds on the GPU of each of so many runs, queued behind each other, between two events on the stream."""
        pointer, events = ctypes.c_void_p(), []
        try:
            for _ in range(2 * count):
                self.call("cuEventCreate", "making an event", ctypes.byref(pointer), 0)
                events.append(pointer.value)
            for begin, end in zip(events[::2], events[1::2], strict=True):
                self.call("cuEventRecord", "recording an event", begin, self.stream)
                run()
                self.call("cuEventRecord", "recording an event", end, self.stream)
            self.synchronize()
            found, ms = [], ctypes.c_float()
            for begin, end in zip(events[::2], events[1::2], strict=True):
                self.call("cuEventElapsedTime", "reading an event", ctypes.byref(ms), begin, end)
                found.append(ms.value)
            return found
        finally:
            for event in events:
                self.driver.cuEventDestroy_v2(event)

    def begin_capture(self) -> None:
        """What is queued from here on is recorded, not run."""
        self.call("cuStreamBeginCapture_v2", "capturing a CUDA graph", self.stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self) -> Graph:
        """The graph of what was recorded."""
        captured, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamEndCapture", "capturing a CUDA graph", self.stream, ctypes.byref(captured))
        try:
            self.call("cuGraphInstantiateWithFlags", "making a CUDA graph", ctypes.byref(executable), captured.value, 0)
        finally:
            self.driver.cuGraphDestroy(captured.value)
        assert executable.value is not None
        return Graph(self, executable.value)


def _reason(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    todo = {_OUT_OF_MEMORY: "; free GPU memory, or use a smaller batch", _NO_DEVICE: "; run on a machine with a GPU"}
    return f"CUDA error {code} ({(text.value or b'unknown').decode()}){todo.get(code, '')}"


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TargetError(
            "target tensorrt: no CUDA driver (libcuda.so.1); install the NVIDIA driver, or in a container use --gpus all"
        ) from error
    for name, types in _SIGNATURES.items():
        try:
            function = getattr(driver, name)
        except AttributeError as error:
            raise TargetError(
                f"target tensorrt: the CUDA driver has no {name}; install one of CUDA 12.0 or later"
            ) from error
        function.argtypes, function.restype = types, ctypes.c_int
    code = driver.cuInit(0)
    if code:
        raise TargetError(f"target tensorrt: CUDA does not start: {_reason(driver, code)}")
    return driver


def open_cuda(device: int = 0) -> Cuda:
    """The GPU of this number; see `Cuda`."""
    return Cuda(device)
