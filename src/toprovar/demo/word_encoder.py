"""The text encoder of the text demo: words to features, in place of the T5 encoder that the released Infinity uses.

    words -> ids -> embedding and position -> two small transformer layers -> features [B, T, C]

Splitting into words and numbering them needs no torch (`TOKENIZER`); `forward` is all tensors of standard operators, so
that a bundle carries it as ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.checkpoint import block_count, load_strict, read_state_dict, shape_of
from toprovar.backbones.text import TextEncoder
from toprovar.demo.captions import COLOURS, COUNTS, MAX_WORDS, SHAPES, WORD_IDS
from toprovar.errors import CheckpointError
from toprovar.profiles.files import pretty_json
from toprovar.profiles.tokenizer import WordTokenizer

__all__ = ["TOKENIZER", "WordEncoder", "load_word_encoder"]

_HEAD_DIM = 32
_MASKED = -3.0e4  # finite, so that fp16 holds it


_PARTS = {
    "a count": COUNTS,
    "a colour": COLOURS,
    "a shape": SHAPES,
    "'on'": ("on",),
    "the floor's colour": COLOURS,
    "'floor'": ("floor",),
}
TOKENIZER = WordTokenizer(
    words=WORD_IDS,
    maximum_tokens=MAX_WORDS,
    form={part: tuple(WORD_IDS[word] for word in words) for part, words in _PARTS.items()},
)
"""The words of captions. A prompt that leaves a part out is refused: the model never saw one, and draws a smear."""


class _Layer(nn.Module):
    """Self-attention over the real words and an FFN, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x `[B, T, C]`, bias `[B, 1, 1, T]` on the scores -> `[B, T, C]`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, _HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) * _HEAD_DIM**-0.5 + bias, dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class WordEncoder(TextEncoder):
    """Ids of words -> features.

    Args:
        width: C, a multiple of 32.
        depth: transformer layers.
    """

    max_tokens = MAX_WORDS

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.channels = width
        self.embedding = nn.Embedding(max(WORD_IDS.values()) + 1, width)
        self.position = nn.Parameter(torch.randn(MAX_WORDS, width) * 0.3)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[B, T]` and lengths `[B]`, int64 -> features `[B, T, C]` fp32, zero in the padding."""
        real = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        bias = torch.where(real, 0.0, _MASKED)[:, None, None]
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, bias)
        return torch.where(real[..., None], self.norm(x).float(), 0.0)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` and lengths `[B]`, int64; raises InputError, see `WordTokenizer`."""
        ids, lengths = TOKENIZER(prompts)
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def tokenizer_json(self) -> str:
        return pretty_json(TOKENIZER)


def load_word_encoder(path: str | Path, *, device: torch.device | str = "cpu") -> WordEncoder:
    """Load weights; sizes are read from the tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or not a word encoder of this vocabulary.
    """
    state = read_state_dict(path)
    words, width = shape_of(state, "embedding.weight", path, 2)
    if words != max(WORD_IDS.values()) + 1 or width % _HEAD_DIM:
        raise CheckpointError(
            f"{path}: embeddings {words} x {width}, expected {max(WORD_IDS.values()) + 1} words and a multiple of "
            f"{_HEAD_DIM} channels; it belongs to another version of toprovar"
        )
    with torch.device("meta"):
        encoder = WordEncoder(width, block_count(state, r"layers\.(\d+)\."))
    load_strict(encoder, state, path, device=device)
    return encoder.eval().requires_grad_(False)
