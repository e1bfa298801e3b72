"""The embedded text demo: a small Infinity, its BSQ-VAE and its word encoder; where they lie, and how large they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toprovar.errors import CheckpointError
from toprovar.exporter.source import SamplingWish

if TYPE_CHECKING:
    from torch import Tensor

    from toprovar.backbones.bsq_vae import BsqVae
    from toprovar.backbones.infinity import Infinity

__all__ = ["TextDemo", "embedded_text_demo", "new_infinity", "new_vae", "original_state", "write_random_text_demo"]

RESOLUTION = "0.25M"
"""Infinity's own schedule, 2521 tokens; with a VAE of stride 8 that is 256 x 256 pixels."""

SAMPLING = SamplingWish(guidance=2.0, top_p=0.97)
"""What evaluation of the checkpoint found good; see MODEL_CARD_TEXT.md."""

DEPTH, WIDTH, BITS, TEXT_WIDTH = 8, 256, 16, 128
"""Sizes of the transformer: layers, channels, bits a token, channels of the word encoder."""

VAE_WIDTHS = (64, 64, 128, 128)
"""Channels of the VAE's levels, outermost first."""


@dataclass(frozen=True)
class TextDemo:
    """The files of a text demo in one folder."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The transformer."""
        return self.folder / "infinity.safetensors"

    @property
    def vae(self) -> Path:
        """The decoder."""
        return self.folder / "bsq_vae.safetensors"

    @property
    def word_encoder(self) -> Path:
        """See `word_encoder.load_word_encoder`."""
        return self.folder / "words.safetensors"


def embedded_text_demo() -> TextDemo:
    """The text demo that comes with the package.

    Raises:
        CheckpointError: this installation lacks it.
    """
    demo = TextDemo(Path(__file__).parent / "weights")
    for path in (demo.checkpoint, demo.vae, demo.word_encoder):
        if not path.is_file():
            raise CheckpointError(f"{path}: the embedded text demo is not installed; install toprovar again")
    return demo


def new_vae() -> BsqVae:
    """A VAE of the demo's sizes, without encoder, with PyTorch's initial weights."""
    from toprovar.backbones.bsq_vae import BsqVae, VaeSpec

    base = VAE_WIDTHS[0]
    return BsqVae(VaeSpec(BITS, base, tuple(width // base for width in VAE_WIDTHS), stride=8, res_blocks=0))


def new_infinity(vae: BsqVae | None = None) -> Infinity:
    """An Infinity of the demo's sizes with its own initial weights, around `vae` or a new one."""
    from toprovar.backbones.infinity import Infinity, InfinitySizes
    from toprovar.backbones.schedules import schedule
    from toprovar.demo.captions import MAX_WORDS

    vae = new_vae() if vae is None else vae
    sizes = InfinitySizes(
        depth=DEPTH,
        width=WIDTH,
        heads=WIDTH // 64,
        ffn_width=4 * WIDTH,
        bits=BITS,
        text_width=TEXT_WIDTH,
        text_maximum_tokens=MAX_WORDS,
        pool_heads=WIDTH // 64,
        levels=10,
        chunks=1,
    )
    chosen = schedule("1.0", RESOLUTION)
    return Infinity(sizes.spec(vae, chosen.grids, chosen.rope_grid), vae)


_CHUNKS = 4
_WRAPPED = re.compile(r"(conv_in|conv_out|conv[12]|nin_shortcut|upsample\.conv|norm[12]|norm_out)\.(weight|bias)$")


def original_state(model: Infinity) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's and the VAE's tensors under the names that Infinity's released files use."""
    per_chunk = model.spec.depth // _CHUNKS
    transformer: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith("vae."):
            continue
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            layer = int(match[1])
            name = f"block_chunks.{layer // per_chunk}.module.{layer % per_chunk}.{match[2]}"
        transformer[name.replace("head_linear.", "head.")] = value
    vae = {
        _WRAPPED.sub(lambda m: f"{m[1]}.{'norm' if 'norm' in m[1] else 'conv'}.{m[2]}", name): value
        for name, value in model.vae.state_dict().items()
    }
    return transformer, vae


def write_random_text_demo(folder: Path, seed: int = 0) -> TextDemo:
    """Write an untrained text demo of the final sizes, for tests of what comes after training."""
    import torch
    from safetensors.torch import save_file

    from toprovar.demo.word_encoder import WordEncoder

    demo = TextDemo(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, vae = original_state(new_infinity())
        words = WordEncoder(TEXT_WIDTH).state_dict()
    for path, state in ((demo.checkpoint, transformer), (demo.vae, vae), (demo.word_encoder, words)):
        save_file({name: value.half().contiguous() for name, value in state.items()}, str(path))
    return demo
