"""The function bodies compute what the oracles of the kernels compute, in the runtime that inlines them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from toprovar.exporter.functions import OPSET, function_protos
from toprovar.kernels import contract, oracle

ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int32: TensorProto.INT32}
RANK = {tensor.name: len(tensor.shape) for spec in contract.OPS.values() for tensor in spec.outputs}


def model_of(op_name, inputs, outputs, **attributes):
    """A model of one node; every size is symbolic."""
    node = helper.make_node(
        op_name,
        list(inputs),
        list(outputs),
        name="node",
        domain=contract.DOMAIN,
        plugin_namespace=contract.PLUGIN_NAMESPACE,
        plugin_version=contract.PLUGIN_VERSION,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        op_name,
        [
            helper.make_tensor_value_info(name, ELEMENT[t.dtype], [f"{name}_{i}" for i in range(t.dim())])
            for name, t in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, ELEMENT[dtype], [f"{name}_{i}" for i in range(RANK[name])])
            for name, dtype in outputs.items()
        ],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)]
    return helper.make_model(graph, functions=[function_protos()[op_name]], opset_imports=imports, ir_version=10)


def run(op_name, inputs, outputs, **attributes):
    model = model_of(op_name, inputs, outputs, **attributes)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in found]


def attention_inputs(n, past, new, r=2, h=3, d=16, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    sizes = {"q": n, "past_k": past, "past_v": past, "new_k": new, "new_v": new}
    return {name: torch.randn(size, r, h, d, generator=random).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "past", "new"), [(1, 0, 1), (5, 0, 5), (7, 11, 7), (3, 12, 9)])
def test_entropy_attention_equals_the_oracle(n, past, new, dtype):
    inputs = attention_inputs(n, past, new, dtype=dtype)
    out, entropy = run("EntropyAttention", inputs, {"out": dtype, "entropy": torch.float32}, scale=0.3, entropy=1)
    want_out, want_entropy, _ = oracle.attention_oracle(*inputs.values(), 0.3)
    assert out.dtype == dtype and entropy.dtype == torch.float32
    assert (out - want_out).norm() <= contract.TOLERANCES[str(dtype)[6:]].out_relative * want_out.norm()
    assert (entropy - want_entropy.mean(1)).abs().max() <= 5e-6


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_entropy_is_exact_to_a_few_1e_5_nats_for_scores_of_a_hundred(level):
    inputs = attention_inputs(64, 700, 300, d=64)
    inputs["q"] = inputs["q"] * 0.5 + 10
    for name in ("past_k", "new_k"):
        inputs[name] = inputs[name] * 0.2 + level / (64 * 10 * 0.125)
    outputs = {"out": torch.float32, "entropy": torch.float32}
    _, entropy = run("EntropyAttention", inputs, outputs, scale=0.125, entropy=1)
    _, want, _ = oracle.attention_oracle(*inputs.values(), 0.125)
    assert (entropy - want.mean(1)).abs().max() <= 5e-5


def test_entropy_of_focused_and_of_uniform_attention():
    """Scores of 98. One key far above all others: 0, not NaN, though every other p underflows. Equal keys: log n."""
    q = torch.full((2, 1, 1, 8), 3.5)
    focused = torch.full((1, 1, 1, 8), 3.5)
    others = torch.full((40, 1, 1, 8), -3.5)
    outputs = {"out": torch.float32, "entropy": torch.float32}
    inputs = {"q": q, "past_k": focused, "past_v": focused, "new_k": others, "new_v": others}
    assert run("EntropyAttention", inputs, outputs, scale=1.0, entropy=1)[1].abs().max() == 0
    inputs["past_k"] = torch.full((1, 1, 1, 8), -3.5)
    assert (run("EntropyAttention", inputs, outputs, scale=1.0, entropy=1)[1] - np.log(41)).abs().max() < 5e-5


def test_attention_without_entropy_computes_none(tmp_path):
    """The inlined body holds attention and nothing else, and the scale is fused into the product."""
    inputs = attention_inputs(7, 11, 7)
    model = model_of("CachedAttention", inputs, {"out": torch.float32}, scale=0.3, entropy=0)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    want, _, _ = oracle.attention_oracle(*inputs.values(), 0.3)
    assert np.abs(out - want.numpy()).max() < 1e-6
    left = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert left - {"Cast"} == {"Concat", "Transpose", "FusedMatMul", "Softmax"}


@pytest.mark.parametrize(("images", "tokens", "keep"), [(1, 1, 1), (1, 9, 9), (2, 30, 7), (3, 17, 1)])
def test_select_tokens_equals_the_oracle(images, tokens, keep):
    random = torch.Generator().manual_seed(tokens)
    entropy = torch.randint(0, 5, (images, tokens), generator=random).float()  # many ties
    if tokens > 9:
        entropy[0, 3] = float("nan")
        entropy[-1, 4] = float("inf")
    inputs = {"entropy": entropy, "keep_slots": torch.zeros(keep, dtype=torch.int32)}
    (indices,) = run("SelectTokens", inputs, {"indices": torch.int32})
    assert torch.equal(indices, oracle.select_oracle(entropy, keep))


def token_inputs(images, tokens, keep, dtype, rows_per_image=2, width=6):
    random = torch.Generator().manual_seed(images * 100 + tokens)
    x = torch.randn(tokens, images * rows_per_image, width, generator=random).to(dtype)
    indices = torch.stack([torch.randperm(tokens, generator=random)[:keep].sort().values for _ in range(images)])
    kept = torch.randn(keep, images * rows_per_image, width, generator=random).to(dtype)
    return x, kept, indices.to(torch.int32)


SIZES = [(1, 1, 1), (1, 12, 12), (2, 12, 5), (3, 12, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("images", "tokens", "keep"), SIZES)
@pytest.mark.parametrize("rows_per_image", [1, 2])
def test_gather_and_scatter_equal_the_oracles(images, tokens, keep, rows_per_image, dtype):
    x, kept, indices = token_inputs(images, tokens, keep, dtype, rows_per_image)
    (gathered,) = run("GatherTokens", {"x": x, "indices": indices}, {"kept": dtype})
    assert torch.equal(gathered, oracle.gather_oracle(x, indices))
    (scattered,) = run("ScatterTokens", {"x": x, "kept": kept, "indices": indices}, {"y": dtype})
    assert torch.equal(scattered, oracle.scatter_oracle(x, kept, indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("images", "tokens", "keep"), SIZES)
@pytest.mark.parametrize("cached", [(1, 1), (2, 3), (5, 7)])
def test_restore_equals_the_oracle(images, tokens, keep, cached, dtype):
    x, kept, indices = token_inputs(images, tokens, keep, dtype)
    h, w = (3, 4) if tokens == 12 else (1, 1)
    cache = torch.randn(cached[0] * cached[1], *x.shape[1:], generator=torch.Generator().manual_seed(3)).to(dtype)
    rows, cols = oracle.area_matrix(h, cached[0]).float(), oracle.area_matrix(w, cached[1]).float()
    inputs = {"x": x, "kept": kept, "indices": indices, "cache": cache, "rows": rows, "cols": cols}
    (y,) = run("RestoreTokens", inputs, {"y": dtype})
    want = oracle.restore_oracle(x, kept, indices, cache, rows, cols)
    assert (y - want).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", function_protos())
def test_functions_are_named_as_the_contract_says(name):
    specs = {spec.onnx_name: spec for spec in contract.OPS.values()}
    spec = specs["EntropyAttention" if name == "CachedAttention" else name]
    proto = function_protos()[name]
    assert (proto.domain, proto.name) == (contract.DOMAIN, name)
    assert list(proto.input) == [tensor.name for tensor in spec.inputs]
    assert list(proto.output) == [tensor.name for tensor in spec.outputs][: 1 if name == "CachedAttention" else None]
    assert list(proto.attribute) == [attribute.name for attribute in spec.attributes if attribute.default is None]
    optional = [attribute.name for attribute in spec.attributes if attribute.default is not None]
    assert [attribute.name for attribute in proto.attribute_proto] == optional


def test_every_op_of_the_contract_has_a_body():
    assert {spec.onnx_name for spec in contract.OPS.values()} == set(function_protos()) - {"CachedAttention"}


def test_no_two_nodes_of_the_bodies_share_a_name():
    names = [node.name for proto in function_protos().values() for node in proto.node]
    assert all(names) and len(set(names)) == len(names)
