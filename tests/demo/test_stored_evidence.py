"""The evidence that comes with the package: of these weights, on enough pictures, and what it promises of `fast`."""

from pathlib import Path

import pytest

import toprovar.demo
from toprovar.backbones.checkpoint import checkpoint_files
from toprovar.demo.embedded import embedded_source, embedded_text_source
from toprovar.profiles.evidence import ALL, load_arrays, load_evidence
from toprovar.profiles.manifest import sha256_checkpoint

FOLDER = Path(toprovar.demo.__file__).parent / "evidence"


@pytest.mark.parametrize(("name", "make"), [("class", embedded_source), ("text", embedded_text_source)])
def test_stored_evidence(name, make):
    path, source = FOLDER / f"{name}.json", make()
    evidence = load_evidence(path)
    arrays = load_arrays(path, evidence)
    shipped = sha256_checkpoint(checkpoint_files(source.checkpoint), checkpoint_files(source.vae))
    assert evidence.checkpoint_sha256 == shipped
    for example in evidence.examples:
        assert all(f"{example.key}.image.{policy}" in arrays for policy in example.policies)
    dense, fast = (evidence.policy(policy).groups[ALL] for policy in ("dense", "ours-fast"))
    assert dense.images >= 200
    assert fast.metrics["ssim"].low >= 0.85
    assert fast.metrics["accuracy"].mean >= 0.97 * dense.metrics["accuracy"].mean
    assert fast.transformer["torch"].median_ms * 2.5 <= dense.transformer["torch"].median_ms
    families = {policy.family for policy in evidence.policies}
    assert families == {"dense", "drop", "rival", "ours", "ablation"}
