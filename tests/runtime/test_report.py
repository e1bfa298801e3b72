"""The report of the toy bundles, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toprovar.errors import InputError
from toprovar.runtime import pictures, report
from toprovar.runtime.session import Session

from . import tiny


def test_the_report_has_a_row_per_bundle(session: Session, dense_bundle: Path, tmp_path: Path) -> None:
    dropped = {name: tiny.TinySchedule((1, 4), None) for name in tiny.SCHEDULES}
    only_dropped = Session(tiny.write_bundle(tmp_path / "drop.bundle", dropped, "drop-1"), threads=1)
    steps: list[str] = []
    made = report.make(
        [Session(dense_bundle, threads=1), only_dropped, session],
        ["disc", "glow"],
        [1, 2],
        repeat=2,
        on_progress=lambda what, done, of: steps.append(f"{what} {done}/{of}"),
    )
    assert steps[-1] == "comparing 3/3" and "measuring 18/18" in steps
    rows = made.document["rows"]
    assert [row["name"] for row in rows] == ["dense", "drop-1", "tiny"]
    assert rows[0]["psnr_db"] is None and rows[0]["total_speedup"] == 1.0 and rows[0]["equal_tokens"] == 1.0
    assert [row["scales"] for row in rows] == [[3], [2], [2, 3]]
    assert rows[0]["classes"]["plain"] == {"transformer_speedup": 1.0, "ssim": 1.0}
    files = report.write(made, tmp_path / "out.html")
    assert [file.name for file in files] == ["out.html", "out.md", "out.json", "out.png"]
    assert json.loads(files[2].read_text()) == made.document
    page = files[0].read_text()
    assert "data:image/png;base64," in page and "http" not in page
    text = files[1].read_text()
    assert "| tiny |" in text and "](out.png)" in text and "| bundle | object, transformer | object, SSIM |" in text
    with Image.open(files[3]) as image:
        assert np.array_equal(np.asarray(image), made.grid)


def test_a_report_needs_names_that_differ(session: Session) -> None:
    with pytest.raises(InputError, match="give each its own name"):
        report.make([session, session], ["disc"], [1])


def test_pixels_are_rounded_to_nearest() -> None:
    image = np.array([0.0, 0.5, 1.0, 1.5, -1.0, 0.4999 / 255], np.float32).reshape(1, 1, 6).repeat(3, 0)
    assert pictures.to_bytes(image)[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]


def test_a_grid_places_every_picture() -> None:
    red, blue = np.zeros((3, 12, 10)), np.zeros((3, 12, 10))
    red[0], blue[2] = 1, 1
    sheet = pictures.grid([[red, blue], [blue]], ["a", "b"], ["x", "y"])
    found = [(int((sheet == colour).all(-1).sum())) for colour in ([255, 0, 0], [0, 0, 255])]
    assert found == [120, 240]


def test_a_picture_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; make it first"):
        pictures.save(tmp_path / "no" / "x.png", np.zeros((4, 4, 3), np.uint8))
