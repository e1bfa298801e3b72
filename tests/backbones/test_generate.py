"""The loop over scales: draws, teacher forcing, pruning, dropped scales, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.backbones.conftest import make_var
from toprovar.backbones.base import Backbone, Prefix, Sampling
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.var import VAR
from toprovar.errors import InputError

LABELS = torch.tensor([3, 7])
ALL = ("codes", "hidden", "inputs", "kept", "logits", "span_deltas")


def noise_of(seed: int):
    def noise(scale: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + scale)
        return torch.rand(shape, generator=generator).clamp(2.0**-24, 1 - 2.0**-24)

    return noise


def test_noise_decides_the_picture(model: VAR) -> None:
    prefix = model.prefix(LABELS)
    one, same, other = (generate(model, prefix, noise=noise_of(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.image, same.image)
    assert not torch.equal(one.image, other.image)
    assert list(one.image.shape) == [2, 3, 24, 24]
    assert one.image.min() >= 0 and one.image.max() <= 1
    assert [list(t.shape) for t in one.tokens] == [[2, n] for n in model.spec.tokens]


def test_an_image_does_not_depend_on_its_neighbours(model: VAR) -> None:
    noise = [noise_of(5)(s, model.noise_shape(s, 2)) for s in range(model.spec.scales)]
    both = generate(model, model.prefix(LABELS), noise=noise)
    alone = generate(model, model.prefix(LABELS[1:]), noise=[n[:, 1:] for n in noise])
    assert all(torch.equal(a[1:], b) for a, b in zip(both.tokens, alone.tokens, strict=True))
    torch.testing.assert_close(both.image[1:], alone.image, atol=1e-5, rtol=0)


def test_no_noise_and_top_k_1_are_greedy(model: VAR) -> None:
    prefix = model.prefix(LABELS)
    greedy = generate(model, prefix)
    model.sampling, before = replace(model.sampling, top_k=1), model.sampling
    try:
        drawn = generate(model, prefix, noise=noise_of(3))
    finally:
        model.sampling = before
    assert all(torch.equal(a, b) for a, b in zip(greedy.tokens, drawn.tokens, strict=True))


def test_tokens_fed_back_give_the_same_logits_and_picture(model: VAR) -> None:
    prefix = model.prefix(LABELS)
    free = generate(model, prefix, noise=noise_of(4), record=ALL)
    forced = generate(model, prefix, tokens=free.tokens, record=ALL)
    assert all(torch.equal(a, b) for a, b in zip(free.logits, forced.logits, strict=True))
    assert torch.equal(free.image, forced.image)


def test_the_masked_form_of_training_gives_the_same_logits() -> None:
    for options in ({}, {"shared_aln": True, "cosine": False}, {"patch_nums": (2, 3, 5)}):
        model = make_var(**options)
        trace = generate(model, model.prefix(LABELS), noise=noise_of(2), record=("logits",))
        teacher = model.vae.quantize.teacher_input([t.long() for t in trace.tokens])
        logits = model.forward_training(LABELS, teacher)
        expected = torch.cat(trace.logits).transpose(0, 1)[:2]
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_without_guidance_only_conditional_rows_run(model: VAR) -> None:
    other = make_var()
    other.sampling = Sampling(guidance=0.0, guided=False)
    model.sampling, before = Sampling(guidance=0.0), model.sampling
    try:
        guided = generate(model, model.prefix(LABELS), record=("logits",))
    finally:
        model.sampling = before
    alone = generate(other, other.prefix(LABELS), record=("logits",))
    assert alone.logits[-1].shape[1] == 2 and guided.logits[-1].shape[1] == 4
    torch.testing.assert_close(alone.logits[-1], guided.logits[-1][:, :2], atol=5e-5, rtol=0)


def test_keeping_every_token_is_the_dense_model(model: VAR) -> None:
    prefix = model.prefix(LABELS)
    dense = generate(model, prefix, noise=noise_of(6), record=ALL)
    for restore in ("cache", "identity"):
        pruning = Pruning("gdgdd", model.spec.tokens, cache_scale=2, restore=restore)
        pruned = generate(model, prefix, noise=noise_of(6), pruning=pruning, record=ALL)
        assert all(torch.equal(a, b) for a, b in zip(dense.tokens, pruned.tokens, strict=True))
        torch.testing.assert_close(pruned.logits[-1], dense.logits[-1], atol=5e-5, rtol=0)


def test_pruned_scales_shrink_only_the_past_of_detail_layers(model: VAR) -> None:
    keep = (1, 4, 9, 5, 12)
    pruning = Pruning("gddgd", keep, cache_scale=2)
    trace = generate(model, model.prefix(LABELS), noise=noise_of(1), pruning=pruning, record=ALL, entropy="mean")
    for index, (n, k) in enumerate(zip(model.spec.tokens, keep, strict=True)):
        assert [h.shape[0] for h in trace.hidden[index]] == [n, k, k, n, k]
        assert [list(e.shape) for e in trace.entropy[index]] == [[4, m] for m in (n, k, k, n, k)]
        assert [list(i.shape) for i in trace.kept[index]] == [[2, k]] * 2
        assert [list(d.shape) for d in trace.span_deltas[index]] == [[k, 4, 64]] * 2
    dense = generate(model, model.prefix(LABELS), noise=noise_of(1))
    assert all(torch.equal(a, b) for a, b in zip(dense.tokens[:3], trace.tokens[:3], strict=True))
    assert not torch.equal(dense.tokens[3], trace.tokens[3])


def test_dropped_scales_leave_the_picture_of_the_codes_so_far(model: VAR) -> None:
    prefix = model.prefix(LABELS)
    full = generate(model, prefix, noise=noise_of(1), record=("codes",))
    pruning = Pruning("ggggg", model.spec.tokens, scales_run=(0, 1, 2))
    short = generate(model, prefix, noise=noise_of(1), pruning=pruning)
    assert short.scales == [0, 1, 2]
    assert torch.equal(short.codes[-1], full.codes[2])
    torch.testing.assert_close(short.image, model.decode(full.codes[2]))


def test_a_scale_left_out_in_between(model: VAR) -> None:
    pruning = Pruning("ggggg", model.spec.tokens, scales_run=(0, 1, 3, 4))
    trace = generate(model, model.prefix(LABELS), pruning=pruning, record=ALL)
    assert [t.shape[1] for t in trace.tokens] == [1, 4, 16, 36]
    assert [x.shape[0] for x in trace.inputs] == [1, 4, 16, 36]


def test_progress_is_reported_after_each_scale(model: VAR) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        model,
        model.prefix(LABELS),
        after_scale=lambda scale, trace: seen.append((scale, len(trace.tokens))),
        decode=False,
    )
    assert seen == [(s, s + 1) for s in range(model.spec.scales)]


def test_smooth_sampling_mixes_codes(model: VAR) -> None:
    gumbel_noise = [torch.randn(n, 2, model.spec.vocab) for n in model.spec.tokens]
    trace = generate(
        model, model.prefix(LABELS), mixture=lambda s, logits: model.mixed_codes(s, logits, gumbel_noise[s]), record=ALL
    )
    plain = generate(model, model.prefix(LABELS), record=ALL)
    assert not torch.equal(trace.codes[0], plain.codes[0])
    vectors = model.mixed_codes(0, trace.logits[0], gumbel_noise[0])
    expected = model.accumulate_vectors(vectors, model.initial_codes(2), model.scale_constants(0))
    assert torch.equal(trace.codes[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning": Pruning("ggggg", (1, 4))}, "keeps tokens at 2 scales: the schedule has 5"),
        ({"pruning": Pruning("ggggg", (1, 4, 9, 0, 1))}, "keeps 0 tokens at scale 3: K is 1 to 16"),
        ({"pruning": Pruning("gdggg", (1, 4, 9, 8, 8))}, "cache_scale is None"),
        ({"pruning": Pruning("gdggg", (1, 4, 9, 8, 8), cache_scale=3)}, "before the first pruned one, 3"),
        ({"pruning": Pruning("ggggg", (1, 4, 9, 16, 36), scales_run=(1, 2))}, "ascending scales from 0"),
        ({"record": ("attention",)}, "it records codes, "),
        ({"tokens": [torch.zeros(2, 1)]}, "tokens of 1 scales were given, 5 are run"),
        ({"noise": [torch.rand(1, 2, 7)] * 5}, r"noise of scale 0 is \[1, 2, 7\]: expected \[1, 2, 48\]"),
        ({"tokens": [torch.zeros(2, 3, dtype=torch.int32)] * 5}, r"tokens of scale 0 are \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(model: VAR, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, model.prefix(LABELS), **options)


def test_mixing_needs_a_codebook(model: VAR) -> None:
    with pytest.raises(InputError, match="has no codebook to mix"):
        Backbone.accumulate_vectors(model, torch.zeros(1), torch.zeros(1), {})


def test_half_precision_makes_nearly_the_same_picture() -> None:
    model = make_var()
    exact = generate(model, model.prefix(LABELS), noise=noise_of(1))
    model.set_precision(torch.bfloat16, decoder=torch.bfloat16)
    prefix = model.prefix(LABELS)
    assert isinstance(prefix, Prefix) and prefix.x0.dtype == torch.float32
    rounded = generate(model, prefix, tokens=exact.tokens)
    assert rounded.codes[-1].dtype == rounded.image.dtype == torch.float32
    assert (rounded.image - exact.image).abs().max() < 0.1
