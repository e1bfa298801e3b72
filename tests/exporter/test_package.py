"""A bundle is complete or not there, holds every tensor once, and proves itself in a runtime."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.exporter.conftest import CONDITION, plan_of
from toprovar import __version__
from toprovar.backbones.base import restore_constants
from toprovar.errors import FormatError, InputError, TargetError, ToprovarError
from toprovar.exporter import package
from toprovar.exporter.calibrate import labels_condition
from toprovar.exporter.graph import GRAPHS
from toprovar.exporter.package import GoldenPrompt, golden_trace, precision_for, write_bundle
from toprovar.kernels.contract import CONTRACT_VERSION
from toprovar.profiles.files import sha256_file
from toprovar.profiles.plan import load_plan
from toprovar.runtime.bundle import open_bundle
from toprovar.runtime.session import Session
from toprovar.runtime.verify import verify

ROLES = "gddgd"


def label_prompt(labels, seeds):
    return GoldenPrompt(labels_condition(labels), tuple(seeds))


GOLDEN = {"coarse": label_prompt([0, 2], [7, 8]), "fine": label_prompt([3], [9])}


def write(folder, exporter, plan, **options):
    options = {"name": "sample", "condition": CONDITION, "golden": GOLDEN} | options
    return write_bundle(folder, exporter, plan, **options)


@pytest.fixture(scope="module")
def bundle(exporter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "sample.bundle"
    plan = plan_of(exporter.backbone, ROLES)
    stages = []
    manifest = write(folder, exporter, plan, documents={"calibration.json": "{}\n"}, on_stage=stages.append)
    return folder, manifest, plan, stages


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("roles", [ROLES, "ggggg"])
@pytest.mark.parametrize(("restore", "dropped"), [("cache", 0), ("identity", 1)])
def test_a_runtime_replays_the_golden_trace(exporter, tmp_path, roles, restore, dropped):
    write(tmp_path / "b", exporter, plan_of(exporter.backbone, roles, restore=restore, dropped=dropped))
    verdict = verify(Session(open_bundle(tmp_path / "b"), batch_size=2))
    assert verdict.passed and [one.images for one in verdict.classes] == [2, 1], verdict.classes
    assert [len(one.tokens) for one in verdict.classes] == [5 - dropped] * 2


def test_the_manifest_says_what_is_there(bundle, exporter):
    folder, manifest, plan, _ = bundle
    assert open_bundle(folder).manifest == manifest
    assert set(manifest.files) == set(contents(folder)) - {"manifest.json"}
    for name, info in manifest.files.items():
        assert (info.sha256, info.size_bytes) == (sha256_file(folder / name), (folder / name).stat().st_size)
    assert (manifest.toprovar_version, manifest.contract_version) == (__version__, CONTRACT_VERSION)
    assert (manifest.precision, manifest.model.roles, manifest.model.code_shape) == ("float32", ROLES, (8, 6, 6))
    assert manifest.model.parameters == sum(p.numel() for p in exporter.backbone.parameters())
    assert (manifest.sampling.guidance, manifest.sampling.top_k, manifest.sampling.top_p) == (1.5, 20, 0.9)
    assert manifest.provenance.plan_sha256 == plan.sha256 == load_plan(folder / "plan.json").sha256
    assert set(manifest.graphs) == set(GRAPHS) and list(manifest.targets) == ["onnxruntime"]


def test_each_stage_is_told(bundle):
    *_, stages = bundle
    graphs = [f"graph {name}" for name in GRAPHS]
    assert stages == ["golden trace of coarse", "golden trace of fine", *graphs, "constants", "manifest"]


def test_every_step_names_every_constant_of_its_graphs(bundle, exporter):
    folder, manifest, *_ = bundle
    stored, backbone = load_file(folder / "constants.safetensors"), exporter.backbone
    loop_owned = {"x", "logits", "noise", "codes", "keep_slots", "modulation", "head_modulation"}
    inputs = {info.name for name in ("step", "advance") for info in manifest.graphs[name].inputs}
    constants = {name for name in inputs - loop_owned if not name.startswith(("past_", "span_cache_"))}
    for prompt_class, schedule in manifest.schedules.items():
        for step in schedule.steps:
            assert set(step.constants) == constants
            following = 0 if step.last else step.scale + 1
            for name, tensor in backbone.scale_constants(step.scale, following).items():
                assert np.array_equal(stored[step.constants[name]], tensor.numpy()), (prompt_class, step.scale, name)


def test_spans_are_restored_from_the_cached_scale_and_before_it_from_one_cell_of_zeros(bundle, exporter):
    folder, manifest, plan, _ = bundle
    stored = load_file(folder / "constants.safetensors")
    for prompt_class, schedule in manifest.schedules.items():
        cached = plan.classes[prompt_class].cache_scale
        for step in schedule.steps:
            rows, cols = (stored[step.constants[name]] for name in ("area_rows", "area_cols"))
            if step.scale <= cached:
                assert rows.shape == (step.grid[0], 1) and not rows.any() and not cols.any()
            else:
                expected = restore_constants(exporter.backbone.spec, step.scale, cached)
                assert np.array_equal(rows, expected[0]) and np.array_equal(cols, expected[1])


def test_equal_constants_are_stored_once(bundle):
    folder, manifest, *_ = bundle
    stored = load_file(folder / "constants.safetensors")
    contents = [(array.dtype.str, array.shape, array.tobytes()) for array in stored.values()]
    assert len(set(contents)) == len(contents)
    named = {key for loop in manifest.schedules.values() for step in loop.steps for key in step.constants.values()}
    assert named == set(stored)


def test_the_golden_trace_is_what_pytorch_makes_of_its_seeds(bundle, exporter):
    folder, _, plan, _ = bundle
    golden = load_file(folder / "golden.safetensors")
    assert golden["coarse/labels"].tolist() == [0, 2] and golden["coarse/labels"].dtype == np.int32
    assert golden["coarse/seeds"].dtype == np.int64
    assert {name.split("/")[1] for name in golden} == {
        "labels",
        "seeds",
        "codes",
        "image",
        *(f"tokens_{s}" for s in range(5)),
    }
    again = golden_trace(exporter.backbone, plan, "coarse", label_prompt([0, 2], golden["coarse/seeds"].tolist()))
    for name, array in again.items():
        assert np.array_equal(golden[f"coarse/{name}"], array), name
    image = golden["coarse/image"]
    assert image.shape == (2, 3, 24, 24) and image.min() >= 0 and image.max() <= 1


def test_seeds_whose_decisions_are_too_close_are_passed_over(exporter, monkeypatch):
    plan, tried = plan_of(exporter.backbone, ROLES), []
    original = package._generate

    def watched(backbone, plan, prompt_class, condition, seeds, *, clear):
        tried.append((seeds, clear))
        if clear and len(tried) < 3:
            raise package._Unclear
        return original(backbone, plan, prompt_class, condition, seeds, clear=clear)

    monkeypatch.setattr(package, "_generate", watched)
    assert golden_trace(exporter.backbone, plan, "coarse", GOLDEN["coarse"])["seeds"].tolist() == [11, 12]
    assert tried == [([7, 8], True), ([9, 10], True), ([11, 12], True)]


@pytest.mark.parametrize("threshold", ["_CLEAR_ENTROPY_NATS", "_CLEAR_LOGITS"])
def test_where_no_seed_is_clear_the_given_ones_are_taken(exporter, monkeypatch, threshold):
    plan = plan_of(exporter.backbone, ROLES)
    clear = golden_trace(exporter.backbone, plan, "fine", GOLDEN["fine"])
    monkeypatch.setattr(package, threshold, 10.0)
    taken = golden_trace(exporter.backbone, plan, "fine", GOLDEN["fine"])
    assert taken["seeds"].tolist() == [9]
    if clear["seeds"].tolist() == [9]:
        assert all(np.array_equal(taken[name], clear[name]) for name in clear)


def test_a_bundle_takes_the_place_of_a_bundle(bundle, exporter, tmp_path):
    folder = tmp_path / "b"
    dense = plan_of(exporter.backbone, "ggggg")
    write(folder, exporter, dense, golden={})
    (folder / "engines").mkdir()
    write(folder, exporter, dense, golden={}, name="again")
    assert open_bundle(folder).manifest.name == "again" and not (folder / "engines").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_same_export_gives_the_same_bytes(exporter, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, exporter, plan_of(exporter.backbone, ROLES))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("made", ["file", "folder", "link", "other manifest"])
def test_what_is_no_bundle_is_left_alone(exporter, tmp_path, made):
    place = tmp_path / "b"
    if made == "file":
        place.write_text("mine")
    elif made == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        if made == "other manifest":
            (place / "manifest.json").write_text('{"schema": "something/1"}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"(is a file or a link|exists and is no bundle)"):
        write(place, exporter, plan_of(exporter.backbone, "ggggg"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(exporter, tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", exporter, plan_of(exporter.backbone, "ggggg"), golden={})
    assert open_bundle(tmp_path / "b").manifest.name == "sample"
    assert not (tmp_path / "b" / "golden.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), ToprovarError),
        (RuntimeError("a defect"), RuntimeError),
    ],
)
@pytest.mark.parametrize("where", ["save_graph", "write_bytes", "save_plan", "write_text"])
def test_what_is_interrupted_leaves_what_was_there(exporter, tmp_path, monkeypatch, where, error, raised):
    old = tmp_path / "b"
    old.mkdir()
    (old / "manifest.json").write_text('{"schema": "toprovar.bundle/1"}')

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(package, where, fails)
    for name in ("b", "c"):
        with pytest.raises(raised, match=r"(?i)stop|no space left on device|a defect"):
            write(tmp_path / name, exporter, plan_of(exporter.backbone, "ggggg"), golden={})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert list(contents(old)) == ["manifest.json"]


def test_an_interrupt_between_the_renames_brings_the_old_bundle_back(exporter, tmp_path, monkeypatch):
    old = tmp_path / "b"
    old.mkdir()
    (old / "manifest.json").write_text('{"schema": "toprovar.bundle/1"}')
    replace = package.os.replace

    def interrupted(source, target):
        if str(source).endswith(".part") and target == old:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(package.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(old, exporter, plan_of(exporter.backbone, "ggggg"), golden={})
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and list(contents(old)) == ["manifest.json"]


def test_a_folder_that_cannot_be_is_one_line(exporter, tmp_path):
    with pytest.raises(InputError, match=r"its folder .*nowhere does not exist"):
        write(tmp_path / "nowhere" / "b", exporter, plan_of(exporter.backbone, "ggggg"))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "coreml"}, InputError, "valid: onnxruntime, tensorrt, tensorrt-rtx"),
        ({"golden": {"smooth": GOLDEN["fine"]}}, InputError, "golden trace: prompt class 'smooth' is not in the plan"),
        ({"plan": {"precision": "fp16"}}, InputError, "asks for float16, the model was loaded in float32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(exporter, tmp_path, options, error, text):
    plan = plan_of(exporter.backbone, ROLES, **options.pop("plan", {}))
    with pytest.raises(error, match=text):
        write(tmp_path / "b", exporter, plan, **options)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_model_is_refused(exporter, half_exporter, tmp_path):
    with pytest.raises(FormatError, match=r"model.depth: found 3, expected 5"):
        write(tmp_path / "b", exporter, plan_of(half_exporter.backbone, "gdg"))
    assert not list(tmp_path.iterdir())


def test_a_missing_builder_is_noticed_before_anything_is_written(exporter, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(TargetError, match=r"pip install 'toprovar\[tensorrt-rtx\]'"):
        write(tmp_path / "b", exporter, plan_of(exporter.backbone, ROLES), target="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


def test_golden_prompts_have_a_seed_each():
    with pytest.raises(InputError, match="2 prompts and 1 seeds"):
        label_prompt([1, 2], [3])
    assert label_prompt([1], [3]).condition[0].dtype == torch.int32


def test_auto_precision_suits_the_target():
    assert precision_for("auto", "onnxruntime") == "fp32" and precision_for("auto", "tensorrt-rtx") == "fp16"
    assert precision_for("fp16", "onnxruntime") == "fp16" and precision_for("fp32", "tensorrt-rtx") == "fp32"
    with pytest.raises(InputError, match="target 'coreml'"):
        precision_for("auto", "coreml")


def test_the_manifest_is_json_that_a_person_can_read(bundle):
    text = (bundle[0] / "manifest.json").read_text()
    assert json.loads(text)["schema"] == "toprovar.bundle/1" and max(map(len, text.splitlines())) < 200
