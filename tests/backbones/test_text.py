"""Prompts, text features and the T5 encoder, with a tiny random one built here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from toprovar.backbones.text import (
    Prompt,
    TextEncoder,
    TextFeatures,
    check_prompt,
    load_features,
    load_text_encoder,
    read_prompts,
)
from toprovar.errors import CheckpointError, InputError, ToprovarError

WORDS = "three red striped discs on a blue checkered floor and one green square".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of width 24 with a word tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("t5")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)  # with a decoder, like the released one
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder, max_tokens=8, channels=24)


# ------------------------------------------------------------------------------------------------------------ encoder


def test_features_are_those_of_the_prompt_alone(encoder: TextEncoder) -> None:
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


def test_padding_to_the_full_length_as_the_original_does_changes_nothing(encoder: TextEncoder) -> None:
    ids, mask = encoder.tokenize(["three red discs"])
    padded = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
    with torch.no_grad():
        torch.testing.assert_close(encoder(*padded)[:, :4], encoder(ids, mask), rtol=0, atol=1e-5)


def test_long_prompts_are_refused_or_cut(encoder: TextEncoder) -> None:
    prompt = "three red striped discs on a blue checkered floor"
    with pytest.raises(InputError, match=r"^prompt 'three red .* has 10 tokens and the model takes 8: shorten it"):
        encoder.encode([prompt])
    cut = encoder.encode([prompt], truncate=True)
    assert cut.lengths.tolist() == [8]
    assert encoder.tokenize([prompt], truncate=True)[0][0, -1] == 1  # </s> stays
    torch.testing.assert_close(cut.features, encoder.encode(["three red striped discs on a blue"]).features)


def test_a_batch_names_the_prompt_that_is_wrong(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match="prompt 2: empty"):
        encoder.encode(["one", "  "])
    with pytest.raises(InputError, match="no prompt given"):
        encoder.encode([])


def test_the_encoder_exports(encoder: TextEncoder, tmp_path: Path) -> None:
    """As a graph of ids and mask, with both sizes free."""
    ids, mask = encoder.tokenize(["three red discs", "one"])
    batch, tokens = torch.export.Dim("B"), torch.export.Dim("T", max=8)
    shapes = {0: batch, 1: tokens}
    program = torch.export.export(
        encoder, (ids, mask), dynamic_shapes={"input_ids": shapes, "attention_mask": shapes}, strict=False
    )
    ids, mask = encoder.tokenize(["a blue checkered floor and", "one", "red square"])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids, mask), encoder(ids, mask), rtol=0, atol=1e-5)


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


# ------------------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt: empty"),
        (" \t\n", "prompt: empty"),
        ("a \udcff b", "not UTF-8 at character 3"),
        (b"a", "found bytes"),
    ],
)
def test_prompts_that_are_none(text: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompt(text)


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red disc\r\n\n  zwölf blaue Kreise \tfine\nsquare\t\n".encode())
    assert read_prompts(file) == [Prompt("a red disc"), Prompt("zwölf blaue Kreise", "fine"), Prompt("square")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt in it"),
        (b"\n \n", "no prompt in it"),
        (b"good\n\xe9t\xe9\n", r"line 2: byte 1 \(0xe9\) is not UTF-8"),
        (b"good\n\tfine\n", "line 2: empty"),
    ],
)
def test_prompt_files_that_are_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_prompts(file)


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one prompt a line"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="one prompt a line"):
        read_prompts(tmp_path)


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


def test_feature_files(tmp_path: Path) -> None:
    packed, lengths = torch.randn(6, 5), torch.tensor([2, 1, 3], dtype=torch.int32)
    expected = TextFeatures.from_packed(packed, lengths)
    save_file({"text_features": packed.half(), "text_lens": lengths, "neg_text_features": expected.features,
               "neg_text_lens": lengths.clone()}, tmp_path / "a.safetensors")  # fmt: skip
    np.savez(tmp_path / "b.npz", text_features=expected.features.numpy(), text_lens=lengths.numpy())
    torch.testing.assert_close(load_features(tmp_path / "a.safetensors").features, expected.features, rtol=0, atol=1e-2)
    assert torch.equal(load_features(tmp_path / "a.safetensors", "neg_").features, expected.features)
    read = load_features(tmp_path / "b.npz")
    assert torch.equal(read.features, expected.features) and torch.equal(read.lengths, expected.lengths)


def test_feature_files_that_are_wrong(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_features(path)
        return str(caught.value)

    assert "no such file" in message(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    assert "not readable as .npz" in message(tmp_path / "a.npz")
    (tmp_path / "a.safetensors").write_bytes(b"\x08\x00")
    assert "not readable as .safetensors" in message(tmp_path / "a.safetensors")
    (tmp_path / "a.txt").write_bytes(b"")
    assert ".safetensors and .npz are read" in message(tmp_path / "a.txt")
    save_file({"features": torch.zeros(2, 3)}, tmp_path / "b.safetensors")
    assert "text_features and text_lens missing; the file holds features" in message(tmp_path / "b.safetensors")
    save_file({"text_features": torch.zeros(2, 3), "text_lens": torch.zeros(2)}, tmp_path / "c.safetensors")
    assert "expected integers [B]" in message(tmp_path / "c.safetensors")
    save_file({"text_features": torch.zeros(2, 3), "text_lens": torch.tensor([3])}, tmp_path / "d.safetensors")
    assert "expected [3, C]" in message(tmp_path / "d.safetensors")
    np.savez(tmp_path / "e.npz", text_features=np.array([None]), text_lens=np.array([1]))
    assert "not readable as .npz" in message(tmp_path / "e.npz")
