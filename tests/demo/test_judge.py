"""The caption judge reads its file and answers field by field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toprovar.demo.captions import COLOURS, COUNTS, SHAPES, TEXTURES
from toprovar.demo.classifier import Classifier
from toprovar.demo.judge import FIELDS, CaptionJudge
from toprovar.errors import CheckpointError

SIZES = (len(COUNTS), len(COLOURS), len(TEXTURES), len(SHAPES), len(COLOURS), len(TEXTURES))


def test_judge_answers_every_field(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Classifier(dict(zip(FIELDS, SIZES, strict=True)), (8, 8, 8, 8)).eval()
    save_file(net.state_dict(), str(tmp_path / "judge.safetensors"))
    pictures = torch.rand(5, 3, 256, 256)
    fields, confidence = CaptionJudge.load(tmp_path / "judge.safetensors").judge(pictures, batch=2)
    assert fields.shape == confidence.shape == (5, 6) and fields.dtype == torch.int64
    for i, name in enumerate(FIELDS):
        probabilities = net(pictures)[name].softmax(1)
        assert torch.equal(fields[:, i], probabilities.argmax(1))
        assert torch.allclose(confidence[:, i], probabilities.amax(1), atol=1e-5)


def test_another_net_is_refused(tmp_path: Path) -> None:
    save_file(Classifier({"label": 12}, (8, 8, 8, 8)).state_dict(), str(tmp_path / "judge.safetensors"))
    with pytest.raises(CheckpointError, match=r"judges label, expected count"):
        CaptionJudge.load(tmp_path / "judge.safetensors")
    with pytest.raises(CheckpointError, match="reinstall"):
        CaptionJudge.load(tmp_path / "none.safetensors")
