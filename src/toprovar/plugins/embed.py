"""Turns a cubin library (`python -m toprovar.kernels.aot`) into sources that are linked into the plugin library.

    python -m toprovar.plugins.embed CUBINS OUT

writes into OUT

- `cubins.S`: every cubin, included byte by byte;
- `kernel_arguments.hpp`: one struct per Triton kernel with its launch parameters and grid sizes as named fields, so that
  a kernel that is changed is a compile error here, never a launch with shifted arguments;
- `hopper_arguments.hpp`: the same for the kernels of Hopper's CUDA C++ attention;
- `kernel_table.cpp`: the index as constant data: what a launcher chooses by, and the tables of `tuning.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, ToprovarError
from ..kernels import contract, hopper, tuning
from ..kernels.aot import FORMAT_VERSION, INDEX_NAME

__all__ = ["embed", "read_index"]

KERNELS = ("attention_kernel", "merge_kernel", "mean_heads_kernel", "select_kernel", "gather_kernel", "restore_kernel")
"""Triton kernels that the C++ core launches, by the name of their function."""
HOPPER_KERNEL = "hopper_attention"

_C_TYPES = {"pointer": "CUdeviceptr", "int32": "int32_t", "float32": "float"}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cubin library, with every file checked against its hash.

    Raises:
        FormatError: no library, one of another version, or a changed file.
    """
    path = folder / INDEX_NAME
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); build the cubins with `python -m toprovar.kernels.aot {folder}`"
        ) from error
    wanted = {
        "format_version": FORMAT_VERSION,
        "contract_version": contract.CONTRACT_VERSION,
        "kernel_revision": contract.KERNEL_REVISION,
    }
    for key, value in wanted.items():
        if index.get(key) != value:
            raise FormatError(
                f"{path}: {key} is {index.get(key)}, this toprovar needs {value}; build the cubins again with "
                f"`python -m toprovar.kernels.aot {folder}`"
            )
    for entry in index["kernels"]:
        file = entry["file"]
        if Path(file).name != file or not file.isascii() or '"' in file:
            raise FormatError(f"{path}: names the file {file!r}; valid is a plain file name inside the folder")
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != entry["sha256"]:
            raise FormatError(f"{folder / file}: is not what {INDEX_NAME} lists; build the cubins again")
    return index


def embed(cubins: Path, out: Path) -> None:
    """Write the sources into the folder `out`; files that would not change are left alone.

    Raises:
        FormatError: the library is broken, or its kernels are not those that the C++ core launches.
    """
    index = read_index(cubins)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "cubins.S": _assembly(cubins, index),
        "kernel_arguments.hpp": _arguments(index),
        "hopper_arguments.hpp": _hopper_arguments(),
        "kernel_table.cpp": _table(index),
    }.items():
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _assembly(cubins: Path, index: Mapping[str, Any]) -> str:
    lines = ["/* Written by python -m toprovar.plugins.embed. */", "    .section .rodata"]
    for number, entry in enumerate(index["kernels"]):
        symbol = f"toprovar_cubin_{number}"
        lines += [
            f"    .global {symbol}",
            f"    .hidden {symbol}",
            "    .balign 64",
            f"{symbol}:",
            f'    .incbin "{(cubins / entry["file"]).resolve()}"',
        ]
    return "\n".join([*lines, '    .section .note.GNU-stack,"",%progbits', ""])


def _arguments(index: Mapping[str, Any]) -> str:
    lines = [
        "// Written by python -m toprovar.plugins.embed from the index of the cubin library.",
        "#pragma once",
        "",
        "#include <cuda.h>",
        "",
        "#include <cstdint>",
        "",
        '#include "core/kernel_table.hpp"',
        "",
        "namespace toprovar {",
    ]
    for kernel in KERNELS:
        entries = [entry for entry in index["kernels"] if entry["kernel"] == kernel]
        if not entries:
            raise FormatError(f"cubin library: has no {kernel}, which the plugins launch; build the cubins again")
        signatures = {
            (
                tuple((p["name"], p["type"], bool(p.get("hidden"))) for p in entry["parameters"]),
                tuple(axis["size"] for axis in entry["grid"]),
            )
            for entry in entries
        }
        if len(signatures) > 1:
            raise FormatError(
                f"cubin library: {kernel} was compiled with {len(signatures)} different parameter lists; a launcher "
                "needs one: give every variant the same run-time parameters"
            )
        parameters, grid = signatures.pop()
        lines += ["", f"struct {_camel(kernel)} {{"]
        lines += [f"    static constexpr KernelKind kKIND = KernelKind::k{kernel.upper()};"]
        lines += [f"    static constexpr int32_t kNB_PARAMETERS = {len(parameters)};"]
        lines += [
            f"    {_C_TYPES[kind]} {name}{{}};{'  // hidden, null' if hidden else ''}"
            for name, kind, hidden in parameters
        ]
        names = [f"grid_{name}" if name != "one" else "" for name in grid]
        lines += [f"    int64_t {name}{{1}};" for name in names if name]
        lines += [
            "    void pointers(void** pointers_) noexcept {",
            *(f"        pointers_[{i}] = &{name};" for i, (name, _, _) in enumerate(parameters)),
            "    }",
            "    void sizes(int64_t* sizes_) const noexcept {",
            *(f"        sizes_[{i}] = {name or '1'};" for i, name in enumerate(names)),
            "    }",
            "};",
        ]
    return "\n".join([*lines, "", "}  // namespace toprovar", ""])


_HOPPER_TYPES = {"c_void_p": "CUdeviceptr", "c_int": "int32_t", "c_float": "float"}
_HOPPER_MAPS = 9
"""Tensor maps in front of the forward kernel's other parameters: q; past k, v, new k, v; the same four for the seam."""


def _hopper_arguments() -> str:
    """The parameters of hopper.cu as `hopper.py` passes them. `tests/plugins` compares both with the source."""
    lines = [
        "// Written by python -m toprovar.plugins.embed from kernels/hopper.py.",
        "#pragma once",
        "",
        "#include <cuda.h>",
        "",
        "#include <cstdint>",
        "",
        "namespace toprovar {",
    ]
    for name, maps, fields in (
        ("HopperForward", _HOPPER_MAPS, hopper._ForwardArguments._fields_),
        ("HopperFinish", 0, hopper._FinishArguments._fields_),
        ("HopperSmall", 0, hopper._SmallArguments._fields_),
    ):
        lines += ["", f"struct {name} {{"]
        lines += [f"    static constexpr int32_t kNB_PARAMETERS = {maps + len(fields)};"]
        lines += [f"    alignas(64) CUtensorMap maps[{maps}];"] if maps else []
        lines += [f"    {_HOPPER_TYPES[field[1].__name__]} {field[0]}{{}};" for field in fields]
        lines += ["    void pointers(void** pointers_) noexcept {"]
        lines += [f"        pointers_[{i}] = &maps[{i}];" for i in range(maps)]
        lines += [f"        pointers_[{maps + i}] = &{field[0]};" for i, field in enumerate(fields)]
        lines += ["    }", "};"]
    return "\n".join([*lines, "", "}  // namespace toprovar", ""])


def _dtype(name: str) -> str:
    return f"contract::DataType::k{name.upper()}"


def _entropy(entry: Mapping[str, Any]) -> int:
    return contract.ENTROPY_MODES[entry["entropy"]] if "entropy" in entry else -1


def _table(index: Mapping[str, Any]) -> str:
    entries = index["kernels"]
    known = {*KERNELS, HOPPER_KERNEL}
    lines = [
        "// Written by python -m toprovar.plugins.embed from the index of the cubin library.",
        '#include "core/kernel_table.hpp"',
        "",
        'extern "C" {',
        *(f"extern unsigned char const toprovar_cubin_{number}[];" for number in range(len(entries))),
        "}",
        "",
        "namespace toprovar {",
        "",
        "namespace {",
        "",
        "KernelEntry const kENTRIES[] = {",
    ]
    for number, entry in enumerate(entries):
        kernel = entry["kernel"]
        if kernel not in known:
            raise FormatError(f"cubin library: {entry['name']} is a {kernel}, which the plugins do not know")
        is_hopper = kernel == HOPPER_KERNEL
        grid = [1, 1, 1] if is_hopper else [axis["per_program"] for axis in entry["grid"]]
        tile = {"wide": 0, "narrow": 1}.get(entry.get("tile", ""), -1)
        symbols = (
            [entry["symbols"][name] for name in ("forward", "finish", "small")]
            if is_hopper
            else [entry["symbol"], "", ""]
        )
        fields: list[str] = [
            f'"{entry["name"]}"',
            f"KernelKind::k{kernel.upper()}",
            f"contract::Op::k{entry['op'].upper()}",
            str(entry["arch"]),
            _dtype(entry["dtype"]),
            str(entry.get("head_dim", 0)),
            str(_entropy(entry)),
            str(tile),
            str(int(entry.get("split", False))),
            str(entry.get("heads_pad", 0)),
            str(entry.get("block", 0)),
            str(entry.get("constants", {}).get("UNIT", 0)),
            str(entry.get("cache", 0)),
            *(f'"{symbol}"' for symbol in symbols),
            str(entry["threads"]),
            str(entry["shared_bytes"]),
            f"{{{', '.join(map(str, grid))}}}",
            f"{{{', '.join(map(str, _hopper(entry))) if is_hopper else ''}}}",
            f"toprovar_cubin_{number}",
            str(entry["size_bytes"]),
        ]
        lines.append(f"    {{{', '.join(fields)}}},")
    tables = index["tuning"]
    lines += ["};", "", "TileEntry const kTILES[] = {"]
    for tile in tables["tiles"]:
        lines.append(
            f"    {{{tile['arch']}, {_dtype(tile['dtype'])}, {tile['head_dim']}, "
            f"{ {'wide': 0, 'narrow': 1}[tile['tile']] }, {tile['block_m']}, {tile['block_n']}}},"
        )
    lines += [
        "};",
        "",
        "}  // namespace",
        "",
        "KernelTable const& kernelTable() noexcept {",
        "    static KernelTable const table{",
        f"        {len(entries)}, kENTRIES, {len(tables['tiles'])}, kTILES,",
        f"        {tables['wide_fill_percent']}, {tables['slots_per_sm']}, {tables['min_keys_per_split']}, "
        f"{tables['max_splits']}, {max(tuning.HEADS_PADS)}}};",
        "    return table;",
        "}",
        "",
        "}  // namespace toprovar",
        "",
    ]
    return "\n".join(lines)


def _hopper(entry: Mapping[str, Any]) -> list[int]:
    """The fields of `HopperBuild`, in order."""
    fields = ("tile_m", "tile_n", "consumers", "ctas_per_sm", "tile_ns", "block_ns", "seam", "finish_threads", "sets")
    small = ("small_queries", "small_keys", "small_threads", "small_shared_bytes")
    numbers = [*(int(entry[field]) for field in fields), hopper._TENSOR_MAP_DTYPE[entry["dtype"]]]
    return [*numbers, *(int(entry[field]) for field in small)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m toprovar.plugins.embed`."""
    parser = argparse.ArgumentParser(
        prog="python -m toprovar.plugins.embed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("cubins", type=Path, help="folder written by python -m toprovar.kernels.aot")
    parser.add_argument("out", type=Path, help="folder of the sources")
    given = parser.parse_args(arguments)
    try:
        embed(given.cubins, given.out)
    except ToprovarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
