"""The text demo's word encoder and files: what a prompt becomes, and that the ordinary loaders read what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from toprovar.backbones import load
from toprovar.demo.captions import MAX_WORDS, WORD_IDS, caption
from toprovar.demo.embedded_text import RESOLUTION, embedded_text_demo, write_random_text_demo
from toprovar.demo.scenes import random_scenes, scene_of
from toprovar.demo.word_encoder import WordEncoder, load_word_encoder
from toprovar.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def encoder() -> WordEncoder:
    torch.manual_seed(0)
    return WordEncoder(64).eval().requires_grad_(False)


def test_every_caption_is_known_to_the_encoder(encoder: WordEncoder) -> None:
    captions = [caption(scene_of(row)) for row in random_scenes(np.arange(500))]
    ids, lengths = encoder.tokenize(captions)
    assert ids.dtype == lengths.dtype == torch.int64
    assert lengths.tolist() == [len(text.split()) for text in captions] and int(lengths.max()) <= MAX_WORDS
    assert bool((ids > 0).sum(1).eq(lengths).all())


def test_synonyms_share_a_number(encoder: WordEncoder) -> None:
    first, _ = encoder.tokenize(["3 red circles, on a blue checked ground."])
    second, _ = encoder.tokenize(["Three red discs on a blue checkered floor"])
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt"),
        (["  "], "empty"),
        ([" . "], "1 to 16"),
        (["one red disc on a blue floor", "one red cat"], r"prompt 2.*'cat'.*heart"),
        (["red " * 17], "17 words"),
        (["red \udcff"], "UTF-8"),
    ],
)
def test_bad_prompts_are_refused(encoder: WordEncoder, prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder.tokenize(prompts)


def test_padding_changes_nothing(encoder: WordEncoder) -> None:
    short, long = "red star", "four white checkered hearts on an orange dotted floor"
    together = encoder.encode([short, long])
    alone = encoder.encode([short])
    assert torch.allclose(together.features[:1, :2], alone.features, atol=1e-5)
    assert not together.features[0, 2:].any() and together.lengths.tolist() == [2, 9]


def test_word_order_is_heard(encoder: WordEncoder) -> None:
    one, other = encoder.encode(["red disc on blue floor", "blue disc on red floor"]).features
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_text_demo(tmp_path_factory.mktemp("demo")).folder


def test_random_demo_is_read_by_the_ordinary_loaders(files: Path) -> None:
    demo = write_random_text_demo(files)  # the same files again: the seed decides
    assert sum(path.stat().st_size for path in files.iterdir()) <= 24e6
    model = load("infinity", demo.checkpoint, demo.vae, resolution=RESOLUTION)
    words = load_word_encoder(demo.word_encoder)
    assert model.spec.image_size == (256, 256) and sum(model.spec.tokens) == 2521
    text = words.encode(["two green rings on a white striped floor", "a star"])
    x0 = model.prefix(text.features, text.lengths).x0
    assert x0.shape == (1, 4, model.spec.width) and torch.isfinite(x0).all()


def test_damaged_or_missing_files_are_named(files: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embedding\.weight"):
        load_word_encoder(files / "bsq_vae.safetensors")
    (tmp_path / "words.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        load_word_encoder(tmp_path / "words.safetensors")


def test_vocabulary_has_no_gap() -> None:
    assert sorted(set(WORD_IDS.values())) == list(range(1, max(WORD_IDS.values()) + 1))


def test_embedded_demo_lies_in_the_package() -> None:
    try:
        demo = embedded_text_demo()
    except CheckpointError as error:
        assert "install toprovar again" in str(error)
        return
    assert load_word_encoder(demo.word_encoder).channels == 128
