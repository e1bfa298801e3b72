"""Prompts, text features and the T5 encoder, with a tiny random one built here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.text_checkpoint import write_t5
from toprovar.backbones.text import T5Encoder, TextFeatures, load_text_encoder
from toprovar.errors import CheckpointError, InputError, ToprovarError
from toprovar.profiles.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5Encoder:
    return load_text_encoder(folder, max_tokens=8, channels=24)


# ------------------------------------------------------------------------------------------------------------ encoder


def test_features_are_those_of_the_prompt_alone(encoder: T5Encoder) -> None:
    prompts = ["three red discs", "one", "a blue checkered floor and"]
    text = encoder.encode(prompts)
    assert text.lengths.tolist() == [4, 2, 6] and text.features.shape == (3, 6, 24)
    assert text.features.dtype is torch.float32
    for image, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        length = int(text.lengths[image])
        torch.testing.assert_close(text.features[image, :length], alone.features[0], rtol=0, atol=1e-5)
        assert not text.features[image, length:].any()
    in_parts = encoder.encode(prompts, batch=1)
    torch.testing.assert_close(in_parts.features, text.features, rtol=0, atol=1e-5)


def test_padding_to_the_full_length_as_the_original_does_changes_nothing(encoder: T5Encoder) -> None:
    ids, lengths = encoder.tokenize(["three red discs"])
    padded = torch.nn.functional.pad(ids, (0, 4), value=3)
    with torch.no_grad():
        torch.testing.assert_close(encoder(padded, lengths)[:, :4], encoder(ids, lengths), rtol=0, atol=1e-5)


def test_long_prompts_are_refused_or_cut(encoder: T5Encoder) -> None:
    prompt = "three red striped discs on a blue checkered floor"
    with pytest.raises(InputError, match=r"^prompt 'three red .* has 10 tokens and the model takes 8: shorten it"):
        encoder.encode([prompt])
    ids, lengths = encoder.tokenize([prompt], truncate=True)
    assert lengths.tolist() == [8] and ids[0, -1] == 1  # </s> stays
    assert torch.equal(ids, encoder.tokenize(["three red striped discs on a blue"])[0])


def test_the_tokenizer_in_a_bundle_gives_the_same_ids(encoder: T5Encoder) -> None:
    tokenizer = read_tokenizer(encoder.tokenizer_json().encode(), encoder.max_tokens, "tokenizer.json")
    prompts = ["three red discs", "one", "a blue checkered unknown floor and"]
    for found, expected in zip(tokenizer(prompts), encoder.tokenize(prompts), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    with pytest.raises(InputError, match="has 10 tokens and the model takes 8: shorten it"):
        tokenizer(["three red striped discs on a blue checkered floor"])


def test_no_prompt(encoder: T5Encoder) -> None:
    for prompts in ([], ["one", "  "]):
        with pytest.raises(InputError, match="no prompt given, or an empty one"):
            encoder.encode(prompts)


def test_half_precision_weights_give_fp32_features(folder: Path) -> None:
    half = load_text_encoder(folder, dtype=torch.bfloat16)
    features = half.encode(["three red discs"]).features
    expected = load_text_encoder(folder).encode(["three red discs"]).features
    assert features.dtype is torch.float32 and not torch.equal(features, expected)
    torch.testing.assert_close(features, expected, rtol=0, atol=0.1)


def test_an_encoder_that_cannot_be_loaded_is_explained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(source: str | Path, error: type[ToprovarError] = InputError, channels: int | None = None) -> str:
        with pytest.raises(error) as caught:
            load_text_encoder(source, channels=channels)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nothing")
    assert "no config.json in this folder" in message(tmp_path)
    assert "24 channels, and the transformer was trained on 2048; it takes google/flan-t5-xl" in message(
        folder, CheckpointError, channels=2048
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "not loaded (" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "found a 'bert' model; Infinity takes a T5 encoder" in message(tmp_path, CheckpointError)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "the package transformers is not installed" in message(folder)


# ----------------------------------------------------------------------------------------------------------- features


def test_packed_and_padded_features_are_the_same() -> None:
    packed, lengths = torch.randn(6, 5), torch.tensor([2, 1, 3])
    text = TextFeatures.from_packed(packed, lengths)
    assert text.features.shape == (3, 3, 5) and text.batch == 3
    assert torch.equal(text.features[2], packed[3:])
    filled = text.features.clone()
    filled[1, 1:] = torch.nan
    assert torch.equal(TextFeatures.from_padded(filled, lengths.int()).features, text.features)
    assert text.padded_to(2) is text and text.padded_to(7).features.shape == (3, 7, 5)
    assert text[1:].lengths.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("features", "lengths", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([1]), r"expected \[2\]"),
        (torch.zeros(2, 3, 4), torch.tensor([1, 4]), r"each must be 1\.\.3"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 3]), r"each must be 1\.\.3"),
        (torch.zeros(2, 0, 4), torch.tensor([1, 1]), r"expected \[B,T,C\]"),
        (torch.zeros(3, 4), torch.tensor([1]), r"expected \[B,T,C\]"),
    ],
)
def test_features_that_do_not_fit(features: torch.Tensor, lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextFeatures.from_padded(features, lengths)
