"""`toprovar plan --floor`: from a checkpoint on disk to a plan that export takes, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from toprovar.exporter import search
from toprovar.profiles.plan import load_plan
from toprovar.profiles.profile import QualityFloor
from toprovar.runtime.bundle import open_bundle

from .test_export import Checkpoint, one_line, run


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(search, "FRACTIONS", (0.3, 0.7))
    monkeypatch.setattr(search, "DETAIL_SHARES", (0.8,))
    return Checkpoint(tmp_path / "model")


def test_a_searched_plan_is_exported_and_is_the_same_each_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    calibration = tmp_path / "c.json"
    assert run("calibrate", *checkpoint.options, "--per-class", 2, "--seeds", 1, "-o", calibration).exit_code == 0
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path in paths:
        result = run(
            "plan", calibration, *checkpoint.options, "--floor", "ssim=0.1", "--floor", "psnr_db=3", "-o", path
        )
        assert result.exit_code == 0, result.output
        assert "prunings tried" in result.stderr and "psnr_db" in result.stderr
    assert paths[0].read_bytes() == paths[1].read_bytes()
    plan = load_plan(paths[0])
    assert plan.profile.quality_floor == QualityFloor(ssim=0.1, psnr_db=3.0)
    bundle = tmp_path / "searched.bundle"
    result = run("export", *checkpoint.options, "--plan", paths[0], "--calibration", calibration, "-o", bundle)
    assert result.exit_code == 0, result.output
    assert open_bundle(bundle).manifest.provenance.plan_sha256 == plan.sha256


def test_what_a_search_cannot_do_is_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    calibration = tmp_path / "c.json"
    run("calibrate", *checkpoint.options, "--per-class", 1, "--seeds", 1, "-o", calibration)
    result = run("plan", calibration, *checkpoint.options, "--floor", "accuracy=0.9", "-o", tmp_path / "p.json")
    assert "needs a judge" in one_line(result)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    result = run("plan", calibration, *checkpoint.options, "--floor", "ssim=0.9", "--prompts", prompts)
    assert "takes labels, not text" in one_line(result)
