"""Matrix products of a transformer layer, ``y = x W^T + b``, at whatever number of rows a scale has.

Early scales have 2 to 128 rows, and their products cost what reading the weights costs; late ones have thousands, and cost
what the tensor cores cost if the tiles fill the GPU evenly. No single choice serves both:

``thin_linear``    few rows: a Triton kernel with enough programs to keep the memory busy, because the sum over K is cut
                   into parts; the kernel behind it adds them up in passing.
``Products``       more rows: cuBLASLt, whose first proposals for a shape are timed once on the device and the fastest kept.
                   PyTorch takes the first proposal, which at 800 to 3200 rows is often 10% to 30% slower than the best.

Accumulation is fp32 in both. Biases are added in fp32 before rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import ctypes
import functools
import glob
import os
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["THIN_ROWS", "Products", "launch_options", "overlaps", "thin_linear"]

THIN_ROWS = 128
"""Up to this many rows `thin_linear` is used."""


# ------------------------------------------------------------------------------------------------------- few rows


@triton.jit
def _thin_linear(
    X,
    W,
    Y,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
    length: tl.constexpr = K // PARTS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * length
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    weights = W + n.to(tl.int64) * K + first
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, length, BLOCK_K, num_stages=STAGES):
        w = tl.load(weights[:, None] + start + k[None, :])
        x = tl.load(X + m[None, :] * K + first + start + k[:, None], mask=(m < M)[None, :], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")  # of fp32, in tests
    if OVERLAP:
        gdc_launch_dependents()
    y = Y + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(y, total, mask=(m < M)[None, :])


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` for few rows, in parts to be added up by a kernel that does so while it reads.

    Args:
        x: ``[M, K]`` fp16 or bf16, contiguous, M at most `THIN_ROWS`.
        weight: ``[N, K]`` of the same dtype.

    Returns: fp32 ``[parts, M, N]``.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if rows > THIN_ROWS:
        raise ValueError(f"{rows} rows: a thin product has at most {THIN_ROWS}")
    # What was fastest on an H200 of a dozen cuts for the shapes of Infinity 2B; docs/log.md has some.
    large = outputs > inputs or inputs > 4096
    tile, block, parts = (128, 64, 8) if large else (64, 128, 4)
    tile, block = _divisor(outputs, tile), _divisor(inputs, block)
    while inputs % (parts * block):
        parts //= 2
    y = torch.empty((parts, rows, outputs), dtype=torch.float32, device=x.device)
    overlap = overlaps(x)
    _thin_linear[(outputs // tile, parts)](
        x,
        weight,
        y,
        rows,
        N=outputs,
        K=inputs,
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUTPUTS=tile,
        BLOCK_K=block,
        PARTS=parts,
        OVERLAP=overlap,
        STAGES=4,
        num_warps=4,
        **launch_options(overlap),
    )
    return y


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def overlaps(tensor: Tensor) -> bool:
    """Whether a kernel on this tensor's device may be set up beside the one before it: Hopper and later."""
    return tensor.is_cuda and _capability(tensor.device.index) >= 9


def launch_options(overlap: bool) -> dict[str, bool]:
    """Options of a launch that may be set up beside the kernel before it."""
    return {"launch_pdl": True} if overlap else {}


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


# ------------------------------------------------------------------------------------------------------- many rows

_PROPOSALS = 32
_WORTH = 0.96
"""A proposal is preferred to the first if it takes at most this share of its time: clocks move by a few per cent."""
_WORKSPACE_BYTES = 64 << 20
_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
_EPILOGUES = {False: 4, True: 36}  # BIAS, GELU_BIAS
_MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """cuBLASLt as PyTorch loaded it, or None."""
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libcublasLt.so.{major}"]
    for folder in sys.path:
        names += glob.glob(os.path.join(folder or ".", "nvidia", "*", "lib", f"libcublasLt.so.{major}"))
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        library.cublasLtMatmul.argtypes = [pointer] * 14 + [ctypes.c_size_t, pointer]
        library.cublasLtMatmulAlgoGetHeuristic.argtypes = [pointer] * 7 + [integer, pointer, pointer]
        library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, integer, pointer, ctypes.c_size_t]
        library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, integer, pointer, ctypes.c_size_t]
        library.cublasLtMatrixLayoutCreate.argtypes = [
            pointer, integer, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64,
        ]  # fmt: skip
        library.cublasLtMatmulDescCreate.argtypes = [pointer, integer, integer]
        return library
    return None


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"cuBLASLt: {what} failed with status {code}")


class _Product:
    """``x W^T + b`` of one shape, ready for launching."""

    def __init__(
        self, library: ctypes.CDLL, handle: ctypes.c_void_p, shape: tuple[int, int, int], dtype: torch.dtype, gelu: bool
    ) -> None:
        self._library, self._handle = library, handle
        rows, outputs, inputs = shape
        kind = _DATA_TYPES[dtype]
        self._descriptor = ctypes.c_void_p()
        _check(
            library.cublasLtMatmulDescCreate(ctypes.byref(self._descriptor), _COMPUTE_FLOAT32, _FLOAT32), "a descriptor"
        )
        self._set(_TRANSPOSE_A, ctypes.c_int32(1))
        self._set(_EPILOGUE, ctypes.c_int32(_EPILOGUES[gelu]))
        # cuBLAS counts by columns: [M, N] by rows is N x M by columns, so W is its A and x its B.
        self._layouts = [ctypes.c_void_p() for _ in range(3)]
        for layout, (height, width) in zip(
            self._layouts, ((inputs, outputs), (inputs, rows), (outputs, rows)), strict=True
        ):
            _check(library.cublasLtMatrixLayoutCreate(ctypes.byref(layout), kind, height, width, height), "a layout")
        self._one, self._zero, self._bias = ctypes.c_float(1.0), ctypes.c_float(0.0), ctypes.c_void_p()
        self.proposal = _Proposal()

    def _set(self, attribute: int, value: ctypes.c_int32 | ctypes.c_void_p) -> None:
        _check(
            self._library.cublasLtMatmulDescSetAttribute(
                self._descriptor, attribute, ctypes.byref(value), ctypes.sizeof(value)
            ),
            "an attribute",
        )

    def proposals(self, bias: Tensor) -> list[_Proposal]:
        """What cuBLASLt's heuristic proposes for the shape, best guess first."""
        self._bias.value = bias.data_ptr()
        self._set(_BIAS_POINTER, self._bias)
        preference, found = ctypes.c_void_p(), ctypes.c_int()
        _check(self._library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "a preference")
        most = ctypes.c_uint64(_WORKSPACE_BYTES)
        self._library.cublasLtMatmulPreferenceSetAttribute(
            preference, _MOST_WORKSPACE, ctypes.byref(most), ctypes.sizeof(most)
        )
        results = (_Proposal * _PROPOSALS)()
        weights, x, y = self._layouts
        code = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._descriptor, weights, x, y, y, preference, _PROPOSALS, results, ctypes.byref(found)
        )
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        _check(code, "the heuristic")
        return [result for result in results[: found.value] if result.state == 0]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, workspace: Tensor) -> int:
        """Queues the product on the current stream; returns cuBLASLt's status."""
        self._bias.value = bias.data_ptr()
        self._set(_BIAS_POINTER, self._bias)
        of_weight, of_x, of_y = self._layouts
        status: int = self._library.cublasLtMatmul(
            self._handle, self._descriptor, ctypes.byref(self._one), weight.data_ptr(), of_weight, x.data_ptr(), of_x,
            ctypes.byref(self._zero), y.data_ptr(), of_y, y.data_ptr(), of_y, ctypes.byref(self.proposal.algorithm),
            workspace.data_ptr(), workspace.numel(), torch.cuda.current_stream(x.device).cuda_stream,
        )  # fmt: skip
        return status


_chosen: dict[tuple[int | None, tuple[int, int, int], torch.dtype, bool], _Proposal] = {}
"""(device, [rows, outputs, inputs], dtype, GELU) -> what won; for this process."""


class Products:
    """The products of one model, each shape's algorithm chosen by the clock when the process first meets it.

    They share a workspace, so one object serves one stream. Where cuBLASLt is not found, PyTorch's own choice runs.
    First meetings cannot be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = _library() if device.type == "cuda" else None
        self._ready: dict[tuple[tuple[int, int, int], torch.dtype, bool], _Product] = {}
        if self._library is not None:
            self._handle = ctypes.c_void_p()
            _check(self._library.cublasLtCreate(ctypes.byref(self._handle)), "its handle")
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, like: Sequence[Tensor] = ()
    ) -> Tensor:
        """``x W^T + b``, and the tanh form of GELU of it where asked for.

        Args:
            x: ``[..., K]`` fp16 or bf16, contiguous. weight: ``[N, K]``. bias: ``[N]`` of the same dtype.
            like: weights of the same shape in other layers. Candidates are timed over all of them, since a weight that
                is used twice in turn comes from the cache, as it never does in the model.

        Returns: ``[..., N]``.
        """
        if self._library is None:
            y = F.linear(x, weight, bias)
            return F.gelu(y, approximate="tanh") if gelu else y
        flat = x.view(-1, x.shape[-1])
        y = torch.empty((flat.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        key = ((flat.shape[0], weight.shape[0], weight.shape[1]), x.dtype, gelu)
        product = self._ready.get(key)
        if product is None:
            product = _Product(self._library, self._handle, *key)
            met = (x.device.index, *key)
            if met not in _chosen:
                _chosen[met] = self._choose(product, flat, like or (weight,), bias, y)
            product.proposal = _chosen[met]
            self._ready[key] = product
        _check(product(flat, weight, bias, y, self._workspace), "a product")
        return y.view(*x.shape[:-1], weight.shape[0])

    def _choose(self, product: _Product, x: Tensor, weights: Sequence[Tensor], bias: Tensor, y: Tensor) -> _Proposal:
        """Times every proposal over the given weights, then the first and the best four others again, in turn."""
        weights = weights[:8]

        def pass_ms(proposal: _Proposal) -> float:
            product.proposal = proposal

            def run() -> int:
                return max(product(x, weight, bias, y, self._workspace) for weight in weights)

            return _elapsed_ms(run)

        proposals = product.proposals(bias)
        if not proposals:
            raise RuntimeError("cuBLASLt proposes no algorithm for a product")
        once = [pass_ms(proposal) for proposal in proposals]
        others = sorted(range(1, len(proposals)), key=once.__getitem__)[:4]
        rounds = [[pass_ms(proposals[index]) for index in (0, *others)] for _ in range(3)]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        best = min(range(len(times)), key=times.__getitem__)
        return proposals[(0, *others)[best] if times[best] < _WORTH * times[0] else 0]


def _elapsed_ms(run: Callable[[], int]) -> float:
    """Time of a replay as a graph, which the host does not slow down; infinite where it cannot run."""
    if run():
        return float("inf")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        graph.capture_begin()
        failed = run()
        graph.capture_end()
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
    end.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    return float("inf") if failed else begin.elapsed_time(end)
