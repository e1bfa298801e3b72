"""Floors as a command line gives them, and the pictures that a search is made of."""

import re

import pytest
from typer.testing import CliRunner

from tests.profiles.samples import a_calibration
from toprovar.cli import app
from toprovar.errors import InputError
from toprovar.exporter.guard import parse_floor, pictures_for, summary
from toprovar.exporter.search import Found, Picture
from toprovar.profiles.calibration import save_calibration
from toprovar.profiles.evidence import Interval
from toprovar.profiles.profile import QualityFloor, load_profile


def test_floors_are_read():
    assert parse_floor(["ssim=0.9", "psnr_db=30"]) == QualityFloor(ssim=0.9, psnr_db=30.0)
    assert parse_floor(["accuracy=1"]) == QualityFloor(accuracy=1.0)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["sim=0.9"], "'sim=0.9': expected one of ssim=NUMBER, psnr_db=NUMBER, accuracy=NUMBER"),
        (["ssim=high"], "'high' is no number; give one like ssim=0.9"),
        (["ssim=1.5"], "'ssim=1.5': expected 0 to 1"),
        (["ssim=nan"], "expected 0 to 1"),
        (["ssim=0.9", "ssim=0.8"], "once"),
    ],
)
def test_a_wrong_floor_is_named(texts, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse_floor(texts)


def test_a_search_uses_the_prompts_of_the_calibration_and_holds_out_others():
    calibration = a_calibration(classes=("plain",))  # calibrated with the labels 0 and 1
    searched, held_out = pictures_for(calibration, {"plain": [0, 1, 2, 3, 4]}, [7])
    assert searched["plain"] == [Picture(0, 7), Picture(1, 7)]
    assert held_out["plain"] == [Picture(2, 7), Picture(3, 7)]


def test_without_other_prompts_every_other_picture_is_held_out():
    searched, held_out = pictures_for(a_calibration(classes=("plain",)), {"plain": [0, 1]}, [7, 8])
    assert len(searched["plain"]) == len(held_out["plain"]) == 2
    assert not set(searched["plain"]) & set(held_out["plain"])


def test_the_table_says_speed_and_figures():
    from rich.console import Console

    figures = {"ssim": Interval(mean=0.91, low=0.9, high=0.92), "psnr_db": Interval(mean=30.0, low=29.0, high=31.0)}
    found = Found(load_profile("fast"), {"plain": figures}, {"plain": 0.25}, 12)
    console = Console(record=True, width=120)
    console.print(summary(found))
    text = console.export_text()
    assert "25.0%" in text and "0.910 [0.900, 0.920]" in text and "12 prunings tried" in text


def test_a_wrong_floor_is_one_line_of_the_command(tmp_path):
    save_calibration(tmp_path / "c.json", a_calibration())
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "c.json"), "--floor", "ssim=9"])
    assert result.exit_code == 2
    assert "error: floor 'ssim=9': expected 0 to 1" in result.output
    wrong = CliRunner().invoke(app, ["plan", str(tmp_path / "c.json"), "--floor", "ssim=0.9"])
    assert wrong.exit_code == 2
    assert "checkpoint_sha256" in wrong.output
