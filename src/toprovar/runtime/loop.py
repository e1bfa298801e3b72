"""The loop over scales: all that a runtime does outside the graphs. The C++ runtime mirrors `Loop.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from toprovar.errors import InputError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.profiles.noise import scale_noise
from toprovar.runtime.binding import Binding, Turn
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.machine import usable_cores
from toprovar.runtime.target import Array, Buffer, Run, Target

__all__ = ["MARGINS", "Loop", "ScaleTiming", "Timing", "Trace"]


@dataclass(frozen=True)
class ScaleTiming:
    """Milliseconds of one scale.

    How long its noise held it up (threads draw it ahead, on cores that a CPU target could use), the transformer, and
    what leads to the next scale.
    """

    scale: int
    noise_ms: float
    step_ms: float
    advance_ms: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one batch; `total_ms` is wall time from the condition to the pictures in host memory."""

    prompt_class: str
    images: int
    prefix_ms: float
    scales: tuple[ScaleTiming, ...]
    decode_ms: float
    total_ms: float

    @property
    def transformer_ms(self) -> float:
        """The steps of all scales together."""
        return sum(scale.step_ms for scale in self.scales)


@dataclass(frozen=True)
class Trace:
    """What one batch gave.

    tokens by scale, each `[B, N]` or `[B, N, bits]` int32; codes `[B, Cv, h, w]`; images `[B, 3, height, width]` in
    [0, 1]. margins, shaped like tokens, of a run that followed others: by how much the logits of those must rise until
    they are drawn, as a part of the scale's largest logit; 0 where they are, infinity where no `MARGINS` will do.
    """

    tokens: dict[int, Array]
    codes: Array
    images: Array
    timing: Timing
    margins: dict[int, Array] = field(default_factory=dict)


_NOISE_THREADS = 4
"""Most threads that draw: one is busy with the last scale, about half of a picture's noise, while others do the rest."""


class Loop:
    """A bundle on a target at one batch size, B images; runs each of the bundle's prompt classes.

    Raises:
        BundleError: graphs and loop do not fit together.
    """

    def __init__(self, bundle: Bundle, target: Target, batch: int):
        self._bundle = bundle
        self._target = target
        self._bound = Binding(bundle, target, batch)
        self._scale_noise = getattr(target, "scale_noise", scale_noise)
        self._pool = ThreadPoolExecutor(min(_NOISE_THREADS, usable_cores()), "toprovar-noise")

    def run(
        self,
        prompt_class: str,
        condition: Mapping[str, Array],
        seeds: Sequence[int],
        on_scale: Callable[[], None] = lambda: None,
        *,
        follow: Mapping[int, Array] | None = None,
    ) -> Trace:
        """Make B pictures.

        Args:
            prompt_class: which schedule.
            condition: what ``prefix`` takes: ``labels`` [B] int32, or ``text_features`` and ``text_lengths``.
            seeds: B of them; a picture depends on its own seed only.
            on_scale: called after each scale.
            follow: tokens by scale, shaped like those of `Trace`. Each scale still gives its own tokens, but those here
                are what is added to the codes and what the next scale is shown.

        Raises:
            InputError: a condition or seeds of another shape than the batch.
        """
        bound, read = self._bound, self._target.read
        if len(seeds) != bound.batch:
            raise InputError(f"{len(seeds)} seeds for a batch of {bound.batch} images; give one seed per image")
        turns = bound.turns[prompt_class]
        start = perf_counter()
        for name, values in condition.items():
            self._write(name, values)
        self._write(Names.CODES, np.zeros(bound.codes(0).shape))

        scales: list[ScaleTiming] = []
        given: dict[int, Array] = {}
        margins: dict[int, Array] = {}
        with self._noise_ahead(turns, seeds) as noise:
            prefix_ms = self.timed(bound.prefix)
            for turn, drawn in zip(turns, noise, strict=True):
                noise_ms = self._write_noise(turn, drawn)
                step_ms = self.timed(turn.step)
                advance_ms = self.timed(turn.advance)
                scales.append(ScaleTiming(turn.scale, noise_ms, step_ms, advance_ms))
                if follow is not None:
                    given[turn.scale], tokens = read(turn.tokens), follow[turn.scale]
                    chosen = _chosen(tokens, turn.logits)
                    margins[turn.scale] = self._margins(turn, tokens, given[turn.scale], chosen)
                    self._target.write(turn.logits, _CERTAIN_LOGIT * chosen)
                    turn.advance()  # reads the codes that it read before, and writes over what it gave
                on_scale()
        decode_ms = self.timed(bound.decode[len(turns) % 2])

        images = read(bound.buffers[Names.IMAGE])
        total_ms = (perf_counter() - start) * 1e3
        return Trace(
            tokens=given or {turn.scale: read(turn.tokens) for turn in turns},
            codes=read(bound.codes(len(turns))),
            images=images,
            timing=Timing(prompt_class, bound.batch, prefix_ms, tuple(scales), decode_ms, total_ms),
            margins=margins,
        )

    def turns(self, prompt_class: str) -> Sequence[Turn]:
        """The scales of a prompt class, bound."""
        return self._bound.turns[prompt_class]

    def _margins(self, turn: Turn, tokens: Array, drawn: Array, chosen: Array) -> Array:
        """See `Trace`; of a turn that has run and drawn `drawn`. Leaves other logits behind."""
        found = np.where(drawn == tokens, 0.0, np.inf)
        if not found.any():
            return found
        logits = self._target.read(turn.logits)
        largest = np.abs(logits).max()
        for margin in MARGINS:
            self._target.write(turn.logits, (logits + margin * largest * chosen).astype(logits.dtype))
            turn.advance()
            found = np.minimum(found, np.where(self._target.read(turn.tokens) == tokens, margin, np.inf))
            if np.isfinite(found).all():
                break
        return found

    def timed(self, run: Run) -> float:
        """Milliseconds from asking for a run until it is done."""
        start = perf_counter()
        run()
        self.wait()
        return (perf_counter() - start) * 1e3

    def wait(self) -> None:
        """Until everything queued has run."""
        self._target.synchronize()

    @contextmanager
    def _noise_ahead(self, turns: Sequence[Turn], seeds: Sequence[int]) -> Iterator[list[Future[Array] | None]]:
        """The noise of each turn that takes some, drawn in order by threads while the target runs those before."""
        futures = [self._draw(turn, seeds) for turn in turns]
        try:
            yield futures
        finally:  # a picture that was interrupted leaves nothing to draw
            for future in filter(None, futures):
                future.cancel()

    def _draw(self, turn: Turn, seeds: Sequence[int]) -> Future[Array] | None:
        if turn.noise is None:
            return None
        tokens, _, logits = turn.noise.shape
        return self._pool.submit(self._scale_noise, list(seeds), turn.scale, tokens, logits)

    def _write_noise(self, turn: Turn, drawn: Future[Array] | None) -> float:
        start = perf_counter()
        if turn.noise is not None and drawn is not None:
            self._target.write(turn.noise, drawn.result())
        return (perf_counter() - start) * 1e3

    def _write(self, name: str, values: Array) -> None:
        buffer = self._bound.buffers.get(name)
        if buffer is None or values.shape != buffer.shape:
            takes = "no such input" if buffer is None else f"{list(buffer.shape)}"
            raise InputError(f"{self._bundle.root}: {name} has shape {list(values.shape)}; the bundle takes {takes}")
        self._target.write(buffer, np.ascontiguousarray(values, dtype=buffer.dtype))


MARGINS = tuple(2.0**-k for k in range(12, 2, -1))
"""Parts of the largest logit by which those of another token are raised, to see how far it was from being drawn."""

_CERTAIN_LOGIT = 1e3
"""Above all others, which are 0: no noise, guidance or temperature changes the choice, and fp16 holds the sum of both."""


def _chosen(tokens: Array, logits: Buffer) -> Array:
    """1 at these tokens, `[B, N]`, or `[B, N, bits]` of V = bits * 2, and 0 elsewhere, `[N, R, V]` as logits are."""
    count, rows, values = logits.shape
    each = tokens.reshape(len(tokens), count, -1).swapaxes(0, 1)  # [N, B, 1 or bits]
    choices = values // each.shape[2]
    chosen = np.zeros((*each.shape, choices), logits.dtype)
    # A golden trace that was tampered with may hold any number; it is counted as wrong where tokens are compared.
    np.put_along_axis(chosen, each.clip(0, choices - 1)[..., None], 1, axis=3)
    return np.tile(chosen.reshape(count, len(tokens), values), (1, rows // len(tokens), 1))
