"""Verify, compare and bench on the toy bundle; SSIM and PSNR against known values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from toprovar.errors import BundleError, InputError
from toprovar.profiles.files import pretty_json
from toprovar.runtime import bench, compare
from toprovar.runtime.session import Result, Session
from toprovar.runtime.verify import MOST_FLIPS, WIDEST_MARGIN, verify

from . import tiny


def test_a_sound_bundle_verifies(session: Session) -> None:
    verdict = verify(session)
    assert verdict.passed
    assert [one.prompt_class for one in verdict.classes] == ["object", "plain"]
    assert "tokens of all 3 scales are equal" in str(verdict.classes[0])


def test_the_first_scale_that_differs_is_named(bundle: Path) -> None:
    def flip(tokens: np.ndarray) -> np.ndarray:
        tokens[0, 1] += 1
        return tokens

    tiny.change_golden(bundle, "object/tokens_2", flip)
    tiny.change_golden(bundle, "object/tokens_1", flip)
    verdict = verify(Session(bundle, threads=1))
    assert not verdict.passed and verdict.classes[1].passed
    assert verdict.classes[0].first_wrong_scale == 1
    assert "WRONG" in str(verdict.classes[0])
    assert "scale 1 is the first that differs, in 1 of 8 tokens" in str(verdict.classes[0])


def test_a_token_that_differs_is_a_close_call_or_wrong(tmp_path: Path) -> None:
    """In half precision one of 28 tokens may differ, if it was nearly drawn."""
    found = {}
    for token in range(tiny.LOGITS):
        root = tiny.write_half_bundle(tmp_path / f"{token}.bundle", token)
        found[token] = verify(Session(root, threads=1), tolerance=1).classes[0]  # pictures show the token
    kinds = {
        token: "same" if one.margin == 0 else "close" if one.margin <= WIDEST_MARGIN["float16"] else "far"
        for token, one in found.items()
    }
    assert {token: one.passed for token, one in found.items()} == {t: kind != "far" for t, kind in kinds.items()}
    assert set(kinds.values()) >= {"same", "far"}
    assert all(one.flips <= MOST_FLIPS["float16"] for one in found.values())
    far = next(str(one) for token, one in found.items() if kinds[token] == "far")
    assert "WRONG" in far and "of the largest logit (at most 3.12%)" in far


@pytest.mark.parametrize(("error", "passes"), [(9e-4, True), (2e-3, False), (np.nan, False)])
def test_a_picture_beyond_the_tolerance_fails(bundle: Path, error: float, passes: bool) -> None:
    tiny.change_golden(bundle, "plain/image", lambda image: image + np.float32(error))
    assert verify(Session(bundle, threads=1)).passed is passes


def test_no_golden_trace(bundle: Path) -> None:
    (bundle / "golden.safetensors").unlink()
    tiny.write_manifest(bundle, json.loads((bundle / "manifest.json").read_text()))
    with pytest.raises(BundleError, match=r"lists no golden\.safetensors"):
        verify(Session(bundle))


def test_bench_refuses_a_wrong_result(bundle: Path) -> None:
    tiny.change_golden(bundle, "plain/tokens_0", lambda tokens: tokens + 1)
    with pytest.raises(BundleError, match="fails its golden trace, so nothing is measured: plain"):
        bench.bench([Session(bundle, threads=1)], repeat=1)


def test_bench_measures_every_scale(session: Session, dense_bundle: Path) -> None:
    runs: list[tuple[int, int]] = []
    document = bench.bench(
        [session, Session(dense_bundle, threads=1)], repeat=3, warmup=1, on_run=lambda done, of: runs.append((done, of))
    )
    assert runs[-1] == (16, 16)
    assert json.loads(pretty_json(document)) == document
    tiny_bundle, dense = document["bundles"]
    assert [scale["keep"] for scale in tiny_bundle["classes"]["object"]["scales"]] == [1, 4, 5]
    assert len(dense["classes"]["plain"]["scales"]) == 3
    for one in tiny_bundle["classes"].values():
        steps = sum(scale["step_ms"]["median"] for scale in one["scales"])
        assert one["transformer_ms"]["median"] == pytest.approx(steps, rel=0.5)
        assert one["total_ms"]["q20"] <= one["total_ms"]["median"] <= one["total_ms"]["q80"]
    ratio = document["ratios"][0]["classes"]["object"]["total"]
    expected = dense["classes"]["object"]["total_ms"]["median"] / tiny_bundle["classes"]["object"]["total_ms"]["median"]
    assert ratio == pytest.approx(expected, rel=1e-3)
    text = bench.markdown(document)
    assert "| scale 2 | 3x3 | 9 | 5 |" in text and "## tiny against dense" in text


def test_bench_of_an_unknown_prompt_class(session: Session) -> None:
    with pytest.raises(InputError, match="no prompt class 'cats'; valid: object, plain"):
        bench.bench([session], prompt_classes=["cats"])
    with pytest.raises(InputError, match="give 1 or more"):
        bench.bench([session], repeat=0)


def test_compare_says_where_two_bundles_part(session: Session, dense_bundle: Path) -> None:
    labels, seeds = ["disc", "square", "glow"], [1, 2, 3]
    document = compare.compare(Session(dense_bundle, threads=1), session, labels, seeds)
    assert json.loads(pretty_json(document)) == document
    assert document["all"]["agreement"]["0"] == 1.0
    assert document["classes"]["object"]["agreement"]["1"] == 1.0  # not pruned before scale 2
    assert document["classes"]["object"]["agreement"]["2"] < 1.0
    assert "2" not in document["classes"]["plain"]["agreement"]  # dropped
    text = compare.markdown(document)
    assert "# tiny (onnxruntime) against dense (onnxruntime)" in text and "| all | 3 |" in text


def test_a_bundle_equals_itself(session: Session) -> None:
    document = compare.compare(session, session, ["disc", "glow"], [1, 2])
    assert document["all"]["psnr_db"] is None and document["all"]["ssim"] == 1.0
    assert set(document["all"]["agreement"].values()) == {1.0}
    assert "| all | 2 | equal | 1.0000 |" in compare.markdown(document)


class _Judges:
    """Judges that say what they are shown."""

    def distance(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.abs(first - second).mean((1, 2, 3))

    def accuracy(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        return np.array([1.0 if caption == "disc" else 0.5 for caption in captions])

    def frechet(self, first: np.ndarray, second: np.ndarray) -> float:
        return float(abs(first.mean() - second.mean()))


def test_judges_add_their_figures(session: Session, dense_bundle: Path) -> None:
    document = compare.compare(Session(dense_bundle, threads=1), session, ["disc", "glow"], [1, 2], judges=_Judges())
    assert json.loads(pretty_json(document)) == document
    assert document["all"]["accuracy"] == 0.75 and document["classes"]["object"]["reference_accuracy"] == 1.0
    assert document["all"]["perceptual"] > 0 and document["all"]["frechet"] > 0
    assert "perceptual distance" in compare.markdown(document)


def test_tokens_of_a_bitwise_model_are_equal_where_all_bits_are() -> None:
    bits = np.zeros((4, 2), np.int32)
    other = bits.copy()
    other[0, 1] = 1
    result = [
        Result(np.zeros((1, 3, 16, 16), np.float32), ({0: tokens},), np.zeros((1, 1)), ("plain",), ())
        for tokens in (bits, other)
    ]
    found = compare.compare_results(*result, ["a"], [0])["all"]
    assert found["agreement"] == {"0": 0.75} and found["bit_agreement"] == {"0": 0.875}


def test_psnr_of_a_known_error() -> None:
    assert compare.psnr_db(0.01) == pytest.approx(20.0)
    assert compare.psnr_db(0.0) is None


def test_ssim_of_constant_pictures() -> None:
    """Without variance SSIM is its luminance term alone."""
    a, b = np.full((3, 16, 20), 0.2), np.full((3, 16, 20), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert compare.ssim(a, b) == pytest.approx(luminance, rel=1e-9)
    assert compare.ssim(a, a) == 1.0


def test_ssim_of_an_inverted_picture() -> None:
    """Equal means and variances, covariance the opposite: contrast and structure give (-2v + c2) / (2v + c2)."""
    picture = np.indices((40, 40)).sum(0) % 2 - 0.5
    a, b = (0.5 + 0.4 * picture)[None], (0.5 - 0.4 * picture)[None]
    assert compare.ssim(a, b) == pytest.approx((-2 * 0.04 + 9e-4) / (2 * 0.04 + 9e-4), rel=1e-3)


def test_ssim_equals_the_definition_window_by_window() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((1, 13, 12))
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(3):
        for x in range(2):
            p, q = a[0, y : y + 11, x : x + 11], b[0, y : y + 11, x : x + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert compare.ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_pictures_that_do_not_match() -> None:
    with pytest.raises(InputError, match="give two of one size"):
        compare.ssim(np.zeros((3, 16, 16)), np.zeros((3, 16, 17)))
    with pytest.raises(InputError, match="11 x 11 or more"):
        compare.ssim(np.zeros((3, 8, 8)), np.zeros((3, 8, 8)))
