"""The text of a text-conditional model on its way into calibration and bundle.

Features of all prompts are made once, before the transformer is loaded, and the encoder is let go again: a T5-XL
encoder and an 8B transformer need not fit into memory together. To go into a bundle it is loaded a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim

from toprovar.backbones.text import TextEncoder, TextFeatures
from toprovar.errors import CheckpointError, InputError
from toprovar.exporter import edits
from toprovar.exporter.functions import OPSET
from toprovar.exporter.graph import EXTERNAL_DATA_BYTES, IR_VERSION, quiet
from toprovar.exporter.source import TextSource
from toprovar.profiles.calibration import Discriminant
from toprovar.profiles.files import sha256_bytes, write_text
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.profiles.manifest import TextEncoderInfo
from toprovar.profiles.prompts import Prompt, check_prompt, fit_classifier, pool, read_features

__all__ = ["EncodedPrompts", "discriminants", "encode", "write_encoder"]

GRAPH, TOKENIZER = "text_encoder.onnx", "tokenizer.json"


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their features. Either every prompt has a class, or none."""

    prompts: tuple[Prompt, ...]
    text: TextFeatures

    @property
    def classes(self) -> dict[str, list[str]] | None:
        """Prompt class -> its prompts; None where the classes are still to be found."""
        if any(prompt.prompt_class is None for prompt in self.prompts):
            return None
        classes: dict[str, list[str]] = {}
        for prompt in self.prompts:
            classes.setdefault(str(prompt.prompt_class), []).append(prompt.text)
        return classes

    @property
    def sha256(self) -> str:
        """Of the features: another encoder measures something else."""
        lengths = self.text.lengths.cpu().numpy().tobytes()
        return sha256_bytes(lengths + self.text.features.cpu().numpy().tobytes())

    def condition(self, texts: Sequence[int | str]) -> tuple[Tensor, Tensor]:
        """What `Backbone.prefix` takes of some of the prompts: features `[B, T, C]`, lengths `[B]` int32."""
        names = [prompt.text for prompt in self.prompts]
        rows = torch.tensor([names.index(str(text)) for text in texts])
        lengths = self.text.lengths[rows].to(torch.int32)
        return self.text.features[rows, : int(lengths.max())], lengths

    def pooled(self) -> dict[str, np.ndarray]:
        """Text -> its pooled features `[C]`."""
        vectors = pool(self.text.features.cpu().numpy(), self.text.lengths.cpu().numpy())
        return {prompt.text: vector for prompt, vector in zip(self.prompts, vectors, strict=True)}


def encode(source: TextSource, prompts: Sequence[Prompt], device: str = "cpu") -> EncodedPrompts:
    """Features of the prompts, from the source's file or encoder.

    Args:
        prompts: those of the file, row by row; empty: the file's texts have no names.

    Raises:
        InputError: no prompt, a prompt twice, a class for some of them only; prompts that the encoder does not take;
            a file of another number of texts; neither file nor encoder.
        CheckpointError: the encoder cannot be loaded.
    """
    if source.features is not None:
        features, lengths = (torch.from_numpy(array) for array in read_features(source.features))
        prompts = prompts or [Prompt(f"text {i}") for i in range(1, len(lengths) + 1)]
        if len(prompts) != len(lengths):
            raise InputError(
                f"{source.features}: features of {len(lengths)} texts for {len(prompts)} prompts; give a row for each"
            )
        text = TextFeatures(features, lengths)
    elif source.encoder is None:
        raise InputError("text: found neither an encoder nor a file of features; give --text-encoder or --features")
    else:
        _check(prompts)
        encoder = source.encoder().to(device)
        text = encoder.encode([prompt.text for prompt in prompts]).to("cpu")
    _check(prompts)
    return EncodedPrompts(tuple(prompts), text)


def _check(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise InputError("prompts: found none; give a file with one prompt a line")
    texts = [check_prompt(prompt.text) for prompt in prompts]
    if twice := next((text for i, text in enumerate(texts) if text in texts[:i]), None):
        raise InputError(f"prompts: {twice[:60]!r} is there twice; give each once")
    without = [prompt.text for prompt in prompts if prompt.prompt_class is None]
    if 0 < len(without) < len(prompts):
        raise InputError(
            f"prompts: {without[0][:60]!r} has no prompt class and others have; give all of them one, or none"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Prompt classes


def discriminants(classes: Mapping[str, Sequence[str]], pooled: Mapping[str, np.ndarray]) -> dict[str, Discriminant]:
    """What tells the classes' prompts apart: see `toprovar.profiles.prompts.fit_classifier`."""
    fitted = fit_classifier({name: np.stack([pooled[text] for text in texts]) for name, texts in classes.items()})
    return {
        name: Discriminant(weights=tuple(float(f"{w:.6g}") for w in weights), bias=float(f"{bias:.6g}"))
        for name, (weights, bias) in fitted.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Into the bundle


def write_encoder(source: TextSource, folder: Path, *, text_width: int, maximum_tokens: int) -> TextEncoderInfo | None:
    """Export the encoder, and write its tokenizer beside it; None where the source has only features.

    Raises:
        CheckpointError: it cannot be loaded, or makes features of another width.
    """
    if source.encoder is None:
        return None
    encoder = source.encoder()
    if encoder.channels != text_width:
        raise CheckpointError(
            f"text encoder {source.name}: {encoder.channels} channels, and the transformer was trained on {text_width}"
        )
    with torch.no_grad(), quiet():
        model = _graph(encoder, min(encoder.max_tokens, maximum_tokens))
    large = sum(p.numel() * p.element_size() for p in encoder.parameters()) > EXTERNAL_DATA_BYTES
    ir.save(model, folder / GRAPH, external_data=f"{GRAPH}.data" if large else None)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    write_text(folder / TOKENIZER, encoder.tokenizer_json())
    return TextEncoderInfo(name=source.name, graph=GRAPH, tokenizer=TOKENIZER)


def _graph(encoder: TextEncoder, maximum_tokens: int) -> ir.Model:
    ids, lengths = torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2], dtype=torch.int32)
    batch, tokens = Dim("B"), Dim("T", max=maximum_tokens)
    program = torch.export.export(
        encoder, (ids, lengths), dynamic_shapes=({0: batch, 1: tokens}, {0: batch}), strict=False
    )
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        input_names=[Names.TOKEN_IDS.value, Names.TEXT_LENGTHS.value],
        output_names=[Names.TEXT_FEATURES.value],
    )
    assert exported is not None
    model = exported.model
    edits.name_dims(model, [("B", "T"), ("B",)], {})
    edits.strip_traces(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "toprovar", None
    return model
