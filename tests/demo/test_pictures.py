"""The generator of the demo's pictures: the same picture from the same seed, in any batch, and words that match it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toprovar.demo import captions, draw
from toprovar.demo.captions import Scene, caption, held_out, parse
from toprovar.demo.labels import CLASSES, PROMPT_CLASS, PROMPT_CLASSES, label_of
from toprovar.demo.pictures import HELD_OUT, render
from toprovar.demo.scenes import fields, random_scenes, render_scenes, scene_of


def test_a_picture_depends_on_its_label_and_seed_alone() -> None:
    labels, seeds = np.arange(12), np.arange(500, 512)
    together = render(labels, seeds, size=64)
    order = np.random.default_rng(0).permutation(12)
    shuffled = render(labels[order], seeds[order], size=64)
    assert torch.equal(together[torch.from_numpy(order)], shuffled)
    assert torch.equal(together[7:8], render([7], [507], size=64))


def test_pictures_are_valid_and_differ() -> None:
    pictures = render(np.repeat(np.arange(12), 2), HELD_OUT + np.arange(24), size=64)
    assert pictures.shape == (24, 3, 64, 64) and torch.isfinite(pictures).all()
    assert pictures.min() >= 0 and pictures.max() <= 1
    flat = pictures.flatten(1)
    distance = torch.cdist(flat, flat) + 100 * torch.eye(24)
    assert distance.min() > 3.0
    assert flat.std(1).min() > 0.02  # nothing is blank


def test_fineness_orders_the_prompt_classes() -> None:
    """What the late scales have to add, as the share of a picture's variance that a quarter-size copy loses."""
    lost = {}
    for group, names in PROMPT_CLASSES.items():
        labels = np.repeat([CLASSES.index(name) for name in names], 4)
        pictures = render(labels, np.arange(len(labels)), size=128)
        small = torch.nn.functional.interpolate(pictures, scale_factor=0.25, mode="area")
        back = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear")
        lost[group] = float((pictures - back).square().mean())
    assert lost["plain"] < lost["object"] < lost["texture"]


def test_labels_are_read_from_names_and_numbers() -> None:
    assert label_of(" Star ") == CLASSES.index("star") and label_of("3") == 3
    assert set(PROMPT_CLASS) == set(CLASSES) and len(CLASSES) == 12
    with pytest.raises(ValueError, match="gradient, horizon"):
        label_of("cat")


@pytest.mark.parametrize("labels, seeds", [([0, 1], [0]), ([12], [0]), ([0], [-1])])
def test_bad_requests_are_refused(labels: list[int], seeds: list[int]) -> None:
    with pytest.raises(ValueError):
        render(labels, seeds, size=16)


def test_numbers_do_not_depend_on_the_batch() -> None:
    all_at_once = draw.uniforms(np.arange(1000))
    assert np.array_equal(all_at_once[[3, 700]], draw.uniforms([3, 700]))
    assert not np.array_equal(draw.uniforms([3], stream=1), draw.uniforms([3]))


def test_captions_are_read_back() -> None:
    for row in random_scenes(np.arange(300)):
        scene = scene_of(row)
        assert parse(caption(scene)) == scene
        assert np.array_equal(fields([scene])[0], row)
    assert caption(Scene(3, "red", "striped", "disc", "blue", "checkered")) == (
        "three red striped discs on a blue checkered floor"
    )
    loose = parse("a dotted green circle on checked black ground.")
    assert loose == Scene(1, "green", "dotted", "disc", "black", "checkered")


@pytest.mark.parametrize("floor", ["", " on", " on a floor", " on a red floor", " on a blue carpet", " on on"])
def test_bad_captions_are_refused(floor: str) -> None:
    for things in ("", "red discs", "two red discs", "two red cats", "two red blue discs"):
        with pytest.raises(ValueError):
            parse(things + floor)


def test_a_share_of_combinations_is_held_out() -> None:
    rows = random_scenes(np.arange(3000))
    assert 0.04 < np.mean([held_out(scene_of(row)) for row in rows]) < 0.12
    assert {captions.prompt_class(scene_of(row)) for row in rows} == {"plain", "object", "texture"}


def test_scenes_are_drawn_from_their_seed() -> None:
    rows = random_scenes(np.arange(6))
    pictures = render_scenes(rows, np.arange(6), size=64)
    assert pictures.shape == (6, 3, 64, 64) and torch.isfinite(pictures).all()
    assert torch.allclose(pictures[4:5], render_scenes(rows[4:5], [4], size=64), atol=1e-6)
    assert pictures.min() >= 0 and pictures.max() <= 1
