"""The lowering for TensorRT 8.6: same numbers, nothing left that its parser misreads, and refusals that say why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from toprovar.exporter.lower86 import OPERATORS, OPSET, LoweringError, lower, main
from toprovar.kernels import contract


def model(*nodes, inputs=(), outputs=(), initializers=(), opset=20, functions=()):
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("toprovar", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def value(name, shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def array(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def run(proto, feeds):
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def same(proto, feeds, tolerance=0.0):
    lowered = lower(proto)
    assert [(one.domain, one.version) for one in lowered.opset_import if not one.domain] == [("", OPSET)]
    for found, expected in zip(run(lowered, feeds), run(proto, feeds), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0) <= tolerance
    return lowered


X = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSum", "ReduceSumSquare"])
@pytest.mark.parametrize("axes", [[1], [-1], [0, 2], None])
def test_axes_become_an_attribute(op, axes):
    inputs = ["x", "axes"] if axes else ["x"]
    node = helper.make_node(op, inputs, ["y"], keepdims=0, noop_with_empty_axes=0)
    initializers = [array("axes", axes)] if axes else []
    proto = model(node, inputs=[value("x", ["a", 6, "c"])], outputs=[value("y", None)], initializers=initializers)
    lowered = same(proto, {"x": X})
    assert op == "ReduceSum" or len(lowered.graph.node[0].input) == 1


@pytest.mark.parametrize("bounds", [{"start": 1}, {"start": 1, "end": 2}, {"end": -1}, {"start": -2}, {}])
def test_a_part_of_a_shape_is_sliced(bounds):
    node = helper.make_node("Shape", ["x"], ["y"], **bounds)
    proto = model(node, inputs=[value("x", ["a", 6, "c"])], outputs=[value("y", None, TensorProto.INT64)])
    lowered = same(proto, {"x": X})
    assert not any(node.attribute for node in lowered.graph.node if node.op_type == "Shape")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_becomes_its_formula(approximate, dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("Gelu", ["x"], ["y"], approximate=approximate)
    proto = model(node, inputs=[value("x", ["a", 6, "c"], kind)], outputs=[value("y", None, kind)])
    if dtype == np.float16 and approximate == "none":
        lower(proto)  # ONNX Runtime has no Erf in fp16 on a CPU
        return
    same(proto, {"x": 4 * X.astype(dtype)}, tolerance=2e-6 if dtype == np.float32 else 2e-2)


@pytest.mark.parametrize("attributes", [{}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}])
def test_a_cumulative_sum_becomes_a_product(attributes):
    """The parser of 8.6 makes a loop of CumSum. The value goes in as two halves, so that TF32 loses nothing of it."""
    node = helper.make_node("CumSum", ["x", "axis"], ["y"], **attributes)
    proto = model(
        node, inputs=[value("x", ["a", 6, 5])], outputs=[value("y", ["a", 6, 5])], initializers=[array("axis", -1)]
    )
    lowered = same(proto, {"x": X}, tolerance=1e-6)
    assert "CumSum" not in {node.op_type for node in lowered.graph.node}
    unknown = model(
        node, inputs=[value("x", ["a", 6, "c"])], outputs=[value("y", None)], initializers=[array("axis", -1)]
    )
    with pytest.raises(LoweringError, match="with a known size"):
        lower(unknown)


def test_instance_normalization_becomes_its_formula():
    """The parser of 8.6 makes a plugin of it that needs cuDNN."""
    node = helper.make_node("InstanceNormalization", ["x", "scale", "bias"], ["y"], epsilon=1e-3)
    initializers = [array("scale", np.arange(1, 7), np.float32), array("bias", np.arange(6), np.float32)]
    proto = model(node, inputs=[value("x", ["a", 6, "c"])], outputs=[value("y", None)], initializers=initializers)
    lowered = same(proto, {"x": X}, tolerance=2e-6)
    assert "InstanceNormalization" not in {node.op_type for node in lowered.graph.node}


def test_constants_that_are_put_together_become_one():
    node = helper.make_node("Concat", ["a", "b"], ["w"], axis=0)
    proto = model(
        node,
        helper.make_node("Add", ["x", "w"], ["y"]),
        inputs=[value("x", ["n", 2])],
        outputs=[value("y", None)],
        initializers=[array("a", [[1, 2]], np.float32), array("b", [[3, 4]], np.float32)],
    )
    lowered = same(proto, {"x": X[0, :2, :2]})
    assert [node.op_type for node in lowered.graph.node] == ["Add"]


def test_cast_like_becomes_a_cast_to_the_type_of_its_model():
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16, saturate=1),
        helper.make_node("CastLike", ["x", "half"], ["y"]),
    ]
    proto = model(*nodes, inputs=[value("x", ["a", 6, "c"])], outputs=[value("y", None, TensorProto.FLOAT16)])
    assert [node.op_type for node in same(proto, {"x": X}).graph.node] == ["Cast", "Cast"]


def test_split_and_resize_lose_the_attributes_of_newer_opsets():
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    same(model(*nodes, inputs=[value("x", ["n", 6, 5])], outputs=[value("y", None)]), {"x": X})
    node = helper.make_node(
        "Resize", ["x", "", "s"], ["y"], mode="nearest", nearest_mode="floor", antialias=0,
        coordinate_transformation_mode="asymmetric", keep_aspect_ratio_policy="stretch",
    )  # fmt: skip
    scales = array("s", [1, 1, 2, 2], np.float32)
    proto = model(node, inputs=[value("x", [1, 2, 6, 5])], outputs=[value("y", None)], initializers=[scales])
    same(proto, {"x": X[None]})


def test_a_product_with_one_matrix_has_two_axes():
    weight = array("w", np.random.default_rng(1).normal(size=(5, 4)), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])

    def product(shape):
        return model(node, inputs=[value("x", shape)], outputs=[value("y", None)], initializers=[weight])

    lowered = same(product(["a", 6, 5]), {"x": X}, tolerance=1e-6)
    assert [one.op_type for one in lowered.graph.node] == ["Reshape", "MatMul", "Reshape"]
    same(product([2, 6, 5]), {"x": X}, tolerance=1e-6)
    for shape in (["a", 5], ["a", "b", 5]):  # has two axes; two sizes that are not known
        assert [one.op_type for one in lower(product(shape)).graph.node] == ["MatMul"]


def test_an_attention_with_one_query_has_no_products():
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    random = np.random.default_rng(2)

    def attention(queries):
        shapes = {"q": [2, 3, queries, 8], "k": [2, 3, 8, 5], "v": [2, 3, 5, 8], "mask": [2, 1, 1, 5]}
        return model(*nodes, inputs=[value(*one) for one in shapes.items()], outputs=[value("y", None)]), shapes

    proto, shapes = attention(1)
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    lowered = same(proto, feeds, tolerance=1e-6)
    assert "MatMul" not in [one.op_type for one in lowered.graph.node]
    for queries in (2, "n"):
        assert [one.op_type for one in lower(attention(queries)[0]).graph.node] == [one.op_type for one in nodes]


def test_weights_in_a_file_of_their_own_are_not_looked_for(tmp_path, monkeypatch):
    weight = array("w", np.zeros((5, 4)), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    proto = model(node, inputs=[value("x", ["a", 6, 5])], outputs=[value("y", None)], initializers=[weight])
    onnx.save(proto, tmp_path / "graph.onnx", save_as_external_data=True, location="graph.data", size_threshold=0)
    monkeypatch.chdir("/")
    lowered = lower(onnx.load(tmp_path / "graph.onnx", load_external_data=False))
    assert [entry.value for entry in lowered.graph.initializer[0].external_data if entry.key == "location"] == [
        "graph.data"
    ]
    assert [one.name for one in lowered.graph.input] == ["x"]


def test_sizes_are_stated_on_the_command_line(tmp_path, capsys):
    path, out = tmp_path / "graph.onnx", tmp_path / "lowered.onnx"
    node = helper.make_node("Relu", ["x"], ["y"])
    onnx.save(model(node, inputs=[value("x", ["N", "R"])], outputs=[value("y", ["N", "R"])]), path)
    assert main([str(path), str(out), "--size", "R=2"]) == 0
    dims = [(dim.dim_param, dim.dim_value) for dim in onnx.load(out).graph.output[0].type.tensor_type.shape.dim]
    assert dims == [("N", 0), ("", 2)]
    assert main([str(path), str(out), "--size", "R"]) == 2
    assert capsys.readouterr().err == "error: --size R: give a name and a size, like R=2\n"


def test_a_graph_of_opset_17_is_left_as_it_is():
    proto = model(helper.make_node("Relu", ["x"], ["y"]), inputs=[value("x", [2])], outputs=[value("y", [2])], opset=17)
    assert [node.op_type for node in lower(proto).graph.node] == ["Relu"]


def test_plugin_nodes_stay_and_their_bodies_go():
    functions = pytest.importorskip("toprovar.exporter.functions").function_protos()
    node = helper.make_node("GatherTokens", ["x", "indices"], ["y"], domain="toprovar", plugin_namespace="toprovar")
    proto = model(
        node, inputs=[value("x", ["N", "R", 8]), value("indices", ["B", "K"], TensorProto.INT32)],
        outputs=[value("y", None)], functions=[functions["GatherTokens"]],
    )  # fmt: skip
    lowered = lower(proto)
    assert not lowered.functions
    assert [(node.domain, node.op_type) for node in lowered.graph.node] == [("toprovar", "GatherTokens")]


def _inlined(path: Path) -> onnx.ModelProto:
    return onnx.inliner.inline_local_functions(onnx.load(path))


@pytest.mark.parametrize("backbone", ["var", "infinity"])
def test_every_exported_graph_can_be_lowered(backbone, tmp_path):
    pytest.importorskip("torch")
    from tests.backbones.conftest import make_var
    from tests.backbones.infinity_models import make_infinity
    from toprovar.exporter.graph import GRAPHS, GraphExporter, save_graph

    made = {"var": make_var, "infinity": make_infinity}[backbone]()
    exporter = GraphExporter(made)
    roles = ("gddgd" * made.spec.depth)[: made.spec.depth]
    known = OPERATORS | {"EntropyAttention", "CachedAttention", "SelectTokens", "GatherTokens", "RestoreTokens"}
    for name in GRAPHS:
        path = tmp_path / f"{name}.onnx"
        save_graph(exporter.graph(name, roles if name == "step" else None), path, {})
        lowered = lower(onnx.load(path))
        assert {node.op_type for node in lowered.graph.node} <= known
        assert [i.name for i in lowered.graph.input] == [i.name for i in onnx.load(path).graph.input]
        if name in ("advance", "decoder"):  # what runs with any numbers; bodies are standard operators there
            same(onnx.load(path), _feeds(onnx.load(path)), tolerance=1e-5)


def _feeds(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs; sizes by name, chosen so that scales fit together."""
    random = np.random.default_rng(0)
    feeds = {}
    sizes = {"B": 2, "R": 4, "N": 6, "h": 2, "w": 3, "N_next": 12, "h_next": 4, "w_next": 3}
    for one in proto.graph.input:
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in one.type.tensor_type.shape.dim]
        if one.type.tensor_type.elem_type == TensorProto.FLOAT:
            feeds[one.name] = random.uniform(0.01, 0.99, shape).astype(np.float32)
        else:
            dtype = helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type)
            feeds[one.name] = np.zeros(shape, dtype)
    return feeds


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        (model(helper.make_node("Relu", ["x"], ["y"]), opset=21), "opset 21; valid are 17 to 20"),
        (model(helper.make_node("Other", ["x"], ["y"], domain="toprovar")), "valid there are our plugins"),
        (model(helper.make_node("Relu", ["x"], ["y"], domain="com.other")), "is of domain 'com.other'"),
        (model(helper.make_node("Mish", ["x"], ["y"])), "its parser knows no Mish"),
        (model(inputs=[value("x", [1], TensorProto.BFLOAT16)]), "--precision fp16"),
        (model(helper.make_node("ReduceMax", ["x", "a"], ["y"]), inputs=[value("x", [2, 2])]), "is computed at run time"),
        (model(helper.make_node("CastLike", ["x", "z"], ["y"]), inputs=[value("x", [2, 2])]), "type of 'z' is not known"),
        (
            model(helper.make_node("Split", ["x"], ["a", "b"], axis=0, num_outputs=2), inputs=[value("x", [5])]),
            "splits 5 into 2",
        ),
        (
            model(helper.make_node("Resize", ["x", "", "s"], ["y"], antialias=1), inputs=[value("x", [1, 1, 2, 2])]),
            "antialias is 1",
        ),
        (
            model(
                helper.make_node("TopK", ["x", "k"], ["y", "i"]),
                inputs=[value("x", [4096])],
                initializers=[array("k", [3841])],
            ),
            "K is 3841; TensorRT's TopK ends at 3840",
        ),
        (
            model(
                helper.make_node(
                    "If", ["c"], ["y"], then_branch=helper.make_graph([], "t", [], []),
                    else_branch=helper.make_graph([], "e", [], []),
                )
            ),
            "has a graph of its own",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)  # fmt: skip
def test_what_cannot_be_lowered_is_refused_with_the_node(proto, expected):
    with pytest.raises(LoweringError, match=r"lowering to TensorRT 8\.6") as caught:
        lower(proto)
    assert expected in str(caught.value)
    assert contract.DOMAIN == "toprovar"
