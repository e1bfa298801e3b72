"""Compiles every kernel ahead of time, on a machine with no GPU, into a library of cubins.

    python -m toprovar.kernels.aot OUT [--arch 90]...

OUT becomes a folder of cubins and `index.json`: for each kernel its architecture, dtype, tile, launch parameters in
order (Triton's hidden scratch pointers among them, always null), grid, shared memory and sha256; and the tables of
`tuning.py`, so that a C++ launcher repeats `tuning.choose` from the index alone. `loader.py` reads and launches it with
no Triton present. Triton's kernels cover every architecture of the table; Hopper's CUDA C++ kernel joins as entries
whose "source" is "cuda".
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, TargetError, ToprovarError
from . import contract, tuning

__all__ = ["FORMAT_VERSION", "INDEX_NAME", "Variant", "build_library", "compile_variant", "variants"]

FORMAT_VERSION = 1
INDEX_NAME = "index.json"

_TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
_HIDDEN_PARAMETERS = ("global_scratch", "profile_scratch")


@dataclass(frozen=True)
class Variant:
    """One Triton kernel to compile: which, for what, and with which compile-time values.

    `pointers` gives the element dtype of each pointer parameter, `floats` the parameters that are fp32 scalars; every
    other run-time parameter is an int32. `grid` names, for each axis, a size and how much of it one program covers.
    """

    name: str
    op: str
    kernel: str
    arch: int
    dtype: str
    pointers: dict[str, str]
    constants: dict[str, int | bool]
    grid: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 3
    floats: tuple[str, ...] = ()
    describes: dict[str, Any] = field(default_factory=dict)
    """What a launcher chooses by: head_dim, entropy, tile, split, heads_pad, block, cache."""


def _attention_variants(arch: int) -> Iterator[Variant]:
    for dtype, head_dim in itertools.product(("float16", "bfloat16"), contract.HEAD_DIMS):
        d0, d1 = tuning.split_head_dim(arch, head_dim)
        for tile_name, entropy, split in (
            ("wide", "none", False),
            ("wide", "mean", False),
            ("narrow", "none", False),
            ("narrow", "mean", False),
            ("narrow", "mean", True),  # one for both: the merge kernel drops what is not asked for
        ):
            tile = tuning.TILES[arch, dtype, head_dim, tile_name]
            keys = dict.fromkeys(("q", "past_k", "past_v", "new_k", "new_v"), dtype)
            outputs = {"out": "float32" if split else dtype, "entropy": "float32", "lse": "float32", "stats": "float32"}
            yield Variant(
                name=f"attention_sm{arch}_{dtype}_d{head_dim}_{tile_name}_{'split' if split else entropy}",
                op="entropy_attention",
                kernel="attention_kernel",
                arch=arch,
                dtype=dtype,
                pointers=keys | outputs,
                floats=("scale_log2",),
                constants={
                    "D": head_dim, "D0": d0, "D1": d1, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                    "ENTROPY": entropy == "mean", "LSE": False, "SPLIT": split,
                },
                grid=(("n_queries", tile.block_m), ("row_heads", 1), ("splits", 1)),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                describes={"head_dim": head_dim, "entropy": entropy, "tile": tile_name, "split": split},
            )  # fmt: skip
        if head_dim != contract.MAX_HEAD_DIM:
            continue  # the merge kernel takes the head dim at run time
        for heads_pad, entropy in itertools.product(tuning.HEADS_PADS, ("none", "mean")):
            yield Variant(
                name=f"merge_sm{arch}_{dtype}_h{heads_pad}_{entropy}",
                op="entropy_attention",
                kernel="merge_kernel",
                arch=arch,
                dtype=dtype,
                pointers={"parts": "float32", "stats": "float32", "out": dtype, "entropy": "float32", "lse": "float32"},
                constants={
                    "D_PAD": contract.MAX_HEAD_DIM, "HEADS_PAD": heads_pad,
                    "ENTROPY": contract.ENTROPY_MODES[entropy], "LSE": False,
                },
                grid=(("n_queries", 1), ("rows", 1), ("one", 1)),
                num_warps=tuning.MERGE_WARPS,
                describes={"entropy": entropy, "heads_pad": heads_pad},
            )  # fmt: skip
    for heads_pad in tuning.HEADS_PADS:
        yield Variant(
            name=f"mean_heads_sm{arch}_h{heads_pad}",
            op="entropy_attention",
            kernel="mean_heads_kernel",
            arch=arch,
            dtype="float32",
            pointers={"per_head": "float32", "mean": "float32"},
            constants={"HEADS_PAD": heads_pad, "BLOCK": tuning.MEAN_BLOCK},
            grid=(("n_queries", tuning.MEAN_BLOCK), ("rows", 1), ("one", 1)),
            num_warps=tuning.MEAN_WARPS,
            describes={"heads_pad": heads_pad},
        )


def _token_variants(arch: int) -> Iterator[Variant]:
    for block, warps in tuning.SELECT_BLOCKS.items():
        yield Variant(
            name=f"select_sm{arch}_n{block}",
            op="select_tokens",
            kernel="select_kernel",
            arch=arch,
            dtype="float32",
            pointers={"entropy": "float32", "indices": "int32"},
            constants={"BLOCK": block},
            grid=(("images", 1), ("one", 1), ("one", 1)),
            num_warps=warps,
            describes={"block": block},
        )
    for dtype in contract.DTYPES:
        block_c, warps = tuning.TOKEN_BLOCK
        yield Variant(
            name=f"gather_sm{arch}_{dtype}",
            op="gather_tokens",
            kernel="gather_kernel",
            arch=arch,
            dtype=dtype,
            pointers={"x": dtype, "indices": "int32", "kept": dtype},
            constants={"UNIT": 8, "BLOCK_C": block_c},
            grid=(("kept_rows", 1), ("channels", block_c), ("one", 1)),
            num_warps=warps,
        )
        for name, cache in (("scatter", 0), ("restore", 1), ("restore_any", 2)):
            yield Variant(
                name=f"{name}_sm{arch}_{dtype}",
                op="restore_tokens" if cache else "scatter_tokens",
                kernel="restore_kernel",
                arch=arch,
                dtype=dtype,
                pointers={"x": dtype, "kept": dtype, "indices": "int32", "cache": dtype, "y": dtype},
                constants={"CACHE": cache, "UNIT": 8, "BLOCK_C": block_c, "SAMPLES": tuning.RESTORE_SAMPLES},
                grid=(("token_rows", 1), ("channels", block_c), ("one", 1)),
                num_warps=warps,
                describes={"cache": cache},
            )


def variants(archs: Iterable[int] = tuning.ARCHS) -> list[Variant]:
    """Every Triton kernel of a library for these architectures."""
    return [v for arch in archs for v in (*_attention_variants(arch), *_token_variants(arch))]


def compile_variant(variant: Variant, image: str = "cubin") -> tuple[bytes, dict[str, Any]]:
    """(cubin or PTX text, index entry without file name) of one kernel; needs Triton, no GPU."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise TargetError(
            "cubin library: triton is not installed; it compiles the kernels (pip install triton, 3.6 is tested)"
        ) from error
    from . import triton_kernels

    kernel = getattr(triton_kernels, variant.kernel)
    names: list[str] = kernel.arg_names
    signature = {}
    for name in names:
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            signature[name] = "*" + _TRITON_TYPES[variant.pointers[name]]
        else:
            signature[name] = "fp32" if name in variant.floats else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in variant.pointers}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # would put this machine's paths into the cubin
        compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)

    limit = tuning.SHARED_LIMIT_BYTES[variant.arch]
    if compiled.metadata.shared > limit:
        raise TargetError(
            f"{variant.name}: asks for {compiled.metadata.shared} bytes of shared memory, sm_{variant.arch} has "
            f"{limit}; "
            "choose a smaller tile or fewer stages in tuning.py"
        )
    parameters: list[dict[str, Any]] = []
    for name in names:
        if name in variant.pointers:
            parameters.append({"name": name, "type": "pointer", "dtype": variant.pointers[name]})
        elif name not in variant.constants:
            parameters.append({"name": name, "type": "float32" if name in variant.floats else "int32"})
    hidden = _ptx_parameter_count(compiled.asm["ptx"]) - len(parameters)
    if hidden != len(_HIDDEN_PARAMETERS):
        raise TargetError(
            f"{variant.name}: Triton {triton.__version__} gave the kernel {hidden} hidden parameters, "
            f"{len(_HIDDEN_PARAMETERS)} are known; use Triton 3.6"
        )
    parameters += [{"name": name, "type": "pointer", "hidden": True} for name in _HIDDEN_PARAMETERS]
    entry = {
        "name": variant.name,
        "op": variant.op,
        "kernel": variant.kernel,
        "source": "triton",
        "tensor_maps": False,
        "arch": variant.arch,
        "dtype": variant.dtype,
        **variant.describes,
        "symbol": compiled.metadata.name,
        "constants": dict(variant.constants),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "threads": 32 * variant.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "parameters": parameters,
        "grid": [{"size": size, "per_program": amount} for size, amount in variant.grid],
    }
    code: bytes | str = compiled.asm[image]
    return (code if isinstance(code, bytes) else code.encode()), entry


def _ptx_parameter_count(ptx: str) -> int:
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return entry.group(1).count(".param") if entry else 0


def _hopper_entries() -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Hopper's CUDA C++ kernel. Both kernels of a launch are in one cubin; `hopper.py` documents the fields."""
    from . import hopper

    for variant in itertools.chain.from_iterable(hopper.VARIANTS.values()):
        given = "mean" if variant.entropy else "none"
        described = {
            "name": f"hopper_attention_sm90_{variant.dtype}_d{variant.head_dim}_{variant.name}_{given}",
            "op": "entropy_attention",
            "kernel": "hopper_attention",
            "tensor_maps": True,
            "arch": 90,
        }
        yield hopper.build_cubin(variant), {**described, **variant.metadata(), "entropy": given}


def _tables(archs: Iterable[int]) -> dict[str, Any]:
    """tuning.py as data: what a C++ launcher needs to repeat `choose`."""
    return {
        "wide_fill_percent": tuning.WIDE_FILL_PERCENT,
        "slots_per_sm": tuning.SLOTS_PER_SM,
        "min_keys_per_split": tuning.MIN_KEYS_PER_SPLIT,
        "max_splits": tuning.MAX_SPLITS,
        "tiles": [
            {"arch": arch, "dtype": dtype, "head_dim": head_dim, "tile": name, **asdict(tile)}
            for (arch, dtype, head_dim, name), tile in tuning.TILES.items()
            if arch in archs and dtype != "float32"
        ],
    }


def build_library(out: Path, archs: Iterable[int] = tuning.ARCHS, *, hopper: bool = True) -> dict[str, Any]:
    """Compile everything for `archs` into the folder `out`, replacing a library that is there. Returns the index.

    With `hopper`, sm_90 also gets the CUDA C++ kernel where a CUDA compiler is found; where none is, the index says so
    under "left_out". The folder appears whole or not at all.

    Raises: InputError for an unknown architecture or an `out` that holds something else; TargetError without Triton.
    """
    archs = sorted(set(archs))
    unknown = [arch for arch in archs if arch not in tuning.ARCHS]
    if unknown or not archs:
        raise InputError(f"cubin library: architecture {unknown}; valid are {', '.join(map(str, tuning.ARCHS))}")
    if out.exists() and not (out / INDEX_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"cubin library: {out} exists and is no cubin library; name an empty or a new folder")
    work = out.with_name(f".{out.name}.{os.getpid()}")
    work.mkdir(parents=True)
    try:
        index = _build_into(work, archs, hopper)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return index


def _build_into(folder: Path, archs: list[int], hopper: bool) -> dict[str, Any]:
    started = time.perf_counter()
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []

    def keep(cubin: bytes, entry: dict[str, Any]) -> None:
        file = f"{entry['name']}.cubin"
        (folder / file).write_bytes(cubin)
        entries.append({**entry, "file": file, "size_bytes": len(cubin), "sha256": hashlib.sha256(cubin).hexdigest()})

    pending = variants(archs)
    for done, variant in enumerate(pending):
        if sys.stderr.isatty():
            print(f"\r{done}/{len(pending)} {variant.name:60}", end="", file=sys.stderr, flush=True)
        keep(*compile_variant(variant))
    if sys.stderr.isatty():
        print("\r" + " " * 80 + "\r", end="", file=sys.stderr)
    if hopper and 90 in archs:
        try:
            for cubin, entry in _hopper_entries():
                keep(cubin, entry)
        except TargetError as error:
            left_out.append(str(error))

    import triton

    index = {
        "format_version": FORMAT_VERSION,
        "contract_version": contract.CONTRACT_VERSION,
        "kernel_revision": contract.KERNEL_REVISION,
        "triton": triton.__version__,
        "archs": archs,
        "build_seconds": round(time.perf_counter() - started, 1),
        "left_out": left_out,
        "tuning": _tables(archs),
        "kernels": entries,
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toprovar.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the library; replaced if it is one already")
    parser.add_argument("--arch", type=int, action="append", help=f"one of {tuning.ARCHS}; repeatable; default: all")
    given = parser.parse_args(arguments)
    try:
        index = build_library(given.out, given.arch or tuning.ARCHS)
    except ToprovarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(entry["size_bytes"] for entry in index["kernels"])
    print(f"{given.out}: {len(index['kernels'])} kernels, {size / 2**20:.1f} MiB, {index['build_seconds']} s")
    for reason in index["left_out"]:
        print(f"left out: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
