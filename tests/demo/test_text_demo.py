"""The text demo's word encoder and files: what a prompt becomes, and that the ordinary loaders read what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from toprovar.backbones import load
from toprovar.backbones.base import Sampling
from toprovar.backbones.generate import Pruning, generate
from toprovar.demo.captions import MAX_WORDS, WORD_IDS, Scene, caption, held_out
from toprovar.demo.embedded_text import RESOLUTION, SAMPLING, TextDemo, embedded_text_demo, write_random_text_demo
from toprovar.demo.judge import CaptionJudge
from toprovar.demo.scenes import fields, random_scenes, scene_of
from toprovar.demo.word_encoder import WordEncoder, load_word_encoder
from toprovar.errors import CheckpointError, InputError
from toprovar.profiles.tokenizer import read_tokenizer


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
        (["a red star"], "'a red star' does not name, in this order, a count, .* 'floor'"),
        (["red star on a blue floor"], "a count, a colour, a shape"),
        (["two hearts on a blue floor"], "the floor's colour"),
        (["red \udcff"], "UTF-8"),
    ],
)
def test_bad_prompts_are_refused(encoder: WordEncoder, prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder.tokenize(prompts)


def test_a_bundle_reads_prompts_as_the_demo_does(encoder: WordEncoder) -> None:
    read = read_tokenizer(encoder.tokenizer_json().encode(), MAX_WORDS, "tokenizer.json")
    ids, lengths = encoder.tokenize(["a red star on the dotted blue floor"])
    assert read(["A red star, on the spotted blue ground."])[0].tolist() == ids.tolist() and lengths.tolist() == [8]
    with pytest.raises(InputError, match="does not name"):
        read(["a red star"])


def test_padding_changes_nothing(encoder: WordEncoder) -> None:
    short, long = "a red star on blue floor", "four white checkered hearts on an orange dotted floor"
    together = encoder.encode([short, long])
    alone = encoder.encode([short])
    assert torch.allclose(together.features[:1, :6], alone.features, atol=1e-5)
    assert not together.features[0, 6:].any() and together.lengths.tolist() == [6, 9]


def test_word_order_is_heard(encoder: WordEncoder) -> None:
    one, other = encoder.encode(["one red disc on blue floor", "one blue disc on red floor"]).features
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
    text = words.encode(["two green rings on a white striped floor", "a red star on blue floor"])
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


@pytest.fixture(scope="module")
def embedded() -> TextDemo:
    return embedded_text_demo()


def test_embedded_demo_is_small_enough(embedded: TextDemo) -> None:
    judge = embedded.folder / "judge.safetensors"
    files = (embedded.checkpoint, embedded.vae, embedded.word_encoder, judge)
    assert sum(path.stat().st_size for path in files) <= 24e6


def test_embedded_demo_draws_what_it_is_asked(embedded: TextDemo) -> None:
    """A combination that training never showed, without the last three scales to be quick."""
    scene = Scene(3, "red", "plain", "heart", "blue", "striped")
    assert held_out(scene)
    sampling = Sampling(guidance=SAMPLING.guidance or 1.0, top_p=SAMPLING.top_p or 0.0)
    model = load("infinity", embedded.checkpoint, embedded.vae, resolution=RESOLUTION, sampling=sampling)
    text = load_word_encoder(embedded.word_encoder).encode([caption(scene)])
    spec = model.spec
    quick = Pruning("g" * spec.depth, spec.tokens, scales_run=tuple(range(spec.scales - 3)))
    generator = torch.Generator().manual_seed(0)
    picture = generate(
        model,
        model.prefix(text.features, text.lengths),
        noise=lambda scale, shape: torch.rand(shape, generator=generator).clamp(2**-25, 1 - 2**-24),
        pruning=quick,
    ).image
    assert picture is not None
    assert CaptionJudge.load().judge(picture).fields.tolist() == fields([scene]).tolist()
