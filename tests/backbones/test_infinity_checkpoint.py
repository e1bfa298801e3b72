"""Every key of every released Infinity file is accounted for, and what does not fit is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from toprovar import backbones
from toprovar.backbones.bsq_vae import build_bsq_vae, ignorable, released_name
from toprovar.backbones.checkpoint import load_strict
from toprovar.backbones.infinity import (
    RELEASED_SAMPLING,
    Infinity,
    build_infinity,
    load_infinity,
    read_sizes,
    unconditional_text,
)
from toprovar.backbones.infinity import ignorable as ignorable_transformer
from toprovar.backbones.schedules import schedule
from toprovar.errors import CheckpointError, InputError

GOLDEN = Path(__file__).parent.parent / "golden"
SCHEDULE: dict[str, Any] = {"grids": [(1, 1), (2, 2), (3, 2), (6, 4), (9, 6)], "rope_grid": (78, 52)}
KEYS: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress((GOLDEN / "infinity_keys.json.gz").read_bytes()))
VAES = {"infinity_8b": "infinity_vae_d56_f8_14_patchify"}  # the others: d32

# name -> depth, width, heads, bits of a token, patch, parameters (with buffers left out)
RELEASED = {
    "infinity_2b": (32, 2048, 16, 32, 1, 2_204_564_032),
    "infinity_8b": (40, 3584, 28, 56, 2, 8_375_791_824),
    "infinity_layer12": (12, 768, 8, 32, 1, 125_185_696),
    "infinity_layer24": (24, 1536, 16, 32, 1, 940_944_832),
}


def _meta_state(name: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}


@pytest.mark.parametrize("name", ["infinity_vae_d32_reg", "infinity_vae_d56_f8_14_patchify"])
@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("inner", [True, False], ids=["released names", "names without the inner module"])
def test_every_vae_key_is_used(name: str, encoder: bool, inner: bool) -> None:
    state = _meta_state(name)
    if not inner:
        state = {released_name(key): value for key, value in state.items()}
    count = sum(encoder or not key.startswith("encoder.") for key in state)
    vae = build_bsq_vae(state, name, encoder=encoder)
    assert len(vae.state_dict()) == count - 2  # the two masks
    load_strict(vae, state, name, ignore=ignorable, device="meta")
    assert set(state) == {"quantizer.lfq.mask", "quantize.lfq.mask"}
    parameters = {True: {32: 110_118_051, 14: 81_624_209}, False: {32: 65_092_355, 14: 48_484_611}}
    assert sum(p.numel() for p in vae.parameters()) == parameters[encoder][vae.spec.latent_channels]
    assert (vae.spec.latent_channels, vae.spec.stride) == ((32, 16) if "d32" in name else (14, 8))


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("resolution", ["0.06M", "1M"])
def test_every_transformer_key_is_used(name: str, resolution: str) -> None:
    state = _meta_state(name)
    vae_name = VAES.get(name, "infinity_vae_d32_reg")
    vae = build_bsq_vae(_meta_state(vae_name), vae_name)
    chosen = schedule("1.5", resolution)
    model = build_infinity(state, name, vae, grids=chosen.grids, rope_grid=chosen.rope_grid)
    own = [key for key in model.state_dict() if not key.startswith("vae.")]
    assert len(own) == len(KEYS[name])
    load_strict(model, state, name, ignore=ignorable_transformer, elsewhere=("vae.",), device="meta")
    assert not state

    spec = model.spec
    parameters = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("vae."))
    assert (spec.depth, spec.width, spec.heads, spec.bits, spec.patch, parameters) == RELEASED[name]
    assert spec.head_dim * spec.heads == spec.width and spec.vocab == 2 * spec.bits and spec.pool_heads == 16
    assert spec.text_maximum_tokens == 512 and spec.text_width == 2048 and spec.levels == 15
    assert spec.image_size == chosen.image_size
    assert spec.latent_grid == tuple(spec.patch * n for n in chosen.grids[-1])
    assert model.sampling == RELEASED_SAMPLING[spec.patch]


def test_layers_are_numbered_across_chunks() -> None:
    state = _meta_state("infinity_2b")
    first = state["block_chunks.3.module.2.sa.mat_qkv.weight"]
    sizes = read_sizes(state, "x")
    assert sizes.chunks == 8 and state["blocks.14.sa.mat_qkv.weight"] is first
    assert _golden(level_every_chunk=True).spec.level_starts == (1,)


def test_a_vae_of_another_model_is_refused() -> None:
    state, vae = _meta_state("infinity_2b"), build_bsq_vae(_meta_state(VAES["infinity_8b"]), "x")
    with pytest.raises(
        CheckpointError, match="writes 32 bits a token and the VAE has 14 latent channels: it needs 32, or 8"
    ):
        build_infinity(state, "x", vae, grids=schedule().grids, rope_grid=(64, 64))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    """The golden transformer's tensors, and a folder to save them to."""
    return load_file(GOLDEN / "infinity-tall" / "infinity.safetensors"), tmp_path


def _golden(
    state: dict[str, Tensor] | None = None,
    path: Path = GOLDEN / "infinity-tall" / "infinity.safetensors",
    **options: Any,
) -> Infinity:
    if state is not None:
        save_file(state, path)
    vae = options.pop("vae", GOLDEN / "infinity-tall" / "vae.safetensors")
    return load_infinity(path, vae, **SCHEDULE, **options)


def _same(a: Infinity, b: Infinity) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_nested_sharded_and_renamed_files_are_the_same_model(files: tuple[dict[str, Tensor], Path]) -> None:
    state, folder = files
    expected = _golden()
    nested = folder / "training.pth"
    torch.save({"epoch": 3, "trainer": {"gpt_fsdp": state, "other": {"a": 1}}}, nested)
    assert _same(_golden(path=nested), expected)

    legacy = state | {"lvl_1L": torch.zeros(1, 4), "attn_bias_for_masking": torch.zeros(1, 1, 4, 4)}
    legacy = {
        key: value.permute(0, 2, 1, 3).contiguous() if key.endswith("scale_mul_1H11") else value
        for key, value in legacy.items()
    }
    assert _same(_golden(legacy, folder / "legacy.safetensors"), expected)

    per = {f"block_chunks.{i}.module.0.": f"blocks.{i}." for i in range(2)}
    flat = {
        next((new + key[len(old) :] for old, new in per.items() if key.startswith(old)), key): state[key]
        for key in state
    }
    assert _same(_golden(flat, folder / "flat.safetensors"), expected)

    shards, names = folder / "sharded", sorted(state)
    shards.mkdir()
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, shards / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert _same(_golden(path=shards), expected)

    vae = load_file(GOLDEN / "infinity-tall" / "vae.safetensors")
    torch.save({"vae": {released_name(key): value for key, value in vae.items()}}, folder / "vae.pth")
    assert _same(_golden(vae=folder / "vae.pth"), expected)
    by_name = backbones.load("infinity", nested, folder / "vae.pth", **SCHEDULE)
    assert isinstance(by_name, Infinity) and _same(by_name, expected)


def test_the_unconditional_text_is_cut_or_filled_up() -> None:
    learned = _golden().cfg_uncond
    assert learned.shape == (12, 256)
    assert torch.equal(_golden(text_maximum_tokens=5).cfg_uncond, learned[:5])
    longer = _golden(text_maximum_tokens=20)
    assert longer.spec.text_maximum_tokens == 20
    assert torch.equal(longer.cfg_uncond, torch.cat([learned, unconditional_text(20, 256)[12:]]))


def test_only_matrices_are_cast() -> None:
    model = _golden(dtype=torch.bfloat16, vae_dtype=torch.float16)
    halves = {name for name, p in model.state_dict().items() if p.dtype is torch.bfloat16}
    assert halves and all(name.startswith("blocks.") for name in halves)
    expected = _golden().set_precision(torch.bfloat16, decoder=torch.float16)
    assert _same(model, expected)
    assert {name for name, p in expected.state_dict().items() if p.dtype is torch.bfloat16} == halves
    assert next(model.vae.parameters()).dtype is torch.float16


def _wrong(change: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "block_chunks.1.module.0.ca.mat_q.weight"
    if change == "missing":
        del state[key], state["lvl_embed.weight"]
        state["lvl_embed.weight"] = torch.zeros(15, 48)
    elif change == "left over":
        state["block_chunks.0.module.0.ca_gamma"] = torch.ones(48)
        state["norm0_ve.weight"] = torch.ones(12)
    elif change == "shape":
        state["head.weight"] = torch.zeros(20, 48)
    elif change == "chunks":
        del state["block_chunks.1.module.0.ca.mat_q.weight"]
        state["block_chunks.1.module.1.sa.q_bias"] = torch.zeros(48)
    elif change == "other":
        return {"pos_1LC": torch.zeros(1, 2, 3)}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 missing: blocks\.1\.ca\.mat_q\.weight"),
        ("left over", r"2 left over: norm0_ve\.weight, blocks\.0\.ca_gamma|2 left over: blocks\.0\.ca_gamma, norm0_ve"),
        ("shape", r"1 of another shape: head_linear\.weight \[20, 48\] instead of \[24, 48\]"),
        ("chunks", r"block_chunks \(chunk: blocks\) are \{0: 1, 1: 2\}: every chunk must hold as many"),
        ("other", "this is a VAR transformer, expected an Infinity transformer"),
    ],
)
def test_what_does_not_fit_is_named(files: tuple[dict[str, Tensor], Path], change: str, message: str) -> None:
    state, folder = files
    with pytest.raises(CheckpointError, match=message) as caught:
        _golden(_wrong(change, state), folder / "wrong.safetensors")
    assert "\n" not in str(caught.value)


def test_a_vae_with_missing_or_doubled_keys_is_refused(tmp_path: Path) -> None:
    vae = load_file(GOLDEN / "infinity-tall" / "vae.safetensors")
    doubled = vae | {"decoder.conv_in.weight": vae["decoder.conv_in.conv.weight"].clone()}
    save_file(doubled, tmp_path / "doubled.safetensors")
    with pytest.raises(CheckpointError, match=r"holds decoder\.conv_in\.weight twice"):
        _golden(vae=tmp_path / "doubled.safetensors")
    for key in ("decoder.mid.block_1.norm1.norm.bias", "decoder.up.1.upsample.conv.conv.bias"):
        save_file({k: v for k, v in vae.items() if k != key}, tmp_path / "less.safetensors")
        with pytest.raises(CheckpointError, match=f"1 missing: {released_name(key)}".replace(".", r"\.")):
            _golden(vae=tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match="this is an Infinity transformer, expected an Infinity VAE"):
        _golden(vae=GOLDEN / "infinity-tall" / "infinity.safetensors")


def test_schedules_that_do_not_fit(files: tuple[dict[str, Tensor], Path]) -> None:
    vae = GOLDEN / "infinity-tall" / "vae.safetensors"
    checkpoint = GOLDEN / "infinity-tall" / "infinity.safetensors"
    with pytest.raises(InputError, match="give both, or neither"):
        load_infinity(checkpoint, vae, grids=[(1, 1)])
    with pytest.raises(InputError, match=r"begins with the grid \(2, 2\)"):
        load_infinity(checkpoint, vae, grids=[(2, 2)], rope_grid=(2, 2))
    with pytest.raises(InputError, match="schedule of 16 scales: the checkpoint has level embeddings for 15"):
        load_infinity(checkpoint, vae, grids=[(n, n) for n in range(1, 17)], rope_grid=(16, 16))
    assert load_infinity(checkpoint, vae, aspect=1.5, resolution="0.06M").spec.grids == schedule("1.5", "0.06M").grids
