"""Launches the kernels of a cubin library (`aot.py`) through the CUDA driver: no Triton, no torch, no compiler.

    library = Library(Path("cubins"))
    library.load("mean_heads_sm90_h32").launch({"per_head": a, "mean": b, "n_queries": 4096, "heads": 16}, rows=2)

Pointers are device addresses (ints) in the current CUDA context; the caller keeps them alive and aligned to 16 bytes.
A TensorRT plugin does the same in C++; `AttentionLaunch` is the arithmetic it repeats.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FormatError, TargetError
from . import contract, tuning
from .aot import FORMAT_VERSION, INDEX_NAME

__all__ = ["AttentionLaunch", "Kernel", "Library"]

_SHARED_WITHOUT_ASKING = 48 << 10
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_CTYPES: dict[str, Any] = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "float32": ctypes.c_float}


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TargetError("cubin library: libcuda.so.1 is not found; launching needs an NVIDIA driver") from error
    _check(driver, driver.cuInit(0), "cuInit")
    return driver


def _check(driver: ctypes.CDLL, code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise TargetError(
            f"cubin library: {what} failed with CUDA error {code} ({(text.value or b'unknown').decode()})"
        )


def _capability(driver: ctypes.CDLL) -> int:
    """Compute capability of the current context's device; if none is current, the first device's primary context is."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _check(driver, driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _check(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
        _check(driver, driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _check(driver, driver.cuCtxGetDevice(ctypes.byref(device)), "cuCtxGetDevice")
    digits = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
        digits.append(value.value)
    return 10 * digits[0] + digits[1]


class Kernel:
    """One kernel, loaded into the current CUDA context from its cubin (or PTX text, which the driver compiles)."""

    def __init__(self, entry: dict[str, Any], image: bytes) -> None:
        self.entry = entry
        driver = _driver()
        _capability(driver)  # makes a context current
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver, driver.cuModuleLoadData(ctypes.byref(self._module), image), f"loading {entry['name']}")
        symbol = entry["symbol"].encode()
        _check(
            driver,
            driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, symbol),
            "cuModuleGetFunction",
        )
        shared = entry["shared_bytes"]
        if shared > _SHARED_WITHOUT_ASKING:
            code = driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            _check(driver, code, f"asking for {shared} bytes of shared memory")

    def launch(self, arguments: Mapping[str, int | float], *, stream: int = 0, **sizes: int) -> None:
        """Start the kernel on `stream` (a CUstream).

        Args:
            arguments: every parameter of the entry but the hidden ones; pointers as device addresses.
            sizes: what the entry's grid counts (see `grid` in the index): images, channels, row_heads, splits … Sizes
                that are also parameters are taken from there.
        """
        known = {"one": 1, **arguments, **sizes}
        grid = [max(1, math.ceil(known[axis["size"]] / axis["per_program"])) for axis in self.entry["grid"]]
        values = []
        for parameter in self.entry["parameters"]:
            value = 0 if parameter.get("hidden") else arguments[parameter["name"]]
            values.append(_CTYPES[parameter["type"]](value))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        driver = _driver()
        code = driver.cuLaunchKernel(
            self._function,
            *grid,
            self.entry["threads"],
            1,
            1,
            self.entry["shared_bytes"],
            ctypes.c_void_p(stream),
            pointers,
            None,
        )
        _check(driver, code, f"launching {self.entry['name']}")


class Library:
    """A folder written by `aot.build_library`, checked against its index.

    Raises FormatError when the folder is no library, is of another version, or a file is not the one that was built.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(
                f"cubin library: {folder / INDEX_NAME} cannot be read ({error}); build one with "
                "`python -m toprovar.kernels.aot OUT`"
            ) from error
        for key, wanted in (("format_version", FORMAT_VERSION), ("contract_version", contract.CONTRACT_VERSION)):
            if self.index.get(key) != wanted:
                raise FormatError(
                    f"cubin library: {folder} has {key} {self.index.get(key)}, this toprovar needs {wanted}; "
                    "build it again"
                )
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in self.index["kernels"]}
        self._loaded: dict[str, Kernel] = {}

    def find(self, **wanted: Any) -> dict[str, Any]:
        """The one entry whose fields have these values. Raises TargetError when there is none."""
        for entry in self._entries.values():
            if all(entry.get(key) == value for key, value in wanted.items()):
                return entry
        asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise TargetError(
            f"cubin library: {self.folder} has no kernel with {asked}; it was built for "
            f"sm_{', sm_'.join(map(str, self.index['archs']))}"
        )

    def read(self, name: str) -> bytes:
        """The cubin of a kernel, checked against its sha256."""
        entry = self._entries[name]
        file = entry["file"]
        if Path(file).name != file:
            raise FormatError(f"cubin library: {self.folder} names the file {file!r}, which is not inside the folder")
        cubin = (self.folder / file).read_bytes()
        found = hashlib.sha256(cubin).hexdigest()
        if found != entry["sha256"]:
            raise FormatError(
                f"cubin library: {self.folder / file} has sha256 {found}, the index says {entry['sha256']}; "
                "build it again"
            )
        return cubin

    def load(self, name: str) -> Kernel:
        """The kernel, loaded into the current CUDA context (once). Raises TargetError when it is for another GPU."""
        if name not in self._loaded:
            entry = self._entries[name]
            arch, capability = entry["arch"], _capability(_driver())
            # Machine code runs on its own major architecture from its minor one on; ours from sm_90 on that one alone.
            if not (arch == capability or (arch < 90 and arch // 10 == capability // 10 and arch <= capability)):
                raise TargetError(
                    f"cubin library: {name} is for sm_{arch}, this GPU is sm_{capability}; "
                    f"build one for it (python -m toprovar.kernels.aot OUT --arch {capability})"
                )
            self._loaded[name] = Kernel(entry, self.read(name))
        return self._loaded[name]


@dataclass(frozen=True)
class AttentionLaunch:
    """One entropy_attention on dense tensors, as the launches it takes: what the torch op does, from the library alone.

    `entropy` is "none" or "mean". `workspace_bytes` of device memory go to `run` beside the tensors.
    """

    library: Library
    arch: int
    dtype: str
    rows: int
    heads: int
    head_dim: int
    n_queries: int
    n_past: int
    n_new: int
    scale: float
    entropy: str
    sm_count: int | None = None

    @property
    def config(self) -> tuning.AttentionConfig:
        keys = self.n_past + self.n_new
        return tuning.choose(
            self.arch, self.dtype, self.head_dim, self.n_queries, keys, self.rows * self.heads, self.sm_count
        )

    @property
    def workspace_bytes(self) -> int:
        """Split: fp32 parts [splits,N,R,H,D], then m, l, u [3,splits,N,R,H]. Otherwise the entropy per head [R,H,N]."""
        items, splits = self.n_queries * self.rows * self.heads, self.config.splits
        if splits > 1:
            return 4 * splits * items * (self.head_dim + 3)
        return 4 * items if self.entropy == "mean" else 0

    def run(self, pointers: dict[str, int], workspace: int = 0, stream: int = 0) -> None:
        """Launch. `pointers`: addresses of q, past_k, past_v, new_k, new_v, out and, for "mean", entropy [R,N]."""
        config, library = self.config, self.library
        items = self.n_queries * self.rows * self.heads
        split = config.splits > 1
        stats = workspace + 4 * config.splits * items * self.head_dim if split else 0
        row8 = self.heads * self.head_dim // 8
        sizes = {"n_queries": self.n_queries, "rows": self.rows, "heads": self.heads}
        strides = {
            f"{name}_{axis}8": size
            for name in ("q", "past_k", "past_v", "new_k", "new_v")
            for axis, size in (("token", self.rows * row8), ("row", row8))
        }
        attention = library.find(
            kernel="attention_kernel", arch=self.arch, dtype=self.dtype, head_dim=self.head_dim,
            tile=config.tile_name, split=split, entropy="mean" if split else self.entropy,
        )  # fmt: skip
        tensors = {name: pointers[name] for name in ("q", "past_k", "past_v", "new_k", "new_v")}
        library.load(attention["name"]).launch(
            {
                **tensors, **sizes, **strides,
                "out": workspace if split else pointers["out"], "entropy": workspace, "lse": 0, "stats": stats,
                "scale_log2": self.scale * math.log2(math.e), "n_past": self.n_past, "n_new": self.n_new,
                "keys_per_split": config.keys_per_split,
            },
            stream=stream, row_heads=self.rows * self.heads, splits=config.splits,
        )  # fmt: skip
        pad = tuning.heads_pad(self.heads)
        if split:
            merge = library.find(
                kernel="merge_kernel", arch=self.arch, dtype=self.dtype, heads_pad=pad, entropy=self.entropy
            )
            arguments = {
                "parts": workspace, "stats": stats, "out": pointers["out"], "entropy": pointers.get("entropy", 0),
                "lse": 0, **sizes, "splits": config.splits, "head_dim8": self.head_dim // 8,
            }  # fmt: skip
            library.load(merge["name"]).launch(arguments, stream=stream)
        elif self.entropy == "mean":
            mean = library.find(kernel="mean_heads_kernel", arch=self.arch, heads_pad=pad)
            arguments = {"per_head": workspace, "mean": pointers["entropy"], **sizes}
            library.load(mean["name"]).launch(arguments, stream=stream)
