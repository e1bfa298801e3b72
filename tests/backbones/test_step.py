"""One scale, dense and pruned: the span form against independent slow forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.backbones.conftest import make_var
from toprovar.backbones.base import layer_norm, restore_constants
from toprovar.backbones.step import Segment, Step
from toprovar.backbones.var import VAR
from toprovar.errors import InputError

ROLES = "gddgd"
SCALE, CACHE_SCALE, KEPT = 4, 2, 11


def _inputs(model: VAR, roles: str, tokens: int, images: int = 2, past_g: int = 9, past_d: int = 5, seed: int = 3):
    """x `[N, R, C]`, the context of two labels, and a random past whose length follows the role."""
    torch.manual_seed(seed)
    rows = 2 * images
    x = torch.randn(tokens, rows, model.spec.width)
    context = model.prefix(torch.arange(images)).context
    shape = (rows, model.spec.heads, model.spec.head_dim)
    past = [torch.randn(past_g if role == "g" else past_d, *shape) for role in roles for _ in range(2)]
    # Keys are unit vectors, as the model caches them.
    return x, context, [F.normalize(t, dim=-1) if i % 2 == 0 else t for i, t in enumerate(past)]


def _attention(
    model: VAR, layer: int, x: Tensor, context: dict[str, Tensor], past: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """gamma1 * attention branch of a layer in plain PyTorch, and its entropy `[R, N]`."""
    gamma, _, scale, _, shift, _ = context["modulation"][layer].unbind(0)
    attention = model.blocks[layer].attn
    q, k, v = attention.qkv(layer_norm(x) * (1 + scale) + shift)
    k, v = torch.cat([past[2 * layer], k]), torch.cat([past[2 * layer + 1], v])
    p = torch.einsum("nrhd,mrhd->rhnm", q, k).mul(model.spec.attention_scale).softmax(-1)
    out = torch.einsum("rhnm,mrhd->nrhd", p, v).flatten(2)
    return gamma * attention.proj(out), -(p * p.log()).sum(-1).mean(1)


def _ffn(model: VAR, layer: int, x: Tensor, context: dict[str, Tensor]) -> Tensor:
    _, gamma, _, scale, _, shift = context["modulation"][layer].unbind(0)
    return gamma * model.blocks[layer].ffn(layer_norm(x) * (1 + scale) + shift)


def _area(cache: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """`[hc * wc, R, C]` -> `[h * w, R, C]` by adaptive average pooling."""
    maps = cache.permute(1, 2, 0).unflatten(2, source)
    return F.adaptive_avg_pool2d(maps, target).flatten(2).permute(2, 0, 1)


def _by_branch(model: VAR, x: Tensor, context, past: list[Tensor], keep: int, branch_cache: list[Tensor] | None):
    """Restores after every residual branch, as FastVAR does, by loops. Returns x and what each branch added."""
    images = x.shape[1] // 2
    branches, kept = [], None
    for layer, role in enumerate(ROLES):
        if role == "g":
            attended, entropy = _attention(model, layer, x, context, past)
            x = x + attended
            x = x + _ffn(model, layer, x, context)
            ranked = [sorted(range(x.shape[0]), key=entropy[b].tolist().__getitem__) for b in range(images)]
            kept = [sorted(order[:keep]) for order in ranked]
            continue
        for branch in (_attention, _ffn):
            sub = torch.stack([x[kept[row % images], row] for row in range(x.shape[1])], 1)
            args = (past,) if branch is _attention else ()
            out = branch(model, layer, sub, context, *args)
            out = out[0] if branch is _attention else out
            full = torch.zeros_like(x)
            if branch_cache is not None:
                full = _area(branch_cache[len(branches)], model.spec.grids[CACHE_SCALE], model.spec.grids[SCALE])
            for row in range(x.shape[1]):
                full[kept[row % images], row] = out[:, row]
            x = x + full
            branches.append(full)
    return x, branches


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_all_kept_equals_dense(shared_aln: bool, cosine: bool) -> None:
    model = make_var(shared_aln=shared_aln, cosine=cosine)
    tokens = model.spec.tokens[SCALE]
    x, context, past = _inputs(model, "ggggg", tokens)
    dense = Step(model).run(x, context, None, None, None, None, past, [])
    step = Step(model, ROLES)
    caches = [torch.full((1, *x.shape[1:]), 1e3) for _ in step.spans]  # must not show
    ones = torch.ones(model.spec.grids[SCALE][0], 1)
    pruned = step.run(x, context, None, torch.zeros(tokens, dtype=torch.int32), ones, ones, past, caches)
    # The selecting layers take the op's entropy path, whose sums are ordered otherwise.
    torch.testing.assert_close(pruned.logits, dense.logits, atol=2e-5, rtol=0)
    for found, expected in zip(pruned.new_kv, dense.new_kv, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert all(torch.equal(k, torch.arange(tokens, dtype=torch.int32).expand(2, -1)) for k in pruned.kept)

    same_path = Step(model).run(x, context, None, None, None, None, past, [], entropy="mean")
    asked = step.run(x, context, None, torch.zeros(tokens, dtype=torch.int32), ones, ones, past, caches, entropy="mean")
    assert torch.equal(asked.logits, same_path.logits)


@pytest.mark.parametrize("restore", ["cache", "identity"])
def test_span_restore_equals_restoring_each_branch(model: VAR, restore: str) -> None:
    step = Step(model, ROLES, restore)
    # Dense scale: what each span adds is cached, and what each branch adds for the slow form.
    dense_tokens = model.spec.tokens[CACHE_SCALE]
    x, context, past = _inputs(model, ROLES, dense_tokens, past_g=5, past_d=5, seed=8)
    one = torch.ones(model.spec.grids[CACHE_SCALE][0], 1)
    all_kept = torch.zeros(dense_tokens, dtype=torch.int32)
    empty = [x.new_zeros(1, *x.shape[1:]) for _ in step.spans]
    dense = step.run(x, context, None, all_kept, one, one, past, empty)
    _, branch_cache = _by_branch(model, x, context, past, dense_tokens, None)

    x, context, past = _inputs(model, ROLES, model.spec.tokens[SCALE])
    rows, cols = restore_constants(model.spec, SCALE, CACHE_SCALE)
    keep_slots = torch.zeros(KEPT, dtype=torch.int32)
    output = step.run(x, context, None, keep_slots, rows, cols, past, dense.span_deltas)
    expected, _ = _by_branch(model, x, context, past, KEPT, branch_cache if restore == "cache" else None)
    torch.testing.assert_close(output.logits, model.head(expected, context), atol=5e-5, rtol=0)
    assert [list(k.shape) for k in output.kept] == [[2, KEPT]] * 2
    assert len(output.span_deltas) == (2 if restore == "cache" else 0)


def test_detail_layers_emit_only_kept_keys(model: VAR) -> None:
    x, context, past = _inputs(model, ROLES, model.spec.tokens[SCALE])
    rows, cols = restore_constants(model.spec, SCALE, CACHE_SCALE)
    caches = [torch.randn(model.spec.tokens[CACHE_SCALE], *x.shape[1:]) for _ in range(2)]
    logits, new_kv, deltas = Step(model, ROLES)(
        x, context, None, torch.zeros(KEPT, dtype=torch.int32), rows, cols, past, caches
    )
    assert [t.shape[0] for t in new_kv[::2]] == [36, KEPT, KEPT, 36, KEPT]
    assert [list(d.shape) for d in deltas] == [[KEPT, 4, 64]] * 2
    assert logits.shape == (36, 4, 48) and logits.dtype == torch.float32


def test_both_branches_of_guidance_share_the_kept_set_of_the_conditional_rows(model: VAR) -> None:
    x, context, past = _inputs(model, ROLES, model.spec.tokens[SCALE])
    rows, cols = restore_constants(model.spec, SCALE, CACHE_SCALE)
    caches = [torch.randn(model.spec.tokens[CACHE_SCALE], *x.shape[1:]) for _ in range(2)]
    args = (context, None, torch.zeros(KEPT, dtype=torch.int32), rows, cols)
    step = Step(model, ROLES)
    kept = step.run(x, *args, past, caches).kept[0]
    other = x.clone()
    other[:, 2:] = torch.randn_like(other[:, 2:])  # unconditional rows
    assert torch.equal(step.run(other, *args, past, caches).kept[0], kept)
    other = x.clone()
    other[:, 0] = torch.randn_like(other[:, 0])
    changed = step.run(other, *args, past, caches).kept[0]
    assert not torch.equal(changed[0], kept[0]) and torch.equal(changed[1], kept[1])


def test_asking_for_entropy_changes_nothing_else(model: VAR) -> None:
    x, context, past = _inputs(model, ROLES, model.spec.tokens[SCALE])
    rows, cols = restore_constants(model.spec, SCALE, CACHE_SCALE)
    caches = [torch.randn(model.spec.tokens[CACHE_SCALE], *x.shape[1:]) for _ in range(2)]
    args = (x, context, None, torch.zeros(KEPT, dtype=torch.int32), rows, cols, past, caches)
    plain, mean, head = (Step(model, ROLES).run(*args, entropy=mode) for mode in ("none", "mean", "head"))
    assert [e is not None for e in plain.entropy] == [True, False, False, True, False]
    assert [list(e.shape) for e in head.entropy] == [[4, 4, n] for n in (36, KEPT, KEPT, 36, KEPT)]
    for a, b in zip(mean.entropy, head.entropy, strict=True):
        torch.testing.assert_close(a, b.mean(1))
    for found in (mean, head):
        assert all(torch.equal(a, b) for a, b in zip(found.kept, plain.kept, strict=True))
        torch.testing.assert_close(found.logits, plain.logits, atol=2e-5, rtol=0)


def test_segments() -> None:
    step = Step(make_var(depth=6), "gddggd")
    assert step.segments == [Segment("g", 0, 1), Segment("d", 1, 3), Segment("g", 3, 5), Segment("d", 5, 6)]
    assert step.spans == [Segment("d", 1, 3), Segment("d", 5, 6)]
    assert Step(make_var(depth=2)).spans == []


@pytest.mark.parametrize(
    ("roles", "restore", "message"),
    [
        ("gd", "cache", "2 layers, the backbone has 5"),
        ("dgggg", "cache", "the first must be 'g'"),
        ("gxggg", "cache", "'g' \\(global\\) or 'd' \\(detail\\)"),
        ("ggggd", "nearest", "'cache' or 'identity'"),
    ],
)
def test_unusable_roles_are_refused(model: VAR, roles: str, restore: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Step(model, roles, restore)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    """The residual stream and the logits stay fp32, keys and values take the dtype of the matrices."""
    model = make_var()
    x, context, past = _inputs(model, "ggggg", 36)
    exact = Step(model).run(x, context, None, None, None, None, past, [])
    assert model.set_precision(dtype).dtype == dtype
    assert model.blocks[0].attn.scale_mul_1H11.dtype == torch.float32
    rounded = Step(model).run(x, context, None, None, None, None, [t.to(dtype) for t in past], [], keep_hidden=True)
    assert (len(exact.hidden), len(rounded.hidden)) == (0, 5)  # kept only where asked for
    assert rounded.logits.dtype == rounded.hidden[-1].dtype == torch.float32
    assert {t.dtype for t in rounded.new_kv} == {dtype}
    error = (rounded.logits - exact.logits).abs().max() / exact.logits.abs().max()
    assert error < (0.02 if dtype == torch.float16 else 0.15), error


def test_the_step_exports_with_every_size_free(model: VAR) -> None:
    """One graph for all scales: torch.export keeps tokens, kept tokens, both pasts and the cache dynamic."""
    step = Step(model, ROLES)

    def arguments(scale: int, cache_scale: int, keep: int, images: int, past_g: int, past_d: int):
        x, context, past = _inputs(model, ROLES, model.spec.tokens[scale], images, past_g, past_d)
        rows, cols = restore_constants(model.spec, scale, cache_scale)
        caches = [torch.randn(model.spec.tokens[cache_scale], *x.shape[1:]) for _ in range(2)]
        return x, context, None, torch.zeros(keep, dtype=torch.int32), rows, cols, past, caches

    free = torch.export.Dim.DYNAMIC
    sizes = {
        "x": {0: free, 1: free},
        "context": {"modulation": {2: free}, "head_modulation": {1: free}},
        "rope": None,
        "keep_slots": {0: free},
        "area_rows": {0: free, 1: free},
        "area_cols": {0: free, 1: free},
        "past": [{0: free, 1: free}] * 10,
        "span_cache": [{0: free, 1: free}] * 2,
    }
    exported = torch.export.export(step, arguments(3, 2, 7, 2, 6, 4), dynamic_shapes=sizes, strict=False).module()
    for case in ((4, 2, 11, 3, 30, 14), (2, 1, 9, 2, 5, 5)):
        args = arguments(*case)
        found, expected = exported(*args), step(*args)
        torch.testing.assert_close(found, expected)
