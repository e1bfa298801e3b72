"""What a target is to the loop: memory, and graphs that run in it. Targets are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from toprovar.errors import TargetError

if TYPE_CHECKING:
    from toprovar.runtime.bundle import Bundle

__all__ = ["DTYPE_BYTES", "TARGETS", "Array", "Buffer", "GraphRunner", "Run", "Target", "open_target"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "bool": 1}
Array = npt.NDArray[Any]
Run = Callable[[], None]


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor in a target's memory.

    `memory` is what the target allocated (it keeps the bytes alive); `offset_bytes` is where the tensor begins in it.
    """

    memory: Any
    capacity_bytes: int
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def view(self, shape: Sequence[int], first_row: int = 0) -> Buffer:
        """The same memory in another shape, beginning `first_row` rows of that shape behind this tensor's begin."""
        offset = self.offset_bytes + first_row * prod(shape[1:]) * DTYPE_BYTES[self.dtype]
        view = replace(self, shape=tuple(shape), offset_bytes=offset)
        if offset + view.size_bytes > self.capacity_bytes:
            raise ValueError(f"a view {view.shape} from byte {offset} leaves a buffer of {self.capacity_bytes} bytes")
        return view


class GraphRunner(Protocol):
    """One graph of a bundle on a target."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Fix where every input is read and every output is written; the result runs the graph, as often as called."""


class Target(Protocol):
    """What runs graphs, and the memory that they run in.

    It may also have `scale_noise`, a faster one with the bytes of `toprovar.profiles.noise.scale_noise`.
    """

    description: str
    """Runtime, version and device, for reports."""

    def graph(self, name: str) -> GraphRunner:
        """``prefix``, ``step``, ``advance`` or ``decoder``."""

    def allocate(self, size_bytes: int) -> Any:
        """Zeroed memory, aligned for every dtype."""

    def write(self, buffer: Buffer, values: Array) -> None:
        """Host to buffer; shapes and dtypes agree."""

    def read(self, buffer: Buffer) -> Array:
        """Buffer to host, as a copy."""

    def synchronize(self) -> None:
        """Wait until everything queued has run."""


TARGETS = {
    "onnxruntime": "toprovar.runtime.onnxruntime",
    "tensorrt": "toprovar.runtime.tensorrt",
    "torch": "toprovar.runtime.torch",
}
"""Target -> the module with its ``open(bundle, **options)``."""


_NOT_RUN_YET = {
    "tensorrt-rtx": "needs an NVIDIA RTX GPU, and this version builds its engines but does not run them",
}


def open_target(bundle: Bundle, name: str, **options: Any) -> Target:
    """Load a bundle's graphs on a target.

    Raises:
        TargetError: an unknown target, one that this version cannot run, or one whose runtime is not installed.
    """
    if name not in TARGETS:
        reason = _NOT_RUN_YET.get(name, "no such target")
        raise TargetError(f"target {name!r}: {reason}; valid: {', '.join(TARGETS)}")
    target: Target = import_module(TARGETS[name]).open(bundle, **options)
    return target
