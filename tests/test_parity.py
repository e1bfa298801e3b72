"""Golden folders: trimmed ones always, full ones where TOPROVAR_GOLDEN names the folder that holds them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import REPORTS, Golden, main, report_of

TRIMMED = Path(__file__).parent / "golden"
FULL = Path(os.environ.get("TOPROVAR_GOLDEN", "")) if "TOPROVAR_GOLDEN" in os.environ else None


def _cases(folder: Path) -> list[Path]:
    """Golden folders of backbones that have a check."""
    cases = sorted(path.parent for path in folder.glob("*/config.json"))
    return [case for case in cases if json.loads((case / "config.json").read_text())["backbone"].lower() in REPORTS]


@pytest.mark.parametrize("folder", _cases(TRIMMED), ids=lambda path: path.name)
def test_trimmed_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(folder)
    report.print()
    assert report.holds, capsys.readouterr().out
    unused = set(report.golden.arrays) - report.compared
    assert not unused, unused


@pytest.mark.skipif(FULL is None, reason="TOPROVAR_GOLDEN does not name a folder of full golden cases (images too)")
@pytest.mark.parametrize("folder", _cases(FULL) if FULL else [None], ids=lambda path: path.name if path else "none")
def test_full_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(folder)
    report.print()
    assert report.holds, capsys.readouterr().out


def test_what_a_var_report_compares() -> None:
    names = {row.name for row in report_of(TRIMMED / "var-mini").rows}
    assert names >= {
        "sizes inferred from the files",
        "argmax/logits_raw",
        "argmax/logits_raw (free)",
        "argmax/tokens (free)",
        "argmax/attn_entropy_per_query",
        "argmax/image",
        "topkp/probs_filtered",
        "smooth/h_soft",
        "tf/logits",
    }


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRIMMED / "var-mini", tmp_path / "var-mini"))


@pytest.mark.parametrize(
    ("array", "offset"), [("argmax/logits_raw", 2e-4), ("argmax/tokens", 1), ("argmax/attn_entropy_per_query", 1e-4)]
)
def test_a_changed_array_fails(copy: Path, array: str, offset: float, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = load_file(copy / "outputs.safetensors")
    arrays[array].view(-1)[5] += offset
    save_file(arrays, copy / "outputs.safetensors")
    assert main([str(copy)]) == 1
    assert any(line.startswith(array) and "FAILED" in line for line in capsys.readouterr().out.splitlines())


def test_a_nan_fails(copy: Path) -> None:
    arrays = load_file(copy / "outputs.safetensors")
    arrays["topkp/logits_raw"][0, 0, 0] = torch.nan
    save_file(arrays, copy / "outputs.safetensors")
    assert main([str(copy)]) == 1


def test_absent_arrays_are_not_needed(copy: Path) -> None:
    arrays = load_file(copy / "outputs.safetensors")
    keep = ("labels", "argmax/logits_raw", "argmax/tokens")
    save_file({key: arrays[key] for key in keep}, copy / "outputs.safetensors")
    assert main([str(copy)]) == 0


def test_a_size_that_contradicts_the_config_fails(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["config"]["num_heads"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    assert main([str(copy)]) == 1
    assert "num_heads 2, not 8" in capsys.readouterr().out


def test_folders_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "config.json").write_text('{"backbone": "PixelCNN"}')
    assert main([str(tmp_path)]) == 2
    save_file({"a": torch.zeros(1)}, tmp_path / "outputs.safetensors")
    assert main([str(tmp_path)]) == 2
    assert "backbone 'pixelcnn' has no parity check" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0


def test_sharded_outputs_are_read(copy: Path) -> None:
    arrays = load_file(copy / "outputs.safetensors")
    (copy / "outputs.safetensors").unlink()
    names = sorted(arrays)
    parts = {"outputs-1.safetensors": names[::2], "outputs-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: arrays[key] for key in keys}, copy / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (copy / "outputs.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Golden(copy).arrays.keys() == arrays.keys()
