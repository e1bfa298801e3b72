"""The exported graphs compute what the backbone computes, and look as the design says."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import toprovar
from tests.backbones.conftest import make_var
from tests.backbones.infinity_models import make_infinity, make_text
from toprovar.backbones.resample import area_matrix
from toprovar.backbones.step import Step
from toprovar.errors import InputError
from toprovar.exporter.graph import GraphExporter, save_graph

ROLES = "gddgd"


def session(graph, folder, **options):
    path = folder / f"{graph.name}.onnx"
    save_graph(graph, path, {}, **options)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def worst(runtime, feeds, expected):
    """Largest difference of any output; shapes and dtypes must agree."""
    found = runtime.run(None, {one.name: feeds[one.name].numpy() for one in runtime.get_inputs()})
    errors = [0.0]
    for name, array, tensor in zip([one.name for one in runtime.get_outputs()], found, expected, strict=True):
        assert array.shape == tuple(tensor.shape) and array.dtype == tensor.numpy().dtype, name
        errors.append(float(np.abs(array.astype(np.float64) - tensor.double().numpy()).max(initial=0)))
    return max(errors)


def step_case(backbone, step, context, grid, past_global, past_detail, keep, cached, rope=None, seed=0):
    """Random inputs of a step by name, and what the step makes of them."""
    random = torch.Generator().manual_seed(seed)
    spec, (h, w) = backbone.spec, grid
    rows = next(iter(context.values())).shape[-2]  # modulation [depth, 6, R, C]

    def draw(*shape):
        return torch.randn(shape, generator=random)

    feeds = {"x": draw(h * w, rows, spec.width), "keep_slots": torch.zeros(keep, dtype=torch.int32), **context}
    feeds |= {"area_rows": area_matrix(h, cached[0]), "area_cols": area_matrix(w, cached[1])}
    past = []
    for role in step.roles:
        length = past_global if role == "g" else past_detail
        past += [draw(length, rows, spec.heads, spec.head_dim).to(backbone.dtype) for _ in "kv"]
    for layer in range(spec.depth):
        feeds |= {f"past_k_{layer}": past[2 * layer], f"past_v_{layer}": past[2 * layer + 1]}
    cache = [draw(cached[0] * cached[1], rows, spec.width) for _ in step.spans]
    feeds |= {f"span_cache_{i}": tensor for i, tensor in enumerate(cache)}
    if rope is not None:
        feeds["rope"] = rope
    with torch.no_grad():
        logits, new_kv, deltas = step(
            feeds["x"], context, rope, feeds["keep_slots"], feeds["area_rows"], feeds["area_cols"], past, cache
        )
    return feeds, [logits, *new_kv, *deltas]


# images, grid, past of global layers, past of detail layers, kept, cached grid
CASES = [
    (1, (1, 1), 0, 0, 1, (1, 1)),
    (1, (2, 2), 1, 1, 4, (1, 1)),
    (2, (3, 3), 5, 5, 4, (2, 2)),
    (3, (4, 4), 14, 9, 1, (3, 3)),
    (1, (3, 5), 14, 9, 15, (2, 4)),
]


@pytest.mark.parametrize(("roles", "restore"), [(ROLES, "cache"), (ROLES, "identity"), ("ggggg", "cache")])
def test_step_equals_pytorch_at_every_size(exporter, tmp_path, roles, restore):
    backbone = exporter.backbone
    runtime = session(exporter.graph("step", roles, restore), tmp_path)
    step = Step(backbone, roles, restore)
    for images, *sizes in CASES:
        context = backbone.prefix(torch.arange(images)).context
        feeds, expected = step_case(backbone, step, context, *sizes)
        assert worst(runtime, feeds, expected) < 1e-5, (images, *sizes)


def test_prefix_advance_and_decoder_equal_pytorch(exporter, tmp_path):
    backbone, spec = exporter.backbone, exporter.backbone.spec
    prefix, advance, decoder = (session(exporter.graph(name), tmp_path) for name in ("prefix", "advance", "decoder"))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for images in (1, 3):
            labels = torch.arange(images, dtype=torch.int32)
            expected = backbone.prefix(labels)
            assert worst(prefix, {"labels": labels}, [expected.x0, *expected.context.values()]) < 1e-5
            codes = torch.randn(images, spec.latent_channels, *spec.latent_grid, generator=random)
            assert worst(decoder, {"codes": codes}, [backbone.decode(codes)]) < 1e-5
            for scale, tokens in enumerate(spec.tokens):
                # Behind the last scale the first one stands in, as in a bundle.
                constants = backbone.scale_constants(scale, (scale + 1) % spec.scales)
                logits = 3 * torch.randn(tokens, 2 * images, spec.vocab, generator=random)
                noise = torch.rand(tokens, images, spec.vocab, generator=random)
                feeds = {"logits": logits, "noise": noise, "codes": codes, **constants}
                assert worst(advance, feeds, backbone.advance(logits, noise, codes, constants)) < 1e-5


def test_inputs_and_outputs_have_the_names_and_sizes_of_the_design(exporter):
    def ports(name, **options):
        graph = exporter.graph(name, **options)
        return [{info.name: info.shape for info in infos} for infos in (graph.inputs, graph.outputs)]

    context = {"modulation": (5, 6, "R", 64), "head_modulation": (2, "R", 64)}
    assert ports("prefix") == [{"labels": ("B",)}, {"x": (1, "R", 64), **context}]
    past = {
        f"past_{n}_{i}": (f"P_{'global' if r == 'g' else 'detail'}", "R", 4, 16)
        for i, r in enumerate(ROLES)
        for n in "kv"
    }
    new = {f"new_{n}_{i}": ("N" if r == "g" else "K", "R", 4, 16) for i, r in enumerate(ROLES) for n in "kv"}
    pruned = {"keep_slots": ("K",), "area_rows": ("h", "hc"), "area_cols": ("w", "wc")}
    caches = {f"span_cache_{i}": ("M", "R", 64) for i in range(2)}
    x, logits = {"x": ("N", "R", 64)}, {"logits": ("N", "R", 48)}
    found = ports("step", roles=ROLES)
    assert found == [
        {**x, **context, **pruned, **past, **caches},
        {**logits, **new, **{f"span_delta_{i}": ("K", "R", 64) for i in range(2)}},
    ]
    assert list(found[0])[:3] == ["x", "modulation", "head_modulation"]
    assert list(found[1])[:3] == ["logits", "new_k_0", "new_v_0"]
    identity = ports("step", roles=ROLES, restore="identity")
    assert identity == [{**x, **context, "keep_slots": ("K",), **past}, {**logits, **new}]
    inputs, outputs = ports("advance")
    assert {name: inputs[name] for name in ("logits", "noise", "codes", "up_rows", "up_cols", "next_position")} == {
        **logits,
        "noise": ("N", "B", 48),
        "codes": ("B", 8, 6, 6),
        "up_rows": (6, "h"),
        "up_cols": (6, "w"),
        "next_position": ("N_next", 1, 64),
    }
    assert outputs == {"tokens": ("B", "N"), "codes_out": ("B", 8, 6, 6), "next_x": ("N_next", "R", 64)}
    assert ports("decoder") == [{"codes": ("B", 8, 6, 6)}, {"image": ("B", 3, 24, 24)}]


def test_a_dense_step_has_no_selection(exporter, tmp_path):
    save_graph(exporter.graph("step"), tmp_path / "step.onnx", {})
    model = onnx.load(tmp_path / "step.onnx")
    assert [function.name for function in model.functions] == ["CachedAttention"]
    ours = [node.op_type for node in model.graph.node if node.domain == "toprovar"]
    assert ours == ["CachedAttention"] * 5
    assert not {"keep_slots", "area_rows", "span_cache_0"} & {one.name for one in model.graph.input}


def test_only_layers_that_choose_compute_entropy(exporter, tmp_path):
    save_graph(exporter.graph("step", ROLES), tmp_path / "step.onnx", {})
    model = onnx.load(tmp_path / "step.onnx")
    ours = [(node.name, node.op_type) for node in model.graph.node if node.domain == "toprovar"]
    assert [op for _, op in ours] == [
        *("EntropyAttention", "SelectTokens", "GatherTokens", "CachedAttention", "CachedAttention", "RestoreTokens"),
        *("EntropyAttention", "SelectTokens", "GatherTokens", "CachedAttention", "RestoreTokens"),
    ]
    assert ours[0][0] == "blocks.0.EntropyAttention" and ours[4][0] == "blocks.2.CachedAttention"
    plugin = {"plugin_namespace": b"toprovar", "plugin_version": b"1"}
    for node in model.graph.node:
        if node.domain == "toprovar":
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            assert plugin.items() <= attributes.items()
            if "Attention" in node.op_type:
                assert attributes["entropy"] == (node.op_type == "EntropyAttention") and attributes["scale"] == 1.0


@pytest.mark.parametrize("name", ["prefix", "step", "advance", "decoder"])
def test_a_file_says_what_it_is_and_not_who_made_it(exporter, tmp_path, name):
    metadata = {"toprovar.version": "1.2.3", "toprovar.plan_sha256": "ab" * 32}
    (path,) = save_graph(exporter.graph(name, ROLES), tmp_path / f"{name}.onnx", metadata)
    model = onnx.load(path)
    assert {one.key: one.value for one in model.metadata_props} == metadata
    assert (model.graph.name, model.producer_name, model.ir_version) == (name, "toprovar", 10)
    assert {one.domain: one.version for one in model.opset_import}[""] == 20
    assert all(node.name for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    data = path.read_bytes()
    for folder in (Path(torch.__file__).parents[1], Path(toprovar.__file__).parents[1], Path.home()):
        assert str(folder).encode() not in data


def test_every_weight_is_the_backbones_own_and_there_once(exporter, tmp_path):
    backbone = exporter.backbone
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    graph = exporter.graph("step", ROLES).model.graph
    weights = {name: value for name, value in graph.initializers.items() if name.removesuffix("_T") in tensors}
    expected = {name for name in tensors if name.startswith(("blocks.", "head.")) and "ada_lin" not in name}
    folded = (".q_bias", ".v_bias", ".zero_k_bias", ".scale_mul_1H11")  # put together, made factors
    assert {name.removesuffix("_T") for name in weights} == {name for name in expected if not name.endswith(folded)}
    for name, value in weights.items():
        tensor = tensors[name.removesuffix("_T")]
        if name.endswith("_T"):
            assert np.array_equal(value.const_value.numpy(), tensor.T.numpy())
        else:
            assert value.const_value.raw.data_ptr() == tensor.data_ptr()
    path = tmp_path / "step.onnx"
    save_graph(exporter.graph("step", ROLES), path, {})
    assert path.stat().st_size < 1.15 * 4 * sum(tensors[name].numel() for name in expected)


def test_nothing_is_computed_from_small_weights_alone(exporter):
    for name in ("prefix", "step", "advance", "decoder"):
        graph = exporter.graph(name, ROLES if name == "step" else None).model.graph
        known = set(graph.initializers)
        assert [
            node.name for node in graph if node.inputs and all(one is None or one.name in known for one in node.inputs)
        ] == []


def test_weights_can_go_to_a_file_beside_the_graph(exporter, tmp_path):
    graph = exporter.graph("step", ROLES)
    files = save_graph(graph, tmp_path / "step.onnx", {}, external_data=True)
    assert [file.name for file in files] == ["step.onnx", "step.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    runtime = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    backbone, step = exporter.backbone, Step(exporter.backbone, ROLES)
    context = backbone.prefix(torch.arange(1)).context
    feeds, expected = step_case(backbone, step, context, (2, 2), 1, 1, 4, (1, 1))
    assert worst(runtime, feeds, expected) < 1e-5


def test_a_graph_is_exported_once(exporter):
    assert exporter.graph("prefix") is exporter.graph("prefix")
    assert exporter.graph("step") is exporter.graph("step", "ggggg") is exporter.graph("step", restore="identity")
    assert exporter.graph("step", ROLES) is not exporter.graph("step", ROLES, "identity")
    with pytest.raises(InputError, match="graph 'encoder' is not known; it is one of prefix, step, advance, decoder"):
        exporter.graph("encoder")


def test_half_precision_keeps_residuals_and_logits_in_fp32(half_exporter, tmp_path):
    backbone, roles = half_exporter.backbone, "gdg"
    graph = half_exporter.graph("step", roles)
    dtypes = {info.name: info.dtype for info in (*graph.inputs, *graph.outputs)}
    half = {name for name, dtype in dtypes.items() if dtype == "float16"}
    assert half == {name for name in dtypes if name.startswith(("past_", "new_"))}
    runtime = session(graph, tmp_path)
    context = backbone.prefix(torch.arange(2)).context
    feeds, expected = step_case(backbone, Step(backbone, roles), context, (3, 3), 5, 5, 9, (2, 2))
    assert worst(runtime, feeds, expected) < 2e-2
    model = onnx.load(tmp_path / "step.onnx")
    types = {one.name: one.data_type for one in model.graph.initializer}
    assert types["blocks.1.ffn.fc1.weight_T"] == onnx.TensorProto.FLOAT16
    normalised = {node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    shown = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    assert normalised and {shown[name] for name in normalised} == {onnx.TensorProto.FLOAT}


def test_layers_that_are_built_differently_get_templates_of_their_own(tmp_path):
    backbone = make_var(depth=3, cosine=False)
    backbone.blocks[1].attn.scale = 0.4
    exporter = GraphExporter(backbone)
    runtime = session(exporter.graph("step"), tmp_path)
    context = backbone.prefix(torch.arange(2)).context
    feeds, expected = step_case(backbone, Step(backbone), context, (3, 3), 5, 5, 9, (2, 2))
    assert worst(runtime, feeds, expected) < 1e-5


def test_unguided_sampling_has_one_row_per_image(tmp_path):
    backbone = make_var(depth=1, patch_nums=(1, 2, 3))
    backbone.sampling = dataclasses.replace(backbone.sampling, guided=False)
    exporter = GraphExporter(backbone)
    advance = session(exporter.graph("advance"), tmp_path)
    constants = backbone.scale_constants(1)
    logits, noise, codes = torch.randn(4, 2, 48), torch.rand(4, 2, 48), torch.randn(2, 8, 3, 3)
    expected = backbone.advance(logits, noise, codes, constants)
    assert worst(advance, {"logits": logits, "noise": noise, "codes": codes, **constants}, expected) < 1e-5


def test_a_backbone_with_text_and_rotary_positions_has_them_in_its_graphs(tmp_path):
    """Infinity: text length is symbolic, positions of kept tokens are gathered, one layer adds the level embedding."""
    backbone, roles = make_infinity(depth=2, level_starts=(1,)), "gd"
    graph = GraphExporter(backbone).graph("step", roles)
    runtime = session(graph, tmp_path)
    assert {info.name: info.shape for info in graph.inputs}["cross_k"] == (2, "T", "R", 3, 16)
    rope = backbone.scale_constants(2)["rope"]
    for lengths in ((3,), (2, 7)):
        with torch.no_grad():
            context = backbone.prefix(*make_text(lengths)).context
        case = step_case(backbone, Step(backbone, roles), context, (3, 2), 5, 4, 3, (2, 2), rope)
        assert worst(runtime, *case) < 1e-5
