"""The text demo's training scripts compute what the backbone computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

picture_bits = pytest.importorskip("picture_bits")
import train_infinity  # noqa: E402
from scale_training import attend_by_scale  # noqa: E402

from toprovar.backbones.bsq_vae import BitQuantizer, load_bsq_vae  # noqa: E402
from toprovar.demo.captions import WORD_IDS, parse  # noqa: E402
from toprovar.demo.embedded_text import BITS, TEXT_WIDTH, new_infinity, original_state  # noqa: E402
from toprovar.demo.scenes import random_scenes, scene_of  # noqa: E402

EDGES = (1, 2, 3, 5, 8)


def test_quantiser_of_training_computes_the_same() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 16, 8, 8)
    made = picture_bits.BitScales(torch.device("cpu"), EDGES)(features)
    wanted = BitQuantizer(16)(features, [(n, n) for n in EDGES])
    assert torch.equal(made.labels, torch.cat([bits.flatten(1, 2) for bits in wanted.bits], 1).bool())
    assert torch.allclose(made.inputs, torch.cat([m.flatten(2) for m in wanted.inputs], 2).mT, atol=1e-5)
    assert torch.allclose(made.codes, wanted.codes, atol=1e-5)


def test_wrong_bits_change_what_comes_later_only() -> None:
    torch.manual_seed(0)
    features, scales = torch.randn(2, 16, 8, 8), picture_bits.BitScales(torch.device("cpu"), EDGES)
    clean = scales(features)
    wrong = scales(features, flip=torch.tensor([0.0, 0.5]), last=torch.tensor([2, 4]))
    assert torch.equal(wrong.labels[0], clean.labels[0]) and torch.equal(wrong.inputs[0], clean.inputs[0])
    assert torch.equal(wrong.labels[1, :1], clean.labels[1, :1]) and not torch.equal(wrong.labels[1], clean.labels[1])
    assert not torch.equal(wrong.codes[0], clean.codes[0])  # the last two scales are left out
    early = picture_bits.BitScales(torch.device("cpu"), EDGES)
    early.edges, early.down, early.up = early.edges[:3], early.down[:3], early.up[:3]
    assert torch.allclose(wrong.codes[0], early(features).codes[0])


def test_vae_is_shipped_under_its_original_names() -> None:
    torch.manual_seed(0)
    trained = picture_bits.PictureBsq()
    whole = new_infinity()
    whole.vae.decoder.load_state_dict(trained.decoder.state_dict())
    state = original_state(whole)[1]
    assert "decoder.mid.block_1.norm1.norm.weight" in state and "decoder.up.1.upsample.conv.conv.weight" in state
    loaded = load_bsq_vae(dict(state), "vae")
    codes = torch.randn(1, 16, 8, 8)
    assert torch.allclose(loaded.decoder(codes), trained.decoder(codes), atol=1e-4)


def test_training_pass_equals_the_backbone() -> None:
    torch.manual_seed(0)
    model = train_infinity.build(new_infinity().vae).eval()
    count = 6
    tokens = model.spec.tokens[:count]
    text, lengths = torch.randn(2, 16, TEXT_WIDTH), torch.tensor([9, 4])
    inputs = torch.randn(2, sum(tokens) - 1, BITS)
    attend = attend_by_scale(tokens, torch.device("cpu"), 60)
    x, context = train_infinity.forward(model, text, lengths, inputs, attend)
    wanted = model.forward_training(text, lengths, inputs, scales=count)
    assert torch.allclose(model.head(x, context).transpose(0, 1), wanted, atol=1e-4)


def test_bits_survive_packing() -> None:
    bits = torch.rand(3, 5, BITS) < 0.5
    assert torch.equal(train_infinity.unpack(train_infinity.pack(bits)).bool(), bits)


def test_loose_captions_say_the_same() -> None:
    rows = random_scenes(np.arange(200))
    ids, lengths = train_infinity.loose_captions(rows, np.random.default_rng(0))
    names = {}
    for word, number in WORD_IDS.items():
        names.setdefault(number, word)
    written = [" ".join(names[int(i)] for i in row[:n]) for row, n in zip(ids, lengths, strict=True)]
    assert [parse(text) for text in written] == [scene_of(row) for row in rows]
    assert len({len(text.split()) for text in written}) > 2
