"""docs/evidence.md shows what the stored evidence holds."""

from pathlib import Path

from benchmarks.evidence_page import fill

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"


def test_the_tables_of_the_page_are_those_of_the_stored_evidence() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == 6
    assert fill(page) == page
    changed = page.replace("| Dense | 1.00 x |", "| Dense | 1.01 x |")
    assert changed != page and fill(changed) == page
