"""The builder for the full TensorRT. TensorRT itself is a mock here: these tests show what it is asked for, in which
version, and that mistakes are found; no engine is built. tests/runtime/test_tensorrt.py is the other half."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.runtime import tiny
from toprovar.errors import BundleError, InputError, TargetError
from toprovar.exporter import engine_tensorrt
from toprovar.exporter.engine import EngineOptions, ShapeProfile
from toprovar.exporter.engine_tensorrt import TensorRtBuilder, add_engines, emit_trtexec, trtexec_commands
from toprovar.plugins.device import Gpu
from toprovar.runtime.bundle import open_bundle


class _Names:
    """Enumerators by name; a name that this version has not is an AttributeError, as in the binding."""

    def __init__(self, **values: int) -> None:
        self.__dict__.update(values)


def mock_tensorrt(version: str, plugin_layers: int, asked: dict) -> types.ModuleType:
    """As much of the binding as a build uses; `asked` collects what was asked for."""
    major = int(version.split(".")[0])
    trt = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.float32, trt.float16, trt.int32 = "float32", "float16", "int32"
    kinds = "PLUGIN_V2 CONSTANT SHAPE CAST MATRIX_MULTIPLY SHUFFLE SLICE GATHER ELEMENTWISE".split()
    kinds += ["PLUGIN_V3"] if major >= 10 else []
    trt.LayerType = _Names(**{kind: number for number, kind in enumerate(kinds)})
    made_of = {"Cast": trt.LayerType.CAST, "MatMul": trt.LayerType.MATRIX_MULTIPLY, "Reshape": trt.LayerType.SHUFFLE}
    flags = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}
    trt.NetworkDefinitionCreationFlag = _Names(**flags[major])
    builder_flags = {"TF32": 7}
    if major == 8:
        builder_flags |= {"FP16": 0, "OBEY_PRECISION_CONSTRAINTS": 12}
        trt.PreviewFeature = _Names(PROFILE_SHARING_0806=2)
        trt.TacticSource = _Names(EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4)
    trt.BuilderFlag = _Names(**builder_flags)
    trt.MemoryPoolType = _Names(WORKSPACE=0)

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

        def __init__(self) -> None: ...

    trt.ILogger = ILogger

    class Tensor:
        def __init__(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> None:
            self.name, self.shape, self.dtype = name, shape, dtype

    class Layer:
        """Its output reads as fp32 or int32, whatever it will be: so it is in 8.6 before a build."""

        def __init__(self, kind: int, name: str, inputs: list[Tensor], output: str, integer: bool = False) -> None:
            self.type, self.name, self._inputs = kind, name, inputs
            self.num_inputs, self.num_outputs = len(inputs), 1
            self.output = Tensor(output, (), "int32" if integer else "float32")

        def get_input(self, index: int) -> Tensor:
            return self._inputs[index]

        def get_output(self, index: int) -> Tensor:
            return self.output

        def set_output_type(self, index: int, dtype: str) -> None:
            asked.setdefault("types", {})[self.name] = dtype

        def __setattr__(self, name: str, value: object) -> None:
            if name == "precision":
                asked.setdefault("precisions", {})[self.name] = value
            super().__setattr__(name, value)

    class Network:
        def __init__(self, inputs: list[Tensor], nodes: Sequence[onnx.NodeProto], constants: dict[str, int]) -> None:
            self._inputs, self.num_inputs = inputs, len(inputs)
            kind = trt.LayerType.PLUGIN_V2 if major == 8 else trt.LayerType.PLUGIN_V3
            self._layers = [Layer(kind, f"plugin {i}", inputs[:1], "kept") for i in range(plugin_layers)]
            known = {one.name: one for one in inputs}
            for name, dtype in constants.items():
                unnamed = f"(Unnamed Layer* {len(self._layers)}) [Constant]_output"
                constant = Layer(trt.LayerType.CONSTANT, name, [], unnamed, dtype == TensorProto.INT64)
                known[name] = constant.output
                self._layers.append(constant)
            for node in nodes:
                read = [known[name] for name in node.input if name]
                if node.op_type in ("Mul", "Add"):  # as the parser does it: constants get the rank of the other operand
                    ranked = f"(Unnamed Layer* {len(self._layers)}) [Shuffle]"
                    shuffle = Layer(trt.LayerType.SHUFFLE, ranked, read[1:], f"{node.name}.ranked")
                    self._layers.append(shuffle)
                    read[1] = shuffle.output
                made = made_of.get(node.op_type, trt.LayerType.ELEMENTWISE)
                self._layers.append(Layer(made, node.name, read, node.output[0]))
                known |= dict.fromkeys(node.output, self._layers[-1].output)
            self.num_layers = len(self._layers)

        def get_input(self, index: int) -> Tensor:
            return self._inputs[index]

        def get_layer(self, index: int) -> Layer:
            return self._layers[index]

    class Parser:
        num_errors = 0

        def __init__(self, network: Network, logger: object) -> None:
            self._network = network

        def parse_from_file(self, model: str) -> bool:
            proto = onnx.load(model, load_external_data=False)
            asked["opset"] = proto.opset_import[0].version
            dtypes = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT32: "int32"}
            inputs = [
                Tensor(
                    one.name,
                    tuple(-1 if dim.dim_param else dim.dim_value for dim in one.type.tensor_type.shape.dim),
                    dtypes[one.type.tensor_type.elem_type],
                )
                for one in proto.graph.input
            ]
            nodes = [node for node in proto.graph.node if not node.domain]
            self._network.__init__(inputs, nodes, {one.name: one.data_type for one in proto.graph.initializer})
            return True

    trt.OnnxParser = Parser

    class TimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+"

    class Config:
        def __init__(self) -> None:
            asked["profiles"] = []

        def set_flag(self, flag: int) -> None:
            asked.setdefault("flags", set()).add(flag)

        def clear_flag(self, flag: int) -> None:
            asked.setdefault("cleared", set()).add(flag)

        def set_memory_pool_limit(self, pool: int, size: int) -> None:
            asked["workspace"] = size

        def set_preview_feature(self, feature: int, enable: bool) -> None:
            asked["preview"] = (feature, enable)

        def set_tactic_sources(self, sources: int) -> None:
            asked["sources"] = sources

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            asked.setdefault("timing", []).append(serialized_timing_cache)
            return TimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            return ignore_mismatch

        def add_optimization_profile(self, profile: dict) -> int:
            asked["profiles"].append(profile)
            return len(asked["profiles"]) - 1

    class Profile(dict):
        def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:
            self[input] = (min, opt, max)

    class Builder:
        def __init__(self, logger: object) -> None: ...

        def create_network(self, flags: int) -> Network:
            asked["network"] = flags
            return Network([], [], {})

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            asked["builds"] = asked.get("builds", 0) + 1
            return b"engine"

    trt.Builder = Builder
    return trt


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A builder on a mock of this version, whose networks have so many plugin layers."""

    def builder(version: str, plugin_layers: int = 0, gpu: str = "Mock GPU"):
        asked: dict = {}
        trt = mock_tensorrt(version, plugin_layers, asked)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        library = tmp_path / "plugins.so"
        library.write_bytes(b"plugins")
        monkeypatch.setattr(engine_tensorrt, "describe_gpu", lambda: Gpu(gpu, "9.0", "13.0"))
        monkeypatch.setattr(engine_tensorrt, "load_library", lambda module: library)
        asked["faults"] = []

        def find_fault(engine: bytes, name: str) -> str | None:
            assert engine == b"engine" and name.endswith(".onnx")
            return asked["faults"].pop(0) if asked["faults"] else None

        monkeypatch.setattr(engine_tensorrt, "find_fault", find_fault)
        return TensorRtBuilder(timing_cache=tmp_path / "timing.cache"), asked

    return builder


@pytest.fixture
def graph(tmp_path) -> Path:
    """One plugin node, opset 20."""
    node = helper.make_node("GatherTokens", ["x", "indices"], ["kept"], domain="toprovar", plugin_namespace="toprovar")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 8]),
        helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "K"]),
    ]
    output = helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["K", 2, 8])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("toprovar", 1)]
    proto = helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets, ir_version=10)
    onnx.save(proto, tmp_path / "step.onnx")
    return tmp_path / "step.onnx"


PROFILES = [ShapeProfile.fixed({"x": (n, 2, 8), "indices": (1, k)}) for n, k in ((4, 4), (16, 3))]


@pytest.mark.parametrize(
    ("version", "network", "opset"), [("8.6.0", 1, 17), ("10.16.1.11", 2, 20), ("11.1.0.106", 1, 20)]
)
def test_each_version_is_asked_for_its_kind_of_network(make, graph, version, network, opset):
    builder, asked = make(version, plugin_layers=1)
    built = builder.build(graph, PROFILES, EngineOptions(tf32=False, workspace_bytes=1 << 20))
    assert built.data == b"engine"
    assert (asked["network"], asked["opset"], asked["workspace"]) == (network, opset, 1 << 20)
    assert asked["cleared"] == {7}
    assert [profile["x"][1] for profile in asked["profiles"]] == [(4, 2, 8), (16, 2, 8)]


def test_an_engine_that_cannot_be_used_is_built_again_and_nothing_of_it_is_kept(make, graph, tmp_path, caplog):
    builder, asked = make("8.6.0", plugin_layers=1)
    timing = tmp_path / "timing.cache"
    timing.write_bytes(b"measured")
    asked["faults"] = ["profile 3 is not taken", None]
    assert builder.build(graph, PROFILES, EngineOptions()).data == b"engine"
    assert asked["timing"] == [b"measured", b""], "what led to the first is not read again"
    assert timing.read_bytes() == b"+" and asked["builds"] == 2
    assert "step.onnx: TensorRT wrote an engine that cannot be used: profile 3 is not taken" in caplog.text

    asked["faults"] = ["first", "second", "third"]
    with pytest.raises(TargetError, match=r"step.onnx: of 3 engines that TensorRT 8.6.0 wrote none .* the last: third"):
        builder.build(graph, PROFILES, EngineOptions())
    assert timing.read_bytes() == b"+" and asked["builds"] == 5


def write_block(path: Path, inner: int) -> Path:
    """A product of type `inner` between sums in fp32, as a transformer block has it."""
    short = helper.tensor_dtype_to_np_dtype(inner)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 8])]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 4])
    random = np.random.default_rng(1)
    arrays = {
        "shift": random.normal(size=8).astype(np.float32),
        "weight": random.normal(size=(8, 4)).astype(short),
        "half": np.array(0.5, short),
        "bias": random.normal(size=4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Add", ["x", "shift"], ["shifted"], name="Add_0"),
        helper.make_node("Cast", ["shifted"], ["short"], name="Cast_0", to=inner),
        helper.make_node("MatMul", ["short", "weight"], ["product"], name="MatMul_0"),
        helper.make_node("Mul", ["product", "half"], ["halved"], name="Mul_0"),
        helper.make_node("Cast", ["halved"], ["long"], name="Cast_1", to=TensorProto.FLOAT),
        helper.make_node("Add", ["long", "bias"], ["y"], name="Add_1"),
    ]
    constants = [numpy_helper.from_array(values, name) for name, values in arrays.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [output], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(proto, path)
    return path


def test_the_weak_typing_of_8_6_is_made_strict(make, tmp_path):
    mixed = write_block(tmp_path / "mixed.onnx", TensorProto.FLOAT16)
    profiles = [ShapeProfile.fixed({"x": (n, 2, 8)}) for n in (4, 16)]
    builder, asked = make("8.6.0")
    builder.build(mixed, profiles, EngineOptions())
    assert asked["flags"] == {7, 0, 12} and asked["preview"] == (2, True) and asked["sources"] == 1 << 3 | 1 << 4
    computed = {"Add_0": "float32", "product.product.node": "float16", "Mul_0": "float16", "Add_1": "float32"}
    assert asked["types"] == computed, "what moves values is left alone; lower86 named the product"
    assert asked["precisions"] == asked["types"]

    builder, asked = make("8.6.0")
    builder.build(write_block(tmp_path / "full.onnx", TensorProto.FLOAT), profiles, EngineOptions())
    moves = {name: kind for name, kind in asked["types"].items() if name not in computed}
    assert set(asked["types"].values()) == {"float32"} and any("[Shuffle]" in name for name in moves)

    builder, asked = make("10.16.1.11")
    builder.build(mixed, profiles, EngineOptions())
    assert "types" not in asked


@pytest.mark.parametrize("layers", [0, 2])
def test_a_graph_whose_plugins_were_not_taken_is_refused(make, graph, layers):
    builder, asked = make("10.16.1.11", plugin_layers=layers)
    with pytest.raises(TargetError, match=f"has 1 GatherTokens, the parsed network {layers} plugin layers"):
        builder.build(graph, PROFILES, EngineOptions())
    assert "builds" not in asked


def test_the_timing_cache_is_kept_from_build_to_build(make, graph, tmp_path):
    builder, asked = make("10.16.1.11", plugin_layers=1)
    builder.build(graph, PROFILES, EngineOptions())
    builder.build(graph, PROFILES, EngineOptions())
    assert asked["timing"] == [b"", b"+"]
    assert (tmp_path / "timing.cache").read_bytes() == b"++"


def test_engines_for_another_gpu_than_the_one_at_hand_are_refused(make, graph):
    builder, _ = make("10.16.1.11", plugin_layers=1)
    with pytest.raises(InputError, match="leave compute_capabilities empty"):
        builder.build(graph, PROFILES, EngineOptions(compute_capabilities=("8.9",)))


def test_engines_are_added_to_a_bundle_and_entered_into_its_manifest(make, tmp_path):
    root = tiny.write_bundle(tmp_path / "tiny.bundle")
    builder, asked = make("10.16.1.11")
    info = add_engines(root, builder, cache=tmp_path / "engines")
    assert (info.version, info.gpu, info.compute_capability, info.driver) == ("10.16.1.11", "Mock GPU", "9.0", "13.0")
    assert asked["builds"] == 4
    bundle = open_bundle(root)  # every hash is checked
    assert bundle.manifest.targets["tensorrt"] == info
    assert bundle.path(info.engines["step"]).read_bytes() == b"engine"

    add_engines(root, builder, cache=tmp_path / "engines")
    assert asked["builds"] == 4, "nothing that is in the cache is built again"
    other, asked = make("10.16.1.11", gpu="Other GPU")
    assert add_engines(root, other, cache=tmp_path / "engines").cache_key != info.cache_key
    assert asked["builds"] == 4, "another GPU has other engines"


def test_a_bundle_that_has_changed_gets_no_engines(make, tmp_path):
    root = tiny.write_bundle(tmp_path / "tiny.bundle")
    (root / "step.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"step.onnx has changed"):
        add_engines(root, make("10.16.1.11")[0])
    with pytest.raises(BundleError, match=r"has no manifest.json"):
        add_engines(tmp_path, make("10.16.1.11")[0])


def test_trtexec_commands_name_every_profile():
    options = EngineOptions(tf32=False, workspace_bytes=1 << 30, optimization_level=3)
    (line,) = emit_trtexec("10.16.1.11", Path("step.onnx"), PROFILES, options, Path("p.so"), Path("step.engine"))
    for word in (
        "--onnx=step.onnx", "--dynamicPlugins=p.so", "--stronglyTyped", "--noTF32", "--memPoolSize=workspace:1024",
        "--builderOptimizationLevel=3", "--profile=0 --minShapes=x:4x2x8,indices:1x4", "--profile=1", "--skipInference",
        "--maxShapes=x:16x2x8,indices:1x3", "--saveEngine=step.engine",
    ):  # fmt: skip
        assert word in line, word
    (line,) = emit_trtexec("11.1.0.106", Path("step.onnx"), PROFILES, options, Path("p.so"), Path("step.engine"))
    assert "--stronglyTyped" not in line, "11 knows nothing else"
    lines = emit_trtexec("8.6.0", Path("step.onnx"), PROFILES, options, Path("p.so"), Path("step.engine"))
    assert [re.search(r"--saveEngine=(\S+)", line).group(1) for line in lines] == ["step.0.engine", "step.1.engine"]
    assert all("--profile" not in line for line in lines)
    types = {"TopK_0": "fp32+int32", "MatMul_0": "fp16"}
    lines = emit_trtexec("8.6.0", Path("step.onnx"), PROFILES, options, Path("p.so"), Path("step.engine"), (), types)
    said = (
        "--precisionConstraints=obey --layerOutputTypes=TopK_0:fp32+int32,MatMul_0:fp16 --layerPrecisions=TopK_0:fp32,"
    )
    assert all(said in line for line in lines)


def test_trtexec_commands_of_a_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_tensorrt, "lower", lambda model: model)  # its selection has a K that 8.6 cannot read
    root = tiny.write_bundle(tmp_path / "tiny.bundle")
    lines = trtexec_commands(root, EngineOptions(), "10.16.1.11")
    assert len(lines) == 4 and all(line.startswith("trtexec --onnx=") for line in lines)
    lines = trtexec_commands(root, EngineOptions(), "8.6.0")
    assert lines[0].startswith("python -m toprovar.exporter.lower86 ") and lines[0].endswith(" --size=B=1")
    assert "Shapes" not in lines[1], "trtexec refuses shapes of a graph that states all of them"
    step = next(line for line in lines if "step.opset17.onnx" in line and line.startswith("trtexec"))
    assert "--minShapes=x:" in step and "modulation:" not in step
    assert json.loads((root / "manifest.json").read_text())["targets"] == {"onnxruntime": {}}


def test_commands_of_a_cut_graph_are_refused(tmp_path, capsys):
    root = tiny.write_bundle(tmp_path / "tiny.bundle")
    assert engine_tensorrt.main([str(root), "--emit-trtexec", "--stages", "2"]) == 2
    assert capsys.readouterr().err == "error: --emit-trtexec: trtexec builds whole graphs; leave out --stages\n"


@pytest.mark.parametrize("inner", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_trtexec_is_told_the_types_that_layers_are_told(make, tmp_path, inner):
    path = write_block(tmp_path / "block.onnx", inner)
    builder, asked = make("8.6.0")
    builder.build(path, [ShapeProfile.fixed({"x": (4, 2, 8)})], EngineOptions())
    told = {name: kind.replace("float", "fp") for name, kind in asked["types"].items() if "Unnamed" not in name}
    assert engine_tensorrt._layer_types(onnx.load(path)) == told


def test_what_builds_engines_imports_no_torch():
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None; import toprovar.exporter.engine_tensorrt, toprovar.runtime.tensorrt, "
        "toprovar.exporter.lower86"
    )
    root = Path(__file__).resolve().parents[2] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})
