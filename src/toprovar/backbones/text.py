"""Text conditioning: prompts in, padded features and their lengths out. Prompt and feature files: `profiles.prompts`.

One layout everywhere, `TextFeatures`: features [B,T,C] padded with zeros to the longest prompt, and the number of real
tokens of each. The transformer masks the padding, which gives real tokens exactly what the original's packed
variable-length attention gives them, in a graph of plain shapes.

transformers is imported only where a T5 encoder is loaded.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toprovar.errors import CheckpointError, InputError

__all__ = [
    "MAX_TOKENS",
    "T5Encoder",
    "TextEncoder",
    "TextFeatures",
    "load_text_encoder",
]

MAX_TOKENS = 512
"""Tokens of a prompt, end-of-sentence mark included, that the released Infinity models were trained with."""


# --------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class TextFeatures:
    """What a text encoder says about B prompts.

    Attributes:
        features: [B,T,C] fp32; positions past the length of a prompt are zero.
        lengths: [B] int64, real tokens of each prompt, 1..T.
    """

    features: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.features.shape)
        if len(shape) != 3 or 0 in shape:
            raise InputError(f"text features of shape {shape}: expected [B,T,C], none of them 0")
        if tuple(self.lengths.shape) != shape[:1]:
            raise InputError(
                f"text lengths of shape {tuple(self.lengths.shape)} for features {shape}: expected [{shape[0]}]"
            )
        low, high = int(self.lengths.min()), int(self.lengths.max())
        if low < 1 or high > shape[1]:
            raise InputError(
                f"text lengths from {low} to {high} for features padded to {shape[1]}: each must be 1..{shape[1]}"
            )

    @classmethod
    def from_padded(cls, features: Tensor, lengths: Tensor) -> TextFeatures:
        """From [B,T,C] with anything in the padding (even NaN), which is cleared here."""
        lengths = lengths.to(torch.int64)
        if features.dim() == 3 and lengths.dim() == 1:
            real = torch.arange(features.shape[1], device=features.device)[None] < lengths[:, None]
            features = torch.where(real[..., None], features.float(), 0.0)
        return cls(features, lengths)

    @classmethod
    def from_packed(cls, packed: Tensor, lengths: Tensor) -> TextFeatures:
        """From the original's packed layout: [sum of lengths, C], prompts one behind the other."""
        counts = [int(n) for n in lengths]
        if packed.dim() != 2 or sum(counts) != packed.shape[0] or min(counts, default=0) < 1:
            raise InputError(
                f"packed text features of shape {tuple(packed.shape)} with lengths {counts}: "
                f"expected [{sum(counts)}, C] and every length at least 1"
            )
        padded = nn.utils.rnn.pad_sequence(list(packed.float().split(counts)), batch_first=True)
        return cls(padded, torch.tensor(counts, dtype=torch.int64, device=packed.device))

    @property
    def batch(self) -> int:
        """B."""
        return self.features.shape[0]

    def padded_to(self, tokens: int) -> TextFeatures:
        """The same prompts, padded to at least `tokens`."""
        missing = tokens - self.features.shape[1]
        if missing <= 0:
            return self
        return TextFeatures(nn.functional.pad(self.features, (0, 0, 0, missing)), self.lengths)

    def to(self, device: torch.device | str) -> TextFeatures:
        """The same on another device."""
        return TextFeatures(self.features.to(device), self.lengths.to(device))

    def __getitem__(self, images: slice) -> TextFeatures:
        """Some of the prompts."""
        return TextFeatures(self.features[images], self.lengths[images])


# ---------------------------------------------------------------------------------------------------------- encoder


class TextEncoder(nn.Module, ABC):
    """Prompts -> features. `forward` is all tensors and exports to ONNX.

    Attributes:
        channels: C of the features.
        max_tokens: longest prompt.
    """

    channels: int
    max_tokens: int

    @abstractmethod
    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids `[B, T]` int64 (anything in the padding), lengths `[B]` -> features `[B, T, C]` fp32, zero in the
        padding."""

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` and lengths `[B]`, int64, T the longest prompt (what is padded cannot change what is real).

        Raises:
            InputError: no prompt, or one that is empty, too long, or that the encoder has no words for.
        """

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The tokenizer as a file that `toprovar.profiles.tokenizer.read_tokenizer` reads."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch: int = 16) -> TextFeatures:
        """Features of the prompts, on the encoder's device; `batch` prompts at a time. Raises as `tokenize`."""
        ids, lengths = (t.to(next(self.parameters()).device) for t in self.tokenize(prompts))
        parts = [self(*some) for some in zip(ids.split(batch), lengths.split(batch), strict=True)]
        return TextFeatures.from_padded(torch.cat(parts), lengths)


class T5Encoder(TextEncoder):
    """A T5 encoder of transformers and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.channels = int(cast(Any, model).config.d_model)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        features = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state.float()
        return torch.where(real[..., None], features, 0.0)

    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> tuple[Tensor, Tensor]:
        """As `TextEncoder.tokenize`; `truncate` keeps the first `max_tokens - 1` tokens of a longer prompt and the
        end-of-sentence mark, as the original does without a word."""
        if not prompts or not all(text.strip() for text in prompts):
            raise InputError("no prompt given, or an empty one; at least a word is needed")
        texts = list(prompts)
        if not truncate:
            for text, ids in zip(texts, self.tokenizer(texts).input_ids, strict=True):
                if len(ids) > self.max_tokens:
                    raise InputError(
                        f"prompt {text[:40]!r}... has {len(ids)} tokens and the model takes {self.max_tokens}: "
                        "shorten it"
                    )
        batch = self.tokenizer(
            texts, max_length=self.max_tokens, padding="longest", truncation=True, return_tensors="pt"
        )
        return batch.input_ids, batch.attention_mask.sum(1)

    def tokenizer_json(self) -> str:
        return str(self.tokenizer.backend_tokenizer.to_str())


def load_text_encoder(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_tokens: int = MAX_TOKENS,
    channels: int | None = None,
) -> T5Encoder:
    """A T5 encoder from a local folder, or by its name on the model hub (for Infinity: google/flan-t5-xl).

    Args:
        source: folder with config.json, weights and tokenizer, or a name.
        dtype: of the weights; the original runs the encoder in fp16 on a GPU.
        device: where it runs.
        max_tokens: longest prompt in tokens.
        channels: the features' width that the transformer expects, checked if given.

    Raises:
        InputError: transformers is not installed, or nothing usable is found under this name.
        CheckpointError: the encoder is of another width than `channels`.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            "text encoder: the package transformers is not installed; pip install 'toprovar[text]', or give a file of "
            "text features"
        ) from None
    source = str(source)
    looks_local = Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"text encoder {source}: no such folder; give a folder with a T5 encoder, or a name, google/flan-t5-xl"
            )
        if not (folder / "config.json").is_file():
            raise InputError(
                f"text encoder {source}: no config.json in this folder; give the folder of a T5 checkpoint"
            )
        source = str(folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=looks_local)
        if not hasattr(config, "d_model") or "t5" not in str(getattr(config, "model_type", "")):
            raise CheckpointError(
                f"text encoder {source}: found a {config.model_type!r} model; Infinity takes a T5 encoder"
            )
        if channels is not None and config.d_model != channels:
            raise CheckpointError(
                f"text encoder {source}: {config.d_model} channels, and the transformer was trained on {channels}"
                + ("; it takes google/flan-t5-xl" if channels == 2048 else "")
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=looks_local)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decoder's weights in a full T5 checkpoint are meant to be left out
            model = transformers.T5EncoderModel.from_pretrained(
                source, dtype=dtype, local_files_only=looks_local, use_safetensors=None if looks_local else True
            )
    except (InputError, CheckpointError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, its hub's errors, ... for a missing piece
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"text encoder {source}: not loaded ({reason}); give a folder with config.json, weights and tokenizer"
        ) from None
    model.eval().requires_grad_(False).to(device)
    return T5Encoder(model, tokenizer, max_tokens)
