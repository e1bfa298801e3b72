"""What a command line names, understood: a model and its labels, a profile and its changes. No PyTorch here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from toprovar.errors import FormatError, InputError
from toprovar.profiles.manifest import Label
from toprovar.profiles.profile import Profile, dense_profile, load_profile

__all__ = ["SamplingWish", "Source", "named_profile", "read_labels", "user_source"]

_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class SamplingWish:
    """What is wished of the sampling; None leaves what the checkpoint's backbone does by default."""

    guidance: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def over(self, other: SamplingWish) -> SamplingWish:
        """This wish, and the other one where this has none."""
        return SamplingWish(
            other.guidance if self.guidance is None else self.guidance,
            other.top_k if self.top_k is None else self.top_k,
            other.top_p if self.top_p is None else self.top_p,
        )


@dataclass(frozen=True)
class Source:
    """A model on disk. `labels` None: numbered, all of one prompt class."""

    name: str
    backbone: str
    checkpoint: Path
    vae: Path
    labels: tuple[Label, ...] | None = None
    sampling: SamplingWish = SamplingWish()
    """What suits this checkpoint; a user's wish goes over it."""


def user_source(backbone: str, checkpoint: Path | None, vae: Path | None, labels: Path | None) -> Source:
    """What the options of a command name.

    Raises:
        InputError: a transformer without its tokenizer, or the other way round.
        FormatError: see `read_labels`.
    """
    if checkpoint is None or vae is None:
        missing = "--checkpoint" if checkpoint is None else "--vae"
        raise InputError(f"{missing} is missing: a model is a transformer (--checkpoint) and its tokenizer (--vae)")
    name = checkpoint.name.split(".")[0] or backbone
    return Source(name, backbone, checkpoint, vae, read_labels(labels) if labels else None)


def read_labels(path: Path) -> tuple[Label, ...]:
    """Labels in order, a line each: a name, and behind the last blank its prompt class.

    Raises:
        FormatError: not readable, a line without a class, or a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise FormatError(f"{path}: cannot be read: {reason}; expected a text file of labels") from error
    labels: list[Label] = []
    for number, line in enumerate(lines, 1):
        name, _, prompt_class = line.strip().rpartition(" ")
        if not name.strip() or not _CLASS_NAME.fullmatch(prompt_class):
            raise FormatError(
                f"{path}: line {number}: found {line.strip()!r}, expected a label's name and, behind a blank, its "
                "prompt class (letters, digits, '.', '_', '-')"
            )
        labels.append(Label(name=name.strip(), prompt_class=prompt_class))
    names = [label.name for label in labels]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None or not labels:
        raise FormatError(f"{path}: {f'label {twice!r} is there twice' if twice else 'holds no label'}; give each once")
    return tuple(labels)


def named_profile(name: str, drop_scales: int | None = None, precision: str = "auto") -> Profile:
    """A profile by name or path, with the command line's changes.

    Args:
        name: a shipped profile, ``dense``, or the path of a TOML file.
        drop_scales: in place of the profile's own, for every prompt class; its name then says so.
        precision: in place of the profile's own, unless ``auto``.

    Raises:
        FormatError: no such profile, or one that does not follow the format.
        InputError: a number of scales or a precision that makes no sense.
    """
    if precision not in ("auto", "fp32", "fp16"):
        raise InputError(f"precision is {precision!r}; valid: auto, fp32, fp16")
    if drop_scales is not None and drop_scales < 0:
        raise InputError(f"drop-scales is {drop_scales}; give a number of scales, 0 or more")
    if name == "dense":
        return dense_profile(drop_scales or 0, cast(Literal["auto", "fp32", "fp16"], precision))
    profile = load_profile(name)
    value = json.loads(profile.model_dump_json(by_alias=True))
    if precision != "auto":
        value["precision"] = precision
    if drop_scales is not None:
        value |= {"drop_scales": drop_scales, "drop_rho": None, "name": f"{profile.name}-drop-{drop_scales}"}
        for options in value["classes"].values():
            options |= {"drop_scales": drop_scales, "drop_rho": None}
    return Profile.model_validate_json(json.dumps(value))
