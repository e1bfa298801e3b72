"""A small Infinity of random weights on disk, with a T5 encoder and prompts for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.infinity import Infinity, InfinitySizes
from toprovar.backbones.schedules import schedule

WORDS = "three red striped discs on a blue checkered floor and one green square".split()
RESOLUTION = "0.06M"
TEXT_WIDTH, TEXT_TOKENS = 24, 12

PROMPTS = {
    "plain": ["one red discs", "a blue floor", "one green square"],
    "fine": ["three striped discs on a checkered floor", "a striped square on a checkered floor", "striped checkered"],
}

PROFILE = """schema = "toprovar.profile/1"
name = "half"
[depth]
grid = 8
[roles]
explicit = "gdg"
[tokens]
alpha_min = 0.5
alpha_max = 0.5
"""


def write_t5(folder: Path) -> Path:
    """A T5 of `TEXT_WIDTH` channels with a word tokenizer, as transformers saves them, decoder included."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


class TextCheckpoint:
    """The files, and the options that name them."""

    def __init__(self, folder: Path, seed: int = 0):
        folder.mkdir()
        torch.manual_seed(seed)
        vae = BsqVae(VaeSpec(latent_channels=4, base_channels=24, multipliers=(1, 2), stride=2, res_blocks=1))
        sizes = InfinitySizes(
            depth=3,
            width=48,
            heads=3,
            ffn_width=96,
            bits=4,
            text_width=TEXT_WIDTH,
            text_maximum_tokens=TEXT_TOKENS,
            pool_heads=4,
            levels=7,
            chunks=1,
        )
        chosen = schedule("1.0", RESOLUTION)
        model = Infinity(sizes.spec(vae, chosen.grids, chosen.rope_grid), vae)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "scale_mul" not in name:
                    parameter.normal_(0.0, 0.7 / parameter[0].numel() ** 0.5)
        self.folder = folder
        self.infinity, self.vae = folder / "infinity.safetensors", folder / "vae.safetensors"
        self.prompts, self.profile = folder / "prompts.txt", folder / "half.toml"
        state = model.state_dict()
        save_file({key: value for key, value in state.items() if not key.startswith("vae.")}, self.infinity)
        mask = {"quantizer.lfq.mask": torch.zeros(1)}  # by which a VAE of Infinity is known
        save_file({key[4:]: value for key, value in state.items() if key.startswith("vae.")} | mask, self.vae)
        self.prompts.write_text("".join(f"{text}\t{name}\n" for name, texts in PROMPTS.items() for text in texts))
        self.profile.write_text(PROFILE)
        self.t5 = write_t5(folder / "t5")

    @property
    def files(self) -> list[object]:
        return ["--backbone", "infinity", "--checkpoint", self.infinity, "--vae", self.vae, "--resolution", RESOLUTION]

    @property
    def options(self) -> list[object]:
        return [*self.files, "--text-encoder", self.t5]
