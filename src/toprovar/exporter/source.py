"""What a command line names, understood: a model and its labels, a profile and its changes. No PyTorch here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from toprovar.backbones import BACKBONES
from toprovar.errors import FormatError, InputError
from toprovar.profiles.manifest import Label
from toprovar.profiles.profile import Profile, dense_profile, load_profile
from toprovar.profiles.prompts import Prompt

if TYPE_CHECKING:
    from toprovar.backbones.text import TextEncoder

__all__ = ["RELEASES", "SamplingWish", "Source", "TextSource", "named_profile", "read_labels", "user_source"]


class Release(NamedTuple):
    """A size of Infinity: layers and width, which its checkpoint must have, and the names of its released files."""

    size: tuple[int, int]
    checkpoint: str
    vae: str


RELEASES: dict[str, Release] = {
    "infinity-125m": Release((12, 768), "infinity_125M_256x256.pth", "infinity_vae_d16.pth"),
    "infinity-2b": Release((32, 2048), "infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
    "infinity-8b": Release((40, 3584), "infinity_8b_weights", "infinity_vae_d56_f8_14_patchify.pth"),
}
"""Sizes that a command may name. Source: FoundationVision/Infinity on Hugging Face."""

T5 = "google/flan-t5-xl"
"""The text encoder of the released Infinity checkpoints."""

_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class SamplingWish:
    """What is wished of the sampling; None leaves what the checkpoint's backbone does by default."""

    guidance: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None

    def over(self, other: SamplingWish) -> SamplingWish:
        """This wish, and the other one where this has none."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **mine)


@dataclass(frozen=True)
class TextSource:
    """What turns the prompts of a text-conditional model into features: an encoder, or a file that has them."""

    name: str
    """Of the encoder, for people."""
    encoder: Callable[[], TextEncoder] | None = None
    """Loads it."""
    features: Path | None = None
    prompts: tuple[Prompt, ...] = ()
    """What comes with the model to calibrate with."""
    per_class: int | None = None
    """How many of them are generated for each prompt class; the others only teach the classes apart. None: all."""


@dataclass(frozen=True)
class Source:
    """A model on disk. `labels` None: numbered, all of one prompt class. `text`: it takes text, not labels."""

    name: str
    backbone: str
    checkpoint: Path
    vae: Path
    labels: tuple[Label, ...] | None = None
    sampling: SamplingWish = SamplingWish()
    """What suits this checkpoint; a user's wish goes over it."""
    text: TextSource | None = None
    load_options: Mapping[str, str | int] = field(default_factory=dict)
    """What `backbones.load` takes besides the files: a schedule is not in a checkpoint."""
    size: tuple[int, int] | None = None
    """Layers and width that the checkpoint must have, where a size was named."""
    profiles: Mapping[str, Path] = field(default_factory=dict)
    """Name of a shipped profile -> the one that a search found for this checkpoint above the same floor."""


def user_source(
    backbone: str,
    checkpoint: Path | None,
    vae: Path | None,
    labels: Path | None = None,
    *,
    text_encoder: str | None = None,
    features: Path | None = None,
    aspect: str | None = None,
    resolution: str | None = None,
    text_tokens: int | None = None,
) -> Source:
    """What the options of a command name.

    Args:
        backbone: a family, or a released size of Infinity (`RELEASES`).
        labels: of a class-conditional model, see `read_labels`.
        text_encoder, features: of a text-conditional one: folder or name of a T5 encoder, or a file of features.
        aspect, resolution, text_tokens: of Infinity, see `toprovar.backbones.infinity.load_infinity`.

    Raises:
        InputError: something is missing, or belongs to the other kind of model.
        FormatError: see `read_labels`.
    """
    if backbone not in (*BACKBONES, *RELEASES):
        raise InputError(f"backbone '{backbone}' is unknown: it is one of {', '.join((*BACKBONES, *RELEASES))}")
    release = RELEASES.get(backbone)
    family = "infinity" if release else backbone
    takes_text = family == "infinity"
    if checkpoint is None or vae is None:
        missing = "--checkpoint" if checkpoint is None else "--vae"
        files = f", {release.checkpoint} and {release.vae}" if release else ""
        raise InputError(
            f"{missing} is missing: {backbone} is a transformer (--checkpoint) and its tokenizer (--vae){files}; give both"
        )
    if takes_text and labels is not None:
        raise InputError(f"--labels: {backbone} takes text, not labels; leave it out")
    given = {"--text-encoder": text_encoder, "--features": features, "--aspect": aspect, "--resolution": resolution}
    if not takes_text and (extra := [name for name, value in {**given, "--text-tokens": text_tokens}.items() if value]):
        raise InputError(f"{extra[0]}: {backbone} takes labels and has one schedule; leave it out")
    if takes_text and text_encoder is None and features is None:
        raise InputError(
            f"--text-encoder is missing: {backbone} takes text; give the name or the folder of a T5 encoder ({T5}), or "
            "--features, a file of text features"
        )
    name = checkpoint.name.split(".")[0] or backbone
    if not takes_text:
        return Source(name, family, checkpoint, vae, read_labels(labels) if labels else None)
    if text_tokens is not None and text_tokens < 1:
        raise InputError(f"text-tokens is {text_tokens}; give the longest prompt in tokens, 1 or more")

    def load_encoder() -> TextEncoder:
        from toprovar.backbones.text import MAX_TOKENS, load_text_encoder

        return load_text_encoder(str(text_encoder), max_tokens=text_tokens or MAX_TOKENS)

    options = {"aspect": aspect, "resolution": resolution, "text_maximum_tokens": text_tokens}
    return Source(
        name,
        family,
        checkpoint,
        vae,
        text=TextSource(text_encoder or "none", None if text_encoder is None else load_encoder, features),
        load_options={key: value for key, value in options.items() if value is not None},
        size=release.size if release else None,
    )


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


def named_profile(
    name: str, drop_scales: int | None = None, precision: str = "auto", own: Mapping[str, Path] | None = None
) -> Profile:
    """A profile by name or path, with the command line's changes.

    Args:
        name: a shipped profile, ``dense``, or the path of a TOML file.
        drop_scales: in place of the profile's own, for every prompt class; its name then says so.
        precision: in place of the profile's own, unless ``auto``.
        own: `Source.profiles`, in place of shipped ones of the same name.

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
    profile = load_profile((own or {}).get(name, name))
    value = json.loads(profile.model_dump_json(by_alias=True))
    if precision != "auto":
        value["precision"] = precision
    if drop_scales is not None:
        value |= {"drop_scales": drop_scales, "drop_rho": None, "name": f"{profile.name}-drop-{drop_scales}"}
        for options in value["classes"].values():
            options |= {"drop_scales": drop_scales, "drop_rho": None}
    return Profile.model_validate_json(json.dumps(value))
