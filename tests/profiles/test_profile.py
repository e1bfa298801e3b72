"""A profile says what it wishes, in one way only; what it says wrongly is named in one line."""

import re
from pathlib import Path

import pytest

from tests.profiles.samples import a_profile
from toprovar.errors import FormatError
from toprovar.profiles.profile import SHIPPED, Profile, dense_profile, load_profile


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_load_under_their_names(name):
    profile = load_profile(name)
    assert profile.name == name and profile.description
    assert (profile.drop_scales == 0) == (name in ("quality", "balanced"))
    assert (profile.drop_rho is None) == (name != "fast")


def test_a_profile_of_ones_own_is_loaded_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('schema = "toprovar.profile/1"\nname = "mine"\n')
    assert load_profile(path).name == "mine"
    assert load_profile(str(path)) == load_profile(path)


def test_unknown_names_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(FormatError, match="'fats': not known; expected one of quality, balanced, fast, extreme"):
        load_profile("fats")
    with pytest.raises(FormatError, match="no such file; expected a profile"):
        load_profile(tmp_path / "fast.toml")


def test_a_class_states_only_what_differs():
    profile = a_profile(
        "drop_scales = 1\n[depth]\ntau = 0.3\n[tokens]\nalpha_max = 1.0\n[classes.fine.tokens]\nalpha_min = 0.95"
    )
    fine, other = profile.for_class("fine"), profile.for_class("other")
    assert (fine.tokens.alpha_min, fine.tokens.alpha_max) == (0.95, 1.0)
    assert fine.depth == other.depth == profile.depth and fine.drop_scales == other.drop_scales == 1
    assert other.tokens == profile.tokens


def test_comments_order_and_defaults_do_not_count_in_the_hash():
    one = a_profile('restore = "cache"\n[depth]\ntau = 0.4 # literal')
    assert one.sha256 == a_profile().sha256
    assert one.sha256 != a_profile("[depth]\ntau = 0.41").sha256


def test_a_profile_survives_its_json():
    profile = a_profile(
        'drop_scales = ["32x32"]\n[depth]\nrho = [0, 3]\n[tokens.keep]\n32x32 = 0.5\n[classes.a]\ndrop_scales = 0'
    )
    assert Profile.model_validate_json(profile.model_dump_json(by_alias=True)) == profile


def test_the_dense_profile_prunes_nothing():
    assert dense_profile().tokens.keep == {} and dense_profile().name == "dense"
    assert dense_profile(2).drop_scales == 2 and dense_profile(("32x32",)).name == "drop-1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[dpeth]", "dpeth: unknown key; did you mean depth? valid keys: classes, depth, "),
        ("[tokens]\nalfa_min = 1", "tokens.alfa_min: unknown key; did you mean alpha_min? valid keys: alpha_max, "),
        ("[classes.a.tokens]\nkepp = 3", "classes.a.tokens.kepp: unknown key; did you mean keep?"),
        ("[roles]\nbeta = 'mean'", "roles.beta: found \"mean\", expected 'median' or a valid number"),
        ("[roles]\nexplicit = 'dg'", "roles.explicit: found 'dg', expected a letter per layer"),
        ("[depth]\ntau = 1.5", "depth.tau: found 1.5, expected less than or equal to 1"),
        ("[depth]\ntau = nan", "depth.tau: found NaN, expected a finite number"),
        ("[depth]\ntau = '0.4'", 'depth.tau: found "0.4", expected a valid number'),
        ("[depth]\ntau = 2020-01-01", 'depth.tau: found "2020-01-01", expected a valid number'),
        ("[depth]\ndirection = '<'", "depth.direction: found \"<\", expected '<=' or '>='"),
        ("[depth]\nrho = [1, 1]", "depth: rho: found [1, 1], expected each layer once"),
        ("[depth]\nrho = []", "depth: rho: found an empty list"),
        ("[depth]\nrho = ['a']", 'depth.rho.0: found "a", expected a valid integer'),
        ("[tokens]\nalpha_min = 0.95", "tokens: alpha_min: found 0.95, expected at most alpha_max, which is 0.9"),
        ("[tokens.keep]\n32 = 0.5", "tokens.keep.32: found '32', expected a grid as height x width"),
        ("[tokens.keep]\n32x32 = 0.0", "tokens.keep.32x32: found 0.0, expected greater than 0"),
        ("drop_scales = true", "drop_scales: found true, expected a valid integer or a list"),
        ("drop_scales = -1", "drop_scales: found -1, expected greater than or equal to 0"),
        ("drop_scales = ['3x']", "drop_scales.0: found '3x', expected a grid"),
        ("precision = 'bf16'", "precision: found \"bf16\", expected 'auto', 'fp32' or 'fp16'"),
        ("classes = 3", "classes: found 3, expected an object"),
        ("[classes.a]\ndepth = 3", "classes.a.depth: found 3, expected an object"),
        ("tau = ", "not a profile: not valid TOML: "),
    ],
)
def test_every_mistake_is_one_line_with_file_key_found_and_expected(text, said):
    with pytest.raises(FormatError) as caught:
        a_profile(text)
    message = str(caught.value)
    assert message.startswith(f"t.toml: {said}"), message
    assert "\n" not in message


def test_another_schema_is_named(tmp_path):
    (tmp_path / "a.toml").write_text('schema = "toprovar.profile/2"\nname = "a"\n')
    with pytest.raises(FormatError, match=r"schema: found \"toprovar.profile/2\", expected 'toprovar.profile/1'"):
        load_profile(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('name = "a"\n')
    with pytest.raises(FormatError, match=r"schema: found nothing, expected this key"):
        load_profile(tmp_path / "a.toml")


def test_the_method_page_names_every_option_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.partition("## 8.")[2].splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([a-z_.]+)`", row[-2])}
    profile = dense_profile()
    sections = {name: getattr(profile, name).model_dump() for name in ("depth", "roles", "tokens")}
    assert named == {"restore", "drop_scales", "drop_rho"} | {
        f"{section}.{name}" for section, options in sections.items() for name in options
    }
