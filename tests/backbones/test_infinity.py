"""Infinity beyond its golden cases: text layouts, the draw of bits, training, pruning, precision, graphs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.backbones.infinity_models import MAXIMUM_TOKENS, make_infinity, make_text
from tests.parity import main
from toprovar.backbones.base import Sampling
from toprovar.backbones.bsq_vae import bilinear
from toprovar.backbones.generate import Pruning, Trace, generate
from toprovar.backbones.infinity import Infinity, _rotate, masked_attention, rope_table, text_bias
from toprovar.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "infinity-tall"
ROLES = "gddg"


@pytest.fixture(scope="module")
def model() -> Infinity:
    return make_infinity()


@pytest.fixture(scope="module")
def patchy() -> Infinity:
    return make_infinity(patch=2)


def _noise(model: Infinity, images: int, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = [model.noise_shape(scale, images) for scale in range(model.spec.scales)]
    return [torch.rand(shape).clamp(1e-6, 1 - 1e-6) for shape in shapes]


def _run(model: Infinity, *condition: Tensor, images: int = 2, tokens: list[Tensor] | None = None) -> Trace:
    noise = None if tokens else _noise(model, images)
    return generate(model, model.prefix(*condition), noise=noise, tokens=tokens, record=("logits", "codes"))


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("array", "place", "offset"),
    [("forced/logits_raw", 5, 1e-3), ("cfg/cond_BD", 3, 1e-3), ("cfg/bits_2", 0, 1), ("encode/labels", 7, 1)],
)
def test_a_changed_array_fails(
    tmp_path: Path, array: str, place: int, offset: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "copy"))
    arrays = load_file(folder / "outputs.safetensors")
    flat = arrays[array].view(-1)
    flat[place] = flat[place] + offset if arrays[array].is_floating_point() else 1 - flat[place]
    save_file(arrays, folder / "outputs.safetensors")
    assert main([str(folder)]) == 1
    start = array.rsplit("_", 1)[0] if "bits" in array else array
    assert any(line.startswith(start) and "FAILED" in line for line in capsys.readouterr().out.splitlines())


# --------------------------------------------------------------------------------------------------------------- text


def test_padding_and_company_do_not_change_a_prompt(model: Infinity) -> None:
    features, lengths = make_text((3, 7, 1))
    together = _run(model, features, lengths, images=3)
    padded = F.pad(features, (0, 0, 0, MAXIMUM_TOKENS - 7), value=torch.nan)
    padded[0, 3:] = torch.inf
    filled = _run(model, padded, lengths, tokens=together.tokens)
    for scale in range(model.spec.scales):
        torch.testing.assert_close(filled.logits[scale], together.logits[scale], rtol=0, atol=1e-5)
    for image, length in enumerate(lengths.tolist()):
        alone = _run(model, features[image : image + 1, :length], lengths[image : image + 1],
                     tokens=[t[image : image + 1] for t in together.tokens])  # fmt: skip
        rows = [image, 3 + image]
        for scale in range(model.spec.scales):
            torch.testing.assert_close(alone.logits[scale], together.logits[scale][:, rows], rtol=0, atol=1e-5)


def test_masked_attention_is_attention_on_real_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 3, 2, 8), torch.randn(6, 3, 2, 8), torch.randn(6, 3, 2, 8)
    lengths = torch.tensor([6, 1, 4])
    out = masked_attention(q, k, v, text_bias(lengths, 6))
    for row, length in enumerate(lengths.tolist()):
        weights = torch.einsum("nhd,thd->hnt", q[:, row], k[:length, row]).mul(8**-0.5).softmax(-1)
        expected = torch.einsum("hnt,thd->nhd", weights, v[:length, row])
        torch.testing.assert_close(out[:, row], expected, rtol=0, atol=1e-6)


def test_the_unconditional_row_is_as_long_as_the_prompt(model: Infinity) -> None:
    features, lengths = make_text((3, 5))
    rows, row_lengths = model.text_rows(features, lengths)
    assert row_lengths.tolist() == [3, 5, 3, 5]
    assert torch.equal(rows[2, :3], model.cfg_uncond[:3]) and torch.equal(rows[3, :5], model.cfg_uncond[:5])


def test_negative_prompts_have_their_own_lengths_and_may_be_absent(model: Infinity) -> None:
    features, lengths = make_text((3, 5))
    negative, negative_lengths = make_text((2, 8), seed=2)
    rows, row_lengths = model.text_rows(features, lengths, negative, negative_lengths)
    assert row_lengths.tolist() == [3, 5, 2, 8] and rows.shape[1] == 8
    assert torch.equal(rows[2:], negative)
    assert torch.equal(rows[:2, :5], features)

    some = model.prefix(features, lengths, negative, torch.tensor([0, 8]))
    none, both = model.prefix(features, lengths), model.prefix(features, lengths, negative, negative_lengths)
    assert not torch.allclose(none.x0[:, 2], both.x0[:, 2], atol=1e-3)
    torch.testing.assert_close(some.x0[:, 2], none.x0[:, 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(some.x0[:, 3], both.x0[:, 3], rtol=0, atol=1e-5)


def test_a_negative_prompt_may_be_longer_than_the_learned_text(model: Infinity) -> None:
    features, lengths = make_text((2,))
    negative, negative_lengths = make_text((MAXIMUM_TOKENS + 4,), seed=2)
    assert model.prefix(features, lengths, negative, negative_lengths).context["cross_k"].shape[1] == MAXIMUM_TOKENS + 4


def test_unguided_runs_conditional_rows_alone() -> None:
    model = make_infinity()
    features, lengths = make_text((3, 5))
    guided = _run(model, features, lengths)
    model.sampling = Sampling(guided=False)
    alone = _run(model, features, lengths, tokens=guided.tokens)
    for scale in range(model.spec.scales):
        assert alone.logits[scale].shape[1] == 2
        torch.testing.assert_close(alone.logits[scale], guided.logits[scale][:, :2], rtol=0, atol=1e-5)


def test_conditions_that_do_not_fit_are_refused(model: Infinity) -> None:
    features, lengths = make_text((3,))
    with pytest.raises(InputError, match="3 tensors were given instead of 2 or 4"):
        model.prefix(features, lengths, features)
    with pytest.raises(InputError, match=r"expected \[B, T, 24\]"):
        model.prefix(features[..., :7], lengths)
    long, its_length = make_text((MAXIMUM_TOKENS + 1,))
    with pytest.raises(InputError, match="13 tokens: the checkpoint's learned unconditional text has 12"):
        model.prefix(long, its_length)


# ----------------------------------------------------------------------------------------------------------- the draw


def _logits(model: Infinity, tokens: int = 400) -> Tensor:
    """[N, R, V] with differences of guided logits between -6 and 6."""
    torch.manual_seed(2)
    return torch.randn(tokens, 2 * 3, model.spec.vocab)


def test_greedy_takes_the_larger_logit_and_zero_on_a_tie(model: Infinity) -> None:
    constants = model.scale_constants(2)
    logits = _logits(model)
    logits[7] = 0.0
    weights = constants["guidance"]
    pairs = (weights[0] * logits[:, :3] + weights[1] * logits[:, 3:]).unflatten(-1, (-1, 2))
    expected = (pairs[..., 1] > pairs[..., 0]).transpose(0, 1).int()
    assert torch.equal(model.sample(logits, None, constants), expected)
    assert not expected[:, 7].any()
    greedy = make_infinity()
    greedy.sampling = dataclasses.replace(model.sampling, top_k=1)
    assert torch.equal(greedy.sample(logits, torch.rand(400, 3, model.spec.vocab), constants), expected)


def test_bits_follow_the_filtered_probabilities(model: Infinity) -> None:
    constants = model.scale_constants(1)
    logits = _logits(model, 1)
    weights = constants["guidance"]
    pairs = (weights[0] * logits[:, :3] + weights[1] * logits[:, 3:]).unflatten(-1, (-1, 2))
    # The filter of the original, on two logits sorted upwards.
    ascending, order = pairs.sort(-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - model.sampling.top_p
    dropped[..., -1] = False
    kept = pairs.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    probability = kept.softmax(-1)[..., 1].transpose(0, 1)
    assert (probability == 0).any() and (probability == 1).any() and ((probability > 0.1) & (probability < 0.9)).any()

    draws = 4000
    torch.manual_seed(3)
    noise = torch.rand(draws, 3, model.spec.vocab).clamp(1e-7, 1 - 1e-7)
    drawn = model.sample(logits.expand(draws, -1, -1), noise, constants).double().mean(1)
    certain = (probability == 0) | (probability == 1)
    assert torch.equal(drawn[certain[:, 0]], probability[:, 0][certain[:, 0]].double())
    deviation = (probability * (1 - probability) / draws).sqrt()[:, 0]
    assert ((drawn - probability[:, 0]).abs() <= 5 * deviation + 1e-12).all()


def test_guidance_and_temperature_are_per_scale() -> None:
    model = make_infinity()
    model.sampling = Sampling(guidance=(1.0, 2.0, 3.0, 0.5), temperature=(1.0, 0.5, 2.0, 1.0))
    weights = [model.scale_constants(scale)["guidance"].tolist() for scale in range(4)]
    assert weights == [[1.0, 0.0], [4.0, -2.0], [1.5, -1.0], [0.5, 0.5]]
    assert model.noise_shape(3, 2) == (24, 2, model.spec.vocab)


# -------------------------------------------------------------------------------------------------------------- codes


def test_codes_of_patches_are_those_of_pixel_shuffle(patchy: Infinity) -> None:
    torch.manual_seed(0)
    h, w = patchy.spec.grids[2]
    tokens = torch.randint(0, 2, (2, h * w, patchy.spec.bits), dtype=torch.int32)
    maps = tokens.reshape(2, h, w, -1).permute(0, 3, 1, 2)
    expected = (2 * F.pixel_shuffle(maps.float(), 2) - 1) / patchy.spec.latent_channels**0.5
    codes = patchy.bits_to_codes(tokens, (h, w))
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-7)
    assert torch.equal(patchy.bits_to_tokens((codes > 0).int().permute(0, 2, 3, 1)), tokens)


@pytest.mark.parametrize("patch", [1, 2])
def test_accumulation_is_plain_bilinear_also_downwards(patch: int, model: Infinity, patchy: Infinity) -> None:
    backbone = model if patch == 1 else patchy
    spec = backbone.spec
    torch.manual_seed(0)
    codes = torch.randn(2, spec.latent_channels, *spec.latent_grid)
    for scale, (h, w) in enumerate(spec.grids):
        constants = backbone.scale_constants(scale)
        tokens = torch.randint(0, 2, (2, h * w, spec.bits))
        expected = codes + bilinear(backbone.bits_to_codes(tokens, (h, w)), spec.latent_grid)
        torch.testing.assert_close(backbone.accumulate(tokens, codes, constants), expected, rtol=0, atol=1e-5)
        if scale + 1 < spec.scales:
            after = spec.grids[scale + 1]
            small = bilinear(codes, (patch * after[0], patch * after[1]))
            small = F.pixel_unshuffle(small, 2) if patch == 2 else small
            words = backbone.next_words(codes, constants)
            torch.testing.assert_close(words, small.flatten(2).permute(2, 0, 1), rtol=0, atol=1e-5)
        else:
            assert "down_rows" not in constants and "next_position" not in constants


def test_a_dropped_last_scale_still_decodes(model: Infinity) -> None:
    prefix = model.prefix(*make_text((3, 5)))
    keep = model.spec.tokens
    trace = generate(model, prefix, pruning=Pruning("gggg", keep, None, "identity", scales_run=(0, 1, 2)))
    assert trace.image is not None and trace.image.shape == (2, 3, *model.spec.image_size)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("level_starts", [(), (2,)])
def test_the_training_forward_equals_the_cached_loop(patch: int, level_starts: tuple[int, ...]) -> None:
    model = make_infinity(patch=patch, level_starts=level_starts, encoder=True)
    condition = make_text((3, 7))
    torch.manual_seed(4)
    image = torch.rand(2, 3, *model.spec.image_size) * 2 - 1
    grids = [(patch * h, patch * w) for h, w in model.spec.grids]
    coded = model.vae.encode(image, grids)
    model.sampling = Sampling(guided=False)
    tokens = [model.bits_to_tokens(bits) for bits in coded.bits]
    trace = _run(model, *condition, tokens=tokens)
    logits = model.forward_training(*condition, model.training_inputs(coded.inputs))
    torch.testing.assert_close(logits, torch.cat(trace.logits).transpose(0, 1), rtol=0, atol=2e-5)
    torch.testing.assert_close(trace.codes[-1], coded.codes, rtol=0, atol=1e-5)

    first = model.training_inputs(coded.inputs[:1])
    short = model.forward_training(*condition, first, scales=2)
    torch.testing.assert_close(short, logits[:, :5], rtol=0, atol=2e-5)


def test_dropped_text_is_the_unconditional_one(model: Infinity) -> None:
    features, lengths = make_text((3, 7))
    prefix = model.prefix(features, lengths)
    tokens = [torch.zeros(2, n, model.spec.bits, dtype=torch.int32) for n in model.spec.tokens]
    unconditional = torch.cat(generate(model, prefix, tokens=tokens, record=("logits",)).logits)[:, 2:]
    inputs = torch.cat(
        [
            model.next_words(codes, model.scale_constants(scale))
            for scale, codes in enumerate(generate(model, prefix, tokens=tokens, record=("codes",)).codes[:-1])
        ]
    ).transpose(0, 1)
    logits = model.forward_training(features, lengths, inputs, drop=torch.tensor([False, True]))
    torch.testing.assert_close(logits[1], unconditional[:, 1], rtol=0, atol=2e-5)
    assert not torch.allclose(logits[0], unconditional[:, 0], atol=1e-2)


def test_every_parameter_of_the_transformer_gets_a_gradient() -> None:
    model = make_infinity().requires_grad_(True)
    features, lengths = make_text((3, 7))
    inputs = torch.randn(2, sum(model.spec.tokens) - 1, model.spec.bits)
    logits = model.forward_training(features, lengths, inputs, drop=torch.tensor([False, True]))
    logits.square().mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith("vae.") and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []
    with pytest.raises(InputError, match=r"expected \[B, 34, 4\]"):
        model.forward_training(features, lengths, inputs[:, :-1])


# --------------------------------------------------------------------------------------------------- positions, levels


def test_rope_turns_pairs_by_row_and_column() -> None:
    grid, rope_grid, head_dim = (3, 2), (78, 52), 16
    table = rope_table(grid, rope_grid, head_dim)
    assert table.shape == (6, 1, 32)
    for token in range(6):
        row, col = round(token // 2 * 26.0), round(token % 2 * 26.0)
        frequencies = [10000.0 ** (-2 * j / 8) for j in range(4)]
        angles = np.array([row * f for f in frequencies] + [col * f for f in frequencies])
        cosines, sines = table[token, 0].numpy().reshape(2, 8, 2).transpose(0, 2, 1)
        np.testing.assert_allclose(cosines, [np.cos(angles)] * 2, rtol=0, atol=1e-5)
        np.testing.assert_allclose(sines, [-np.sin(angles), np.sin(angles)], rtol=0, atol=1e-5)


def test_pairs_are_rotated(model: Infinity) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(6, 2, 3, 16), rope_table((3, 2), (78, 52), 16)
    turned = _rotate(x, table[..., None, :16], table[..., None, 16:])
    angle = torch.complex(table[..., None, 0:16:2], table[..., None, 17::2])
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angle).flatten(-2)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


def test_kept_tokens_keep_their_positions(model: Infinity) -> None:
    torch.manual_seed(0)
    x, rope = torch.randn(24, 4, 48), model.rope(3)
    kept = torch.tensor([0, 5, 6, 17, 23])
    attention = model.blocks[1].sa
    for whole, part in zip(attention.qkv(x, rope), attention.qkv(x[kept], rope[kept].expand(-1, 4, -1)), strict=True):
        torch.testing.assert_close(part, whole[kept], rtol=0, atol=1e-6)


def test_a_pruning_that_keeps_everything_is_the_dense_model(model: Infinity) -> None:
    prefix = model.prefix(*make_text((3, 5)))
    noise = _noise(model, 2)
    dense = generate(model, prefix, noise=noise)
    same = generate(model, prefix, noise=noise, pruning=Pruning(ROLES, model.spec.tokens, 1))
    assert all(torch.equal(a, b) for a, b in zip(dense.tokens, same.tokens, strict=True))
    pruned = generate(
        model, prefix, noise=noise, pruning=Pruning(ROLES, (1, 4, 6, 9), 2), record=("kept", "logits", "span_deltas")
    )
    assert pruned.kept[3][0].shape == (2, 9)
    assert pruned.logits[3].isfinite().all()


def test_level_embeddings_of_later_chunks() -> None:
    model, plain = make_infinity(level_starts=(2,)), make_infinity()
    assert model.spec.rope_width == 33
    torch.manual_seed(0)
    x, past = torch.randn(6, 4, 48), torch.zeros(0, 4, 3, 16)
    context = model.prefix(*make_text((3, 5))).context
    rope = model.rope(2)
    assert (rope[..., -1] == 2).all()
    added = model.blocks[2](x, model.layer_context(2, context), past, past, rope=rope)
    level = plain.lvl_embed.weight[2]
    by_hand = plain.blocks[2](x + level, plain.layer_context(2, context), past, past, rope=plain.rope(2))
    torch.testing.assert_close(added.x, by_hand.x, rtol=0, atol=1e-5)
    assert "levels" not in model.layer_context(1, context)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_matrices_keep_an_fp32_stream(dtype: torch.dtype) -> None:
    model = make_infinity()
    condition = make_text((3, 5))
    reference = _run(model, *condition)
    tables = {
        name for name, p in model.named_parameters() if ".ada_gss" in name or "scale_mul" in name or "ca_norm" in name
    }
    model.set_precision(dtype)
    assert model.dtype is dtype
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name in tables)
    prefix = model.prefix(*condition)
    assert prefix.context["cross_k"].dtype is dtype and prefix.context["modulation"].dtype is torch.float32
    trace = generate(model, prefix, tokens=reference.tokens, record=("logits", "inputs", "hidden"), entropy="mean")
    assert {t.dtype for scale in trace.hidden for t in scale} == {torch.float32}
    assert trace.logits[0].dtype is torch.float32 and trace.entropy[0][0].dtype is torch.float32
    worst = max(
        (a - b).abs().max().item() / b.abs().max().item() for a, b in zip(trace.logits, reference.logits, strict=True)
    )
    assert 0 < worst < (0.05 if dtype is torch.bfloat16 else 0.01)
    # The model as a whole in half precision: coarser, and it runs.
    everything = generate(make_infinity().to(dtype), prefix, tokens=reference.tokens, record=("logits",))
    assert everything.logits[-1].dtype is torch.float32 and everything.logits[-1].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.slow
def test_the_graphs_equal_the_model(tmp_path: Path) -> None:
    """Prefix, pruned steps, advance and decoder in ONNX Runtime, for two prompts of unequal lengths."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from toprovar.backbones.base import restore_constants
    from toprovar.exporter.graph import GraphExporter, save_graph

    model = make_infinity(patch=2, depth=3, level_starts=(2,))
    spec, roles, keep, cache, images = model.spec, "gdg", (1, 4, 6, 9), 2, 2
    exporter, sessions = GraphExporter(model), {}
    for name in ("prefix", "step", "advance", "decoder"):
        save_graph(exporter.graph(name, roles), tmp_path / f"{name}.onnx", {})
        sessions[name] = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")

    def call(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        session = sessions[name]
        inputs = {port.name: tensors[port.name].numpy() for port in session.get_inputs()}
        outputs = session.run(None, inputs)
        return {port.name: torch.from_numpy(array) for port, array in zip(session.get_outputs(), outputs, strict=True)}

    features, lengths = make_text((6, 2))
    noise = _noise(model, images)
    expected = generate(model, model.prefix(features, lengths), noise=noise, pruning=Pruning(roles, keep, cache))
    context = call("prefix", {"text_features": features, "text_lengths": lengths.int()})
    x, codes = context.pop("x"), model.initial_codes(images)
    empty = torch.zeros(0, 2 * images, spec.heads, spec.head_dim)
    past = {f"past_{kind}_{layer}": empty for layer in range(spec.depth) for kind in "kv"}
    span = torch.zeros(1, 2 * images, spec.width)
    for scale, (h, w) in enumerate(spec.grids):
        rows, cols = restore_constants(spec, scale, cache) if scale > cache else (torch.zeros(h, 1), torch.zeros(w, 1))
        constants = model.scale_constants(scale, (scale + 1) % spec.scales)
        area = {"keep_slots": torch.zeros(keep[scale], dtype=torch.int32), "area_rows": rows, "area_cols": cols}
        step = call("step", {"x": x, **context, **constants, **area, **past, "span_cache_0": span})
        if scale == cache:
            span = step["span_delta_0"]
        past = {name: torch.cat([old, step[name.replace("past", "new")]]) for name, old in past.items()}
        given = {"logits": step["logits"], "noise": noise[scale], "codes": codes, **constants}
        advance = call("advance", given)
        assert torch.equal(advance["tokens"], expected.tokens[scale])
        codes, x = advance["codes_out"], advance["next_x"]
    assert expected.image is not None
    torch.testing.assert_close(call("decoder", {"codes": codes})["image"], expected.image, rtol=0, atol=1e-5)
