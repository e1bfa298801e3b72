"""Every edit of a graph does what it says, refuses what it cannot do, and leaves alone what needs no edit."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir import tensor_adapters

from toprovar.exporter import edits
from toprovar.exporter.edits import PreconditionError
from toprovar.exporter.functions import function_protos
from toprovar.kernels.contract import DOMAIN

HEADER = '<ir_version: 10, opset_import: ["" : 20, "toprovar" : 1, "toprovar.export" : 1]>'


def model_of(text, **weights):
    """A model from ONNX's text form; weights become initializers of these names."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(HEADER + text))
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in weights.items():
        value = values[name]
        tensor = array if isinstance(array, torch.Tensor) else torch.tensor(array)
        value.const_value = tensor_adapters.TorchTensor(tensor, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(list(tensor.shape))
        model.graph.initializers[name] = value
    return model


def run(model, **inputs):
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def operators(model):
    return [node.op_type for node in model.graph]


X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7

# --- names


def test_ports_are_named_and_whoever_had_the_name_makes_way():
    model = model_of("g (float[2, 3, 4] a) => (float[2, 3, 4] b) { x = Neg(a)  b = Exp(x) }")
    before = run(model, a=X)
    edits.name_ports(model, ["x"], ["y"])
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert np.array_equal(run(model, x=X)[0], before[0])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["x", "z"], ["y"], "2 input names for 1 inputs"),
        (["x"], [], "0 output names for 1 outputs"),
        (["x"], ["x"], "names given twice: x"),
    ],
)
def test_ports_with_wrong_names_are_refused(inputs, outputs, message):
    model = model_of("g (float[2, 3, 4] a) => (float[2, 3, 4] b) { b = Exp(a) }")
    with pytest.raises(PreconditionError, match=message):
        edits.name_ports(model, inputs, outputs)
    assert model.graph.inputs[0].name == "a"


def test_ports_that_have_their_names_stay():
    model = model_of("g (float[2, 3, 4] a) => (float[2, 3, 4] b) { b = Exp(a) }")
    edits.name_ports(model, ["a"], ["b"])
    assert np.allclose(run(model, a=X)[0], np.exp(X))


def test_an_input_that_is_an_output_is_refused():
    model = model_of("g (float[2, 3, 4] a) => (float[2, 3, 4] b) { b = Exp(a) }")
    model.graph.outputs.clear()
    model.graph.outputs.append(model.graph.inputs[0])
    with pytest.raises(PreconditionError, match="returned as an output"):
        edits.name_ports(model, ["a"], ["b"])


def test_weights_lose_their_prefix():
    text = "g (float[2] a) => (float[2] b) { c = Add(a, w0)  b = Mul(c, w1) }"
    model = model_of(text, w0=[1.0, 2.0], w1=[3.0, 4.0])
    edits._rename(model.graph, model.graph.initializers["w0"], "backbone.head.bias")
    assert edits.name_weights(model, "backbone.") == {"head.bias"}
    assert set(model.graph.initializers) == {"head.bias", "w1"}
    assert edits.name_weights(model, "backbone.") == set()
    assert run(model, a=np.float32([0, 1]))[0].tolist() == [3, 12]


def test_weights_that_would_share_a_name_are_refused():
    model = model_of("g (float[2] a) => (float[2] b) { c = Add(a, w)  b = Mul(c, w1) }", w=[1.0, 2.0], w1=[3.0, 4.0])
    edits._rename(model.graph, model.graph.initializers["w1"], "backbone.w")
    with pytest.raises(PreconditionError, match="two weights share a name"):
        edits.name_weights(model, "backbone.")


def test_nodes_are_named_by_module_and_operator():
    text = "g (float[2] a) => (float[2] b) { c = Add(a, w)  d = Add(c, k)  e = Exp(d)  b = Neg(e) }"
    model = model_of(text, w=[1.0, 2.0], k=[1.0, 1.0])
    for node, scope in zip(model.graph, ["x.blocks.0.ffn", "x.blocks.0.ffn", "x", ""], strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{scope}', 'op']" if scope else "['']"
    edits.name_nodes(model, {"w"}, "x", "step")
    names = ["step.blocks.0.ffn.Add", "step.blocks.0.ffn.Add_1", "step.Exp", "step.Neg"]
    assert [node.name for node in model.graph] == names
    assert [node.outputs[0].name for node in model.graph] == [*names[:3], "b"]
    assert set(model.graph.initializers) == {"w", "step.constant_0"}
    edits.name_nodes(model, {"w"}, "x", "step")
    assert [node.name for node in model.graph] == names


def test_dimensions_take_the_names_of_the_inputs():
    text = "g (float[s7, 2*s3, 4] a, float[s3] c) => (float[s7, 2*s3, 4] b) { d = Exp(a)  b = Neg(d) }"
    proto = onnx.parser.parse_model(HEADER + text.replace("2*s3", "q"))
    model = ir.serde.deserialize_model(proto)
    for value in (*model.graph.inputs[:1], *model.graph.outputs):
        value.shape = ir.Shape(["s7", "2*s3", 4])
    inner = next(iter(model.graph)).outputs[0]
    inner.shape = ir.Shape(["s3*s7", "s9", 4])
    edits.name_dims(model, [("N", "R", 4), ("B",)], {"2*B": "R"})
    assert [str(dim) for dim in model.graph.outputs[0].shape] == ["N", "R", "4"]
    assert [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in inner.shape] == ["B*N", None, 4]


def test_an_expression_of_an_input_makes_its_symbol_known():
    model = model_of("g (float[q] a) => (float[p] b) { b = Identity(a) }")
    model.graph.inputs[0].shape, model.graph.outputs[0].shape = ir.Shape(["2*s3"]), ir.Shape(["s3"])
    edits.name_dims(model, [("R",)], {"2*B": "R"})
    assert model.graph.outputs[0].shape[0] == "B"


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([("N", "R", 5)], "has a size 4, expected 5"),
        ([("N", "R")], "has shape"),
        ([("N", "R", "C")], "fixed size 4 for C"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(dims, message):
    model = model_of("g (float[s7, s3, 4] a) => (float[s7, s3, 4] b) { b = Exp(a) }")
    with pytest.raises(PreconditionError, match=message):
        edits.name_dims(model, dims)


def test_an_output_of_unknown_size_is_noticed():
    model = model_of("g (float[s7] a) => (float[s8] b) { b = Exp(a) }")
    with pytest.raises(edits.PostconditionError, match="outputs with a size that no input has: b"):
        edits.name_dims(model, [("N",)])


# --- what is left out


def test_traces_are_forgotten():
    model = model_of("g (float[2] a) => (float[2] b) { b = Exp(a) }")
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/model.py", line 1'
    model.graph.inputs[0].doc_string = "/home/someone"
    edits.strip_traces(model)
    edits.strip_traces(model)
    assert b"someone" not in ir.serde.serialize_model(model).SerializeToString()


def test_what_no_output_depends_on_is_dropped():
    text = "g (float[2] a, float[2] idle) => (float[2] b) { c = Add(idle, w)  d = Exp(c)  b = Mul(a, v) }"
    model = model_of(text, w=[1.0, 1.0], v=[2.0, 2.0])
    assert edits.drop_unused(model, inputs=False) == []
    assert operators(model) == ["Mul"] and set(model.graph.initializers) == {"v"} and len(model.graph.inputs) == 2
    assert edits.drop_unused(model) == ["idle"]
    assert edits.drop_unused(model) == []
    assert run(model, a=np.float32([1, 2]))[0].tolist() == [2, 4]


EXPAND = (
    "g (float[2, 3, 4] a) => (float[2, 3, 4] b) { n = ReduceL2<keepdims=1>(a, last)  e = Expand(n, shape)  b = %s }"
)


def expand_model(last, *, shape=(2, 3, 4)):
    model = model_of(EXPAND % last, last=np.array([-1]), shape=np.array(shape))
    list(model.graph)[1].outputs[0].shape = ir.Shape(list(shape))
    return model


def test_an_expand_before_an_elementwise_operator_goes():
    model = expand_model("Div(a, e)")
    before = run(model, a=X)
    assert edits.drop_broadcast_expands(model) == 1
    assert operators(model) == ["ReduceL2", "Div"]
    assert np.array_equal(run(model, a=X)[0], before[0])
    assert edits.drop_broadcast_expands(model) == 0


@pytest.mark.parametrize("last", ["Div(e, e)", "Neg(e)", "Concat<axis=2>(e, e)"])
def test_an_expand_that_gives_the_shape_stays(last):
    model = expand_model(last)
    assert edits.drop_broadcast_expands(model) == 0 and "Expand" in operators(model)


def test_an_expand_to_a_larger_shape_than_the_other_operand_stays():
    model = expand_model("Div(a, e)", shape=(5, 2, 3, 4))
    assert edits.drop_broadcast_expands(model) == 0


def slices(start, end, axis, squeezed):
    model = model_of(
        "g (float[2, 3, 4] a) => (float[d0, d1] b) { c = Slice(a, start, end, axis)  b = Squeeze(c, squeezed) }",
        start=np.array([start]),
        end=np.array([end]),
        axis=np.array([axis]),
        squeezed=np.array([squeezed]),
    )
    model.graph.outputs[0].shape = ir.Shape([s for i, s in enumerate((2, 3, 4)) if i != squeezed])
    return model


@pytest.mark.parametrize(("start", "axis"), [(0, 0), (1, 1), (3, 2)])
def test_a_slice_of_one_and_its_squeeze_become_a_gather(start, axis):
    model = slices(start, start + 1, axis, axis)
    before = run(model, a=X)
    assert edits.gather_slices(model) == 1
    edits.drop_unused(model)
    assert operators(model) == ["Gather"]
    assert np.array_equal(run(model, a=X)[0], before[0])
    assert edits.gather_slices(model) == 0


@pytest.mark.parametrize(("start", "end", "axis", "squeezed"), [(-1, 0, 1, 1), (0, 2, 1, 0), (0, 1, -1, -1)])
def test_other_slices_stay(start, end, axis, squeezed):
    model = slices(start, end, axis, squeezed)
    assert edits.gather_slices(model) == 0 and operators(model) == ["Slice", "Squeeze"]


def test_a_slice_with_another_user_stays_beside_the_gather():
    model = slices(1, 2, 1, 1)
    cut = next(iter(model.graph)).outputs[0]
    cut.shape = ir.Shape([2, 1, 4])
    model.graph.outputs.append(cut)
    assert edits.gather_slices(model) == 1 and sorted(operators(model)) == ["Gather", "Slice"]


def reshape_model(after, before=("N", "R", 12)):
    text = """g (float[N, R, 12] a, int64[k] target) => (float[o] b)
        { t = Neg(target)  shape = Neg(t)  b = Reshape<allowzero=1>(a, shape) }"""
    model = model_of(text)
    model.graph.inputs[0].shape, model.graph.outputs[0].shape = ir.Shape(list(before)), ir.Shape(list(after))
    return model


@pytest.mark.parametrize(
    ("after", "constant", "shape"),
    [
        (("N", "R", 3, 4), [0, 0, 3, 4], (2, 5, 3, 4)),
        (("N*R", 12), [-1, 12], (10, 12)),
        (("N", "12*R"), [0, -1], (2, 60)),
    ],
)
def test_a_computed_shape_becomes_a_constant(after, constant, shape):
    model = reshape_model(after)
    assert edits.fix_reshapes(model) == 1
    assert operators(model) == ["Reshape"]
    (value,) = model.graph.initializers.values()
    assert value.const_value.numpy().tolist() == constant
    edits.drop_unused(model)
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    assert run(model, a=x)[0].shape == shape
    assert edits.fix_reshapes(model) == 0


@pytest.mark.parametrize("after", [("P", "Q"), (None, 12), (0, "N")])
def test_a_shape_that_does_not_follow_stays_computed(after):
    model = reshape_model(after)
    assert edits.fix_reshapes(model) == 0 and operators(model) == ["Neg", "Neg", "Reshape"]


# --- weights


def test_weights_of_equal_content_stay_apart_in_an_optimiser():
    import onnxscript.optimizer

    text = "g (float[2] a) => (float[4] b) { c = Concat<axis=0>(w, v)  d = Concat<axis=0>(a, a)  b = Add(c, d) }"
    model = model_of(text, w=[0.0, 0.0], v=[0.0, 0.0])
    with edits.weights_as_inputs(model, {"w", "v"}):
        assert not model.graph.initializers and len(model.graph.inputs) == 3
        onnxscript.optimizer.optimize_ir(model, onnx_shape_inference=False)
    assert set(model.graph.initializers) == {"w", "v"} and len(model.graph.inputs) == 1
    assert [value.name for value in next(iter(model.graph)).inputs] == ["w", "v"]


def test_weights_come_back_after_an_error():
    model = model_of("g (float[2] a) => (float[2] b) { b = Add(a, w) }", w=[1.0, 1.0])
    with pytest.raises(ZeroDivisionError), edits.weights_as_inputs(model, {"w"}):
        raise ZeroDivisionError
    assert run(model, a=np.float32([1, 2]))[0].tolist() == [2, 3]
    with pytest.raises(PreconditionError, match="no such weights: v"), edits.weights_as_inputs(model, {"v"}):
        pass
    with edits.weights_as_inputs(model, ()):
        assert "w" in model.graph.initializers


def linear_model(transpose="Transpose<perm=[1, 0]>(w)", shape=(5, 4)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = model_of(f"g (float[2, 3, 4] a) => (float[2, 3, 5] b) {{ t = {transpose}  b = MatMul(a, t) }}", w=weight)
    return model, weight


def test_a_weight_is_transposed_when_it_is_written():
    model, weight = linear_model()
    before = run(model, a=X)
    assert edits.transpose_weights(model) == 1
    assert operators(model) == ["MatMul"] and set(model.graph.initializers) == {"w_T"}
    assert isinstance(model.graph.initializers["w_T"].const_value, ir.LazyTensor)
    assert np.array_equal(run(model, a=X)[0], before[0])
    assert edits.transpose_weights(model) == 0
    weight.mul_(2)  # nothing was copied yet
    assert np.allclose(run(model, a=X)[0], 2 * before[0])


def test_a_weight_that_is_read_as_it_is_too_stays():
    text = "g (float[2, 4] a) => (float[2, 4] b) { t = Transpose<perm=[1, 0]>(w)  c = MatMul(a, t)  b = MatMul(c, w) }"
    model = model_of(text, w=torch.eye(4))
    assert edits.transpose_weights(model) == 1
    assert set(model.graph.initializers) == {"w", "w_T"}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4, 5] w) => (float[5, 4] b) { b = Transpose<perm=[1, 0]>(w) }",
        "g (float[4, 5] w) => (float[4, 5] b) { t = Transpose<perm=[1, 0]>(w)  b = Transpose<perm=[1, 0]>(t) }",
    ],
)
def test_what_is_no_weight_is_not_transposed(text):
    model = model_of(text)
    before = operators(model)
    assert edits.transpose_weights(model) == 0 and operators(model) == before


def test_a_transpose_that_is_none_stays():
    model, _ = linear_model("Transpose<perm=[0, 1]>(w)", (4, 5))
    assert edits.transpose_weights(model) == 0 and "Transpose" in operators(model)


def test_a_weight_of_the_new_name_is_not_overwritten():
    text = "g (float[2, 4] a) => (float[2, 4] b) { t = Transpose(w)  c = MatMul(a, t)  b = MatMul(c, w_T) }"
    model = model_of(text, w=torch.eye(4), w_T=torch.eye(4))
    with pytest.raises(PreconditionError, match="there is a weight w_T already"):
        edits.transpose_weights(model)


# --- functions and layers

GATHER = "g (float[N, R, 4] a, int32[B, K] i) => (float[K, R, 4] b) { b = toprovar.GatherTokens(a, i) }"


def test_used_functions_are_attached_and_no_others():
    model = model_of(GATHER)
    edits.attach_functions(model, function_protos(), DOMAIN)
    edits.attach_functions(model, function_protos(), DOMAIN)
    assert [identifier[1] for identifier in model.functions] == ["GatherTokens"]
    index = np.array([[0, 1]], dtype=np.int32)
    assert np.array_equal(run(model, a=X, i=index)[0], X[:2])


def test_a_graph_without_our_nodes_gets_no_function():
    model = model_of("g (float[2] a) => (float[2] b) { b = Exp(a) }")
    edits.attach_functions(model, function_protos(), DOMAIN)
    assert not model.functions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GATHER.replace("GatherTokens", "GatherWords"), "is a GatherWords; functions are EntropyAttention"),
        (GATHER.replace("(a, i) }", "(a) }"), "has 1 inputs, the function GatherTokens has 2"),
    ],
)
def test_nodes_without_a_fitting_function_are_refused(text, message):
    model = model_of(text)
    with pytest.raises(PreconditionError, match=message):
        edits.attach_functions(model, function_protos(), DOMAIN)


def test_functions_of_another_opset_are_refused():
    model = model_of(GATHER)
    model.opset_imports[""] = 21
    with pytest.raises(PreconditionError, match=r"opset ai.onnx is 21, the function GatherTokens has 20"):
        edits.attach_functions(model, function_protos(), DOMAIN)


STACK = """g (float[N, 4] a) => (float[N, 4] b)
    { c = toprovar.export.Block<layer=0, entropy="none">(a)  b = toprovar.export.Block<layer=1, entropy="none">(c) }"""


def template():
    model = model_of(
        "t (float[n, 4] x) => (float[n, 4] x_out) { m = MatMul(x, w)  x_out = Add(m, one) }", w=torch.eye(4), one=[1.0]
    )
    for node in model.graph:
        node.name = node.op_type
        node.outputs[0].shape = ir.Shape(["n", 4])
    return edits.BlockTemplate(model, frozenset({"w"}))


def test_layers_become_copies_of_their_template_with_their_own_weights():
    model, shared = model_of(STACK), template()
    weights = [2 * torch.eye(4), 3 * torch.eye(4)]
    assert edits.expand_blocks(model, lambda layer, mode: shared, lambda layer, name: weights[layer]) == 2
    names = ["blocks.0.MatMul", "blocks.0.Add", "blocks.1.MatMul", "blocks.1.Add"]
    assert [node.name for node in model.graph] == names
    assert {"blocks.0.w", "blocks.1.w"} <= set(model.graph.initializers)
    assert model.graph.initializers["blocks.1.w"].const_value.raw is weights[1]  # shared, not copied
    assert [str(dim) for dim in next(iter(model.graph)).outputs[0].shape] == ["N", "4"]
    assert run(model, a=np.ones((2, 4), np.float32))[0].tolist() == [[10.0] * 4] * 2
    assert edits.expand_blocks(model, lambda layer, mode: shared, lambda layer, name: weights[layer]) == 0


def test_a_layer_that_does_not_fit_its_template_is_refused():
    model = model_of(STACK.replace("(a)  b", "(a, a)  b"))
    with pytest.raises(PreconditionError, match="layer 0 has 2 inputs, its template has 1"):
        edits.expand_blocks(model, lambda layer, mode: template(), lambda layer, name: torch.eye(4))
