"""The Hopper kernel of `toprovar::EntropyAttention`: what is launched, how it is built, and the call from torch.

`cuda/hopper.cu` holds the kernel and says how it works. This module holds its tile sizes (`VARIANTS`), writes the
wrappers of the matrix instructions it includes, compiles it to a cubin (NVRTC, or nvcc where that is missing), plans
the split of a problem over the GPU, and launches it through the CUDA driver on torch's current stream. Nothing is tuned
or measured at run time. Importing this module needs no torch and no GPU; `forward` needs both.

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

__all__ = ["VARIANTS", "Plan", "Variant", "available", "build_cubin", "forward", "plan", "source", "supports"]

SOURCE = Path(__file__).parent / "cuda" / "hopper.cu"
FORWARD_SYMBOL = "toprovar_attention_forward"
FINISH_SYMBOL = "toprovar_attention_finish"
FINISH_THREADS = 256
_COMPILER_OPTIONS = ("-std=c++17", "--gpu-architecture=sm_90a")

_DTYPES = ("bfloat16", "float16")
_TENSOR_MAP_DTYPE = {"float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_*


@dataclass(frozen=True)
class Variant:
    """One build of hopper.cu: the macros, and what a launch needs to know."""

    dtype: str
    head_dim: int
    entropy: bool
    tile_n: int
    consumers: int = 2
    stages: int = 2
    cluster: int = 1

    @property
    def tile_m(self) -> int:
        """Queries of a CTA."""
        return 64 * self.consumers

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
            "CLUSTER": self.cluster,
            "ENTROPY": int(self.entropy),
        }

    @property
    def seam(self) -> int:
        """Rows of the small boxes from which the block where past and new keys meet is put together."""
        return 8 if self.tile_n // self.cluster % 16 else 16

    @property
    def sets(self) -> int:
        """Groups of 32 output columns: half a block of the finish kernel merges one, for 64 queries."""
        return -(-self.head_dim // 32)

    def metadata(self) -> dict[str, Any]:
        """For a cubin library: all that a loader without Python needs beside the cubin."""
        return asdict(self) | {
            "source": "cuda",
            "symbols": {"forward": FORWARD_SYMBOL, "finish": FINISH_SYMBOL},
            "tile_m": self.tile_m,
            "threads": self.threads,
            "shared_bytes": self.shared_bytes,
            "seam": self.seam,
            "finish_threads": FINISH_THREADS,
            "sets": self.sets,
        }


_TILES: dict[int, dict[str, int]] = {
    64: {"tile_n": 128, "consumers": 3, "stages": 3},
    80: {"tile_n": 176},
    96: {"tile_n": 176},
    128: {"tile_n": 176},
}
VARIANTS: dict[tuple[str, int, bool], Variant] = {
    (dtype, head_dim, entropy): Variant(dtype, head_dim, entropy, **tiles)
    for dtype in _DTYPES
    for head_dim, tiles in _TILES.items()
    for entropy in (False, True)
}
"""(dtype, head dim, with entropy) -> the build that is launched. Frozen: docs/log_hopper.md has what else was measured."""


# --- building -------------------------------------------------------------------------------------------------------


def source(variant: Variant) -> tuple[str, str]:
    """hopper.cu and the text of the `hopper_wgmma.cuh` that it includes for this variant."""
    header = _wgmma("wgmma_qk", variant.tile_n, variant.dtype, a_in_registers=False)
    header += _wgmma("wgmma_pv", variant.head_dim, variant.dtype, a_in_registers=True)
    return SOURCE.read_text(encoding="utf-8"), header


def _wgmma(name: str, n: int, dtype: str, *, a_in_registers: bool) -> str:
    """C++ wrapper of one wgmma.m64nNk16. Its accumulators are N/2 separate operands, hence written and not templated."""
    count, kind = n // 2, {"bfloat16": "bf16", "float16": "f16"}[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    high = 1024 >> 4 | 1 << 30  # high word of an operand: see `operand` in hopper.cu
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}"
    if a_in_registers:
        parameters, inputs = "unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b", '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b)'
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
            raise TargetError(f"Hopper kernel: NVRTC refused hopper.cu (code {code}): {log.value.decode(errors='replace')[:2000]}")
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
                "Hopper kernel: found neither NVRTC (libnvrtc.so.12 or .13, as in the wheel nvidia-cuda-nvrtc) nor nvcc; "
                "install one of them, or use a library of cubins"
            ) from error
        if done.returncode:
            raise TargetError(f"Hopper kernel: nvcc refused hopper.cu: {done.stderr[:2000]}")
        return Path(folder, "hopper.cubin").read_bytes()


# --- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one problem is dealt to the GPU; the fields are what the two kernels are launched with."""

    ctas: int
    full_tiles: int
    split_tiles: int
    run: int
    finish_blocks: int
    part_out_floats: int
    part_stats_floats: int


_MERGE_BLOCKS = 2.0
"""What a merge costs, in units of one key block: the parts are written and read once, and one more kernel runs."""
_LEAST_RUN = 2
"""Key blocks of a split CTA at the least: below this, starting and merging cost more than they save."""


def plan(variant: Variant, queries: int, past: int, fresh: int, rows: int, heads: int, sms: int, *, mean: bool) -> Plan:
    """Whole tiles in rounds of one per SM; what does not fill a last round is cut along the keys if that is faster."""
    clusters = sms // variant.cluster
    tiles = -(-queries // (variant.tile_m * variant.cluster)) * rows * heads
    seam = -(-past // variant.seam) * variant.seam
    blocks = -(-(seam + fresh) // variant.tile_n)
    rest = tiles % clusters
    run = max(_LEAST_RUN, -(-rest * blocks // clusters))
    if not rest or run + _MERGE_BLOCKS >= blocks:
        rest = run = 0
    runs = -(-rest * blocks // run) if run else 0
    slots = 2 * runs * variant.cluster
    merges = rest * variant.cluster * variant.consumers * variant.sets
    return Plan(
        ctas=variant.cluster * min(clusters, max(tiles - rest, runs)),
        full_tiles=tiles - rest,
        split_tiles=rest,
        run=run,
        finish_blocks=-(-merges // 2) + (rows * -(-queries // 32) if mean else 0),
        part_out_floats=slots * variant.tile_m * variant.head_dim,
        part_stats_floats=slots * 3 * variant.tile_m,
    )


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


_SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OVERLAP_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
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


@functools.lru_cache(maxsize=None)
def _functions(variant: Variant, device: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The two kernels, loaded into the device's primary context (the one torch uses, current by now)."""
    driver, module = _driver(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), build_cubin(variant)), "cuModuleLoadData")
    forward_, finish = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleGetFunction(ctypes.byref(forward_), module, FORWARD_SYMBOL.encode()), "cuModuleGetFunction")
    _check(driver.cuModuleGetFunction(ctypes.byref(finish), module, FINISH_SYMBOL.encode()), "cuModuleGetFunction")
    _check(driver.cuFuncSetAttribute(forward_, _SHARED_LIMIT, variant.shared_bytes), "cuFuncSetAttribute")
    return forward_, finish


class _TensorMap:
    """A CUtensorMap [length, R*H, D] of one tensor: 128 bytes, aligned to 64."""

    __slots__ = ("_memory", "address")

    def __init__(self, pointer: int, length: int, row_heads: int, head_dim: int, dtype: str, box_rows: int) -> None:
        self._memory = ctypes.create_string_buffer(192)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        sizes = (ctypes.c_uint64 * 3)(head_dim, row_heads, length)
        strides = (ctypes.c_uint64 * 2)(2 * head_dim, 2 * head_dim * row_heads)
        box = (ctypes.c_uint32 * 3)(64, 1, box_rows)
        steps = (ctypes.c_uint32 * 3)(1, 1, 1)
        code = _driver().cuTensorMapEncodeTiled(
            self.address, _TENSOR_MAP_DTYPE[dtype], 3, pointer, sizes, strides, box, steps, 0, 3, 3, 0
        )  # no interleave, 128-byte swizzle, L2 promotion to 256 bytes, zero fill
        _check(code, "cuTensorMapEncodeTiled")


@functools.lru_cache(maxsize=8192)
def _tensor_map(pointer: int, length: int, row_heads: int, head_dim: int, dtype: str, box_rows: int) -> _TensorMap:
    return _TensorMap(pointer, length, row_heads, head_dim, dtype, box_rows)


class _Launch:
    """Both launches of one problem shape, with every constant in place; a call fills in pointers and goes."""

    def __init__(self, variant: Variant, shape: Plan, device: int, queries: int, past: int, fresh: int, rows: int, heads: int, scale: float) -> None:
        self.variant, self.plan = variant, shape
        self.functions = _functions(variant, device)
        common = {"queries": queries, "past": past, "fresh": fresh, "row_heads": rows * heads,
                  "full_tiles": shape.full_tiles, "run": shape.run}  # fmt: skip
        self.forward = _ForwardArguments(scale_log2=scale * math.log2(math.e), **common)
        self.finish = _FinishArguments(heads=heads, **common)
        self.forward_config = _LaunchConfig((shape.ctas, 1, 1), (variant.threads, 1, 1), variant.shared_bytes)
        self.finish_config = _LaunchConfig((shape.finish_blocks, 1, 1), (FINISH_THREADS, 1, 1), 0)
        # The finish kernel may be set up while the forward kernel still runs; it waits for it with griddepcontrol.wait.
        overlap = _LaunchAttribute(id=_OVERLAP_LAUNCH)
        overlap.value[0] = 1
        self._attributes = (_LaunchAttribute * 1)(overlap)
        self.finish_config.attributes, self.finish_config.attribute_count = self._attributes, 1
        self.forward_parameters = (ctypes.c_void_p * (9 + len(_ForwardArguments._fields_)))()
        for i, (name, *_) in enumerate(_ForwardArguments._fields_):
            self.forward_parameters[9 + i] = ctypes.addressof(self.forward) + getattr(_ForwardArguments, name).offset
        self.finish_parameters = (ctypes.c_void_p * len(_FinishArguments._fields_))()
        for i, (name, *_) in enumerate(_FinishArguments._fields_):
            self.finish_parameters[i] = ctypes.addressof(self.finish) + getattr(_FinishArguments, name).offset

    def __call__(self, maps: list[_TensorMap], out: int, head: int, lse: int, mean: int, parts: int, stats: int, stream: int) -> None:
        for i, tensor_map in enumerate(maps):
            self.forward_parameters[i] = tensor_map.address
        arguments = self.forward
        arguments.out, arguments.head_entropy, arguments.lse = out, head, lse
        arguments.part_out, arguments.part_stats = parts, stats
        self.forward_config.stream = stream
        driver = _driver()
        code = driver.cuLaunchKernelEx(ctypes.addressof(self.forward_config), self.functions[0], self.forward_parameters, None)
        _check(code, f"the launch of {FORWARD_SYMBOL}")
        if self.plan.finish_blocks:
            last = self.finish
            last.out, last.head_entropy, last.lse, last.mean_entropy = out, head, lse, mean
            last.part_out, last.part_stats = parts, stats
            self.finish_config.stream = stream
            code = driver.cuLaunchKernelEx(ctypes.addressof(self.finish_config), self.functions[1], self.finish_parameters, None)
            _check(code, f"the launch of {FINISH_SYMBOL}")


class _Launches(threading.local):
    """Launches by shape. One set per thread: a call writes its pointers into the shared arguments."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], _Launch] = {}


_launches = _Launches()


# --- the call -------------------------------------------------------------------------------------------------------


def available(device: Any = None) -> bool:
    """Whether `device` (a torch device; None: the current one) is a Hopper GPU."""
    import torch

    if not torch.cuda.is_available():
        return False
    wanted = torch.device("cuda" if device is None else device)
    return wanted.type == "cuda" and torch.cuda.get_device_capability(wanted) == (9, 0)


def supports(dtype: Any, head_dim: int, n_queries: int, n_keys: int, scale: float = 1.0) -> bool:
    """Whether `forward` takes this problem: fp16 or bf16 (a torch dtype or its name), a tabled head dim, scale > 0."""
    name = str(dtype).removeprefix("torch.")
    return (name, head_dim, True) in VARIANTS and n_queries > 0 and n_keys > 0 and scale > 0


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
    Raises: TargetError when the kernel cannot be built. Shapes and dtypes are the caller's to check (`supports`, ops.py).
    """
    import torch

    queries, rows, heads, head_dim = q.shape
    past, fresh = past_k.shape[0], new_k.shape[0]
    dtype = str(q.dtype)[6:]
    chosen = variant or VARIANTS[dtype, head_dim, entropy != "none"]
    device = q.device.index
    with torch.cuda.device(device):
        key = (chosen, device, queries, past, fresh, rows, heads, scale, entropy == "mean")
        launch = _launches.known.get(key)
        if launch is None:
            sms = torch.cuda.get_device_properties(device).multi_processor_count
            shape = plan(chosen, queries, past, fresh, rows, heads, sms, mean=entropy == "mean")
            if len(_launches.known) >= 4096:
                _launches.known.clear()
            launch = _launches.known[key] = _Launch(chosen, shape, device, queries, past, fresh, rows, heads, scale)
        shape = launch.plan

        def tensor_map(tensor: Tensor, length: int, box_rows: int) -> _TensorMap:
            return _tensor_map(tensor.data_ptr(), length, rows * heads, head_dim, dtype, box_rows)

        # TMA reads contiguous, 16-byte aligned tensors. Copies made here stay alive until the launch is enqueued.
        q, past_k, past_v, new_k, new_v = tensors = [_ready(t) for t in (q, past_k, past_v, new_k, new_v)]
        maps = [tensor_map(q, queries, chosen.tile_m)]
        for box in (chosen.tile_n // chosen.cluster, chosen.seam):
            old = [tensor_map(t, past, box) for t in tensors[1:3]] if past else []
            new = [tensor_map(t, fresh, box) for t in tensors[3:]] if fresh else old
            maps += [*(old or new), *new]

        out = torch.empty_like(q)
        lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device) if return_lse else None
        per_head = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device) if entropy != "none" else None
        mean = torch.empty(rows, queries, dtype=torch.float32, device=q.device) if entropy == "mean" else None
        parts = stats = 0
        if shape.run:
            workspace = torch.empty(shape.part_out_floats + shape.part_stats_floats, dtype=torch.float32, device=q.device)
            parts = workspace.data_ptr()
            stats = parts + 4 * shape.part_out_floats
        launch(
            maps,
            out.data_ptr(),
            0 if per_head is None else per_head.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if mean is None else mean.data_ptr(),
            parts,
            stats,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return out, mean if entropy == "mean" else per_head, lse


def _ready(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=_contiguous_format())


@functools.lru_cache(maxsize=1)
def _contiguous_format() -> Any:
    import torch

    return torch.contiguous_format
