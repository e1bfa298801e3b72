"""FLOPs equal those counted on the original code.

The numbers are from torch's FlopCounterMode and the original blocks, two rows, one image: linear layers,
self-attention, cross-attention, embedding and head. The originals compute the conditioning at every scale and count it
as linear (AdaLN per layer in VAR-d30, K and V of the cross-attention in Infinity); here it is once per image.
"""

import pytest

from toprovar.errors import InputError
from toprovar.profiles.flops import ModelShape, dense_flops, plan_flops, saving

INFINITY = tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
VAR_256 = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
VAR_512 = tuple((n, n) for n in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))


def shape(backbone, depth, width, logits, channels, grids, text=0, shared=False):
    return ModelShape(
        backbone=backbone,
        depth=depth,
        width=width,
        ffn_width=4 * width,
        logits=logits,
        code_channels=channels,
        grids=grids,
        text_tokens=text,
        shared_conditioning=shared,
    )


CASES = {
    "infinity-2b": (
        shape("infinity", 32, 2048, 64, 32, INFINITY, 64, True),
        (76235669504, 524288, 33554432, 786432),
        (30855045054464, 22593675460608, 137438953472, 3221225472),
        116238213971968,
    ),
    "infinity-8b": (
        shape("infinity", 40, 3584, 112, 56, INFINITY, 64, True),
        (291839672320, 1146880, 73400320, 2408448),
        (118116969349120, 49423665070080, 300647710720, 9865003008),
        385481111257088,
    ),
    "var-d30": (
        shape("var", 30, 1920, 4096, 32, VAR_256),
        (7962624000, 460800, 0, 31703040),
        (1361608704000, 80216064000, 0, 8115978240),
        3789811814400,
    ),
    "var-d36-s": (
        shape("var", 36, 2304, 4096, 32, VAR_512, shared=True),
        (9172942848, 663552, 0, 38043648),
        (9393093476352, 1522029035520, 0, 38956695552),
        22802325258240,
    ),
}


def repeated(model):
    """What the original counts as linear at every scale, of the conditioning."""
    if model.text_tokens:
        return 2 * model.depth * model.text_tokens * 4 * model.width**2
    return 0 if model.shared_conditioning else 2 * model.depth * 12 * model.width**2


@pytest.mark.parametrize("name", CASES)
def test_dense_flops_equal_the_counted_ones(name):
    model, first, last, total = CASES[name]
    flops = dense_flops(model)
    for found, (linear, own, cross, head) in ((flops.scales[0], first), (flops.scales[-1], last)):
        assert found.linear + repeated(model) == linear
        assert (found.self_attention, found.cross_attention, found.head) == (own, cross, head)
    assert sum(scale.total for scale in flops.scales) + repeated(model) * len(model.grids) == total
    assert flops.conditioning >= repeated(model)


def test_detail_layers_cost_their_kept_tokens_and_see_a_shorter_past():
    model = shape("var", 2, 8, 16, 4, ((1, 1), (2, 2), (3, 3)))
    flops = plan_flops(model, "gd", (1, 2, 3), rows=1)
    dense = dense_flops(model, rows=1)
    per_token = 24 * 8 * 8
    assert [scale.linear for scale in flops.scales] == [per_token * n for n in (1 + 1, 4 + 2, 9 + 3)]
    assert [scale.self_attention for scale in flops.scales] == [
        4 * 8 * (1 * 1 + 1 * 1),
        4 * 8 * (4 * 5 + 2 * 3),
        4 * 8 * (9 * 14 + 3 * 6),
    ]
    assert [scale.head for scale in flops.scales] == [scale.head for scale in dense.scales]
    assert flops.conditioning == dense.conditioning


def test_dropped_scales_are_their_own_part_of_the_saving():
    model = CASES["infinity-2b"][0]
    dense = dense_flops(model)
    drop = saving(model, "g" * 32, model.tokens[:-2])
    assert drop.detail_tokens == 0
    assert drop.dropped_scales == dense.scales[-1].total + dense.scales[-2].total
    assert drop.dropped_scales / drop.dense == pytest.approx(0.68, abs=0.01)  # the share that the originals report
    both = saving(model, "g" + "d" * 31, (*model.tokens[:9], 512, 400))
    assert both.dropped_scales == drop.dropped_scales
    assert both.plan == both.dense - both.dropped_scales - both.detail_tokens


def test_what_does_not_fit_the_model_is_refused():
    model = shape("var", 2, 8, 16, 4, ((1, 1), (2, 2)))
    with pytest.raises(InputError, match="one letter, g or d, for each of 2 layers"):
        plan_flops(model, "gdd", (1, 4))
    with pytest.raises(InputError, match="keep has 3 scales"):
        plan_flops(model, "gd", (1, 4, 9))
