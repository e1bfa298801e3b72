"""Prompts -> token ids, as a text encoder takes them: read from the one JSON file that a bundle carries for it.

Two kinds. Ours, ``toprovar.words/1``, numbers the words of a small vocabulary and needs nothing but Python; any other
file is one of Hugging Face's ``tokenizers`` package (``tokenizer.json``, as T5 comes with it), which is imported only
then. Neither needs PyTorch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from toprovar.errors import FormatError, InputError, TargetError
from toprovar.profiles.files import Strict, model_from_json
from toprovar.profiles.prompts import check_prompt

__all__ = ["Tokenizer", "WordTokenizer", "read_tokenizer", "split_words"]

SCHEMA: Final = "toprovar.words/1"
Array = npt.NDArray[Any]


class Tokenizer(Protocol):
    """Prompts -> ids ``[B, T]`` int64, 0 in the padding, T the longest prompt, and lengths ``[B]`` int64.

    Raises InputError for no prompt, or one that is empty, not UTF-8, too long, or that the encoder has no words for.
    """

    def __call__(self, prompts: Sequence[str]) -> tuple[Array, Array]: ...


def split_words(text: str) -> list[str]:
    """The words of a prompt, in lower case, without commas and full stops."""
    return text.lower().replace(",", " ").replace(".", " ").split()


class WordTokenizer(Strict):
    """A word is a token; a word that is not in the vocabulary is an error, not a guess."""

    schema_version: Literal["toprovar.words/1"] = Field(default=SCHEMA, alias="schema")
    words: dict[str, int] = Field(min_length=1)
    """Word -> id, from 1; 0 is padding. Synonyms share an id."""
    maximum_tokens: int = Field(ge=1)
    """Longest prompt, in words."""
    form: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """What every prompt names, in this order and with other words between: a part -> the ids that say it."""

    def __call__(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        rows = []
        for what, text in _checked(prompts):
            words = split_words(text)
            if strangers := [word for word in words if word not in self.words]:
                known = ", ".join(self.words)
                raise InputError(f"{what}: unknown words {', '.join(map(repr, strangers))}; known are {known}")
            if not 1 <= len(words) <= self.maximum_tokens:
                raise InputError(f"{what}: {len(words)} words; the model takes 1 to {self.maximum_tokens}")
            rows.append([self.words[word] for word in words])
            rest = iter(rows[-1])
            if not all(any(word in says for word in rest) for says in self.form.values()):
                raise InputError(f"{what} {text[:60]!r} does not name, in this order, {', '.join(self.form)}")
        return _padded(rows)


class _HubTokenizer:
    """A ``tokenizer.json`` of Hugging Face; special tokens (T5's end-of-sentence mark) are added as it says."""

    def __init__(self, text: str, maximum_tokens: int, source: str):
        try:
            from tokenizers import Tokenizer as HubTokenizer
        except ImportError as error:
            raise TargetError(f"{source}: needs the package tokenizers; pip install tokenizers") from error
        try:
            self._tokenizer = HubTokenizer.from_str(text)
        except Exception as error:  # the Rust side raises plain Exception
            raise FormatError(f"{source}: not a tokenizer: {' '.join(str(error).split())}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._maximum = maximum_tokens

    def __call__(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        rows = []
        for what, text in _checked(prompts):
            ids = self._tokenizer.encode(text).ids
            if len(ids) > self._maximum:
                raise InputError(
                    f"{what} {text[:40]!r}... has {len(ids)} tokens and the model takes {self._maximum}: shorten it"
                )
            rows.append(ids)
        return _padded(rows)


def read_tokenizer(data: bytes, maximum_tokens: int, source: str) -> Tokenizer:
    """Read the file of a tokenizer.

    Args:
        data: its bytes.
        maximum_tokens: longest prompt; a word tokenizer has its own and keeps it.
        source: what to call the file in messages.

    Raises:
        FormatError: no tokenizer of either kind.
        TargetError: the package tokenizers is needed and not installed.
    """
    try:
        text = data.decode("utf-8")
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not a tokenizer: not valid JSON: {error}") from error
    if isinstance(document, dict) and str(document.get("schema", "")).startswith("toprovar.words/"):
        return model_from_json(WordTokenizer, data, source, "tokenizer")
    return _HubTokenizer(text, maximum_tokens, source)


def _checked(prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Name and text of each prompt."""
    if not prompts:
        raise InputError("no prompt given; at least one is needed")
    names = [f"prompt {i}" if len(prompts) > 1 else "prompt" for i in range(1, len(prompts) + 1)]
    return [(name, check_prompt(text, name)) for name, text in zip(names, prompts, strict=True)]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return ids, lengths
