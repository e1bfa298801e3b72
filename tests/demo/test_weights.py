"""The class demo's files: small enough for the package, and what the model card says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toprovar import backbones
from toprovar.backbones.base import Sampling
from toprovar.backbones.generate import generate
from toprovar.demo.classifier import load_classifier
from toprovar.demo.embedded import SAMPLING, embedded_source
from toprovar.demo.perceptual import PerceptualNet
from toprovar.demo.pictures import CLASSES, HELD_OUT, render

WEIGHTS = embedded_source().checkpoint.parent
FILES = ("var", "vae", "classifier", "perceptual")


def test_the_files_fit_the_package() -> None:
    assert sum((WEIGHTS / f"{name}.safetensors").stat().st_size for name in FILES) <= 24_000_000


def test_the_judge_names_drawn_pictures() -> None:
    labels = np.arange(len(CLASSES)).repeat(2)
    pictures = render(labels, HELD_OUT + 9000 + np.arange(len(labels)))
    named = load_classifier(WEIGHTS / "classifier.safetensors").judge(pictures)["label"]
    assert (named.numpy() == labels).mean() > 0.9


def test_perceptual_distance_grows_with_blur() -> None:
    net = PerceptualNet.load()
    pictures = render([4, 7, 9], HELD_OUT + np.arange(3))
    blurred = [
        torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pictures, k), scale_factor=k, mode="bilinear")
        for k in (2, 4, 8)
    ]
    distances = torch.stack([net.distance(pictures, view) for view in blurred])
    assert (distances[0] > 0).all() and (distances.diff(dim=0) > 0).all()
    assert (net.distance(pictures, pictures.roll(1, 0)) > distances[0]).all()


@pytest.mark.slow
def test_samples_show_what_was_asked_for() -> None:
    source = embedded_source()
    assert source.vae is not None
    sampling = Sampling(SAMPLING.guidance, top_k=SAMPLING.top_k, top_p=SAMPLING.top_p)
    model = backbones.load("var", source.checkpoint, source.vae, sampling=sampling)
    labels = torch.tensor([CLASSES.index(name) for name in ("glow", "star", "bricks")])
    generator = torch.Generator().manual_seed(0)

    def noise(scale: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=generator).clamp(2**-25, 1 - 2**-24)

    image = generate(model, model.prefix(labels), noise=noise).image
    assert image is not None
    named = load_classifier(WEIGHTS / "classifier.safetensors").judge(image)["label"]
    assert torch.equal(named, labels)
