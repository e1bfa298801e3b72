"""The Hopper kernel of `toprovar::EntropyAttention`: what is launched, how it is built, and the call from torch.

`cuda/hopper.cu` holds the kernel and says how it works. This module holds its tile sizes (`VARIANTS`), writes the
wrappers of the matrix instructions it includes, compiles it to a cubin (NVRTC, or nvcc where that is missing), chooses
the build for a problem and its split over the GPU, and launches it through the CUDA driver on torch's current stream.
Nothing is tuned or measured at run time. Importing this module needs no torch and no GPU; `forward` needs both.

A call can be captured in a CUDA graph once the same variant has been called before (building and loading cannot).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TargetError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "Plan", "Variant", "available", "build_cubin", "choose", "forward", "plan", "source", "supports"]

SOURCE = Path(__file__).parent / "cuda" / "hopper.cu"
FORWARD_SYMBOL = "toprovar_attention_forward"
FINISH_SYMBOL = "toprovar_attention_finish"
SMALL_SYMBOL = "toprovar_attention_small"
FINISH_THREADS = 256
SMALL_THREADS, SMALL_QUERIES, SMALL_KEYS = 256, 64, 128
SEAM = 16
_COMPILER_OPTIONS = ("-std=c++17", "--gpu-architecture=sm_90a")

_DTYPES = ("bfloat16", "float16")
_TENSOR_MAP_DTYPE = {"float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_*


@dataclass(frozen=True)
class Variant:
    """One build of hopper.cu: the macros, what a launch needs to know, and about how long a tile takes without its
    blocks of keys (`tile_ns`) and each of those (`block_ns`) while all CTAs of an SM are busy."""

    dtype: str
    head_dim: int
    entropy: bool
    tile_n: int
    consumers: int
    stages: int
    ctas_per_sm: int
    tile_ns: int
    block_ns: int

    @property
    def tile_m(self) -> int:
        """Queries of a CTA."""
        return 64 * self.consumers

    @property
    def name(self) -> str:
        return f"{self.tile_m}x{self.tile_n}"

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        halves = -(-self.head_dim // 64)
        return 128 * halves * (self.tile_m + 2 * self.stages * self.tile_n) + 16 + 32 * self.stages + 32

    @property
    def defines(self) -> dict[str, int]:
        return {
            "DTYPE": _DTYPES.index(self.dtype),
            "HEAD_DIM": self.head_dim,
            "TILE_N": self.tile_n,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CTAS_PER_SM": self.ctas_per_sm,
            "ENTROPY": int(self.entropy),
        }

    @property
    def sets(self) -> int:
        """Groups of 32 output columns: half a block of the finish kernel merges one, for 64 queries."""
        return -(-self.head_dim // 32)

    @property
    def small_shared_bytes(self) -> int:
        pitch = 2 * self.head_dim + 16
        return (SMALL_QUERIES + 2 * SMALL_KEYS) * pitch + 3 * 8 * 16 * 4

    def metadata(self) -> dict[str, Any]:
        """For a cubin library: all that a loader without Python needs beside the cubin."""
        return asdict(self) | {
            "source": "cuda",
            "symbols": {"forward": FORWARD_SYMBOL, "finish": FINISH_SYMBOL, "small": SMALL_SYMBOL},
            "tile_m": self.tile_m,
            "threads": self.threads,
            "shared_bytes": self.shared_bytes,
            "seam": SEAM,
            "finish_threads": FINISH_THREADS,
            "small_threads": SMALL_THREADS,
            "small_queries": SMALL_QUERIES,
            "small_keys": SMALL_KEYS,
            "small_shared_bytes": self.small_shared_bytes,
            "sets": self.sets,
        }


_PAIRED = {"consumers": 2, "tile_n": 160, "stages": 2, "ctas_per_sm": 1, "tile_ns": 4830, "block_ns": 1880}
_SINGLE = {"consumers": 1, "tile_n": 96, "stages": 2, "ctas_per_sm": 2, "tile_ns": 2880, "block_ns": 1340}
_TILES: dict[int, tuple[dict[str, int], ...]] = {
    64: (
        {"consumers": 3, "tile_n": 128, "stages": 3, "ctas_per_sm": 1, "tile_ns": 3600, "block_ns": 1650},
        {"consumers": 1, "tile_n": 128, "stages": 2, "ctas_per_sm": 2, "tile_ns": 2700, "block_ns": 1150},
        {"consumers": 1, "tile_n": 144, "stages": 2, "ctas_per_sm": 2, "tile_ns": 2920, "block_ns": 1290},
    ),
    80: (_PAIRED, _SINGLE),
    96: (_PAIRED, _SINGLE),
    128: (_PAIRED, _SINGLE),
}
VARIANTS: dict[tuple[str, int, bool], tuple[Variant, ...]] = {
    (dtype, head_dim, entropy): tuple(Variant(dtype, head_dim, entropy, **tiles) for tiles in builds)
    for dtype in _DTYPES
    for head_dim, builds in _TILES.items()
    for entropy in (False, True)
}
"""(dtype, head dim, with entropy) -> the builds of which `choose` takes one. docs/log.md has what else was measured.

The times are fitted to those of an H100 (bf16, with entropy, head dims 64 and 128): all that counts is which is least."""


# --- building -------------------------------------------------------------------------------------------------------


def source(variant: Variant) -> tuple[str, str]:
    """hopper.cu and the text of the `hopper_wgmma.cuh` that it includes for this variant."""
    header = _wgmma("wgmma_qk", variant.tile_n, variant.dtype, a_in_registers=False)
    header += _wgmma("wgmma_pv", variant.head_dim, variant.dtype, a_in_registers=True)
    return SOURCE.read_text(encoding="utf-8"), header


def _wgmma(name: str, n: int, dtype: str, *, a_in_registers: bool) -> str:
    """C++ wrapper of one wgmma.m64nNk16. Its accumulators are N/2 separate operands: written, not templated."""
    count, kind = n // 2, {"bfloat16": "bf16", "float16": "f16"}[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    high = 1024 >> 4 | 1 << 30  # high word of an operand: see `operand` in hopper.cu
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}"
    if a_in_registers:
        parameters, inputs = (
            "unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b",
            '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b)',
        )
        left = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        body = f".reg .b64 b; mov.b64 b, {{%{count + 4}, {high}}}; {instruction}, {left}, b, 1, 1, 1, 1;"
    else:
        parameters, inputs = "unsigned a, unsigned b, bool add", '"r"(a), "r"(b), "r"((int)add)'
        body = (
            f".reg .pred p; .reg .b64 a, b; mov.b64 a, {{%{count}, {high}}}; mov.b64 b, {{%{count + 1}, {high}}}; "
            f"setp.ne.b32 p, %{count + 2}, 0; {instruction}, a, b, p, 1, 1, 0, 0;"
        )
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}) {{\n"
        f'    asm volatile("{{ {body} }}"\n        : {outputs}\n        : {inputs});\n}}\n'
    )


def build_cubin(variant: Variant) -> bytes:
    """Compile one variant for sm_90a; needs no GPU. Results are kept by content in the user's cache folder.

    Raises:
        TargetError: neither NVRTC nor nvcc is found, or the compiler refuses the source.
    """
    text, header = source(variant)
    options = [*_COMPILER_OPTIONS, *(f"-D{name}={value}" for name, value in variant.defines.items())]
    key = hashlib.sha256("\0".join([text, header, *options]).encode()).hexdigest()
    path = _cache_folder() / f"{key}.cubin"
    try:
        cubin = path.read_bytes()
        if cubin[:4] == b"\x7fELF":
            return cubin
    except OSError:
        pass
    nvrtc = _nvrtc()
    cubin = _compile_nvrtc(nvrtc, text, header, options) if nvrtc else _compile_nvcc(text, header, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home: compiled again next time
    return cubin


def _cache_folder() -> Path:
    root = os.environ.get("TOPROVAR_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "toprovar"
    )
    return Path(root) / "cubin"


@functools.lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC 12 or later, from the CUDA wheels that torch brings or from the system."""
    names = [f"libnvrtc.so.{major}" for major in (14, 13, 12)]
    found = []
    for folder in sys.path:
        for pattern in ("nvidia/*/lib/libnvrtc.so.1[2-9]",):
            found += glob.glob(os.path.join(folder or ".", pattern))
    for name in [*sorted(found, reverse=True), *names]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _compile_nvrtc(nvrtc: ctypes.CDLL, text: str, header: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * 1)(header.encode())
    names = (ctypes.c_char_p * 1)(b"hopper_wgmma.cuh")
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"hopper.cu", 1, headers, names)
    if code:
        raise TargetError(f"Hopper kernel: NVRTC could not start (code {code})")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        if code:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise TargetError(
                f"Hopper kernel: NVRTC refused hopper.cu (code {code}): {log.value.decode(errors='replace')[:2000]}"
            )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _compile_nvcc(text: str, header: str, options: list[str]) -> bytes:
    flags = [o for o in options if not o.startswith("--gpu-architecture")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hopper.cu").write_text(text, encoding="utf-8")
        Path(folder, "hopper_wgmma.cuh").write_text(header, encoding="utf-8")
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", *flags, "-o", "hopper.cubin", "hopper.cu"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            raise TargetError(
                "Hopper kernel: found neither NVRTC (libnvrtc.so.12 or .13, as in the wheel nvidia-cuda-nvrtc) "
                "nor nvcc; install one of them, or use a library of cubins"
            ) from error
        if done.returncode:
            raise TargetError(f"Hopper kernel: nvcc refused hopper.cu: {done.stderr[:2000]}")
        return Path(folder, "hopper.cubin").read_bytes()


# --- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one problem is dealt to the GPU: what the two kernels are launched with, and about how long that takes."""

    ctas: int
    full_tiles: int
    split_tiles: int
    run: int
    finish_blocks: int
    part_out_floats: int
    part_stats_floats: int
    ns: int


_MERGE_BLOCKS = 2.0
"""What a merge costs, in units of one key block: the parts are written and read once, and one more kernel runs."""
_MERGE_NS = 5500
"""The same as time, for `choose`."""
_LEAST_RUN = 2
"""Key blocks of a split CTA at the least: below this, starting and merging cost more than they save."""


def choose(
    dtype: str, head_dim: int, queries: int, past: int, fresh: int, rows: int, heads: int, sms: int, *, entropy: str
) -> tuple[Variant, Plan]:
    """The build that is expected to be fastest for this problem, and how it is dealt out; the first one of equals."""
    plans = [
        (variant, plan(variant, queries, past, fresh, rows, heads, sms, mean=entropy == "mean"))
        for variant in VARIANTS[dtype, head_dim, entropy != "none"]
    ]
    return min(plans, key=lambda pair: pair[1].ns)


def plan(variant: Variant, queries: int, past: int, fresh: int, rows: int, heads: int, sms: int, *, mean: bool) -> Plan:
    """Whole tiles in rounds of one per SM; what does not fill a last round is cut along the keys if that is faster."""
    tiles = -(-queries // variant.tile_m) * rows * heads
    blocks = -(-(-(-past // SEAM) * SEAM + fresh) // variant.tile_n)
    slots = sms * variant.ctas_per_sm
    rest = tiles % slots
    run = max(_LEAST_RUN, -(-rest * blocks // slots))
    if not rest or run + _MERGE_BLOCKS >= blocks:
        rest = run = 0
    runs = -(-rest * blocks // run) if run else 0
    merges = rest * variant.consumers * variant.sets
    ns = -(-(tiles - rest) // slots) * (variant.tile_ns + blocks * variant.block_ns)
    if run:
        ns += variant.tile_ns + run * variant.block_ns + _MERGE_NS
    return Plan(
        ctas=min(slots, max(tiles - rest, runs)),
        full_tiles=tiles - rest,
        split_tiles=rest,
        run=run,
        finish_blocks=-(-merges // 2) + (_mean_blocks(queries, rows) if mean else 0),
        part_out_floats=2 * runs * variant.tile_m * variant.head_dim,
        part_stats_floats=2 * runs * 3 * variant.tile_m,
        ns=ns,
    )


def _mean_blocks(queries: int, rows: int) -> int:
    return rows * -(-queries // 32)


# --- the CUDA driver ------------------------------------------------------------------------------------------------


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class _ForwardArguments(ctypes.Structure):
    """Everything behind the nine tensor maps, in the kernel's order; kernelParams points at its fields."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("head_entropy", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("part_out", ctypes.c_void_p),
        ("part_stats", ctypes.c_void_p),
        ("queries", ctypes.c_int),
        ("past", ctypes.c_int),
        ("fresh", ctypes.c_int),
        ("row_heads", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("full_tiles", ctypes.c_int),
        ("run", ctypes.c_int),
    ]


class _FinishArguments(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("head_entropy", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mean_entropy", ctypes.c_void_p),
        ("part_out", ctypes.c_void_p),
        ("part_stats", ctypes.c_void_p),
        ("queries", ctypes.c_int),
        ("past", ctypes.c_int),
        ("fresh", ctypes.c_int),
        ("row_heads", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("full_tiles", ctypes.c_int),
        ("run", ctypes.c_int),
    ]


class _SmallArguments(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("past_k", ctypes.c_void_p),
        ("past_v", ctypes.c_void_p),
        ("new_k", ctypes.c_void_p),
        ("new_v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("head_entropy", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("queries", ctypes.c_int),
        ("past", ctypes.c_int),
        ("fresh", ctypes.c_int),
        ("row_heads", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
    ]


_SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OVERLAP_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    driver.cuTensorMapEncodeTiled.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return driver


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"Hopper kernel: {what} failed with CUDA error {code} ({(text.value or b'?').decode()})")


@functools.cache
def _function(variant: Variant, device: int, symbol: str) -> int:
    """A kernel's handle, loaded into the device's primary context (the one torch uses, current by now)."""
    function = ctypes.c_void_p()
    _check(
        _driver().cuModuleGetFunction(ctypes.byref(function), _module(variant, device), symbol.encode()),
        "cuModuleGetFunction",
    )
    size = {FORWARD_SYMBOL: variant.shared_bytes, SMALL_SYMBOL: variant.small_shared_bytes, FINISH_SYMBOL: 0}[symbol]
    if size:
        _check(_driver().cuFuncSetAttribute(function, _SHARED_LIMIT, size), "cuFuncSetAttribute")
    assert function.value is not None
    return function.value


@functools.cache
def _module(variant: Variant, device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), build_cubin(variant)), "cuModuleLoadData")
    return module


def _encode(at: int, pointer: int, length: int, row_heads: int, head_dim: int, dtype: str, box_rows: int) -> None:
    """Write the CUtensorMap of one tensor [length, R*H, D] to address `at` (128 bytes, aligned to 64)."""
    sizes = (ctypes.c_uint64 * 3)(head_dim, row_heads, length)
    strides = (ctypes.c_uint64 * 2)(2 * head_dim, 2 * head_dim * row_heads)
    box = (ctypes.c_uint32 * 3)(64, 1, box_rows)
    steps = (ctypes.c_uint32 * 3)(1, 1, 1)
    code = _driver().cuTensorMapEncodeTiled(
        at, _TENSOR_MAP_DTYPE[dtype], 3, pointer, sizes, strides, box, steps, 0, 3, 3, 0
    )  # no interleave, 128-byte swizzle, L2 promotion to 256 bytes, zero fill
    _check(code, "cuTensorMapEncodeTiled")


class _Kernel:
    """One kernel ready for launching: handle, configuration, arguments and the array of pointers to them."""

    def __init__(self, function: int, grid: int, block: int, shared_bytes: int, arguments: ctypes.Structure) -> None:
        self.function = function
        self.arguments = arguments
        self.config = _LaunchConfig((grid, 1, 1), (block, 1, 1), shared_bytes)
        self._config = ctypes.addressof(self.config)
        # It may be set up while the kernel before it on the stream still runs, and waits for it (griddepcontrol.wait).
        attribute = _LaunchAttribute(id=_OVERLAP_LAUNCH)
        attribute.value[0] = 1
        self._attributes = (_LaunchAttribute * 1)(attribute)
        self.config.attributes, self.config.attribute_count = self._attributes, 1
        fields = [
            ctypes.addressof(arguments) + getattr(type(arguments), field[0]).offset for field in arguments._fields_
        ]
        self.fields = fields
        self._own = (ctypes.c_void_p * len(fields))(*fields)
        self.parameters = ctypes.addressof(self._own)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, stream: int, parameters: int | None = None) -> None:
        self.config.stream = stream
        code = self._launch(self._config, self.function, parameters or self.parameters, None)
        if code:
            _check(code, "a launch")


class _Call:
    """Every call of one shape, with all constants in place: a call fills in pointers and goes.

    Not for use by two threads at once: calls write their pointers into shared arguments (see `_Calls`).
    """

    def __init__(
        self,
        variant: Variant | None,
        dtype: str,
        device: int,
        shape: tuple[int, ...],
        past: int,
        fresh: int,
        scale: float,
        entropy: str,
    ) -> None:
        import torch

        queries, rows, heads, head_dim = shape
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        small = queries <= SMALL_QUERIES and past + fresh <= SMALL_KEYS
        if small:  # every build has the same small kernel
            variant = variant or VARIANTS[dtype, head_dim, entropy != "none"][0]
        elif variant is None:
            variant, shares = choose(dtype, head_dim, queries, past, fresh, rows, heads, sms, entropy=entropy)
        else:
            shares = plan(variant, queries, past, fresh, rows, heads, sms, mean=entropy == "mean")
        self.variant = variant
        self.dtype, self.row_heads, self.head_dim = dtype, rows * heads, head_dim
        self.queries, self.past, self.fresh = queries, past, fresh
        common = {"queries": queries, "past": past, "fresh": fresh, "row_heads": rows * heads}
        scale_log2 = scale * math.log2(math.e)
        self.part_floats = self.stats_floats = 0
        self.small: _Kernel | None = None
        self.finish: _Kernel | None = None
        if small:
            self.small = _Kernel(
                _function(variant, device, SMALL_SYMBOL), rows * heads, SMALL_THREADS, variant.small_shared_bytes,
                _SmallArguments(scale_log2=scale_log2, **common),
            )  # fmt: skip
            finish_blocks = _mean_blocks(queries, rows) if entropy == "mean" else 0
            common |= {"full_tiles": -(-queries // variant.tile_m) * rows * heads, "run": 0}
        else:
            finish_blocks = shares.finish_blocks
            common |= {"full_tiles": shares.full_tiles, "run": shares.run}
            self.part_floats, self.stats_floats = shares.part_out_floats, shares.part_stats_floats
            self.forward = _Kernel(
                _function(variant, device, FORWARD_SYMBOL), shares.ctas, variant.threads, variant.shared_bytes,
                _ForwardArguments(scale_log2=scale_log2, **common),
            )  # fmt: skip
        if finish_blocks:
            self.finish = _Kernel(
                _function(variant, device, FINISH_SYMBOL),
                finish_blocks,
                FINISH_THREADS,
                0,
                _FinishArguments(heads=heads, **common),
            )
        self.maps: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def parameters(self, pointers: tuple[int, ...]) -> int:
        """The forward kernel's parameter array for these five tensors; their tensor maps are made on first sight."""
        known = self.maps.get(pointers)
        if known is None:
            if len(self.maps) >= 1024:
                self.maps.clear()
            memory = ctypes.create_string_buffer(9 * 128 + 64)
            start = -(-ctypes.addressof(memory) // 64) * 64
            q, past_k, past_v, new_k, new_v = pointers
            lengths = [(past_k, self.past), (past_v, self.past), (new_k, self.fresh), (new_v, self.fresh)]
            if not self.past:
                lengths[:2] = lengths[2:]
            if not self.fresh:
                lengths[2:] = lengths[:2]
            boxes = [(q, self.queries, self.variant.tile_m)]
            boxes += [(*piece, self.variant.tile_n) for piece in lengths]
            boxes += [(*piece, SEAM) for piece in lengths]
            for i, (pointer, length, rows) in enumerate(boxes):
                _encode(start + 128 * i, pointer, length, self.row_heads, self.head_dim, self.dtype, rows)
            places = [start + 128 * i for i in range(9)] + self.forward.fields
            known = self.maps[pointers] = (memory, (ctypes.c_void_p * len(places))(*places))
        return ctypes.addressof(known[1])


class _Calls(threading.local):
    """Calls by shape, one set per thread."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], _Call] = {}


_calls = _Calls()


# --- the call -------------------------------------------------------------------------------------------------------


def available(device: Any = None) -> bool:
    """Whether `device` (a torch device; None: the current one) is a Hopper GPU."""
    import torch

    if not torch.cuda.is_available():
        return False
    wanted = torch.device("cuda" if device is None else device)
    return wanted.type == "cuda" and torch.cuda.get_device_capability(wanted) == (9, 0)


def supports(dtype: Any, head_dim: int, n_queries: int, n_keys: int, scale: float = 1.0) -> bool:
    """Whether `forward` takes this problem: fp16 or bf16 (a torch dtype or its name), a tabled head dim, scale > 0.

    A scale of 0 or below would turn the mask of absent keys and the maximum of the scores around.
    """
    tabled = (str(dtype).removeprefix("torch."), head_dim, True) in VARIANTS
    return tabled and min(n_queries, n_keys) >= 1 and scale > 0


def forward(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str = "mean",
    return_lse: bool = False,
    *,
    variant: Variant | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(scale q.k) v over past then new keys, with the entropy of every query.

    Args:
        q: [N,R,H,D] fp16 or bf16 on a Hopper GPU. past_k, past_v: [P,R,H,D]; new_k, new_v: [L,R,H,D]; P or L may be 0.
        scale: softmax scale, > 0.
        entropy: "none", "mean" over heads or per "head". return_lse: also the log-sum-exp.
        variant: another build than the tabled one (for measurements).

    Returns: out [N,R,H,D]; entropy in nats [R,N], [R,H,N] or None; lse [R,H,N] or None.
    Raises: TargetError when the kernel cannot be built. Shapes, dtypes and scale are the caller's to check (ops.py).
    """
    import torch

    device = q.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return forward(q, past_k, past_v, new_k, new_v, scale, entropy, return_lse, variant=variant)
    shape = q.shape
    key = (q.dtype, device.index, shape, past_k.shape[0], new_k.shape[0], scale, entropy, variant)
    call = _calls.known.get(key)
    if call is None:
        if len(_calls.known) >= 1024:
            _calls.known.clear()
        dtype = str(q.dtype)[6:]
        call = _Call(variant, dtype, device.index, tuple(shape), past_k.shape[0], new_k.shape[0], scale, entropy)
        _calls.known[key] = call

    # Contiguous and aligned as TMA wants them. Copies made here stay alive until the kernels are enqueued.
    tensors = (_ready(q), _ready(past_k), _ready(past_v), _ready(new_k), _ready(new_v))
    pointers = tuple([tensor.data_ptr() for tensor in tensors])
    queries, rows, heads, _ = shape
    out = torch.empty(shape, dtype=q.dtype, device=device)
    per_head = mean = lse = None
    if entropy == "mean":
        mean = torch.empty((rows, queries), dtype=torch.float32, device=device)
    if entropy == "head":
        per_head = torch.empty((rows, heads, queries), dtype=torch.float32, device=device)
    if return_lse:
        lse = torch.empty((rows, heads, queries), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    # One allocation for all that nobody keeps: the parts of split tiles, and the entropy per head behind a mean.
    scratch_floats = call.part_floats + call.stats_floats + (rows * heads * queries if entropy == "mean" else 0)
    parts = 0
    if scratch_floats:
        scratch = torch.empty(scratch_floats, dtype=torch.float32, device=device)
        parts = scratch.data_ptr()
    out_pointer = out.data_ptr()
    lse_pointer = 0 if lse is None else lse.data_ptr()
    mean_pointer = 0 if mean is None else mean.data_ptr()
    stats = parts + 4 * call.part_floats
    head_pointer = per_head.data_ptr() if per_head is not None else 0 if mean is None else stats + 4 * call.stats_floats
    if call.small is not None:
        small = call.small.arguments
        small.q, small.past_k, small.past_v, small.new_k, small.new_v = pointers
        small.out, small.head_entropy, small.lse = out_pointer, head_pointer, lse_pointer
        call.small(stream)
    else:
        arguments = call.forward.arguments
        arguments.out, arguments.head_entropy, arguments.lse = out_pointer, head_pointer, lse_pointer
        arguments.part_out, arguments.part_stats = parts, stats
        call.forward(stream, call.parameters(pointers))
    if call.finish is not None:
        last = call.finish.arguments
        last.out, last.head_entropy, last.lse, last.mean_entropy = out_pointer, head_pointer, lse_pointer, mean_pointer
        last.part_out, last.part_stats = parts, stats
        call.finish(stream)
    return out, mean if per_head is None else per_head, lse


def _ready(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)
