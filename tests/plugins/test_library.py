"""The plugin library compiles against TensorRT's headers, exports what TensorRT looks for, and is found by Python."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from toprovar.errors import FormatError, TargetError
from toprovar.plugins import embed, library
from toprovar.profiles.noise import scale_noise

from .conftest import cmake, tensorrt_roots

EXPORTS = {
    "libtoprovar_plugins.so": {"getCreators", "setLoggerFinder", "toprovarScaleNoise"},
    "libtoprovar_plugins86.so": {"getPluginCreators", "initToprovarPlugins", "setLoggerFinder", "toprovarScaleNoise"},
}


def build_library(root: str, cubins: Path, folder: Path) -> Path:
    version = next(Path(root).rglob("NvInferVersion.h"), None)
    if version is None:
        pytest.fail(f"TENSORRT_ROOT has {root}, where there is no NvInferVersion.h")
    name = "libtoprovar_plugins86.so" if re.search(r"MAJOR +8\b", version.read_text()) else "libtoprovar_plugins.so"
    target = name.removeprefix("lib").removesuffix(".so")
    build = cmake(folder, f"TOPROVAR_CUBINS={cubins}", "TOPROVAR_BUILD_RUNTIME=OFF", target=target, tensorrt=root)
    return build / "src" / "toprovar" / "plugins" / "cpp" / name


@pytest.mark.cpp
def test_the_library_compiles_without_warnings_and_exports_its_entry_points_only(cubins, tmp_path):
    roots = tensorrt_roots()
    if not roots:
        pytest.skip("TENSORRT_ROOT is not set: no headers of TensorRT to compile against")
    for i, root in enumerate(roots):
        path = build_library(root, cubins, tmp_path / str(i))
        nm = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        assert {line.split()[-1] for line in nm.splitlines()} == EXPORTS[path.name]
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(nvinfer|cuda)", needed), "nothing of TensorRT or CUDA is linked"
        for seeds, tokens, logits in (([7], 1, 3), ([3, 2**64 - 1, 2**40], 300, 5)):
            noise = library.noise_of(path)(seeds, 4, tokens, logits)
            assert np.array_equal(noise, scale_noise(seeds, 4, tokens, logits))


def test_a_library_without_noise_is_of_another_version(tmp_path):
    with pytest.raises(TargetError, match="build it again"):
        library.noise_of(tmp_path / "libtoprovar_plugins.so")
    libc = Path("/lib/x86_64-linux-gnu/libc.so.6")
    if libc.exists():
        with pytest.raises(TargetError, match="toprovarScaleNoise; build it again"):
            library.noise_of(libc)


CHILD = """
import ctypes, sys
import tensorrt_rtx as trt

library = ctypes.CDLL(sys.argv[1])
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
creators = [c for c in registry.all_creators if c.plugin_namespace == "toprovar"]
print("creators", *sorted(c.name for c in creators), flush=True)
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(0)
parser = trt.OnnxParser(network, logger)
ok = parser.parse_from_file(sys.argv[2])
print("parsed", ok, [parser.get_error(i).desc() for i in range(parser.num_errors)], flush=True)
for i in range(network.num_layers):
    print("layer", network.get_layer(i).type, flush=True)
"""


def attention_model(path: Path, **attributes: object) -> Path:
    """One node with the attributes that the exporter writes, and no function body."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    names = ("q", "past_k", "past_v", "new_k", "new_v")
    inputs = [
        helper.make_tensor_value_info(name, types.FLOAT16, [length, 2, 16, 64])
        for name, length in zip(names, "NPPLL", strict=True)
    ]
    outputs = [
        helper.make_tensor_value_info("out", types.FLOAT16, ["N", 2, 16, 64]),
        helper.make_tensor_value_info("entropy", types.FLOAT, [2, "N"]),
    ]
    plugin = {"plugin_namespace": "toprovar", "plugin_version": "1"}
    node = helper.make_node("EntropyAttention", names, ["out", "entropy"], domain="toprovar", **(attributes | plugin))
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("toprovar", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def v3_library(cubins, tmp_path_factory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    for root in tensorrt_roots():
        header = next(Path(root).rglob("NvInferVersion.h"))
        if not re.search(r"MAJOR +8\b", header.read_text()):
            return build_library(root, cubins, tmp_path_factory.mktemp("v3"))
    pytest.skip("TENSORRT_ROOT names no headers of TensorRT 10 or 11")


def _parse(plugin: Path, model: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(plugin), str(model)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.cpp
@pytest.mark.trt
def test_the_parser_reaches_our_creator_with_the_attributes_of_the_node(v3_library, tmp_path):
    # TensorRT-RTX has no plugin layers: its process ends in addPluginV3, right behind createPlugin. So the proof that
    # createPlugin saw a field is what it says of a wrong value.
    good = _parse(v3_library, attention_model(tmp_path / "good.onnx", scale=0.125, entropy=1))
    expected = "creators CachedAttention EntropyAttention GatherTokens RestoreTokens ScatterTokens SelectTokens"
    assert good.stdout.splitlines()[0] == expected
    assert "toprovar::EntropyAttention" not in good.stderr
    assert "parsed" not in good.stdout and good.returncode != 0, "TensorRT-RTX takes plugins now: test the layer"

    wrong = _parse(v3_library, attention_model(tmp_path / "entropy.onnx", scale=0.125, entropy=7))
    assert "toprovar::EntropyAttention: EntropyAttention: attribute entropy is 7; valid is 0 or 1" in wrong.stderr
    wrong = _parse(v3_library, attention_model(tmp_path / "scale.onnx", scale=float("inf"), entropy=1))
    assert "attribute scale is inf; valid is a finite number" in wrong.stderr
    wrong = _parse(v3_library, attention_model(tmp_path / "missing.onnx", entropy=1))
    assert "attribute scale is missing" in wrong.stderr


# --- library.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("8.6.0", "libtoprovar_plugins86.so"),
        ("10.15.1.29", "libtoprovar_plugins.so"),
        ("10.16.1.11", "libtoprovar_plugins.so"),
        ("11.1.0.106", "libtoprovar_plugins.so"),
    ],
)
def test_each_version_of_tensorrt_has_its_library(version, name):
    assert library.library_name(version) == name


@pytest.mark.parametrize("version", ["8.5.3", "9.3.0", "10.14.1", "12.0"])
def test_a_version_without_a_library_is_refused(version):
    with pytest.raises(TargetError, match=r"valid are 8.6, and 10.15 to 11"):
        library.library_name(version)


def test_the_environment_variable_goes_first(monkeypatch, tmp_path):
    path = tmp_path / "some.so"
    path.write_bytes(b"x")
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, str(path))
    assert library.find_library("10.16.1") == path
    path.unlink()
    with pytest.raises(TargetError, match="where no file is"):
        library.find_library("10.16.1")


def test_a_missing_library_comes_with_the_command_that_builds_it(monkeypatch, tmp_path):
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(library, "_CHECKOUT", tmp_path)
    with pytest.raises(TargetError, match=r"cmake -S .* --target toprovar_plugins86"):
        library.find_library("8.6.0")


class _Registry:
    """The registry of a TensorRT binding, as far as load_library uses it."""

    def __init__(self, takes: bool) -> None:
        self.known: list[str] = []
        self.takes = takes
        self.loaded = 0

    def load_library(self, path: str) -> None:
        self.loaded += 1
        if self.takes:
            self.known = [plugin.name for plugin in library.PLUGINS]

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return name if (version, namespace) == ("1", "toprovar") and name in self.known else None


class _Binding:
    __version__ = "10.16.1.11"


def test_a_library_is_loaded_once(monkeypatch, tmp_path):
    (tmp_path / "some.so").write_bytes(b"x")
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, str(tmp_path / "some.so"))
    registry = _Registry(takes=True)
    library.load_library(_Binding, registry)
    library.load_library(_Binding, registry)
    assert registry.loaded == 1
    with pytest.raises(TargetError, match="took no plugin"):
        library.load_library(_Binding, _Registry(takes=False))


# --- embed.py ---------------------------------------------------------------------------------------------------------


def test_a_changed_cubin_is_not_embedded(cubins, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(cubins, copy)
    victim = next(copy.glob("select*.cubin"))
    victim.write_bytes(b"changed")
    with pytest.raises(FormatError, match=r"is not what index.json lists"):
        embed.embed(copy, tmp_path / "out")
    with pytest.raises(FormatError, match=r"python -m toprovar\.kernels\.aot"):
        embed.embed(tmp_path / "nowhere", tmp_path / "out")


def test_embedding_again_changes_no_file(cubins, tmp_path):
    embed.embed(cubins, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    embed.embed(cubins, tmp_path)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == {"cubins.S", "hopper_arguments.hpp", "kernel_arguments.hpp", "kernel_table.cpp"}
