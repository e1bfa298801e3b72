"""The report: what bundles are measured for, what the page says, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import BROWSERS, Page, browser, find_browser
from tests.profiles.evidence_sample import sample_evidence
from toprovar.demo import tour
from toprovar.errors import FormatError, InputError
from toprovar.profiles.evidence import ALL, load_evidence, save_evidence
from toprovar.profiles.manifest import sha256_checkpoint
from toprovar.runtime import pictures, report
from toprovar.runtime.report import charts, images
from toprovar.runtime.report.markup import Markup, el
from toprovar.runtime.report.story import in_short, sections, tell
from toprovar.runtime.report.view import View
from toprovar.runtime.report.words import WORDS, plain, prose
from toprovar.runtime.session import Session

from . import tiny

# ---------------------------------------------------------------------------------------------------------------------
# From bundles


def test_bundles_become_evidence(session: Session, dense_bundle: Path, tmp_path: Path) -> None:
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
    evidence = made.evidence
    assert [policy.name for policy in evidence.policies] == ["dense", "drop-1", "tiny"]
    assert [policy.family for policy in evidence.policies] == ["dense", "drop", "ours"]
    dense, _, pruned = (policy.groups for policy in evidence.policies)
    assert dense[ALL].metrics["ssim"].mean == 1.0 and "psnr_db" not in dense[ALL].metrics
    assert set(pruned) == {"object", "plain", ALL} and pruned["object"].flops < dense["object"].flops
    assert [cost.kept for cost in pruned["object"].scales] == [1, 4, 5]
    # The mean over classes of medians, and of arithmetic.
    for part in (pruned, dense):
        middles = [part[name].transformer["onnxruntime"].median_ms for name in ("object", "plain")]
        assert part[ALL].transformer["onnxruntime"].median_ms == pytest.approx(np.mean(middles))
        assert part[ALL].flops == pytest.approx(np.mean([part[name].flops for name in ("object", "plain")]))

    files = report.write(made, tmp_path / "out.html")
    beside = [f"out-var-bundles.{kind}" for kind in ("json", "safetensors", "png")]
    assert [file.name for file in files] == ["out.html", "out.md", *beside]
    assert load_evidence(files[2]).policies == evidence.policies
    text = files[1].read_text()
    assert "| tiny |" in text and "](out-var-bundles.png)" in text
    assert "below its profile's floor of 0.999" in text
    stored = report.load(files[2])
    assert report.write(stored, tmp_path / "again.html")[0].read_text() == files[0].read_text()


def test_bundles_asked_for_by_text(tmp_path: Path) -> None:
    root = tiny.write_bundle(tmp_path / "text.bundle", text=True)
    session = Session(root, threads=1)
    captions, text = session.examples()
    made = report.make([session], None, [3] * len(captions), text=text, captions=captions, repeat=1)
    assert [example.prompt for example in made.evidence.examples] == list(captions)
    assert [example.prompt_class for example in made.evidence.examples] == list(text.prompt_classes)


def test_a_report_needs_names_that_differ(session: Session) -> None:
    with pytest.raises(InputError, match="give each its own name"):
        report.make([session, session], ["disc"], [1])
    evidence, arrays = sample_evidence()
    with pytest.raises(InputError, match="each once"):
        report.write([report.Part(evidence, arrays, stored=True)] * 2, Path("never.html"))


# ---------------------------------------------------------------------------------------------------------------------
# What the page is made of


def test_text_is_escaped_and_markup_is_not() -> None:
    assert el("p", "a < b & c", Markup("<b>d</b>"), title='"', hidden=True, id=None) == (
        '<p title="&quot;" hidden>a &lt; b &amp; c<b>d</b></p>'
    )
    assert el("img", alt="") == '<img alt="">'


def test_words_are_explained_or_plain() -> None:
    assert plain("{scale|Scales} of {entropy}") == "Scales of entropy"
    assert WORDS["entropy"][:20] in prose("of {entropy}")
    with pytest.raises(KeyError):
        prose("{no such word}")


def test_up_and_left_is_better_whatever_the_metric() -> None:
    def mark(key: str, x: float, y: float) -> charts.Mark:
        return charts.Mark(key, 1, key, "rival", key, charts.Span(x, x, x), charts.Span(y, y, y), key)

    marks = [mark("slow", 100, 1.0), mark("fast", 20, 2.0), mark("bad", 60, 3.0)]
    for higher in (True, False):
        placed = charts.scatter_layout(marks, higher, str, str)["marks"]
        assert placed["fast"][0] < placed["bad"][0] < placed["slow"][0]
        assert (placed["bad"][1] > placed["slow"][1]) == higher
    front = charts.scatter_layout(marks, False, str, str)["front"]
    assert front.startswith("M") and front.count("L") == 3  # fast, a step to slow, and on to the edge; bad is behind


def test_labels_cover_neither_marks_nor_labels() -> None:
    random = np.random.default_rng(1)
    marks = [
        charts.Mark(f"policy {i}", i, f"policy {i}", "rival", "", *(charts.Span(v, v, v) for v in row), "")
        for i, row in enumerate(random.uniform(1, 2, (24, 2)))
    ]
    sides = [entry[6] for entry in charts.scatter_layout(marks, True, str, str)["marks"].values()]
    assert set(sides) <= set("rltbn") and sides.count("n") < 12
    crowd = [charts.Mark(str(i), i, "the same place", "rival", "", *[charts.Span(1, 1, 1)] * 2, "") for i in range(9)]
    sides = [entry[6] for entry in charts.scatter_layout(crowd, True, str, str)["marks"].values()]
    assert sides.count("n") == 9 - 4  # right, left, top, bottom


def test_axes_have_round_ticks_inside() -> None:
    for low, high, log in ((0.83, 1.0, False), (3.0, 900.0, True), (-0.02, 0.05, False)):
        axis = charts.Axis.around([low, high], may_log=log)
        assert axis.log == log
        ticks = axis.ticks()
        assert 3 <= len(ticks) <= 9 and all(axis.low <= value <= axis.high for value in ticks)
        assert 0 <= axis.place(low) < axis.place(high) <= 100


def test_pictures_are_stored_as_pixels_or_as_png() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    stored = np.frombuffer(pictures.png(picture), np.uint8)
    assert np.array_equal(images.pixels(stored), picture) and np.array_equal(images.pixels(picture), picture)
    for bad in (stored[:20], picture[..., :2], picture.astype(np.float32)):
        with pytest.raises(FormatError, match="a picture"):
            images.pixels(bad)
    assert images.difference(picture, picture).max() == 0
    assert images.difference(np.full((1, 1, 3), 250, np.uint8), np.zeros((1, 1, 3), np.uint8)).tolist() == [[[255] * 3]]


def test_low_entropy_is_bright() -> None:
    uri = images.heat_uri(np.array([[0.1, 2.0], [2.0, 2.0]]))
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        shown = np.asarray(image.convert("L")).astype(int)
    assert shown[0, 0] > 150 > 60 > shown[1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


@pytest.fixture(scope="module")
def view() -> View:
    """Without arrays: what is said, not what is drawn."""
    return View(sample_evidence()[0], {})


def test_it_says_where_ours_is_beaten(view: View) -> None:
    said = " ".join(in_short(view))
    assert "Beaten: Last scale dropped is better in SSIM on texture prompts, by 0.030." in said
    assert "better by more than the interval in 1, equal within it in 1, worse in 1; in 1 no policy" in said
    rivals = next(section for section in sections(view) if section.key == "rivals")
    assert any("Last scale dropped beats ours in SSIM on texture prompts." in line for line in rivals.findings)


def test_a_policy_behind_the_front_is_named(view: View) -> None:
    trade = next(section for section in sections(view) if section.key == "trade")
    slow = view.evidence.policy("ours-balanced")
    worse = slow.model_copy(
        update={
            "groups": {
                name: group.model_copy(
                    update={
                        "metrics": view.reference.groups[name].metrics
                        | {"ssim": group.metrics["ssim"].model_copy(update={"mean": 0.1, "low": 0.1, "high": 0.1})}
                    }
                )
                for name, group in slow.groups.items()
            }
        }
    )
    policies = tuple(worse if one is slow else one for one in view.evidence.policies)
    changed = View(view.evidence.model_copy(update={"policies": policies}), view.arrays)
    behind = next(section for section in sections(changed) if section.key == "trade")
    assert "in 40 of 40 cases" in trade.findings[0] and not trade.tables
    assert "in 36 of 40 cases" in behind.findings[0]
    assert [row[:3] for row in behind.tables[0].rows] == [("toprovar balanced", "SSIM", "every prompt class")]


def test_parts_that_were_not_measured_are_left_out(view: View) -> None:
    bare = view.evidence.model_copy(
        update={
            "comparisons": (),
            "rho": {},
            "role_scores": (),
            "errors": (),
            "normalisations": (),
            "costs": (),
            "examples": (),
            "policies": tuple(p for p in view.evidence.policies if p.family in ("dense", "ours")),
        }
    )
    made = sections(View(bare, {}))
    assert [section.key for section in made] == ["trade", "scales", "numbers", "how"]
    assert made[-1].findings == (
        "Not measured, and so not on this page: each rival at its own speed, entropy maps, kept tokens, rho over the "
        "scales, layer roles, pictures, how errors grow, other choices and what the method itself costs.",
    )


def test_shipped_measurements_are_of_the_shipped_weights() -> None:
    weights = tour.EVIDENCE.parent / "weights"
    files = {"class": ("var", "vae"), "text": ("infinity", "bsq_vae")}
    found = sorted(tour.EVIDENCE.glob("*.json"))
    assert found
    for path in found:
        part = report.load(path)
        names = files[path.stem]
        assert part.evidence.checkpoint_sha256 == sha256_checkpoint(
            *([weights / f"{one}.safetensors"] for one in names)
        )
        assert part.evidence.policy(part.evidence.reference).groups[ALL].images >= 200


# ---------------------------------------------------------------------------------------------------------------------
# The page as a file


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, started = tmp_path_factory.mktemp("report"), time.monotonic()
    evidence, arrays = sample_evidence()
    save_evidence(folder / "var.json", evidence, arrays)
    other = evidence.model_copy(update={"name": "text-demo", "title": "Text demo <Infinity>"})
    parts = [report.load(folder / "var.json"), report.Part(other, {}, stored=True)]
    made = report.write(parts, folder / "report.html")[0]
    assert time.monotonic() - started < 60
    return made


_VOID = {"br", "hr", "img", "input", "meta"}
_ADDRESSES = {"src", "href", "srcset", "action", "poster", "data", "xlink:href"}


@dataclass
class _Checker(HTMLParser):
    """What a validator would find: tags that do not match, ids twice, links to nowhere, and anything from outside."""

    open: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if len(given) < len(attrs):
            self.found.append(f"{tag}: an attribute twice")
        if tag not in _VOID:
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for name in _ADDRESSES & set(given):
            address = str(given[name])
            if address.startswith("#"):
                self.links.append(address[1:])
            elif not address.startswith("data:"):
                self.found.append(f"{tag} {name}={address[:60]}")
        if tag == "img" and "alt" not in given:
            self.found.append("img without alt")
        if tag == "button" and given.get("type") != "button":
            self.found.append("button without type")
        if tag == "link" or (tag == "script" and "src" in given):
            self.found.append(f"{tag} from outside")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.found.append(f"</{tag}> closes nothing")


def test_the_page_is_valid_and_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text("utf-8")
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert text.startswith("<!doctype html>") and not checker.found and not checker.open
    assert len(set(checker.ids)) == len(checker.ids) and set(checker.links) <= set(checker.ids)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "Text demo &lt;Infinity&gt;" in text and "<Infinity>" not in text
    for data in re.findall(r'class="layouts">(.*?)</script>', text):
        assert json.loads(data)


def test_the_markdown_says_the_same(page: Path, view: View) -> None:
    text = page.with_suffix(".md").read_text("utf-8")
    assert "## Text demo <Infinity>" in text and "](report-var-demo.png)" in text
    story = tell(view)
    for section in story.sections:
        assert f"### {section.title}" in text
        assert all(plain(line) in text for line in section.findings if "Not measured" not in line)
        assert all(f"| {row[0]} |" in text for table in section.tables for row in table.rows)
    assert all(plain(line) in text for line in story.in_short)


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    with browser(binary) as opened:
        yield opened


_SIZES = """(() => {
  const figures = "section, .plot, .plot > svg, .tile, .bars .bar, .maps img, .stage img, .cards img, table";
  const flat = [...document.querySelectorAll(figures)]
    .filter((one) => !one.closest("[hidden], details:not([open])"))
    .filter((one) => { const box = one.getBoundingClientRect(); return box.width < 1 || box.height < 1; })
    .map((one) => one.className?.baseVal ?? one.className ?? one.tagName);
  const broken = [...document.images].filter((one) => one.complete && one.naturalWidth === 0).length;
  const wide = [...document.querySelectorAll("main *")]
    .filter((one) => !one.closest(".table, [hidden], svg") && one.getBoundingClientRect().right > innerWidth + 1)
    .map((one) => one.className || one.tagName);
  return { overflow: document.documentElement.scrollWidth - innerWidth, flat, broken, wide };
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440], ids=["phone", "desktop"])
def test_it_fits_the_window_and_shows_every_figure(tab: Page, page: Path, width: int, dark: bool) -> None:
    tab.open(page, width, dark=dark)
    assert tab.evaluate(_SIZES) == {"overflow": 0, "flat": [], "broken": 0, "wide": []}
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    assert not tab.problems


def test_what_is_chosen_is_shown(tab: Page, page: Path) -> None:
    tab.open(page, 1440)
    count = "box.querySelectorAll(':scope > [data-when]:not([hidden])').length"
    assert set(tab.evaluate(f"[...document.querySelectorAll('.switch')].map((box) => {count})")) == {1}
    first = tab.evaluate("document.querySelector('.mark').style.left + document.querySelector('.ytitle').textContent")
    tab.evaluate("document.querySelector('.trade [data-value=psnr_db]').click()")
    changed = tab.evaluate("document.querySelector('.mark').style.left + document.querySelector('.ytitle').textContent")
    assert "SSIM" in first and "PSNR, dB" in changed
    before = tab.evaluate("document.querySelector('.viewer .overlay').src")
    tab.evaluate("document.querySelector('.maps button').click()")
    assert tab.evaluate("document.querySelector('.viewer .overlay').src") != before
    tab.evaluate("document.querySelectorAll('table thead th')[1].click()")
    assert tab.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
    tab.evaluate("document.getElementById('theme').click()")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.evaluate(
        "document.querySelector('.mark.ours').dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))"
    )
    assert "toprovar" in tab.evaluate("document.getElementById('tip').textContent")
    tab.evaluate("localStorage.clear()")
    assert not tab.problems


def test_it_prints(tab: Page, page: Path) -> None:
    tab.open(page, 1440)
    assert tab.pdf().startswith(b"%PDF-")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


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
