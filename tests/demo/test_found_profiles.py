"""Profiles found for the embedded checkpoints: for these very files, above the floors of the shipped ones."""

import pytest

from toprovar.backbones.checkpoint import checkpoint_files
from toprovar.demo.embedded import embedded_source, embedded_text_source, found_profiles
from toprovar.exporter.source import named_profile
from toprovar.profiles.manifest import sha256_checkpoint
from toprovar.profiles.profile import SHIPPED, load_profile


@pytest.mark.parametrize("make", [embedded_source, embedded_text_source])
def test_found_profiles_belong_to_the_shipped_weights_and_floors(make):
    source = make()
    assert set(source.profiles) == set(SHIPPED)
    sha256 = sha256_checkpoint(checkpoint_files(source.checkpoint), checkpoint_files(source.vae))
    classes = ("texture", "plain", "object")
    assert found_profiles(sha256, classes) == source.profiles
    assert not found_profiles("0" * 64, classes) and not found_profiles(sha256, ("fine", "coarse"))
    for name, path in source.profiles.items():
        assert path.read_text().startswith(
            f"# Found by `python -m benchmarks.evidence search` for checkpoint {sha256[:12]}."
        )
        found = named_profile(name, own=source.profiles)
        assert found.name == name and found.quality_floor == load_profile(name).quality_floor
        assert set(found.classes) == {"plain", "object", "texture"} and found.roles.explicit is not None
