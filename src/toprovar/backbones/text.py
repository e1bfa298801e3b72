"""Text conditioning: prompts in, padded features and their lengths out.

One layout everywhere, `TextFeatures`: features [B,T,C] padded with zeros to the longest prompt, and the number of real
tokens of each. The transformer masks the padding, which gives real tokens exactly what the original's packed
variable-length attention gives them, in a graph of plain shapes.

transformers is imported only where an encoder is loaded. Features can also come from a file, and then neither
transformers nor the 5 GB of a T5-XL encoder are needed on this machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toprovar.errors import CheckpointError, InputError

__all__ = [
    "MAX_TOKENS",
    "Prompt",
    "TextEncoder",
    "TextFeatures",
    "check_prompt",
    "load_features",
    "load_text_encoder",
    "read_prompts",
]

MAX_TOKENS = 512
"""Tokens of a prompt, end-of-sentence mark included, that the released Infinity models were trained with."""


# ---------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: the text, and the prompt class if one is given."""

    text: str
    prompt_class: str | None = None


def check_prompt(text: object, what: str = "prompt") -> str:
    """The prompt without the white space around it.

    Raises:
        InputError: no string, nothing in it, or bytes that are no UTF-8 (they arrive from a shell as lone surrogates).
    """
    if not isinstance(text, str):
        raise InputError(f"{what}: expected text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: not UTF-8 at character {error.start + 1}; pass UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{what}: empty; say in a few words what the picture shows")
    return text.strip()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a prompt file: UTF-8, one prompt a line, its class after a tab if it has one; blank lines are skipped.

    Raises:
        InputError: no such file, not UTF-8 (the line is named), a line with a class and no prompt, or no prompt at all.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"prompt file {path}: {error.strerror or error}; give a text file with one prompt a line"
        ) from None
    prompts: list[Prompt] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"prompt file {path}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; "
                "save the file as UTF-8"
            ) from None
        if not text.strip():
            continue
        prompt, _, name = text.partition("\t")
        prompts.append(Prompt(check_prompt(prompt, f"prompt file {path}, line {number}"), name.strip() or None))
    if not prompts:
        raise InputError(f"prompt file {path}: no prompt in it; write one prompt a line")
    return prompts


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


def load_features(path: str | Path, prefix: str = "") -> TextFeatures:
    """Features from a .safetensors or .npz file.

    The file holds `text_features` and `text_lens` [B]: features padded, [B,T,C], or packed, [sum of lengths, C].

    Args:
        path: the file.
        prefix: before both names; "neg_" for negative prompts in the same file.

    Raises:
        InputError: no such file, another format, an array missing, or shapes that do not fit.
    """
    path = Path(path)
    names = f"{prefix}text_features", f"{prefix}text_lens"
    if not path.is_file():
        raise InputError(
            f"text features {path}: no such file; give a .safetensors or .npz with {names[0]} and {names[1]}"
        )
    arrays: dict[str, Tensor] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                found = list(file.keys())
                arrays = {name: file.get_tensor(name) for name in names if name in found}
        elif path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as file:
                found = list(file.files)
                arrays = {name: torch.from_numpy(file[name]) for name in names if name in found}
        else:
            raise InputError(
                f"text features {path}: found a {path.suffix or 'nameless'} file; .safetensors and .npz are read"
            )
    except InputError:
        raise
    except Exception as error:  # both readers raise their own kinds for a truncated or foreign file
        raise InputError(f"text features {path}: not readable as {path.suffix} ({error})") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(
            f"text features {path}: {' and '.join(missing)} missing; the file holds {', '.join(found) or 'nothing'}"
        )
    features, lengths = arrays[names[0]], arrays[names[1]]
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise InputError(f"text features {path}: {names[1]} has shape {tuple(lengths.shape)}; expected integers [B]")
    try:
        if features.dim() == 2:
            return TextFeatures.from_packed(features, lengths)
        return TextFeatures.from_padded(features, lengths)
    except InputError as error:
        raise InputError(f"text features {path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------- encoder


class TextEncoder(nn.Module):
    """A T5 encoder and its tokenizer.

    `forward` is all tensors and exports to ONNX; `encode` goes from prompts to `TextFeatures`.

    Attributes:
        channels: C of the features.
        max_tokens: longest prompt, end-of-sentence mark included.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.channels = int(cast(Any, model).config.d_model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask (1 real, 0 padding), both [B,T] int64 -> features [B,T,C] fp32, zero in the padding."""
        features = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        return torch.where(attention_mask[..., None] > 0, features, 0.0)

    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask [B,T] int64, padded to the longest prompt (what is padded cannot change what is real).

        Args:
            prompts: checked here, see `check_prompt`.
            truncate: keep the first `max_tokens - 1` tokens of a longer prompt and the end-of-sentence mark, as the
                original does without a word; otherwise a longer prompt is an error.

        Raises:
            InputError: no prompt, or one that is empty, not UTF-8, or too long.
        """
        if not prompts:
            raise InputError("no prompt given; at least one is needed")
        texts = [
            check_prompt(text, f"prompt {i + 1}" if len(prompts) > 1 else "prompt") for i, text in enumerate(prompts)
        ]
        if not truncate:
            for text, ids in zip(texts, self.tokenizer(texts).input_ids, strict=True):
                if len(ids) > self.max_tokens:
                    raise InputError(
                        f"prompt {text[:40]!r}... has {len(ids)} tokens and the model takes {self.max_tokens}: "
                        "shorten it, or let it be cut with truncate"
                    )
        batch = self.tokenizer(
            texts, max_length=self.max_tokens, padding="longest", truncation=True, return_tensors="pt"
        )
        return batch.input_ids, batch.attention_mask

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, truncate: bool = False, batch: int = 16) -> TextFeatures:
        """Features of the prompts, on the encoder's device; `batch` prompts at a time. Raises as `tokenize`."""
        ids, mask = self.tokenize(prompts, truncate=truncate)
        device = next(self.model.parameters()).device
        parts = [
            self(some_ids.to(device), some_mask.to(device))
            for some_ids, some_mask in zip(ids.split(batch), mask.split(batch), strict=True)
        ]
        return TextFeatures.from_padded(torch.cat(parts), mask.sum(1).to(device))


def load_text_encoder(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_tokens: int = MAX_TOKENS,
    channels: int | None = None,
) -> TextEncoder:
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
    return TextEncoder(model, tokenizer, max_tokens)
