"""The embedded checkpoints as sources of exports: one that takes class labels, one that takes text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toprovar.demo import embedded_text
from toprovar.demo.captions import COLOURS, COUNTS, SHAPES, TEXTURES, Scene, caption, prompt_class
from toprovar.demo.embedded_text import TextDemo, embedded_text_demo
from toprovar.demo.labels import CLASSES, PROMPT_CLASS, PROMPT_CLASSES
from toprovar.errors import CheckpointError
from toprovar.exporter.source import SamplingWish, Source, TextSource
from toprovar.profiles.manifest import Label, sha256_checkpoint
from toprovar.profiles.prompts import Prompt

if TYPE_CHECKING:
    from toprovar.backbones.text import TextEncoder

__all__ = ["calibration_prompts", "embedded_source", "embedded_text_source", "found_profiles"]

SAMPLING = SamplingWish(guidance=1.5, top_k=600, top_p=0.95)
"""What evaluation of the checkpoint found best; see its model card."""

GENERATED_PROMPTS = 4
"""Of each prompt class, that calibration of the text demo makes pictures of."""


def embedded_source() -> Source:
    """The class-conditional checkpoint that comes with the package.

    Raises:
        CheckpointError: this installation lacks it.
    """
    folder = Path(__file__).parent / "weights"
    labels = tuple(Label(name=name, prompt_class=PROMPT_CLASS[name]) for name in CLASSES)
    source = Source(
        "var-demo",
        "var",
        folder / "var.safetensors",
        folder / "vae.safetensors",
        labels,
        SAMPLING,
        profiles=_found_profiles("class"),
    )
    for path in (source.checkpoint, source.vae):
        if not path.is_file():
            raise CheckpointError(f"{path}: the embedded demo checkpoint is not installed; install toprovar again")
    return source


def embedded_text_source(demo: TextDemo | None = None) -> Source:
    """The text-conditional checkpoint that comes with the package, or another one of its kind.

    Raises:
        CheckpointError: this installation lacks it.
    """
    found = embedded_text_demo() if demo is None else demo

    def load_encoder() -> TextEncoder:
        from toprovar.demo.word_encoder import load_word_encoder

        return load_word_encoder(found.word_encoder)

    return Source(
        "infinity-demo",
        "infinity",
        found.checkpoint,
        found.vae,
        sampling=embedded_text.SAMPLING,
        text=TextSource("demo words", load_encoder, prompts=calibration_prompts(), per_class=GENERATED_PROMPTS),
        load_options={"resolution": embedded_text.RESOLUTION},
        profiles=_found_profiles("text"),
    )


def found_profiles(checkpoint_sha256: str, prompt_classes: Collection[str]) -> Mapping[str, Path]:
    """`Source.profiles` of the embedded checkpoint with this hash; of another one, or with other prompt classes, none."""
    if set(prompt_classes) != set(PROMPT_CLASSES):
        return {}
    for make in (embedded_source, embedded_text_source):
        with suppress(CheckpointError):  # not installed
            source = make()
            if sha256_checkpoint([source.checkpoint], [source.vae]) == checkpoint_sha256:
                return source.profiles
    return {}


def _found_profiles(demo: str) -> dict[str, Path]:
    """What `benchmarks/evidence.py search` found for a demo, by the name of the shipped profile with the same floor."""
    return {path.stem: path for path in (Path(__file__).parent / "profiles" / demo).glob("*.toml")}


def calibration_prompts(per_class: int = 64, seed: int = 0) -> tuple[Prompt, ...]:
    """Captions of scenes drawn at random, each with its prompt class; those of one class together."""
    random = np.random.default_rng(seed)
    found: dict[str, list[str]] = {"plain": [], "object": [], "texture": []}
    while min(map(len, found.values())) < per_class:
        colour, floor = (COLOURS[i] for i in random.permutation(len(COLOURS))[:2])
        texture, floor_texture = (TEXTURES[i] for i in random.integers(len(TEXTURES), size=2))
        scene = Scene(
            int(random.integers(len(COUNTS))) + 1,
            colour,
            texture,
            SHAPES[random.integers(len(SHAPES))],
            floor,
            floor_texture,
        )
        members, text = found[prompt_class(scene)], caption(scene)
        if len(members) < per_class and text not in members:
            members.append(text)
    return tuple(Prompt(text, name) for name, texts in found.items() for text in texts)
