"""Engines: the shapes of every scale, keys that change with what an engine depends on, and real builds."""

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.exporter.conftest import CONDITION, plan_of
from toprovar.errors import InputError, TargetError
from toprovar.exporter import engine
from toprovar.exporter.engine import (
    BuiltEngine,
    EngineOptions,
    ShapeProfile,
    build_engines,
    fix_sizes,
    fixed_sizes,
    open_builder,
    shape_profiles,
    share_profiles,
)
from toprovar.exporter.engine_stages import cut_graph
from toprovar.exporter.graph import save_graph
from toprovar.exporter.package import write_bundle
from toprovar.profiles.manifest import GraphInfo, TensorInfo
from toprovar.runtime.bundle import open_bundle


def built_with(builder):
    """Why a test that needs this target's builder cannot run, or None."""
    try:
        open_builder(builder)
    except TargetError as error:
        return str(error)
    return None


NO_RTX = built_with("tensorrt-rtx")
needs_rtx = pytest.mark.skipif(NO_RTX is not None, reason=str(NO_RTX))


@pytest.fixture(scope="module")
def bundle(half_exporter, tmp_path_factory):
    """A half-precision bundle without engines."""
    folder = tmp_path_factory.mktemp("engine") / "half"
    plan = plan_of(half_exporter.backbone, "gdg")
    write_bundle(folder, half_exporter, plan, name="half", condition=CONDITION, golden={})
    return open_bundle(folder)


def arguments(bundle):
    """What `build_engines` takes of a bundle."""
    manifest = bundle.manifest
    constants = {name: array.shape for name, array in bundle.constants.items()}
    return bundle.root, dict(manifest.graphs), manifest.schedules, constants, manifest.model, CONDITION


class FakeBuilder:
    """Notes what it is asked for."""

    target, version = "tensorrt-rtx", "1"

    def __init__(self):
        self.asked = []

    def build(self, graph, profiles, options):
        self.asked.append((graph.name, len(profiles)))
        return BuiltEngine(graph.name.encode(), 1, 0.0)


# --- shapes


def test_there_is_one_profile_for_every_scale_of_every_class_and_none_twice(bundle):
    _, graphs, schedules, constants, model, condition = arguments(bundle)
    profiles = shape_profiles(graphs["step"], "step", schedules, constants, model, condition)
    assert all(profile.least == profile.best == profile.greatest for profile in profiles)
    sizes = [
        tuple(profile.best[name][0] for name in ("x", "keep_slots", "past_k_0", "past_k_1")) for profile in profiles
    ]
    # Scales of 1, 4, 9, 16, 36 tokens; class "coarse" is pruned from 16 on, "fine" at 36 only.
    coarse = [(1, 1, 0, 0), (4, 4, 1, 1), (9, 9, 5, 5), (16, 5, 14, 14), (36, 12, 30, 19)]
    assert sizes == [*coarse, (16, 16, 14, 14), (36, 12, 30, 30)]
    assert profiles[0].best["x"] == (1, 2, 64) and profiles[0].best["modulation"] == (3, 6, 2, 64)
    assert profiles[4].best["span_cache_0"] == (9, 2, 64) and profiles[4].best["area_rows"] == (6, 3)
    advance = shape_profiles(graphs["advance"], "advance", schedules, constants, model, condition)
    assert [profile.best["next_position"][0] for profile in advance] == [4, 9, 16, 36, 1]
    assert len(shape_profiles(graphs["decoder"], "decoder", schedules, constants, model, condition)) == 1


def test_small_scales_can_share_a_profile():
    """It takes every one of them, and is tuned for the largest."""
    profiles = [ShapeProfile.fixed({"x": (n, 2), "past": (past,)}, n) for n, past in ((1, 0), (4, 1), (16, 5))]
    least, most = {"x": (1, 2), "past": (0,)}, {"x": (4, 2), "past": (1,)}
    assert share_profiles(profiles, (4,)) == [ShapeProfile(least, most, most), profiles[2]]
    assert share_profiles(profiles, (1,)) == share_profiles(profiles, ()) == profiles
    other = [ShapeProfile.fixed({"codes": (1, 16)}), ShapeProfile.fixed({"codes": (1, 4)})]
    assert share_profiles(other, (4096,)) == other


def test_scales_share_a_profile_between_two_bounds():
    profiles = [ShapeProfile.fixed({"x": (n, 2)}, n) for n in (1, 4, 9, 16, 36)]
    shared = share_profiles(profiles, (4, 16))
    ranges = [(profile.least["x"][0], profile.best["x"][0], profile.greatest["x"][0]) for profile in shared]
    assert ranges == [(1, 4, 4), (9, 16, 16), (36, 36, 36)]
    assert share_profiles(profiles, (4, 4096))[1].greatest == {"x": (36, 2)}
    assert share_profiles(profiles, (2, 3, 100))[0] == profiles[0], "nothing between two bounds is no profile"


@pytest.mark.parametrize("bounds", [(0,), (64, 64), (1024, 64)])
def test_bounds_ascend(bounds):
    with pytest.raises(InputError, match="give numbers of tokens that ascend"):
        EngineOptions(shared_tokens=bounds)


def test_every_stage_of_a_step_shares_alike(bundle, tmp_path):
    """The input of a later stage has another name than that of the whole step."""
    _, graphs, schedules, constants, model, condition = arguments(bundle)
    for _, info in cut_graph(bundle.path("step.onnx"), 3, tmp_path):
        profiles = shape_profiles(info, "step", schedules, constants, model, condition)
        assert len(profiles) - len(share_profiles(profiles, (9,))) == 2, "1, 4 and 9 tokens in one"
    advance = shape_profiles(graphs["advance"], "advance", schedules, constants, model, condition)
    assert share_profiles(advance, (36,)) == advance


def test_shapes_follow_the_batch(bundle):
    _, graphs, schedules, constants, model, condition = arguments(bundle)
    (prefix,) = shape_profiles(graphs["prefix"], "prefix", schedules, constants, model, condition, batch=3)
    assert prefix == ShapeProfile.fixed({"labels": (3,)})
    advance = shape_profiles(graphs["advance"], "advance", schedules, constants, model, condition, batch=3)
    assert advance[1].best["logits"] == (4, 6, 48) and advance[1].best["noise"] == (4, 3, 48)


def test_a_text_has_the_length_that_the_loop_pads_it_to(bundle):
    *_, schedules, constants, model, _ = arguments(bundle)
    text = CONDITION.model_copy(update={"kind": "text", "labels": (), "text_maximum_tokens": 512})
    info = GraphInfo(
        file="prefix.onnx",
        inputs=(TensorInfo(name="text_features", dtype="float32", shape=("B", "T", 8)),),
        outputs=(),
    )
    (profile,) = shape_profiles(info, "prefix", schedules, constants, model, text)
    assert profile == ShapeProfile.fixed({"text_features": (1, 512, 8)})


def test_a_size_that_no_scale_states_is_a_defect(bundle):
    *_, schedules, constants, model, condition = arguments(bundle)
    info = GraphInfo(file="s.onnx", inputs=(TensorInfo(name="x", dtype="float32", shape=("Q",)),), outputs=())
    with pytest.raises(ValueError, match="x has a size 'Q' that no scale states"):
        shape_profiles(info, "step", schedules, constants, model, condition)


# --- options, keys, cache


@pytest.mark.parametrize(
    ("options", "text"), [({"batch": 0}, "a batch of 0"), ({"optimization_level": 6}, "valid is 0 to 5")]
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(InputError, match=text):
        EngineOptions(**options)


def test_a_key_changes_with_everything_that_an_engine_depends_on(tmp_path):
    graph, weights = tmp_path / "g.onnx", tmp_path / "g.onnx.data"
    graph.write_bytes(b"graph")
    profile, options, builder = ShapeProfile.fixed({"x": (1, 2)}), EngineOptions(), FakeBuilder()

    def key(profiles=(profile,), options=options):
        return engine._cache_key(builder, graph, engine._weights_sha256(graph), list(profiles), options)

    keys = [key()]
    assert key() == keys[0]
    keys += [key([profile, profile]), key([ShapeProfile.fixed({"x": (1, 3)})])]
    keys.append(key(options=dataclasses.replace(options, tf32=False)))
    builder.version = "2"
    keys.append(key())
    weights.write_bytes(b"weights")
    keys.append(key())
    graph.write_bytes(b"graph!")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_is_in_the_cache_is_not_built_again(bundle, tmp_path):
    _, *rest = arguments(bundle)
    for name in ("prefix", "step", "advance", "decoder"):
        (tmp_path / f"{name}.onnx").write_bytes(bundle.path(f"{name}.onnx").read_bytes())
    first, second = FakeBuilder(), FakeBuilder()
    info = build_engines(first, tmp_path, *rest, cache=tmp_path / "cache")
    again = build_engines(second, tmp_path, *rest, cache=tmp_path / "cache")
    assert first.asked == [("prefix.onnx", 1), ("step.onnx", 7), ("advance.onnx", 5), ("decoder.onnx", 1)]
    assert second.asked == [] and again == info
    assert info.engines["step"] == "engines/tensorrt-rtx/step.engine" and info.batch == 1
    assert (tmp_path / info.engines["step"]).read_bytes() == b"step.onnx"


# --- stages, and builds side by side


def run_onnx(path, feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()}), strict=True))


def test_stages_behind_each_other_compute_what_the_graph_does(bundle, tmp_path):
    """Layers g, d, g: the second cut is inside a span of detail layers, where two sets of tokens go on."""
    path, info = bundle.path("step.onnx"), bundle.manifest.graphs["step"]
    sizes = {"N": 16, "K": 5, "R": 2, "B": 1, "P_global": 14, "P_detail": 9, "M": 9, "h": 4, "w": 4, "hc": 3, "wc": 3}
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in info.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    whole = run_onnx(path, feeds)
    stages = cut_graph(path, 3, tmp_path)
    known = dict(feeds)
    for file, stage in stages:
        made = run_onnx(file, known)
        assert set(made) == {tensor.name for tensor in stage.outputs}
        known |= made
    assert set(whole) == {tensor.name for tensor in info.outputs}
    assert all(np.array_equal(known[name], value) for name, value in whole.items())
    weights = [{tensor.name for tensor in onnx.load(str(file)).graph.initializer} for file, _ in stages]
    large = {t.name for t in onnx.load(str(path)).graph.initializer if len(t.dims) == 2}
    assert all(sum(name in one for one in weights) == 1 for name in large), "every matrix is in one stage"


def test_stages_find_weights_in_a_file_of_their_own(half_exporter, tmp_path):
    whole, place = tmp_path / "step.onnx", tmp_path / "stages"
    save_graph(half_exporter.graph("step", "gdg"), whole, {}, external_data=True)
    place.mkdir()
    for file, _ in cut_graph(whole, 3, place):
        weights = onnx.load(file, load_external_data=False).graph.initializer
        named = {entry.value for one in weights for entry in one.external_data if entry.key == "location"}
        assert named == {"step.onnx.data"}
        assert (file.parent / "step.onnx.data").samefile(tmp_path / "step.onnx.data")


def test_a_graph_is_cut_into_at_most_as_many_stages_as_it_has_blocks(bundle, tmp_path):
    with pytest.raises(InputError, match=r"step.onnx: 4 stages; valid is 1 to 3"):
        cut_graph(bundle.path("step.onnx"), 4, tmp_path)


class ProcessBuilder(FakeBuilder):
    """Says in which process it builds."""

    def build(self, graph, profiles, options):
        if graph.name == "decoder.onnx" and options.batch == 2:
            os._exit(1)
        return BuiltEngine(f"{graph.name} {os.getpid()}".encode(), 1, 0.0)


def test_engines_are_built_side_by_side_in_processes(bundle, tmp_path):
    _, *rest = arguments(bundle)
    for name in ("prefix", "step", "advance", "decoder"):
        (tmp_path / f"{name}.onnx").write_bytes(bundle.path(f"{name}.onnx").read_bytes())
    said, side_by_side = [], {"jobs": 2, "make_builder": ProcessBuilder}
    options = EngineOptions(stages=2)
    info = build_engines(
        ProcessBuilder(), tmp_path, *rest, options, on_engine=lambda *one: said.append(one), **side_by_side
    )
    assert list(info.engines) == ["prefix", "step", "step.1", "advance", "decoder"]
    assert sorted(name for name, _ in said) == sorted(info.engines)
    built = [(tmp_path / file).read_text().split() for file in info.engines.values()]
    assert [graph for graph, _ in built] == ["prefix.onnx", "step.onnx", "step.onnx", "advance.onnx", "decoder.onnx"]
    assert str(os.getpid()) not in {process for _, process in built}
    with pytest.raises(TargetError, match=r"ended without a word.*fewer --jobs"):
        build_engines(ProcessBuilder(), tmp_path, *rest, EngineOptions(batch=2), **side_by_side)


class FailingBuilder(ProcessBuilder):
    """Cannot build ``prefix``, and takes its time for the others."""

    def build(self, graph, profiles, options):
        if graph.name == "prefix.onnx":
            raise TargetError("prefix.onnx cannot be built")
        time.sleep(120)


def test_an_error_ends_the_builds_beside_it(bundle, tmp_path):
    _, *rest = arguments(bundle)
    for name in ("prefix", "step", "advance", "decoder"):
        (tmp_path / f"{name}.onnx").write_bytes(bundle.path(f"{name}.onnx").read_bytes())
    start = time.monotonic()
    with pytest.raises(TargetError, match=r"^prefix\.onnx cannot be built"):
        build_engines(FailingBuilder(), tmp_path, *rest, jobs=4, make_builder=FailingBuilder)
    assert time.monotonic() - start < 60


def test_sizes_that_never_change_are_stated(bundle):
    model = onnx.load(bundle.path("step.onnx"))
    manifest = bundle.manifest
    graph = {str(name): one for name, one in manifest.graphs.items()}["step"]
    _, _, schedules, constants, shape, condition = arguments(bundle)
    profiles = shape_profiles(graph, "step", schedules, constants, shape, condition, batch=3)
    sizes = fixed_sizes(model, profiles)
    assert sizes["R"] == 3 * shape.rows_per_image and "N" not in sizes
    fix_sizes(model, sizes)
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    assert dims["x"][1].dim_value == sizes["R"] and dims["x"][0].dim_param == "N"
    assert fixed_sizes(model, profiles[:1]).keys() >= {"N"}  # of one scale everything is known


# --- builders


def test_a_target_without_a_builder_is_one_line():
    with pytest.raises(
        TargetError, match="target 'onnxruntime': no engines are built for it; valid: tensorrt, tensorrt-rtx"
    ):
        open_builder("onnxruntime")


def test_a_missing_builder_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TargetError, match=r"pip install 'toprovar\[tensorrt-rtx\]'"):
        open_builder("tensorrt-rtx")


def test_more_tokens_than_topk_takes_are_refused(bundle):
    if NO_RTX:
        pytest.skip(NO_RTX)
    profile = ShapeProfile.fixed({"keep_slots": (4096,)})
    with pytest.raises(TargetError, match=r"keeps 4096 tokens at a scale; TensorRT's TopK ends at 3840"):
        open_builder("tensorrt-rtx").build(bundle.path("step.onnx"), [profile], EngineOptions())


def test_building_needs_no_pytorch():
    code = "import sys, toprovar.exporter.engine; print(sorted({'torch', 'onnxscript'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.trt
@needs_rtx
def test_tensorrt_rtx_builds_every_graph(half_exporter, tmp_path):
    """No GPU is needed. Running the engines needs an RTX GPU, which is not looked for here."""
    plan = plan_of(half_exporter.backbone, "gdg")
    stages = []
    write_bundle(
        tmp_path / "b",
        half_exporter,
        plan,
        name="engines",
        condition=CONDITION,
        golden={},
        target="tensorrt-rtx",
        on_stage=stages.append,
    )
    bundle = open_bundle(tmp_path / "b")
    info = bundle.manifest.targets["tensorrt-rtx"]
    assert info.engines == {name: f"engines/tensorrt-rtx/{name}.engine" for name in bundle.manifest.graphs}
    assert all(bundle.manifest.files[file].size_bytes > 10_000 for file in info.engines.values())
    assert info.version == open_builder("tensorrt-rtx").version and info.cache_key and info.batch == 1
    assert [stage for stage in stages if stage.startswith("engine")] == [
        *("engine prefix, 1 shapes", "engine step, 7 shapes", "engine advance, 5 shapes", "engine decoder, 1 shapes")
    ]


@pytest.mark.trt
@needs_rtx
def test_tensorrt_rtx_takes_the_options(bundle):
    root, graphs, schedules, constants, model, condition = arguments(bundle)
    profiles = shape_profiles(graphs["prefix"], "prefix", schedules, constants, model, condition)
    options = EngineOptions(tf32=False, workspace_bytes=1 << 28, optimization_level=1, compute_capabilities=("8.9",))
    built = open_builder("tensorrt-rtx").build(root / "prefix.onnx", profiles, options)
    assert len(built.data) > 10_000 and built.layers > 10 and built.seconds > 0
    with pytest.raises(InputError, match=r"compute capability '9.0': TensorRT-RTX builds for 12.0, 12.1, 7.5"):
        open_builder("tensorrt-rtx").build(
            root / "prefix.onnx", profiles, dataclasses.replace(options, compute_capabilities=("9.0",))
        )


@pytest.mark.trt
@needs_rtx
def test_a_graph_that_tensorrt_rtx_does_not_know_is_one_line(tmp_path):
    import onnx.parser

    text = '<ir_version: 10, opset_import: ["" : 20, "x" : 1]> g (float[2] a) => (float[2] b) { b = x.Unknown(a) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    with pytest.raises(TargetError, match=r"cannot parse g.onnx: \S") as caught:
        open_builder("tensorrt-rtx").build(tmp_path / "g.onnx", [], EngineOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.trt
@needs_rtx
def test_weights_beside_the_graph_are_found_and_no_layer_name_is_there_twice(half_exporter, bundle, tmp_path):
    root, graphs, schedules, constants, model, condition = arguments(bundle)
    profiles = shape_profiles(graphs["step"], "step", schedules, constants, model, condition)[:1]
    save_graph(half_exporter.graph("step", "gdg"), tmp_path / "step.onnx", {}, external_data=True)
    builder = open_builder("tensorrt-rtx")
    apart = builder.build(tmp_path / "step.onnx", profiles, EngineOptions())
    together = builder.build(root / "step.onnx", profiles, EngineOptions())
    assert apart.layers == together.layers and abs(len(apart.data) - len(together.data)) < 0.01 * len(together.data)
    assert not [message for message in apart.warnings if "already exists" in message]
