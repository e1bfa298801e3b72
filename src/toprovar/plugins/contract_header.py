"""Writes `cpp/include/toprovar/contract.hpp`, the C++ form of `kernels/contract.py`.

    python -m toprovar.plugins.contract_header            # rewrite the header
    python -m toprovar.plugins.contract_header --check    # exit 1 if it is not what would be written

The header is part of the sources, so that C++ builds without Python; a test regenerates it and requires no difference.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..kernels import contract

__all__ = ["HEADER", "PLUGINS", "Plugin", "header"]

HEADER = Path(__file__).parent / "cpp" / "include" / "toprovar" / "contract.hpp"


@dataclass(frozen=True)
class Plugin:
    """One creator: `name` in ONNX and TensorRT, the op behind it, and how many of the op's outputs it has.

    `defaults` replace those of the contract's attributes.
    """

    name: str
    op: contract.OpSpec
    outputs: int
    defaults: tuple[tuple[str, float | int], ...] = ()


def _plugins() -> tuple[Plugin, ...]:
    plugins = [Plugin(op.onnx_name, op, len(op.outputs)) for op in contract.OPS.values()]
    # Attention without entropy has an ONNX name of its own (exporter/functions.py says why): one output, entropy 0.
    attention = contract.OPS["entropy_attention"]
    return (plugins[0], Plugin("CachedAttention", attention, 1, (("entropy", 0),)), *plugins[1:])


PLUGINS = _plugins()
"""Every creator that the plugin library registers."""

_ATTRIBUTE_KINDS = {"FLOAT": "kFLOAT", "INT": "kINT"}


def header() -> str:
    """The text of the header."""
    types = contract.ONNX_DTYPES
    sizes = {**contract.DTYPES, "int32": 4}
    lines = [
        "// Written by `python -m toprovar.plugins.contract_header` from kernels/contract.py. Do not edit.",
        "#pragma once",
        "",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        "namespace toprovar::contract {",
        "",
        f"inline constexpr int32_t kCONTRACT_VERSION = {contract.CONTRACT_VERSION};",
        f"inline constexpr int32_t kKERNEL_REVISION = {contract.KERNEL_REVISION};",
        f"inline constexpr char const* kDOMAIN = {_quoted(contract.DOMAIN)};",
        f"inline constexpr char const* kPLUGIN_NAMESPACE = {_quoted(contract.PLUGIN_NAMESPACE)};",
        f"inline constexpr char const* kPLUGIN_VERSION = {_quoted(contract.PLUGIN_VERSION)};",
        f"inline constexpr int32_t kMAX_HEAD_DIM = {contract.MAX_HEAD_DIM};",
        f"inline constexpr int32_t kMAX_SELECT_TOKENS = {contract.MAX_SELECT_TOKENS};",
        f"inline constexpr int32_t kHEAD_DIMS[] = {{{', '.join(map(str, contract.HEAD_DIMS))}}};",
        "",
        "// Values are those of onnx.TensorProto.DataType. kANY stands for T: any of kT_TYPES, the same for every T of a node.",
        "enum class DataType : int32_t {",
        "    kANY = 0,",
        *(f"    {_constant(name)} = {value}," for name, value in types.items()),
        "};",
        f"inline constexpr DataType kT_TYPES[] = {{{', '.join('DataType::' + _constant(n) for n in contract.DTYPES)}}};",
        "",
        "constexpr size_t sizeOf(DataType type) {",
        "    switch (type) {",
        *(f"        case DataType::{_constant(name)}: return {sizes[name]};" for name in types),
        "        case DataType::kANY: break;",
        "    }",
        "    return 0;",
        "}",
        "",
        "constexpr char const* nameOf(DataType type) {",
        "    switch (type) {",
        *(f"        case DataType::{_constant(name)}: return {_quoted(name)};" for name in types),
        "        case DataType::kANY: break;",
        "    }",
        '    return "T";',
        "}",
        "",
        "inline constexpr int32_t kMAX_RANK = 4;",
        "",
        "// One input or output; equal axis names are equal sizes.",
        "struct TensorSpec {",
        "    char const* name;",
        "    DataType type;",
        "    int32_t rank;",
        "    char const* axes[kMAX_RANK];",
        "};",
        "",
        "enum class AttributeKind : int32_t { kFLOAT, kINT };",
        "",
        "struct AttributeSpec {",
        "    char const* name;",
        "    AttributeKind kind;",
        "    bool required;",
        "    double defaultValue;",
        "    int32_t nbChoices;  // 0: any value",
        "    int32_t choices[4];",
        "};",
        "",
        "enum class Op : int32_t {",
        *(f"    {_constant(op.torch_name)}," for op in contract.OPS.values()),
        "};",
        "",
    ]
    for op in contract.OPS.values():
        lines += [f"// {op.doc}", f"namespace {op.torch_name} {{"]
        lines += [f"enum Input : int32_t {{ {', '.join(_constant(tensor.name) for tensor in op.inputs)} }};"]
        lines += [f"enum Output : int32_t {{ {', '.join(_constant(t.name) + '_OUT' for t in op.outputs)} }};"]
        if op.attributes:
            lines += [
                f"enum Attribute : int32_t {{ {', '.join(_constant(a.name) + '_ATTR' for a in op.attributes)} }};"
            ]
        lines += ["inline constexpr TensorSpec kINPUTS[] = {", *map(_tensor, op.inputs), "};"]
        lines += ["inline constexpr TensorSpec kOUTPUTS[] = {", *map(_tensor, op.outputs), "};"]
        lines += [f"}}  // namespace {op.torch_name}", ""]
    for plugin in PLUGINS:
        if plugin.op.attributes:
            lines += [f"inline constexpr AttributeSpec k{_words(plugin.name)}_ATTRIBUTES[] = {{"]
            lines += [_attribute(plugin, attribute) for attribute in plugin.op.attributes]
            lines += ["};"]
    most = max(len(op.attributes) for op in contract.OPS.values())
    tensors = max(len(op.inputs) + len(op.outputs) for op in contract.OPS.values())
    lines += [
        "",
        f"inline constexpr int32_t kMAX_ATTRIBUTES = {most};",
        f"inline constexpr int32_t kMAX_TENSORS = {tensors};",
        "",
        "// One TensorRT plugin: its name, the op behind it, its tensors and attributes.",
        "struct PluginSpec {",
        "    char const* name;",
        "    Op op;",
        "    int32_t nbInputs;",
        "    TensorSpec const* inputs;",
        "    int32_t nbOutputs;",
        "    TensorSpec const* outputs;",
        "    int32_t nbAttributes;",
        "    AttributeSpec const* attributes;",
        "};",
        "",
        "inline constexpr PluginSpec kPLUGINS[] = {",
        *map(_plugin, PLUGINS),
        "};",
        f"inline constexpr int32_t kNB_PLUGINS = {len(PLUGINS)};",
        "",
        "}  // namespace toprovar::contract",
    ]
    return "// clang-format off\n" + "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if not text.isascii() or not text.isprintable() or '"' in text or "\\" in text:
        raise ValueError(f"{text!r} needs escaping in C++; use plain ASCII in kernels/contract.py")
    return f'"{text}"'


def _words(name: str) -> str:
    """`past_k` -> PAST_K, `EntropyAttention` -> ENTROPY_ATTENTION."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def _constant(name: str) -> str:
    return f"k{_words(name)}"


def _type(dtype: str) -> str:
    return "DataType::kANY" if dtype == "T" else f"DataType::{_constant(dtype)}"


def _tensor(tensor: contract.TensorSpec) -> str:
    axes = ", ".join(map(_quoted, tensor.shape))
    return f"    {{{_quoted(tensor.name)}, {_type(tensor.dtype)}, {len(tensor.shape)}, {{{axes}}}}},  // {tensor.doc}"


def _attribute(plugin: Plugin, attribute: contract.AttributeSpec) -> str:
    default = dict(plugin.defaults).get(attribute.name, attribute.default)
    choices = [value for _, value in attribute.choices]
    if plugin.outputs < len(plugin.op.outputs) and attribute.name in dict(plugin.defaults):
        choices = [int(dict(plugin.defaults)[attribute.name])]  # what the missing output leaves
    fields = [
        _quoted(attribute.name),
        f"AttributeKind::{_ATTRIBUTE_KINDS[attribute.type]}",
        "true" if default is None else "false",
        repr(float(default or 0)),
        str(len(choices)),
        f"{{{', '.join(map(str, choices))}}}",
    ]
    return f"    {{{', '.join(fields)}}},  // {attribute.doc}"


def _plugin(plugin: Plugin) -> str:
    op = plugin.op
    attributes = f"k{_words(plugin.name)}_ATTRIBUTES" if op.attributes else "nullptr"
    fields = [
        _quoted(plugin.name),
        f"Op::{_constant(op.torch_name)}",
        str(len(op.inputs)),
        f"{op.torch_name}::kINPUTS",
        str(plugin.outputs),
        f"{op.torch_name}::kOUTPUTS",
        str(len(op.attributes)),
        attributes,
    ]
    return f"    {{{', '.join(fields)}}},"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m toprovar.plugins.contract_header`."""
    parser = argparse.ArgumentParser(prog="python -m toprovar.plugins.contract_header", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the header is not up to date")
    given = parser.parse_args(arguments)
    if not given.check:
        HEADER.write_text(header(), encoding="utf-8")
        return 0
    if HEADER.read_text(encoding="utf-8") != header():
        print(
            f"{HEADER} is not what kernels/contract.py gives; run python -m toprovar.plugins.contract_header",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
