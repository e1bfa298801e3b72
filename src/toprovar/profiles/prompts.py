"""Prompts and their features on disk, and which prompt class a text belongs to. NumPy only: every room reads them.

A prompt file is UTF-8 text, one prompt a line, behind a tab its prompt class if it has one. A features file is
``.safetensors`` or ``.npz`` with ``text_features``, padded ``[B, T, C]`` or packed ``[sum of lengths, C]`` (as the
original Infinity has them), and ``text_lens`` ``[B]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toprovar.errors import InputError

__all__ = ["Prompt", "check_prompt", "classify", "fit_classifier", "pool", "read_features", "read_prompts"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: the text, and the prompt class if one is given."""

    text: str
    prompt_class: str | None = None


def check_prompt(text: object, what: str = "prompt") -> str:
    """The prompt without the white space around it.

    Raises:
        InputError: no string, nothing in it, or bytes that are no UTF-8 (they arrive from a shell as lone surrogates).
    """
    if not isinstance(text, str):
        raise InputError(f"{what}: expected text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: not UTF-8 at character {error.start + 1}; pass UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{what}: empty; say in a few words what the picture shows")
    return text.strip()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a prompt file; blank lines are skipped.

    Raises:
        InputError: no such file, not UTF-8 (the line is named), a line with a class and no prompt, or no prompt at all.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"prompt file {path}: {error.strerror or error}; give a text file with one prompt a line"
        ) from None
    prompts: list[Prompt] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"prompt file {path}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; "
                "save the file as UTF-8"
            ) from None
        if not text.strip():
            continue
        prompt, _, name = text.partition("\t")
        prompts.append(Prompt(check_prompt(prompt, f"prompt file {path}, line {number}"), name.strip() or None))
    if not prompts:
        raise InputError(f"prompt file {path}: no prompt in it; write one prompt a line")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Features


def read_features(path: str | Path, prefix: str = "") -> tuple[Array, Array]:
    """Features from a file: ``[B, T, C]`` fp32, zero in the padding, and lengths ``[B]`` int64.

    Args:
        path: the file.
        prefix: before both names; "neg_" for negative prompts in the same file.

    Raises:
        InputError: no such file, another format, an array missing, or shapes that do not fit.
    """
    path = Path(path)
    names = f"{prefix}text_features", f"{prefix}text_lens"
    if not path.is_file():
        raise InputError(
            f"text features {path}: no such file; give a .safetensors or .npz with {names[0]} and {names[1]}"
        )
    if path.suffix not in (".safetensors", ".npz"):
        raise InputError(
            f"text features {path}: found a {path.suffix or 'nameless'} file; .safetensors and .npz are read"
        )
    try:
        found, arrays = (_read_safetensors if path.suffix == ".safetensors" else _read_npz)(path, names)
    except Exception as error:  # both readers raise their own kinds for a truncated or foreign file
        raise InputError(f"text features {path}: not readable as {path.suffix} ({error})") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(
            f"text features {path}: {' and '.join(missing)} missing; the file holds {', '.join(found) or 'nothing'}"
        )
    features, lengths = arrays[names[0]], arrays[names[1]]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise InputError(f"text features {path}: {names[1]} has shape {lengths.shape}; expected integers [B]")
    counts = [int(n) for n in lengths]
    if features.ndim == 2:
        if sum(counts) != features.shape[0] or min(counts, default=0) < 1:
            raise InputError(
                f"text features {path}: packed {features.shape} with lengths {counts}: expected [{sum(counts)}, C] and "
                "every length at least 1"
            )
        padded = np.zeros((len(counts), max(counts), features.shape[1]), np.float32)
        for row, piece in zip(padded, np.split(features, np.cumsum(counts)[:-1]), strict=True):
            row[: len(piece)] = piece
        return padded, lengths.astype(np.int64)
    if features.ndim != 3 or 0 in features.shape or len(counts) != features.shape[0]:
        raise InputError(
            f"text features {path}: shape {features.shape} with {len(counts)} lengths; expected [B,T,C] or [sum, C]"
        )
    if min(counts) < 1 or max(counts) > features.shape[1]:
        raise InputError(
            f"text features {path}: lengths from {min(counts)} to {max(counts)}; each must be 1..{features.shape[1]}"
        )
    real = np.arange(features.shape[1]) < lengths[:, None]
    return np.where(real[..., None], features.astype(np.float32), np.float32(0)), lengths.astype(np.int64)


def _read_safetensors(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, Array]]:
    from safetensors import deserialize, safe_open

    with safe_open(str(path), framework="np") as file:
        found = list(file.keys())
        wanted = [name for name in names if name in found]
        halves = {name for name in wanted if file.get_slice(name).get_dtype() == "BF16"}
        arrays = {name: file.get_tensor(name) for name in wanted if name not in halves}
    if halves:  # NumPy has no such type: they are the upper halves of fp32
        for name, raw in deserialize(path.read_bytes()):
            if name in halves:
                upper = np.frombuffer(raw["data"], "<u2").astype(np.uint32) << np.uint32(16)
                arrays[name] = upper.view(np.float32).reshape(raw["shape"])
    return found, arrays


def _read_npz(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, Array]]:
    with np.load(path, allow_pickle=False) as file:
        return list(file.files), {name: file[name] for name in names if name in file.files}


# ---------------------------------------------------------------------------------------------------------------------
# Which prompt class


def pool(features: Array, lengths: Array) -> Array:
    """The mean of a prompt's token features: ``[B, T, C]``, ``[B]`` -> ``[B, C]`` float64."""
    real = np.arange(features.shape[1]) < np.asarray(lengths)[:, None]
    total: Array = np.where(real[..., None], features.astype(np.float64), 0.0).sum(1)
    return total / np.asarray(lengths)[:, None]


def fit_classifier(pooled: Mapping[str, Array]) -> dict[str, tuple[Array, float]]:
    """Prompt class -> weights ``[C]`` and bias: a prompt is of the class whose ``weights . pooled + bias`` is largest.

    That is the class with the nearest centroid, where distance is measured in the covariance that the prompts have
    within their classes (linear discriminant analysis with equal priors). The covariance of I prompts is shrunk towards
    a multiple of the identity by C / (C + I): with a few prompts of wide features it is the plain nearest centroid.

    Args:
        pooled: class -> `pool` of its prompts, ``[I_c, C]``.
    """
    centroids = {name: values.mean(0) for name, values in pooled.items()}
    spread = np.concatenate([values - centroids[name] for name, values in pooled.items()])
    prompts, width = spread.shape
    shrink = width / (width + prompts)
    covariance = (1 - shrink) / prompts * (spread.T @ spread)
    variance = float((spread**2).mean()) or 1.0  # one prompt a class: no spread, any multiple of the identity will do
    covariance[np.diag_indices(width)] += max(shrink, 1e-3) * variance
    fitted = {}
    for name, centroid in centroids.items():
        weights = np.linalg.solve(covariance, centroid)
        fitted[name] = (weights, -0.5 * float(weights @ centroid))
    return fitted


def classify(pooled: Array, weights: Array, bias: Array) -> Array:
    """The class of each prompt: pooled ``[B, C]``, weights ``[classes, C]``, bias ``[classes]`` -> ``[B]`` indices."""
    chosen: Array = (pooled @ weights.astype(np.float64).T + bias).argmax(1)
    return chosen
