"""Checkpoint and prompts -> calibration: generate densely, and reduce every entropy map as soon as it is there.

What is measured, of which source: `toprovar.profiles.calibration`. Memory holds the maps of one scale of one batch, and
after that a few numbers per image, scale and layer. Those go to a partial file beside the output after every batch,
so that an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from toprovar import __version__
from toprovar.backbones.base import Backbone
from toprovar.backbones.generate import Trace, generate
from toprovar.errors import CheckpointError, InputError
from toprovar.profiles.calibration import (
    SCHEMA,
    Calibration,
    Discriminant,
    Measurement,
    PerLayer,
    PerScale,
    save_calibration,
)
from toprovar.profiles.files import sha256_json, write_error
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.noise import scale_noise

__all__ = [
    "MapStatistics",
    "calibrate",
    "classes_by_fineness",
    "component_ratio",
    "labels_condition",
    "map_statistics",
    "model_shape",
]

Prompt = int | str
Condition = Callable[[Sequence[Prompt]], tuple[Tensor, ...]]
"""Prompts of one batch -> the tensors that `Backbone.prefix` takes."""
TellApart = Callable[[Mapping[str, Sequence[Prompt]]], Mapping[str, Discriminant]]
"""Prompt classes -> what tells a prompt of one from those of the others."""

FINE_GRID = 12
"""Fineness of a prompt is measured at the scales of at least FINE_GRID**2 tokens, those that profiles prune."""

RATIO_LIMIT = 1e4
"""Largest sigma1 / sigma2: entropies in fp32 resolve no more, and one map of rank one shall not be the mean of all."""

DIGITS = 5
"""Significant digits in the file: more would only record the rounding of one machine."""


# ---------------------------------------------------------------------------------------------------------------------
# From maps to numbers


@dataclass(frozen=True)
class MapStatistics:
    """What is kept of the entropy maps of one scale. B images, L layers; float64."""

    rho: npt.NDArray[np.float64]
    """[B], of the map averaged over layers."""
    rho_layers: npt.NDArray[np.float64]
    """[B, L]"""
    entropy_nats: npt.NDArray[np.float64]
    """[B, L], mean over the tokens."""
    ratio_raw: npt.NDArray[np.float64]
    """[B, L], or [B, 0] where the grid is smaller than 2 x 2."""
    ratio_centred: npt.NDArray[np.float64]
    """[B, L] or [B, 0]"""


def component_ratio(maps: Tensor) -> Tensor:
    """Principal component ratio sigma1 / sigma2 of maps `[..., h, w]` -> `[...]`, h and w at least 2.

    1 for a map of zeros, at most `RATIO_LIMIT`. Source: ToProVAR, section 3.3.
    """
    sigma = torch.linalg.svdvals(maps)
    first, second = sigma[..., 0], sigma[..., 1]
    ratio = first / second.clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(first > 0, ratio.clamp(1.0, RATIO_LIMIT), 1.0)


def map_statistics(entropy: Tensor, grid: tuple[int, int]) -> MapStatistics:
    """Reduce the entropy maps of one scale.

    Args:
        entropy: `[L, B, N]` nats, conditional rows.
        grid: (h, w), N = h * w, row-major.
    """
    layers, images, _ = entropy.shape
    maps = entropy.cpu().double()  # a GPU takes longer for singular values of many small matrices
    averaged = maps.mean(0)
    mean = maps.mean(-1, keepdim=True)
    rho = (averaged < averaged.mean(-1, keepdim=True)).double().mean(-1)
    rho_layers = (maps < mean).double().mean(-1)
    if min(grid) >= 2:
        raw = component_ratio(maps.reshape(layers, images, *grid))
        centred = component_ratio((maps - mean).reshape(layers, images, *grid))
    else:
        raw = centred = maps.new_zeros(0, images)

    def array(value: Tensor) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = value.cpu().numpy()
        return result

    return MapStatistics(array(rho), array(rho_layers.T), array(mean.squeeze(-1).T), array(raw.T), array(centred.T))


# ---------------------------------------------------------------------------------------------------------------------
# From numbers to prompt classes

_CLASS_NAMES = {1: ("all",), 2: ("coarse", "fine"), 3: ("coarse", "medium", "fine")}


def _fineness(model: ModelShape, images: Sequence[dict[str, Any]]) -> float:
    """Of one prompt: rho, averaged over its images and over the scales from `FINE_GRID` on (the last where none is)."""
    first = model.first_scale(FINE_GRID)
    return _rounded(float(np.mean([image["rho"][-1 if first is None else first :] for image in images])))


def classes_by_fineness(fineness: Mapping[str, float]) -> dict[str, list[str]]:
    """Sort prompts into up to three classes by their measured fineness.

    Fineness of a prompt is rho, the low-entropy ratio, averaged over its images and over the scales that may be pruned:
    where it is low, late scales add little. The classes are the natural breaks of the sorted values, those with the
    least variance within classes (k-means in one dimension, solved exactly), each of at least two prompts and a sixth of
    all. There are three classes from six prompts on, two from four on, else one. Equal values go by their text, so the
    order of the prompts does not matter.

    Returns: class -> prompts; "coarse", "medium" and "fine", "coarse" and "fine", or "all".
    """
    ordered = sorted(fineness, key=lambda text: (fineness[text], text))
    count = len(ordered)
    names = _CLASS_NAMES[min(3, max(1, count // 2))]
    least = max(2, count // 6) if len(names) > 1 else 1
    values = np.array([fineness[text] for text in ordered])

    def scatter(start: int, stop: int) -> float:
        return float(((values[start:stop] - values[start:stop].mean()) ** 2).sum())

    def best(stop: int, classes: int) -> tuple[float, list[int]]:
        """Least scatter of the first `stop` values in so many classes, and where the classes end."""
        if classes == 1:
            return scatter(0, stop), [stop]
        found = []
        for cut in range(least * (classes - 1), stop - least + 1):
            before, ends = best(cut, classes - 1)
            found.append((before + scatter(cut, stop), [*ends, stop]))
        return min(found)

    ends = best(count, len(names))[1]
    starts = [0, *ends[:-1]]
    return {name: ordered[start:stop] for name, start, stop in zip(names, starts, ends, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The partial file


class _Partial:
    """Finished batches, a JSON line each, behind a line with the key of the measurement that they belong to.

    A line that was cut off by a crash is overwritten. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, key: str):
        self.path, self.key = path, key
        self.batches: dict[int, list[dict[str, Any]]] = {}
        self.file: FileIO | None = None

    def __enter__(self) -> _Partial:
        if self.path is None:
            return self
        good = self._read()
        try:
            self.file = open(self.path, "r+b" if good else "w+b", buffering=0)
            self.file.truncate(good)
            self.file.seek(good)
            if not good:
                self._append({"toprovar": "calibration in progress", "key": self.key})
        except OSError as error:
            self.close()
            raise write_error(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close, and leave no file in which nothing is finished."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been reported by the write itself
                self.file.close()
            self.file = None
        if self.path is not None and not self.batches:
            self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Take over finished batches; the length in bytes of what can be relied on, 0 where nothing can."""
        assert self.path is not None
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}; remove it to start again") from error
        good = 0
        for number, line in enumerate(lines):
            try:
                value: Any = json.loads(line) if line.endswith(b"\n") else None
                if number == 0 and value["key"] != self.key:
                    break
                if number > 0:
                    self.batches[value["batch"]] = value["images"]
            except (ValueError, TypeError, KeyError):
                break
            good += len(line)
        return good

    def _append(self, value: dict[str, Any]) -> None:
        assert self.file is not None
        line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        good = self.file.tell()
        try:
            rest = memoryview(line)
            while rest:  # a disk that is nearly full takes a part of it
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(good)
            raise

    def add(self, batch: int, images: list[dict[str, Any]]) -> None:
        if self.file is not None:
            assert self.path is not None
            try:
                self._append({"batch": batch, "images": images})
            except OSError as error:
                left = f"{len(self.batches)} finished batches are kept" if self.batches else "nothing was left behind"
                raise write_error(self.path, error, left) from error
        self.batches[batch] = images

    def discard(self) -> None:
        self.batches = {}
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def model_shape(backbone: Backbone, text_tokens: int = 64) -> ModelShape:
    """The sizes that plans depend on. `text_tokens` is a prompt's typical length, for FLOPs of text models.

    Raises:
        InputError: a backbone whose FLOPs are not known.
    """
    spec = backbone.spec
    text_tokens = min(text_tokens, getattr(spec, "text_maximum_tokens", text_tokens))
    common: dict[str, Any] = {
        "depth": spec.depth,
        "width": spec.width,
        "ffn_width": spec.ffn_width,
        "logits": spec.vocab,
        "grids": tuple(tuple(grid) for grid in spec.grids),
    }
    if spec.backbone == "var":
        shared = bool(getattr(spec, "shared_aln", False))
        return ModelShape(backbone="var", code_channels=spec.latent_channels, shared_conditioning=shared, **common)
    if spec.backbone == "infinity":
        # two logits a bit; the word embedding takes all bits of a token, also where it is a 2 x 2 patch of codes
        return ModelShape(
            backbone="infinity",
            code_channels=spec.vocab // 2,
            text_tokens=text_tokens,
            shared_conditioning=True,
            **common,
        )
    raise InputError(f"backbone {spec.backbone!r} cannot be planned for yet; expected var or infinity")


def labels_condition(prompts: Sequence[Prompt]) -> tuple[Tensor, ...]:
    """The condition of a class-conditional backbone: labels `[B]`."""
    texts = [prompt for prompt in prompts if not isinstance(prompt, int)]
    if texts:
        raise InputError(f"prompt {texts[0]!r} is a text; this backbone takes class labels, which are whole numbers")
    return (torch.tensor([int(prompt) for prompt in prompts], dtype=torch.int32),)


@contextlib.contextmanager
def _progress(total: int, done: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; the yielded function advances it."""
    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
        transient=True,
    )
    with bar:
        task = bar.add_task("calibrating", total=total, completed=done)
        yield lambda tokens: bar.advance(task, tokens)


def calibrate(
    backbone: Backbone,
    classes: Mapping[str, Sequence[Prompt]] | Sequence[str],
    seeds: Sequence[int],
    *,
    checkpoint_sha256: str,
    condition: Condition = labels_condition,
    condition_sha256: str | None = None,
    tell_apart: TellApart | None = None,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = 4,
    text_tokens: int = 64,
    progress: bool | None = None,
) -> Calibration:
    """Measure a checkpoint: every prompt with every seed, dense, drawn as `backbone.sampling` says.

    Args:
        classes: prompt class -> its prompts (labels or texts). Texts alone: their classes are found by their fineness,
            see `classes_by_fineness`.
        seeds: of the noise, one image each per prompt; the same numbers as a runtime draws from them.
        checkpoint_sha256: of the checkpoint's file (`toprovar.profiles.files.sha256_files`).
        condition: prompts of a batch -> tensors of `backbone.prefix`; the default is for class labels.
        condition_sha256: of what `condition` depends on besides the prompts, such as text features.
        tell_apart: makes what the calibration holds to tell the class of a new prompt; asked for several classes only.
        output: where the calibration is written; beside it lies `<output>.<key>.partial` until it is complete. None
            writes nothing.
        batch_size: images at a time.
        progress: a bar on stderr; None where it is a terminal.

    Raises:
        InputError: no prompt, no seed, or one of them twice.
        CheckpointError: an entropy is not finite.
        ToprovarError: the disk is full; finished batches stay in the partial file.
        KeyboardInterrupt: passed on; the partial file keeps the finished batches, and the same call goes on from there.
    """
    given = classes if isinstance(classes, Mapping) else {"all": classes}
    _check(given, seeds, batch_size)
    model = model_shape(backbone, text_tokens)
    sampling = {name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in asdict(backbone.sampling).items()}
    key = sha256_json(
        {
            "schema": SCHEMA,
            "checkpoint": checkpoint_sha256,
            "model": model.model_dump(mode="json"),
            "sampling": sampling,
            "classes": {name: list(prompts) for name, prompts in given.items()},
            "condition": condition_sha256,
            "seeds": list(seeds),
            "batch_size": batch_size,
            "dtype": str(backbone.dtype),
        }
    )
    items = [(prompt, seed) for prompts in given.values() for prompt in prompts for seed in seeds]
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    partial_path = None if output is None else Path(f"{os.fspath(output)}.{key[:12]}.partial")
    started = time.monotonic()

    with _Partial(partial_path, key) as partial:
        missing = [index for index in range(len(batches)) if index not in partial.batches]
        per_image = sum(model.tokens)
        done = per_image * (len(items) - sum(len(batches[index]) for index in missing))
        try:
            with _progress(per_image * len(items), done, progress) as advance:
                for index in missing:
                    partial.add(index, _measure(backbone, model, batches[index], condition, advance))
        except KeyboardInterrupt:
            if partial_path is not None and partial.batches:
                kept = sum(len(images) for images in partial.batches.values())
                left = f"{kept} of {len(items)} images are kept in {partial_path}"
                print(f"interrupted: {left}; run again to go on", file=sys.stderr)
            raise
        records = iter([image for index in range(len(batches)) for image in partial.batches[index]])
        images = {
            name: {prompt: [next(records) for _ in seeds] for prompt in prompts} for name, prompts in given.items()
        }
        found: Mapping[str, Sequence[Prompt]] = given
        if not isinstance(classes, Mapping):
            every = images["all"]
            found = classes_by_fineness({str(text): _fineness(model, of) for text, of in every.items()})
            images = {name: {prompt: every[prompt] for prompt in prompts} for name, prompts in found.items()}
        measured = {
            name: _measurement(list(of), [image for several in of.values() for image in several])
            for name, of in images.items()
        }
        calibration = Calibration(
            schema=SCHEMA,
            toprovar_version=__version__,
            checkpoint_sha256=checkpoint_sha256,
            model=model,
            sampling=sampling,
            seeds=tuple(seeds),
            classes=measured,
            discriminants=dict(tell_apart(found)) if tell_apart and len(found) > 1 else None,
            wall_time_s=round(time.monotonic() - started, 3),
        )
        if output is not None:
            save_calibration(output, calibration)
            partial.discard()
    return calibration


def _check(classes: Mapping[str, Sequence[Prompt]], seeds: Sequence[int], batch_size: int) -> None:
    if not classes or not all(classes.values()):
        empty = next((name for name, prompts in classes.items() if not prompts), None)
        what = f"prompt class {empty!r} has no prompts" if empty else "there is no prompt class"
        raise InputError(f"calibration: {what}; give at least one prompt for each class")
    if not seeds:
        raise InputError("calibration: found no seed; give at least one")
    given: list[tuple[str, list[Prompt]]] = [("seed", list(seeds))]
    given += [(f"prompt of class {name}", list(prompts)) for name, prompts in classes.items()]
    for what, values in given:
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise InputError(f"calibration: {what} {twice[0]!r} is given twice; give each once")
    if batch_size < 1:
        raise InputError(f"calibration: batch size is {batch_size}; give 1 or more")


def _measure(
    backbone: Backbone,
    model: ModelShape,
    batch: Sequence[tuple[Prompt, int]],
    condition: Condition,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """One record per image of the batch: what `MapStatistics` holds, a list over scales each."""
    prompts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
    fields = MapStatistics.__dataclass_fields__
    records: list[dict[str, Any]] = [{name: [] for name in fields} for _ in batch]

    def noise(scale: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(scale_noise(seeds, scale, shape[0], shape[2]))

    def reduce(scale: int, trace: Trace) -> None:
        entropy = torch.stack([layer[: len(batch)] for layer in trace.entropy[-1]])
        trace.entropy[-1].clear()  # the maps of one scale at a time
        if not bool(torch.isfinite(entropy).all()):
            layer = int((~torch.isfinite(entropy)).flatten(1).any(1).nonzero()[0])
            raise CheckpointError(
                f"checkpoint: the attention entropy is not finite at scale {scale}, layer {layer}; check the file, or "
                "calibrate in fp32"
            )
        statistics = map_statistics(entropy, model.grids[scale])
        for name in fields:
            for record, value in zip(records, getattr(statistics, name), strict=True):
                record[name].append(value.tolist())
        advance(len(batch) * model.tokens[scale])

    prefix = backbone.prefix(*(tensor.to(backbone.device) for tensor in condition(prompts)))
    generate(backbone, prefix, noise=noise, entropy="mean", decode=False, after_scale=reduce)
    return records


def _rounded(value: float) -> float:
    if value == 0:
        return 0.0
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def _measurement(prompts: Sequence[Prompt], images: Sequence[dict[str, Any]]) -> Measurement:
    """Mean and sample standard deviation over the images of a class."""

    def summary(name: str) -> tuple[Any, Any]:
        means: list[Any] = []
        sds: list[Any] = []
        for scale in range(len(images[0][name])):
            values = np.array([image[name][scale] for image in images], dtype=np.float64)  # [images] or [images, L]
            mean = values.mean(0)
            sd = values.std(0, ddof=1) if len(images) > 1 else np.zeros_like(mean)
            for into, row in ((means, mean), (sds, sd)):
                into.append(_rounded(float(row)) if row.ndim == 0 else tuple(_rounded(float(one)) for one in row))
        return tuple(means), tuple(sds)

    rho_mean, rho_sd = summary("rho")
    tables = {}
    for name in ("rho_layers", "entropy_nats", "ratio_raw", "ratio_centred"):
        mean, sd = summary(name)
        tables[name] = PerLayer(mean=mean, sd=sd)
    return Measurement(prompts=tuple(prompts), images=len(images), rho=PerScale(mean=rho_mean, sd=rho_sd), **tables)
