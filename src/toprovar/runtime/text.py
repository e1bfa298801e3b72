"""Text to a bundle: prompts through the encoder that it carries, features from a file, and the prompt class of each.

The encoder runs in ONNX Runtime on the CPU whatever runs the bundle; it needs neither PyTorch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toprovar.errors import BundleError, InputError, TargetError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.profiles.prompts import classify, pool
from toprovar.profiles.tokenizer import read_tokenizer
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.target import Array

__all__ = ["PromptEncoder", "TextFeatures", "prompt_classes"]


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts: features `[I, T, text_width]`, zero in the padding, lengths `[I]`, and the prompt class of each."""

    features: Array
    lengths: Array
    prompt_classes: tuple[str, ...]

    def repeated(self, count: int) -> TextFeatures:
        """Each prompt `count` times, those of one prompt together."""
        classes = tuple(name for name in self.prompt_classes for _ in range(count))
        return TextFeatures(np.repeat(self.features, count, axis=0), np.repeat(self.lengths, count), classes)


class PromptEncoder:
    """The text encoder of a bundle.

    Raises:
        InputError: the bundle takes labels, or was exported without its encoder.
        TargetError: ONNX Runtime, or the tokenizer's package, is not installed.
        BundleError: the encoder cannot be loaded.
    """

    def __init__(self, bundle: Bundle):
        condition = bundle.manifest.condition
        info = condition.text_encoder
        if condition.kind != "text":
            raise InputError(f"{bundle.root}: takes labels, not prompts; see --label")
        if info is None:
            raise InputError(
                f"{bundle.root}: was exported without a text encoder; give features (--features), or export it again "
                "with --text-encoder"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetError("text encoder: onnxruntime is not installed; pip install 'toprovar[run]'") from error
        path = bundle.path(info.tokenizer)
        self._tokenize = read_tokenizer(path.read_bytes(), condition.text_maximum_tokens or 1, str(path))
        graph = bundle.path(info.graph)
        try:
            self._session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{graph}: not loaded: {reason}; copy the bundle again") from error

    def __call__(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Features `[I, T, text_width]` fp32 and lengths `[I]` int32 of the prompts.

        Raises:
            InputError: a prompt that is empty, not UTF-8, too long, or that the encoder has no words for.
        """
        ids, lengths = self._tokenize(prompts)
        lengths = lengths.astype(np.int32)
        inputs = {Names.TOKEN_IDS.value: ids, Names.TEXT_LENGTHS.value: lengths}
        return self._session.run([Names.TEXT_FEATURES.value], inputs)[0], lengths


def prompt_classes(bundle: Bundle, features: Array, lengths: Array, given: str | None = None) -> tuple[str, ...]:
    """The prompt class of each text: the one given, the only one, or the one with the nearest centroid.

    Raises:
        InputError: the bundle has no such class.
        BundleError: it has several classes and nothing that tells them apart.
    """
    names = tuple(bundle.manifest.schedules)
    if given is not None:
        if given not in names:
            raise InputError(f"{bundle.root}: no prompt class {given!r}; valid: {', '.join(names)}")
        return (given,) * len(features)
    if len(names) == 1:
        return names * len(features)
    tensors = bundle.prompt_classes
    width = bundle.manifest.condition.text_width
    if tensors["weights"].shape != (len(names), width) or tensors["bias"].shape != (len(names),):
        raise BundleError(f"{bundle.root}: what tells prompt classes apart is of other sizes; export the bundle again")
    chosen = classify(pool(features, lengths), tensors["weights"], tensors["bias"])
    return tuple(names[index] for index in chosen)
