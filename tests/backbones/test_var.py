"""VAR: the released sizes, what is inferred from a file, and graphs with every size free."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.backbones.conftest import make_var
from toprovar import backbones
from toprovar.backbones.base import Sampling
from toprovar.backbones.var import VAR, VARSpec, infer_spec
from toprovar.backbones.vqvae import VQVAE, VQVAESpec
from toprovar.errors import CheckpointError, InputError

PN_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PN_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# depth, patch_nums, shared AdaLN; parameters and keys of the original classes, whose training mask is one key more
RELEASED = {
    "var_d16": (16, PN_256, False, 310_283_520, 220),
    "var_d20": (20, PN_256, False, 600_917_136, 272),
    "var_d24": (24, PN_256, False, 1_033_399_360, 324),
    "var_d30": (30, PN_256, False, 2_010_020_356, 402),
    "var_d36": (36, PN_512, True, 2_353_893_904, 446),
}


def _released(name: str) -> VAR:
    depth, patch_nums, shared, _, _ = RELEASED[name]
    spec = VARSpec.of(depth=depth, width=64 * depth, heads=depth, patch_nums=patch_nums, shared_aln=shared)
    with torch.device("meta"):
        return VAR(spec, VQVAE(VQVAESpec(patch_nums=patch_nums)))


def _transformer_state(model: VAR) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name: str) -> None:
    _, _, shared, parameters, keys = RELEASED[name]
    model = _released(name)
    state = _transformer_state(model)
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vae.")) == parameters
    assert len(state) == keys - 1
    in_block = sorted(key.removeprefix("blocks.3.") for key in state if key.startswith("blocks.3."))
    modulation = ["ada_gss"] if shared else ["ada_lin.1.bias", "ada_lin.1.weight"]
    attention = ["mat_qkv.weight", "proj.bias", "proj.weight", "q_bias", "scale_mul_1H11", "v_bias", "zero_k_bias"]
    ffn = [f"ffn.fc{i}.{part}" for i in (1, 2) for part in ("bias", "weight")]
    assert in_block == modulation + [f"attn.{key}" for key in attention] + ffn
    outside = {re.sub(r"\..*", "", key) for key in state}
    assert outside == {
        "pos_start", "pos_1LC", "lvl_1L", "word_embed", "class_emb", "lvl_embed", "blocks", "head_nm", "head",
        *(["shared_ada_lin"] if shared else []),
    }  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_are_inferred_from_the_shapes(name: str) -> None:
    model = _released(name)
    state = _transformer_state(model)
    del state["lvl_1L"]  # on the meta device it holds no numbers; the schedule follows from 680 or 2240 tokens
    assert infer_spec(state, name) == model.spec


def test_the_released_vae() -> None:
    with torch.device("meta"):
        vae = VQVAE(VQVAESpec())
    assert sum(p.numel() for p in vae.parameters()) == 108_948_355
    assert sum(p.numel() for p in vae.decoder.parameters()) == 64_653_923
    assert len(vae.state_dict()) == 324 - 1  # and ema_vocab_hit_SV
    assert vae.spec.stride == 16


def _save(model: VAR, folder: Path) -> tuple[Path, Path]:
    """As the original would: its extra keys too."""
    length = sum(model.spec.tokens)
    transformer = {"attn_bias_for_masking": torch.zeros(1, 1, length, length), **_transformer_state(model)}
    save_file(transformer, folder / "var.safetensors")
    vae = {"quantize.ema_vocab_hit_SV": torch.zeros(model.spec.scales, model.spec.vocab), **model.vae.state_dict()}
    torch.save(vae, folder / "vae.pth")
    return folder / "var.safetensors", folder / "vae.pth"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_aln": True},
        {"depth": 2, "patch_nums": (1, 3, 4)},
        {"patch_nums": (2, 3, 5, 7)},
    ],
    ids=str,
)
def test_a_saved_model_loads_as_it_was(options: dict, tmp_path: Path) -> None:
    model = make_var(**options)
    loaded = backbones.load("var", *_save(model, tmp_path), sampling=model.sampling, encoder=True)
    assert loaded.spec == model.spec and loaded.vae.spec == model.vae.spec
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())

    without = backbones.load("var", *_save(model, tmp_path), dtype=torch.float16)
    assert not without.vae.spec.encoder
    assert without.dtype == torch.float16 and without.vae.post_quant_conv.weight.dtype == torch.float32
    halves = {name for name, p in without.named_parameters() if p.dtype == torch.float16}
    assert halves == {
        name for name, p in model.set_precision(torch.float16).named_parameters() if p.dtype == torch.float16
    }
    assert "blocks.0.attn.mat_qkv.weight" in halves and "blocks.0.attn.scale_mul_1H11" not in halves


def test_without_cosine_attention_the_heads_must_be_told(tmp_path: Path) -> None:
    model = make_var(cosine=False)
    files = _save(model, tmp_path)
    loaded = backbones.load("var", *files, heads=4)
    assert loaded.spec.attention_scale == 0.25 / 16**0.5
    assert backbones.load("var", *files).spec.heads == 1  # heads of 64
    with pytest.raises(CheckpointError, match="width 64 does not divide into 5 heads"):
        backbones.load("var", *files, heads=5)


def test_a_schedule_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[1, 2, 3\] does not give the file's 66 tokens in 5 scales"):
        backbones.load("var", *_save(make_var(), tmp_path), patch_nums=[1, 2, 3])


def test_a_vae_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = _save(make_var(), tmp_path)
    other = VQVAE(VQVAESpec(channels=(32,), latent_channels=8, vocab=50, patch_nums=(1, 2), encoder=False))
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"vocab is 50, but 48 in .*var\.safetensors"):
        backbones.load("var", checkpoint, tmp_path / "other.safetensors")


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(InputError, match="backbone 'vart' is unknown: it is one of var, infinity"):
        backbones.load("vart", "a", "b")


def test_a_width_that_does_not_divide_is_refused() -> None:
    spec = VARSpec.of(depth=1, width=10, heads=3, patch_nums=(1, 2))
    with pytest.raises(InputError, match="width 10 with 3 heads"):
        VAR(spec, VQVAE(VQVAESpec(channels=(32,), patch_nums=(1, 2), encoder=False)))


def test_guidance_ramps_up_to_the_last_scale() -> None:
    model = make_var()
    model.sampling = Sampling(guidance=4.0)
    weights = [model.scale_constants(s)["guidance"].tolist() for s in range(5)]
    assert weights == [[1, 0], [2, -1], [3, -2], [4, -3], [5, -4]]
    assert "next_position" in model.scale_constants(3) and "next_position" not in model.scale_constants(4)


class _Advance(torch.nn.Module):
    def __init__(self, model: VAR):
        super().__init__()
        self.model = model

    def forward(self, logits, noise, codes, constants):
        return self.model.advance(logits, noise, codes, constants)


def test_advance_exports_without_resize_nodes() -> None:
    """One graph for all scales; it multiplies by matrices where eager code interpolates; the two agree."""
    model = make_var()
    spec = model.spec

    def arguments(scale: int, images: int):
        torch.manual_seed(scale)
        n = spec.tokens[scale]
        constants = model.scale_constants(scale)
        codes = torch.randn(images, spec.latent_channels, *spec.latent_grid)
        return torch.randn(n, 2 * images, spec.vocab), torch.rand(n, images, spec.vocab), codes, constants

    free = torch.export.Dim.DYNAMIC
    sizes = {name: {} for name in model.scale_constants(2)}
    sizes |= {"up_rows": {1: free}, "up_cols": {1: free}, "down_rows": {0: free}, "down_cols": {0: free}}
    sizes["next_position"] = {0: free}
    dynamic = {"logits": {0: free, 1: free}, "noise": {0: free, 1: free}, "codes": {0: free}, "constants": sizes}
    exported = torch.export.export(_Advance(model), arguments(2, 2), dynamic_shapes=dynamic, strict=False)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [t for t in targets if "upsample" in t or "pool" in t]
    for scale in (1, 2, 3):
        args = arguments(scale, 3)
        (tokens, codes, x), expected = exported.module()(*args), model.advance(*args)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(codes, expected[1], atol=5e-6, rtol=0)
        torch.testing.assert_close(x, expected[2], atol=5e-6, rtol=0)


def test_prefix_and_decoder_export() -> None:
    model = make_var(shared_aln=True)

    class Prefix(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, labels):
            return self.model.prefix(labels)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, codes):
            return self.model.decode(codes)

    free = torch.export.Dim.DYNAMIC
    labels = torch.tensor([1, 2, 3], dtype=torch.int32)
    exported = torch.export.export(Prefix(), (labels[:2],), dynamic_shapes=({0: free},), strict=False)
    torch.testing.assert_close(exported.module()(labels), model.prefix(labels))
    codes = torch.randn(3, 8, 6, 6)
    exported = torch.export.export(Decoder(), (codes[:2],), dynamic_shapes=({0: free},), strict=False)
    torch.testing.assert_close(exported.module()(codes), model.decode(codes))
