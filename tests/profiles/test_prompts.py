"""Prompt files, feature files, tokenizers, and which prompt class a text belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from toprovar.errors import FormatError, InputError
from toprovar.profiles.files import pretty_json
from toprovar.profiles.prompts import (
    Prompt,
    check_prompt,
    classify,
    fit_classifier,
    pool,
    read_features,
    read_prompts,
)
from toprovar.profiles.tokenizer import WordTokenizer, read_tokenizer


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


# ---------------------------------------------------------------------------------------------------------------------
# Features


def test_feature_files(tmp_path: Path) -> None:
    packed, lengths = torch.randn(6, 5), torch.tensor([2, 1, 3], dtype=torch.int32)
    expected = np.zeros((3, 3, 5), np.float32)
    expected[0, :2], expected[1, :1], expected[2] = packed[:2], packed[2:3], packed[3:]
    dirty = torch.from_numpy(np.where(expected == 0, np.nan, expected))  # what stands in the padding does not matter
    save_file({"text_features": packed.bfloat16(), "text_lens": lengths, "neg_text_features": dirty,
               "neg_text_lens": lengths.clone()}, tmp_path / "a.safetensors")  # fmt: skip
    np.savez(tmp_path / "b.npz", text_features=expected, text_lens=lengths.numpy())
    np.testing.assert_allclose(read_features(tmp_path / "a.safetensors")[0], expected, atol=2e-2)
    for found in (read_features(tmp_path / "a.safetensors", "neg_"), read_features(tmp_path / "b.npz")):
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], [2, 1, 3])


def test_feature_files_that_are_wrong(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_features(path)
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


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_words_are_tokens() -> None:
    tokenizer = WordTokenizer(words={"red": 1, "disc": 2, "discs": 2}, maximum_tokens=3)
    read = read_tokenizer(pretty_json(tokenizer).encode(), 99, "words.json")
    for one in (tokenizer, read):
        ids, lengths = one(["Red, disc.", "discs"])
        assert ids.tolist() == [[1, 2], [2, 0]] and lengths.tolist() == [2, 1] and ids.dtype == np.int64


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt given"),
        (["red", " "], "prompt 2: empty"),
        (["a dragon"], "prompt: unknown words 'a', 'dragon'; known are red, disc"),
        (["red red disc disc"], "4 words; the model takes 1 to 3"),
        (["red \udcff"], "not UTF-8"),
        ([","], "0 words"),
    ],
)
def test_prompts_that_words_cannot_say(prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WordTokenizer(words={"red": 1, "disc": 2}, maximum_tokens=3)(prompts)


@pytest.mark.parametrize(
    "data", [b"{", b"\xff", b"[]", b'{"schema": "toprovar.words/1"}', b'{"schema": "toprovar.words/2"}']
)
def test_what_is_no_tokenizer(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^words\.json: "):
        read_tokenizer(data, 8, "words.json")


# ---------------------------------------------------------------------------------------------------------------------
# Prompt classes


def test_pooling_leaves_the_padding_out() -> None:
    features = np.array([[[1.0, 2], [3, 4]], [[5, 6], [np.nan, np.nan]]])
    np.testing.assert_array_equal(pool(features, np.array([2, 1])), [[2, 3], [5, 6]])


def test_a_prompt_is_of_the_class_with_the_nearest_centroid() -> None:
    """Distance is measured in the spread within classes: along the noisy axis a larger step means less."""
    random = np.random.default_rng(0)
    noise = np.array([5.0, 0.2])
    pooled = {"a": random.normal(size=(400, 2)) * noise, "b": random.normal(size=(400, 2)) * noise + [0, 2]}
    fitted = fit_classifier(pooled)
    weights, bias = np.stack([w for w, _ in fitted.values()]), np.array([b for _, b in fitted.values()])
    assert classify(np.array([[12.0, 0.3], [-9.0, 1.8]]), weights, bias).tolist() == [0, 1]
    alone = fit_classifier({"a": np.array([[0.0, 0, 1]]), "b": np.array([[0.0, 1, 0]])})
    weights, bias = np.stack([w for w, _ in alone.values()]), np.array([b for _, b in alone.values()])
    assert classify(np.array([[0.0, 0.4, 0.6], [9.0, 0.6, 0.4]]), weights, bias).tolist() == [0, 1]
