"""Calibrations and plans: strict, linked by hash, the same bytes for the same content."""

import json

import pytest

from tests.profiles.samples import CHECKPOINT, a_calibration, a_profile
from toprovar.errors import FormatError
from toprovar.exporter.plan import make_plan
from toprovar.profiles.calibration import load_calibration, save_calibration
from toprovar.profiles.plan import load_plan, save_plan


@pytest.fixture
def plan():
    return make_plan(a_profile("[classes.plain]\ndrop_scales = 1"), a_calibration())


def edited(path, **changes):
    """The file again with some values changed: `a__b=1` sets value["a"]["b"]."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        *parents, last = key.split("__")
        place = value
        for parent in parents:
            place = place[parent]
        place[last] = new
    path.write_text(json.dumps(value))
    return path


def test_a_calibration_comes_back_as_it_was_and_its_time_does_not_count(tmp_path):
    calibration = a_calibration()
    save_calibration(tmp_path / "c.json", calibration)
    assert load_calibration(tmp_path / "c.json") == calibration
    later = calibration.model_copy(update={"wall_time_s": 99.0})
    assert later.sha256 == calibration.sha256
    assert calibration.model_copy(update={"seeds": (1,)}).sha256 != calibration.sha256


def test_a_plan_comes_back_as_it_was(tmp_path, plan):
    save_plan(tmp_path / "p.json", plan)
    assert load_plan(tmp_path / "p.json") == plan
    first = (tmp_path / "p.json").read_bytes()
    save_plan(tmp_path / "p.json", load_plan(tmp_path / "p.json"))
    assert (tmp_path / "p.json").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "extra: unknown key; valid keys: checkpoint_sha256, classes, discriminants, "),
        ({"checkpoint_sha256": "abc"}, 'checkpoint_sha256: found "abc", expected match pattern'),
        ({"seeds": []}, "seeds: found []"),
        ({"classes__plain__images": 3}, "classes.plain.images: found 3, expected 2, prompts times seeds"),
        ({"classes__plain__rho__mean": [0.5]}, "classes.plain.rho.mean: found 1 scales, expected 10"),
        ({"classes__plain__rho__mean": [1.5] * 10}, "classes.plain.rho: found a ratio outside 0 to 1"),
        (
            {"classes__plain__entropy_nats__sd": [[0.0]] * 10},
            "classes.plain.entropy_nats.sd.0: found 1 layers, expected 12",
        ),
        ({"model__grids": [[1, 1], [1, 1]]}, "model: grids: found [[1, 1], [1, 1]], expected each larger"),
        ({"model__dept": 3}, "model.dept: unknown key; did you mean depth?"),
    ],
)
def test_a_wrong_calibration_is_one_line(tmp_path, change, said):
    save_calibration(tmp_path / "c.json", a_calibration())
    with pytest.raises(FormatError) as caught:
        load_calibration(edited(tmp_path / "c.json", **change))
    assert str(caught.value).startswith(f"{tmp_path}/c.json: {said}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"roles": "ggd"}, "roles: found 3 letters, expected 12"),
        ({"roles": "g" * 12}, "roles: found 'gggggggggggg', expected at least one d"),
        ({"roles": "d" * 12}, "roles: found 'dddddddddddd', expected a letter per layer"),
        ({"profile__depth__tau": 0.3}, "profile_sha256: found "),
        ({"calibration_sha256": None}, "calibration_sha256: found nothing"),
        ({"classes__texture__depth": 3}, "classes.texture.depth: found 3, expected 7, the first scale"),
        ({"classes__texture__keep": [1]}, "classes.texture.keep: found 1 scales, expected 10"),
        ({"classes__texture__keep": [2, *[1] * 9]}, "classes.texture.keep.0: found 2, expected 1 to 1"),
        ({"classes__texture__cache_scale": 3}, "classes.texture.cache_scale: found 3, expected 6"),
        ({"classes__texture__scales_run": [0, 2]}, "classes.texture.scales_run: found [0, 2]"),
        ({"classes": {}}, "classes: found {}"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path, plan, change, said):
    save_plan(tmp_path / "p.json", plan)
    with pytest.raises(FormatError) as caught:
        load_plan(edited(tmp_path / "p.json", **change))
    assert str(caught.value).startswith(f"{tmp_path}/p.json: {said}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a plan: not valid JSON"),
        ("[]", "not a plan: found [], expected an object"),
        ('{"a": 1, "a": 2}', "not a plan: not valid JSON: key 'a' appears twice"),
        ("\xff", "not a plan: not valid JSON"),
        ("[" * 100_000, "not a plan: not valid JSON"),
    ],
)
def test_what_is_no_document_is_one_line(tmp_path, text, said):
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError) as caught:
        load_plan(tmp_path / "p.json")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_another_checkpoint_are_refused(plan):
    plan.check_checkpoint(CHECKPOINT)
    a_calibration().check_checkpoint(CHECKPOINT)
    with pytest.raises(FormatError, match=r"p.json: checkpoint_sha256: found cccccccccccc…, expected dddddddddddd…"):
        plan.check_checkpoint("d" * 64, "p.json")
    with pytest.raises(FormatError, match=r"calibration: checkpoint_sha256: found cccccccccccc…"):
        a_calibration().check_checkpoint("d" * 64)
