"""Parity of Infinity with a folder of golden outputs; `python -m tests.parity DIR` runs it.

Each variant is replayed with the recorded bits, which makes every array a function of given inputs: logits, hidden
states, code maps, pictures and entropies are compared, and the bits that our logits would draw. Greedy variants then
run free as well (rows marked "free").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.parity import CODES, EQUAL, HIDDEN, IMAGE, Golden, Report
from toprovar.backbones import infinity
from toprovar.backbones.base import Prefix, Sampling, guide
from toprovar.backbones.generate import Trace, generate
from toprovar.backbones.infinity import Infinity, load_infinity
from toprovar.backbones.text import TextFeatures
from toprovar.errors import ToprovarError

__all__ = ["infinity_report", "load_golden_infinity", "recorded_bits"]

LOGITS = 2e-4
ENTROPY = 1e-4
PROBABILITY = 1e-3
MARGIN = 1e-3  # a bit whose logits are nearer to each other may be drawn either way
INFORMATION = float("inf")


def infinity_report(golden: Golden) -> Report:
    """Every variant of an Infinity folder."""
    report = Report(golden)
    report.compared |= {"text_features", "text_lens", "neg_text_features", "neg_text_lens"}
    model = load_golden_infinity(golden)
    report.check("sizes inferred from the files", _wrong_sizes(model, golden.config["config"]))
    for variant, arguments in golden.variants().items():
        _variant(report, model, variant, arguments)
    _picture_to_bits(report, model)
    return report


def load_golden_infinity(golden: Golden) -> Infinity:
    """The folder's model, under its schedule."""
    config = golden.config["config"]
    mode = config.get("rope2d_normalized_by_hw", 2)
    if mode != 2:
        raise ToprovarError(f"{golden.folder}: RoPE mode {mode} is in no release: only mode 2 is known")
    height, width = golden.config["rope_norm_hw"]
    return load_infinity(
        golden.file("infinity"),
        golden.file("vae"),
        grids=[(h, w) for _, h, w in golden.config["scale_schedule"]],
        rope_grid=(height, width),
        level_every_chunk=not config.get("add_lvl_embeding_only_first_block", 1),
        text_maximum_tokens=config.get("text_maxlen"),
        encoder=True,
    )


def _wrong_sizes(model: Infinity, config: dict[str, Any]) -> list[str]:
    spec, vae = model.spec, model.vae.spec
    found = {
        "depth": spec.depth,
        "embed_dim": spec.width,
        "num_heads": spec.heads,
        "text_channels": spec.text_width,
        "codebook_dim": spec.latent_channels,
        "apply_spatial_patchify": int(spec.patch == 2),
        "base_ch": vae.base_channels,
        "ch_mult": list(vae.multipliers),
        "patch_size": vae.stride,
    }
    return [
        f"{name} {value}, expected {config[name]}" for name, value in found.items() if config.get(name, value) != value
    ]


def recorded_bits(golden: Golden, model: Infinity, variant: str) -> list[Tensor]:
    """Recorded bits as tokens `[B, N, bits]`, a scale each; those of `forced` where a variant has none of its own."""
    name = variant if f"{variant}/bits_0" in golden.arrays else "forced"
    patch, tokens = model.spec.patch, []
    for scale, (h, w) in enumerate(model.spec.grids):
        maps = golden.arrays[f"{name}/bits_{scale}"]  # [B, p*h, p*w, d]
        cells = maps.reshape(maps.shape[0], h, patch, w, patch, -1).permute(0, 1, 3, 5, 2, 4)
        tokens.append(cells.reshape(maps.shape[0], h * w, -1))
    return tokens


def _prefix(golden: Golden, model: Infinity, variant: str) -> tuple[Prefix, Tensor, Tensor]:
    """Prefix; and the text rows it was made of, `[R, T, text_width]`, with their lengths."""
    arrays = golden.arrays
    text = TextFeatures.from_packed(arrays["text_features"], arrays["text_lens"])
    condition = [text.features, text.lengths]
    if variant.startswith("neg"):
        negative = TextFeatures.from_packed(arrays["neg_text_features"], arrays["neg_text_lens"])
        condition += [negative.features, negative.lengths]
    return (model.prefix(*condition), *model.text_rows(*condition))


def _variant(report: Report, model: Infinity, variant: str, arguments: dict[str, Any]) -> None:
    golden, scales = report.golden, model.spec.scales
    guidance = tuple(float(x) for x in arguments["cfg_list"][:scales])
    temperature = tuple(float(x) for x in arguments["tau_list"][:scales])
    model.sampling = Sampling(
        guidance=guidance,
        temperature=temperature,
        top_k=int(arguments["top_k"]),
        top_p=float(arguments["top_p"]),
        guided=any(x != 1 for x in guidance),
    )
    has_bits = f"{variant}/bits_0" in golden.arrays
    if not has_bits and "forced/bits_0" not in golden.arrays:
        return
    rounded = variant.endswith("bf16ca")
    bits = recorded_bits(golden, model, variant)
    with _rounded() if rounded else _watched() as seen:
        prefix, text, lengths = _prefix(golden, model, variant)
        wants = ("logits", "codes", "inputs", "hidden")
        decode = f"{variant}/image" in golden.arrays
        trace = generate(model, prefix, tokens=bits, entropy="head", record=wants, decode=decode)
    if rounded:
        # Which fp32 sums are rounded to bf16, and when, is the original's kernel; how near ours comes is no criterion.
        report.compare(f"{variant}/logits_raw", torch.cat(trace.logits).transpose(0, 1), INFORMATION)
        guided = torch.cat([_guided(model, s, logits) for s, logits in enumerate(trace.logits)])
        report.compare(f"{variant}/logits_cfg", guided.transpose(0, 1), INFORMATION)
        return
    _compare_text(report, model, variant, text, lengths, seen)
    _compare_trace(report, model, variant, trace)
    if has_bits:
        report.compared |= {name for name in golden.arrays if name.startswith(f"{variant}/bits_")}
        given = "gt_leak" in arguments
        _compare_draws(report, model, variant, trace, bits, greedy=model.sampling.top_k == 1 and not given)
        if model.sampling.top_k == 1 and not given:
            _compare_free(report, model, variant, prefix, bits)


def _guided(model: Infinity, scale: int, logits: Tensor) -> Tensor:
    return guide(logits, model.scale_constants(scale)["guidance"])


def _difference(model: Infinity, scale: int, logits: Tensor) -> Tensor:
    """Guided logit of 1 minus that of 0, `[B, N, bits]`."""
    return _guided(model, scale, logits).unflatten(-1, (-1, 2)).diff(dim=-1)[..., 0].transpose(0, 1)


def _compare_text(
    report: Report, model: Infinity, variant: str, text: Tensor, lengths: Tensor, seen: dict[str, list[Tensor]]
) -> None:
    pooled, source, _ = model.condition(text, lengths)
    report.compare(f"{variant}/cond_BD", pooled, HIDDEN)
    packed = torch.cat([source[:length, row] for row, length in enumerate(lengths.tolist())])
    report.compare(f"{variant}/ca_kv", packed, HIDDEN)
    report.compare(f"{variant}/pool_attn_entropy", seen["attention"][0][..., 0], ENTROPY)
    layers = seen["attention"][1:]  # one call a layer and scale, [R, H, N]
    per_query = torch.stack([torch.cat(layers[layer :: model.spec.depth], -1) for layer in range(model.spec.depth)])
    report.compare(f"{variant}/cross_attn_entropy_per_query", per_query, ENTROPY)
    report.compare(f"{variant}/cross_attn_entropy_per_head", _scale_means(model, per_query), ENTROPY)


def _compare_trace(report: Report, model: Infinity, variant: str, trace: Trace) -> None:
    spec, arrays = model.spec, report.golden.arrays

    def by_row(parts: Sequence[Tensor]) -> Tensor:  # [N, R, *] a scale -> [R, L, *]
        return torch.cat(list(parts)).transpose(0, 1)

    report.compare(f"{variant}/x_in", by_row(trace.inputs), HIDDEN)
    for layer in range(spec.depth):
        name = f"{variant}/hidden_{layer}"
        # They grow with the depth: relative to the greatest.
        allowed = HIDDEN * max(1.0, float(arrays[name].abs().max())) if name in arrays else HIDDEN
        report.compare(name, by_row([hidden[layer] for hidden in trace.hidden]), allowed)
    report.compare(f"{variant}/logits_raw", by_row(trace.logits), LOGITS)
    # Guidance is (g conditional + (1 - g) unconditional) / temperature, and multiplies the error of raw logits.
    sampling = model.sampling
    factors = [
        (abs(g) + abs(1 - g) if sampling.guided else 1.0) / sampling.at("temperature", s)
        for s in range(spec.scales)
        for g in [sampling.at("guidance", s)]
    ]
    guided = by_row([_guided(model, s, logits) for s, logits in enumerate(trace.logits)])
    report.compare(f"{variant}/logits_cfg", guided, LOGITS * max(factors))

    words = []
    for scale, codes in enumerate(trace.codes):
        constants = model.scale_constants(scale)
        report.compare(f"{variant}/codes_{scale}", model.bits_to_codes(trace.tokens[scale], spec.grids[scale]), CODES)
        if scale + 1 < spec.scales:
            words.append(model.next_words(codes, constants))
    report.compare(f"{variant}/word_embed_in", by_row(words), CODES)
    report.compare(f"{variant}/summed_codes", trace.codes[-1], CODES)
    if trace.image is not None:
        report.compare(f"{variant}/image", trace.image * 2 - 1, IMAGE)
        if f"{variant}/summed_codes" in arrays:
            picture = model.vae.decode(arrays[f"{variant}/summed_codes"])
            report.compare(f"{variant}/image", picture, IMAGE, "(of the recorded codes)")
    name = f"{variant}/image_u8_bgr"
    if trace.image is not None and name in arrays:
        ours = (trace.image * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(3)
        # Truncated: a value next to an integer may fall on either side of it.
        far = (ours.int() - arrays[name].int()).abs() > 1
        report.compared.add(name)
        report.check(name, [f"{int(far.sum())} values are further than 1 from the recorded ones"] if far.any() else [])

    layers = [torch.cat([scale[layer] for scale in trace.entropy], -1) for layer in range(spec.depth)]
    per_query = torch.stack(layers)  # [layer, R, H, L]
    per_head = _scale_means(model, per_query)
    report.compare(f"{variant}/attn_entropy_per_query", per_query, ENTROPY)
    report.compare(f"{variant}/attn_entropy_per_head", per_head, ENTROPY)
    report.compare(f"{variant}/attn_entropy", per_head.mean(-1), ENTROPY)


def _scale_means(model: Infinity, per_query: Tensor) -> Tensor:
    """`[layer, R, H, L]` -> mean over the queries of each scale, `[scale, layer, R, H]`."""
    return torch.stack([part.mean(-1) for part in per_query.split(list(model.spec.tokens), -1)])


def _compare_draws(
    report: Report, model: Infinity, variant: str, trace: Trace, bits: Sequence[Tensor], *, greedy: bool
) -> None:
    """What our logits draw: greedily, and under noise that pushes every bit to 0 and then to 1."""
    least, most = 2.0**-24, 1 - 2.0**-24
    probabilities, problems = [], []
    for scale, logits in enumerate(trace.logits):
        constants = model.scale_constants(scale)
        difference = _difference(model, scale, logits)
        if greedy:
            wrong = (model.sample(logits, None, constants) != bits[scale]) & (difference.abs() >= MARGIN)
            if wrong.any():
                problems.append(
                    f"scale {scale}: {int(wrong.sum())} bits of margin {MARGIN:g} or more are drawn differently"
                )
        shape = model.noise_shape(scale, bits[scale].shape[0])
        low, high = (
            model.sample(logits, torch.tensor(pair).repeat(shape[-1] // 2).expand(shape), constants)
            for pair in ([most, least], [least, most])
        )
        # A bit that no noise can move is certain; any other has the probability of its two logits.
        probabilities.append(torch.where(low == high, high.double(), torch.sigmoid(difference.double())))
    if greedy:
        report.check(f"{variant}/bits drawn", problems)
    name = f"{variant}/probs_filtered"
    if name in report.golden.arrays:
        one, expected = torch.cat(probabilities, 1), report.golden.arrays[name].unflatten(-1, (-1, 2))[..., 1].double()
        # Where the lesser probability is that of the filter itself, a rounding decides whether it is kept.
        lesser = torch.minimum(one, 1 - one), torch.minimum(expected, 1 - expected)
        edge = (torch.minimum(*lesser) == 0) & ((torch.maximum(*lesser) - (1 - model.sampling.top_p)).abs() < 1e-4)
        one = torch.where(edge, expected, one)
        report.compare(name, torch.stack([1 - one, one], -1).flatten(-2), PROBABILITY)


def _compare_free(report: Report, model: Infinity, variant: str, prefix: Prefix, bits: Sequence[Tensor]) -> None:
    """Greedy generation without a teacher: equal bits, up to a scale where one lies within the margin."""
    free = generate(model, prefix, record=("logits",), decode=False)
    for scale, (ours, expected) in enumerate(zip(free.tokens, bits, strict=True)):
        differs = ours != expected
        if differs.any():
            wrong = differs & (_difference(model, scale, free.logits[scale]).abs() >= MARGIN)
            problems = [f"scale {scale}: {int(wrong.sum())} bits differ"] if wrong.any() else []
            report.check(f"{variant}/bits (free, up to scale {scale})", problems)
            return
    report.check(f"{variant}/bits (free)", [])


def _picture_to_bits(report: Report, model: Infinity) -> None:
    """The encoder, its bits, and the training forward, where a folder has them (ours has, the first ones have not)."""
    golden, arrays, spec = report.golden, report.golden.arrays, model.spec
    if "encode/image" not in arrays:
        return
    report.compared.add("encode/image")
    report.compare("encode/features", model.vae.features(arrays["encode/image"]), HIDDEN)
    latent_grids = [(h * spec.patch, w * spec.patch) for h, w in spec.grids]
    coded = model.vae.quantizer(arrays["encode/features"], latent_grids)
    report.compare("encode/codes", coded.codes, CODES)
    report.compare("encode/recon", model.vae.decode(coded.codes), IMAGE)
    report.compare("encode/inputs", model.training_inputs(coded.inputs), CODES)
    labels = torch.cat([model.bits_to_tokens(bits) for bits in coded.bits], 1)
    report.compare("encode/labels", labels, EQUAL)
    text = TextFeatures.from_packed(arrays["text_features"], arrays["text_lens"])
    if "train/logits" in golden.arrays:
        logits = model.forward_training(text.features, text.lengths, arrays["encode/inputs"])
        report.compare("train/logits", logits, LOGITS)


# ------------------------------------------------------------------------------------------------ looking at the text


@contextmanager
def _watched() -> Iterator[dict[str, list[Tensor]]]:
    """Collects the entropy of every attention to text, `[R, H, n]`; the first call is the pooling in `prefix`."""
    seen: dict[str, list[Tensor]] = {"attention": []}
    original = infinity.masked_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.einsum("nrhd,trhd->rhnt", q, k) * q.shape[-1] ** -0.5 + bias[:, None, None, :]
        log = scores.double().log_softmax(-1)
        seen["attention"].append(-(log.exp() * log).sum(-1))
        return original(q, k, v, bias)

    with mock.patch.object(infinity, "masked_attention", watched):
        yield seen


@contextmanager
def _rounded() -> Iterator[dict[str, list[Tensor]]]:
    """Attention to text with bf16 inputs and outputs, as the original has it even in fp32."""
    original = infinity.masked_attention

    def rounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.bfloat16().float() for t in (q, k, v))
        return original(q, k, v, bias).bfloat16().float()

    with mock.patch.object(infinity, "masked_attention", rounded):
        yield {}
