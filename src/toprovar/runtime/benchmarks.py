"""Pictures in the folders that public benchmarks read: GenEval, DPG-Bench, HPSv2 and ImageReward.

The benchmarks bring their own prompts files and their own judges; this is what stands between: prompts in, pictures out, in
the places and under the names that their scoring scripts look for. Sources of the layouts:

    geneval      djghosh13/geneval `evaluation/evaluate_images.py`: NNNNN/metadata.jsonl, NNNNN/samples/NNNN.png
    dpg          TencentQQGYLab/ELLA `dpg_bench/compute_dpg_bench.py`: ID.png, four pictures as 2 x 2
    hpsv2        tgxs002/HPSv2 `hpsv2.evaluate`: STYLE/NNNNN.jpg
    imagereward  the evaluation of FoundationVision/Infinity: ID/ID_N.jpg, and a metadata.json that names them

What is there already is not made again, so that an interrupted run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toprovar.errors import FormatError, InputError
from toprovar.profiles.files import read_document, write_bytes, write_text
from toprovar.runtime.pictures import pillow, png, to_bytes
from toprovar.runtime.target import Array

__all__ = ["BENCHMARKS", "Item", "Kind", "read_items", "write_pictures"]

Kind = Literal["geneval", "dpg", "hpsv2", "imagereward"]

BENCHMARKS: dict[Kind, int] = {"geneval": 4, "dpg": 4, "hpsv2": 1, "imagereward": 4}
"""Benchmark -> pictures per prompt."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_FILES: dict[Kind, str] = {
    "geneval": "evaluation_metadata.jsonl",
    "dpg": "the folder of prompts (ID.txt) or dpg_bench.csv",
    "hpsv2": "a JSON object of styles and their prompts, or a JSON list named after its style",
    "imagereward": "benchmark-prompts.json",
}
"""Benchmark -> where it keeps its prompts."""

Generate = Callable[[str, Sequence[int]], Array]
"""A prompt and the seeds of its pictures -> `[n, 3, height, width]` in [0, 1]."""


@dataclass(frozen=True)
class Item:
    """A prompt, its place (see the module), and what the benchmark says about it."""

    prompt: str
    place: str
    record: dict[str, Any]


def read_items(kind: Kind, path: Path) -> list[Item]:
    """The prompts of a benchmark.

    Args:
        path: what `_FILES` says.

    Raises:
        FormatError: not readable, or not in that format; a name that is no file name.
        InputError: an unknown benchmark.
    """
    if kind not in BENCHMARKS:
        raise InputError(f"benchmark {kind!r}: expected one of {', '.join(BENCHMARKS)}")
    try:
        items = list(_READERS[kind](path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise FormatError(f"{path}: not the prompts of {kind} ({what}); give {_FILES[kind]}") from error
    if not items:
        raise FormatError(f"{path}: holds no prompt of {kind}; give {_FILES[kind]}")
    for item in items:
        if not all(_NAME.fullmatch(part) for part in item.place.split("/")):
            raise FormatError(
                f"{path}: {item.place!r} is no name of a file; expected letters, digits, '.', '_' and '-'"
            )
    places = [item.place for item in items]
    if twice := next((place for i, place in enumerate(places) if place in set(places[:i])), None):
        raise FormatError(f"{path}: {twice!r} is there twice; expected each prompt once")
    return items


def _text(path: Path) -> str:
    return read_document(path, "prompts file").decode("utf-8")


def _geneval(path: Path) -> Iterator[Item]:
    lines = [line for line in _text(path).splitlines() if line.strip()]
    for number, record in enumerate(map(json.loads, lines)):
        yield Item(record["prompt"], f"{number:05d}", record)


def _dpg(path: Path) -> Iterator[Item]:
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield Item(_text(file).strip(), file.stem, {})
        return
    seen = set()
    for row in csv.DictReader(io.StringIO(_text(path))):  # a row a question: a prompt stands in several
        if row["item_id"] not in seen:
            seen.add(row["item_id"])
            yield Item(row["text"], row["item_id"], {})


def _hpsv2(path: Path) -> Iterator[Item]:
    found = json.loads(_text(path))
    styles = found if isinstance(found, dict) else {path.stem: found}
    for style, prompts in styles.items():
        for number, prompt in enumerate(prompts):
            yield Item(prompt, f"{style}/{number:05d}", {})


def _imagereward(path: Path) -> Iterator[Item]:
    for record in json.loads(_text(path)):
        yield Item(record["prompt"], record["id"], record)


_READERS: dict[Kind, Callable[[Path], Iterator[Item]]] = {
    "geneval": _geneval,
    "dpg": _dpg,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
}


def write_pictures(
    kind: Kind,
    items: Sequence[Item],
    folder: Path,
    generate: Generate,
    *,
    seed: int = 0,
    on_item: Callable[[int, int], None] = lambda done, of: None,
) -> list[Path]:
    """Make and write the pictures of all prompts.

    Args:
        generate: makes the pictures of a prompt; picture i of item j has the seed `seed` + j * (pictures per prompt) + i.
        on_item: called with (prompts done, prompts in all).

    Returns: the picture files, of earlier runs too.

    Raises:
        InputError, ToprovarError: a folder or file that cannot be written; whatever `generate` raises.
    """
    count, written = BENCHMARKS[kind], []
    for number, item in enumerate(items):
        paths = _paths(kind, folder, item, count)
        if not all(path.is_file() for path in paths):
            first = seed + number * count
            pixels = [to_bytes(image) for image in generate(item.prompt, range(first, first + count))]
            for path, data in zip(paths, _encode(kind, pixels), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, data)
            if kind == "geneval":
                write_text(folder / item.place / "metadata.jsonl", json.dumps(item.record) + "\n")
        written += paths
        on_item(number + 1, len(items))
    if kind == "imagereward":
        records = [
            {**item.record, "gen_image_paths": [str(path) for path in _paths(kind, folder, item, count)]}
            for item in items
        ]
        write_text(folder / "metadata.json", json.dumps(records, indent=1) + "\n")
    return written


def _paths(kind: Kind, folder: Path, item: Item, count: int) -> list[Path]:
    if kind == "geneval":
        return [folder / item.place / "samples" / f"{i:04d}.png" for i in range(count)]
    if kind == "dpg":
        return [folder / f"{item.place}.png"]
    if kind == "hpsv2":
        return [folder / f"{item.place}.jpg"]
    return [folder / item.place / f"{item.place}_{i}.jpg" for i in range(count)]


def _encode(kind: Kind, pixels: Sequence[Array]) -> list[bytes]:
    if kind == "dpg":
        a, b, c, d = pixels
        return [png(np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)]))]
    return [png(one) if kind == "geneval" else _jpeg(one) for one in pixels]


def _jpeg(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    pillow().fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
