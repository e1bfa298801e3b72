"""Ask a bundle for pictures: prompts and seeds in, pictures out, grouped into batches by prompt class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toprovar.errors import BundleError, InputError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.runtime.bundle import Bundle, open_bundle
from toprovar.runtime.loop import Loop, Timing
from toprovar.runtime.target import Array, open_target
from toprovar.runtime.text import PromptEncoder, TextFeatures, prompt_classes

__all__ = ["Result", "Session", "TextFeatures"]


@dataclass(frozen=True)
class Result:
    """I pictures, in the order in which they were asked for.

    images `[I, 3, height, width]` fp32 in [0, 1] RGB; tokens of each image by scale, `[N]` or `[N, bits]` int32;
    codes `[I, Cv, h, w]`; prompt_classes of the images; one `Timing` per batch; margins as in `Trace`, where the loop has
    them.
    """

    images: Array
    tokens: tuple[dict[int, Array], ...]
    codes: Array
    prompt_classes: tuple[str, ...]
    timings: tuple[Timing, ...]
    margins: tuple[dict[int, Array], ...] = ()


class Session:
    """A bundle, loaded on a target.

    Args:
        bundle: a bundle, or the path of one.
        target: ``onnxruntime``, ``torch``.
        batch_size: most images at once. A picture depends on its seed and prompt only, up to rounding.
        options: of the target: ``provider`` and ``threads`` of onnxruntime; ``checkpoint``, ``vae`` of torch.

    Raises:
        BundleError: the bundle is broken.
        TargetError: the target cannot run it here.
    """

    def __init__(
        self, bundle: Bundle | Path | str, target: str = "onnxruntime", *, batch_size: int = 1, **options: Any
    ):
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}; give 1 or more")
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.target = open_target(self.bundle, target, **options)
        self.target_name = target
        self.batch_size = batch_size
        self._loops: dict[int, Loop] = {}
        self._encoder: PromptEncoder | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that the bundle takes."""
        return tuple(label.name for label in self.bundle.manifest.condition.labels)

    @property
    def prompt_classes(self) -> tuple[str, ...]:
        return tuple(self.bundle.manifest.schedules)

    def labels_of(self, prompt_class: str) -> tuple[int, ...]:
        """The labels of one prompt class."""
        labels = self.bundle.manifest.condition.labels
        return tuple(index for index, label in enumerate(labels) if label.prompt_class == prompt_class)

    @property
    def takes_text(self) -> bool:
        """Whether pictures are asked for by text, and not by label."""
        return self.bundle.manifest.condition.kind == "text"

    def encode(self, prompts: Sequence[str], prompt_class: str | None = None) -> TextFeatures:
        """Prompts as the bundle takes them; `prompt_class` in place of the one that each prompt is found to be of.

        Raises:
            InputError: the bundle takes labels or has no encoder, a prompt that it cannot take, or an unknown class.
            TargetError, BundleError: the encoder cannot be loaded.
        """
        if self._encoder is None:
            self._encoder = PromptEncoder(self.bundle)
        return self.text(*self._encoder(prompts), prompt_class)

    def text(self, features: Array, lengths: Array, prompt_class: str | None = None) -> TextFeatures:
        """Features `[I, T, text_width]` and lengths `[I]` with the prompt class of each.

        Raises:
            InputError: the bundle takes labels, or features of another width or shorter; or an unknown class.
            BundleError: nothing tells its prompt classes apart.
        """
        condition = self.bundle.manifest.condition
        width, most = condition.text_width or 0, condition.text_maximum_tokens or 0
        if not self.takes_text:
            raise InputError(f"{self.bundle.root}: pictures are asked for by label, not by text")
        if features.shape[2] != width or int(lengths.max()) > most:
            raise InputError(
                f"{self.bundle.root}: text features of width {features.shape[2]} and up to {int(lengths.max())} tokens; "
                f"the bundle takes width {width} and at most {most} tokens"
            )
        return TextFeatures(
            features[:, :most], lengths, prompt_classes(self.bundle, features, lengths, given=prompt_class)
        )

    def examples(self) -> tuple[tuple[str, ...], TextFeatures]:
        """The texts of the golden trace and their features.

        Raises:
            BundleError: the bundle has no golden trace.
        """
        golden, names, parts = self.bundle.golden, [], []
        for prompt_class in self.prompt_classes:
            if f"{prompt_class}/{Names.TEXT_FEATURES.value}" in golden:
                features = golden[f"{prompt_class}/{Names.TEXT_FEATURES.value}"]
                lengths = golden[f"{prompt_class}/{Names.TEXT_LENGTHS.value}"]
                names += [prompt_class] * len(lengths)
                parts.append((features, lengths))
        if not parts:
            raise BundleError(f"{self.bundle.root}: its golden trace holds no text; give prompts or features")
        longest = max(features.shape[1] for features, _ in parts)
        padded = [np.pad(features, ((0, 0), (0, longest - features.shape[1]), (0, 0))) for features, _ in parts]
        text = TextFeatures(np.concatenate(padded), np.concatenate([n for _, n in parts]), tuple(names))
        examples = tuple(label.name for label in self.bundle.manifest.condition.examples)
        return examples if len(examples) == len(names) else tuple(names), text

    def generate(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] = (0,),
        *,
        text: TextFeatures | None = None,
        follow: Mapping[int, Array] | None = None,
        on_scale: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Make one picture per (label or text, seed).

        Args:
            labels: a name or a number per image, for a bundle of a class-conditional model.
            seeds: one per image; as many as prompts.
            text: for a bundle of a text-conditional model.
            follow: tokens of all images by scale, which each next scale is shown; see `Loop.run`. One prompt class.
            on_scale: called with (scales done, scales in all), over all batches.

        Raises:
            InputError: an unknown label, numbers that do not match, or the wrong kind of prompt.
        """
        condition, classes = self._condition(labels, text)
        if len(classes) != len(seeds):
            raise InputError(f"{len(seeds)} seeds for {len(classes)} prompts; give one seed per image")
        batches = self._batches(classes)
        total = sum(len(self.bundle.manifest.schedules[classes[batch[0]]].steps) for batch in batches)
        done = 0

        def progress() -> None:
            nonlocal done
            done += 1
            if on_scale:
                on_scale(done, total)

        images: list[Array] = [np.empty(0)] * len(classes)
        codes: list[Array] = [np.empty(0)] * len(classes)
        tokens: list[dict[int, Array]] = [{}] * len(classes)
        margins: list[dict[int, Array]] = [{}] * len(classes)
        timings = []
        for batch in batches:
            trace = self.loop(len(batch)).run(
                classes[batch[0]],
                {name: values[batch] for name, values in condition.items()},
                [seeds[image] for image in batch],
                progress,
                follow=None if follow is None else {scale: tokens[batch] for scale, tokens in follow.items()},
            )
            timings.append(trace.timing)
            for row, image in enumerate(batch):
                images[image], codes[image] = trace.images[row], trace.codes[row]
                tokens[image] = {scale: values[row] for scale, values in trace.tokens.items()}
                margins[image] = {scale: values[row] for scale, values in trace.margins.items()}
        return Result(np.stack(images), tuple(tokens), np.stack(codes), classes, tuple(timings), tuple(margins))

    def loop(self, batch: int) -> Loop:
        """The loop of this many images at once; made when it is first asked for."""
        if batch not in self._loops:
            own = getattr(self.target, "loop", None)  # of target torch on a GPU
            self._loops[batch] = (own(batch) if own else None) or Loop(self.bundle, self.target, batch)
        return self._loops[batch]

    def _batches(self, classes: Sequence[str]) -> list[list[int]]:
        """Images of one prompt class, `batch_size` at a time."""
        batches = []
        for name in dict.fromkeys(classes):
            members = [image for image, of in enumerate(classes) if of == name]
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        return batches

    def _condition(
        self, labels: Sequence[int | str] | None, text: TextFeatures | None
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """Inputs of ``prefix`` for all images, and the prompt class of each."""
        condition = self.bundle.manifest.condition
        root = self.bundle.root
        if condition.kind == "label":
            if not labels or text is not None:
                raise InputError(f"{root}: pictures are asked for by label; give one or more of {_some(self.labels)}")
            numbers = [self.label(label) for label in labels]
            classes = tuple(condition.labels[number].prompt_class for number in numbers)
            return {Names.LABELS: np.asarray(numbers, np.int32)}, classes
        if text is None or labels is not None:
            raise InputError(f"{root}: pictures are asked for by text; give prompts or text features, not labels")
        unknown = sorted(set(text.prompt_classes) - set(self.prompt_classes))
        if unknown:
            raise InputError(f"{root}: no prompt class {unknown[0]!r}; valid: {', '.join(self.prompt_classes)}")
        most = condition.text_maximum_tokens or 0
        if text.features.shape[1] > most:
            raise InputError(f"{root}: a text of {text.features.shape[1]} tokens; the bundle takes at most {most}")
        padding = ((0, 0), (0, most - text.features.shape[1]), (0, 0))
        return {
            Names.TEXT_FEATURES: np.pad(text.features, padding),
            Names.TEXT_LENGTHS: np.asarray(text.lengths, np.int32),
        }, text.prompt_classes

    def label(self, label: int | str) -> int:
        """The number of a label given by name or number.

        Raises:
            InputError: the bundle has no such label.
        """
        names = self.labels
        if not names:
            raise InputError(f"{self.bundle.root}: has no labels, its pictures are asked for by text")
        text = str(label).strip()
        if text in names:
            return names.index(text)
        if text.isdecimal() and int(text) < len(names):
            return int(text)
        raise InputError(
            f"{self.bundle.root}: no label {text!r}; valid: {_some(names)}, or a number from 0 to {len(names) - 1}"
        )


def _some(names: Sequence[str], most: int = 16) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
