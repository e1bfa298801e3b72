"""Evidence: what is written comes back, belongs together, and names what does not fit."""

import json

import numpy as np
import pytest

from tests.profiles.evidence_sample import sample_evidence
from toprovar.errors import FormatError
from toprovar.profiles.evidence import arrays_path, load_arrays, load_evidence, save_evidence


def test_document_and_arrays_come_back_as_they_were(tmp_path):
    document, arrays = sample_evidence()
    written = save_evidence(tmp_path / "e.json", document, arrays)
    found = load_evidence(tmp_path / "e.json")
    assert found == written
    loaded = load_arrays(tmp_path / "e.json", found)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


def test_the_same_evidence_gives_the_same_bytes(tmp_path):
    for name in ("a.json", "b.json"):
        save_evidence(tmp_path / name, *sample_evidence())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_arrays_of_another_document_are_refused(tmp_path):
    found = save_evidence(tmp_path / "e.json", *sample_evidence())
    place = arrays_path(tmp_path / "e.json")
    place.write_bytes(place.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FormatError, match="sha256 is"):
        load_arrays(tmp_path / "e.json", found)
    place.unlink()
    with pytest.raises(FormatError, match="no such file"):
        load_arrays(tmp_path / "e.json", found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["policies"].pop(0), "found no policy 'dense'"),
        (lambda d: d["policies"].append(d["policies"][0]), "expected each name once"),
        (lambda d: d["policies"][1]["groups"].update(x=d["policies"][1]["groups"]["all"]), "found 'x', expected one of"),
        (lambda d: d["policies"][1]["groups"]["all"]["metrics"].update(fid={"mean": 1.0, "low": 1.0, "high": 1.0}),
         "found 'fid'"),
        (lambda d: d["comparisons"][0].update(rival="nobody"), "comparisons: found 'nobody'"),
        (lambda d: d["comparisons"][0].update(ours=None), "must be none together"),
        (lambda d: d["rho"].update(plain=[0.5]), "rho: found 1 scales, expected 10"),
        (lambda d: d["errors"][0].update(scales=[1]), "differ in length"),
        (lambda d: d.update(roles="gd"), "roles: found 2 layers, expected 12"),
        (lambda d: d.update(arrays_sha256=None), "arrays_sha256: found nothing"),
        (lambda d: d["tau_fits"]["plain"]["tau"].update(low=9.0), "expected at most high"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, said):
    save_evidence(tmp_path / "e.json", *sample_evidence())
    document = json.loads((tmp_path / "e.json").read_text())
    change(document)
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=said):
        load_evidence(tmp_path / "e.json")
