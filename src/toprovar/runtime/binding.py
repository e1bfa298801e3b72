"""Where each graph reads and writes: the buffers of a bundle at one batch size, and every scale bound to them.

    x, logits, noise, tokens, codes (two, in turn), and per layer one K and one V cache [L, R, H, D]

Every buffer is allocated once, as large as its largest use in any schedule. The cache is sequence-first, so a scale
reads its past as the first P rows of the cache and writes its new keys right behind them: nothing is concatenated,
copied or aliased. Global and detail layers have lengths of their own. Where spans of detail layers are restored from a
cached dense scale, that scale writes each span's change straight into its restore cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from toprovar.errors import BundleError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.profiles.manifest import ScaleStep, Schedule, TensorInfo
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.target import DTYPE_BYTES, Buffer, Run, Target

__all__ = ["Binding", "Turn"]

ZEROS = "zeros"  # stands in for restore caches that are not filled yet
SCRATCH = "scratch"  # takes span deltas that no cache takes


@dataclass(frozen=True)
class Turn:
    """One scale, bound. `noise` is None where the graphs take none (greedy); `logits` is what `advance` reads."""

    scale: int
    noise: Buffer | None
    step: Run
    advance: Run
    logits: Buffer
    tokens: Buffer


class Binding:
    """The graphs of a bundle, bound to a target's memory for B images.

    `prefix()`, then for each turn `step()` and `advance()`, then `decode[turns % 2]()`.

    Raises:
        BundleError: a graph has an input that nothing provides, an output that nothing takes, or a type that differs
            between two graphs.
    """

    def __init__(self, bundle: Bundle, target: Target, batch: int):
        self.bundle = bundle
        self.target = target
        self.batch = batch
        self.model = bundle.manifest.model
        self.rows = batch * self.model.rows_per_image
        self.buffers = self._allocate()
        self.constants = self._upload_constants()
        self.context = self._allocate_context()

        self._runners = {name: target.graph(name) for name in ("prefix", "step", "advance", "decoder")}
        schedules = bundle.manifest.schedules
        first = next(iter(schedules.values())).steps[0]
        self.prefix = self._bind("prefix", self.buffers, {**self.context, Names.X: self._x(first.tokens)})
        self.turns = {name: self._bind_schedule(schedule) for name, schedule in schedules.items()}
        self.decode = [self._bind("decoder", {Names.CODES: self.codes(turn)}, self.buffers) for turn in (0, 1)]

    def codes(self, turn: int) -> Buffer:
        """The codes that a turn reads; it writes those of the next turn."""
        return self.buffers[Names.CODES_OUT if turn % 2 else Names.CODES]

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    def _allocate(self) -> dict[str, Buffer]:
        """Every buffer that the loop owns and a graph names."""
        model, condition, images, rows = self.model, self.bundle.manifest.condition, self.batch, self.rows
        schedules = self.bundle.manifest.schedules.values()
        steps = [step for schedule in schedules for step in schedule.steps]
        tokens = max(step.tokens for step in steps)
        keep = max(step.keep for step in steps)
        length = {
            "g": max(step.past_global + step.tokens for step in steps),
            "d": max(step.past_detail + step.keep for step in steps),
        }
        cached = max(max(self._cached(step), step.tokens if step.capture_span_delta else 1) for step in steps)
        shapes: dict[str, tuple[int, ...]] = {
            Names.LABELS: (images,),
            Names.TEXT_FEATURES: (images, condition.text_maximum_tokens or 0, condition.text_width or 0),
            Names.TEXT_LENGTHS: (images,),
            Names.X: (tokens, rows, model.width),
            Names.LOGITS: (tokens, rows, model.logits),
            Names.NOISE: (tokens, images, model.logits),
            Names.KEEP_SLOTS: (keep,),
            Names.CODES: (images, *model.code_shape),
            Names.CODES_OUT: (images, *model.code_shape),
            Names.IMAGE: (images, 3, *model.image_size),
        }
        for layer, role in enumerate(model.roles):
            for name in (Names.PAST_K, Names.PAST_V):
                shapes[name.format(i=layer)] = (length[role], rows, model.heads, model.head_dim)
        for span in range(len(model.spans)):
            shapes[Names.SPAN_CACHE.format(i=span)] = (cached, rows, model.width)

        buffers: dict[str, Buffer] = {}
        for graph in self.bundle.manifest.graphs.values():
            for tensor in (*graph.inputs, *graph.outputs):
                if tensor.name in shapes and tensor.name not in buffers:
                    buffers[tensor.name] = self._reserve(tensor.dtype, shapes[tensor.name])
                if tensor.name == Names.SPAN_CACHE.format(i=0):
                    buffers[ZEROS] = self._reserve(tensor.dtype, shapes[tensor.name])
                    buffers[SCRATCH] = self._reserve(tensor.dtype, (keep, rows, model.width))
        return buffers

    def _allocate_context(self) -> dict[str, Buffer]:
        """Outputs of ``prefix`` besides the first input: what every scale sees of the condition."""
        sizes = {"B": self.batch, "R": self.rows, "T": self.bundle.manifest.condition.text_maximum_tokens or 0}
        return {
            tensor.name: self._reserve(tensor.dtype, self._resolve(tensor, sizes))
            for tensor in self.bundle.graph("prefix").outputs
            if tensor.name != Names.X
        }

    def _upload_constants(self) -> dict[str, Buffer]:
        constants = {}
        for name, values in self.bundle.constants.items():
            constants[name] = self._reserve(str(values.dtype), values.shape)
            self.target.write(constants[name], values)
        return constants

    def _reserve(self, dtype: str, shape: Sequence[int]) -> Buffer:
        size = max(prod(shape) * DTYPE_BYTES[dtype], 1)  # an empty tensor has an address too
        return Buffer(self.target.allocate(size), size, dtype, tuple(shape))

    def _resolve(self, tensor: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...]:
        unknown = [size for size in tensor.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            known = ", ".join(sizes)
            raise BundleError(
                f"{self.bundle.root}: {tensor.name} has a size {unknown[0]!r}; valid there: numbers, {known}"
            )
        return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)

    # -----------------------------------------------------------------------------------------------------------------
    # Scales

    def _bind_schedule(self, schedule: Schedule) -> list[Turn]:
        turns = []
        filled = False
        for index, step in enumerate(schedule.steps):
            following = schedule.steps[(index + 1) % len(schedule.steps)].tokens  # unused at the last
            turns.append(self._bind_turn(index, step, following, filled))
            filled = filled or step.capture_span_delta
        return turns

    def _bind_turn(self, index: int, step: ScaleStep, following: int, filled: bool) -> Turn:
        """Bind one scale.

        Args:
            index: of the turn, which says whose turn it is among the two code buffers.
            step: the scale.
            following: N of the next scale.
            filled: the restore caches hold an earlier scale.
        """
        model, buffers = self.model, self.buffers
        constants = {name: self.constants[key] for name, key in step.constants.items()}
        inputs: dict[str, Buffer] = {}
        outputs: dict[str, Buffer] = {}

        inputs[Names.X] = self._x(step.tokens)
        outputs[Names.LOGITS] = buffers[Names.LOGITS].view((step.tokens, self.rows, model.logits))
        if Names.KEEP_SLOTS in buffers:
            inputs[Names.KEEP_SLOTS] = buffers[Names.KEEP_SLOTS].view((step.keep,))
        for layer, role in enumerate(model.roles):
            past, new = (step.past_global, step.tokens) if role == "g" else (step.past_detail, step.keep)
            for past_name, new_name in ((Names.PAST_K, Names.NEW_K), (Names.PAST_V, Names.NEW_V)):
                cache = buffers[past_name.format(i=layer)]
                inputs[past_name.format(i=layer)] = cache.view((past, *cache.shape[1:]))
                outputs[new_name.format(i=layer)] = cache.view((new, *cache.shape[1:]), first_row=past)
        for span in range(len(model.spans) if ZEROS in buffers else 0):
            cache = buffers[Names.SPAN_CACHE.format(i=span)]
            read = cache if filled else buffers[ZEROS]
            written = cache if step.capture_span_delta else buffers[SCRATCH]
            inputs[Names.SPAN_CACHE.format(i=span)] = read.view((self._cached(step), *cache.shape[1:]))
            outputs[Names.SPAN_DELTA.format(i=span)] = written.view((step.keep, *cache.shape[1:]))
        run_step = self._bind("step", {**self.context, **constants, **inputs}, outputs)

        tokens = self._tokens(step)
        noise = buffers.get(Names.NOISE)
        noise = noise and noise.view((step.tokens, self.batch, model.logits))
        logits = outputs[Names.LOGITS]
        inputs = {**constants, Names.LOGITS: logits, Names.CODES: self.codes(index)}
        if noise:
            inputs[Names.NOISE] = noise
        outputs = {
            Names.TOKENS: tokens,
            Names.CODES_OUT: self.codes(index + 1),
            Names.NEXT_X: self._x(following),  # the step has read x by now
        }
        return Turn(step.scale, noise, run_step, self._bind("advance", inputs, outputs), logits, tokens)

    def _cached(self, step: ScaleStep) -> int:
        """M, rows of a restore cache as the step reads it."""
        names = (Names.AREA_ROWS, Names.AREA_COLS)
        return prod(self.bundle.constants[step.constants[name]].shape[1] for name in names if name in step.constants)

    def _x(self, tokens: int) -> Buffer:
        return self.buffers[Names.X].view((tokens, self.rows, self.model.width))

    def _tokens(self, step: ScaleStep) -> Buffer:
        """Each scale keeps its own, so that they are read once, at the end. `[B, N]`, or `[B, N, bits]`."""
        for tensor in self.bundle.graph("advance").outputs:
            if tensor.name == Names.TOKENS:
                bits = [size for size in tensor.shape[2:] if isinstance(size, int)]
                return self._reserve(tensor.dtype, (self.batch, step.tokens, *bits))
        raise BundleError(f"{self.bundle.root}: advance has no output {Names.TOKENS.value}; export the bundle again")

    def _bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Give a graph what it names, of what there is."""
        info = self.bundle.graph(graph)
        return self._runners[graph].bind(
            {tensor.name: self._take(graph, tensor, inputs, "input") for tensor in info.inputs},
            {tensor.name: self._take(graph, tensor, outputs, "output") for tensor in info.outputs},
        )

    def _take(self, graph: str, tensor: TensorInfo, buffers: Mapping[str, Buffer], kind: str) -> Buffer:
        if tensor.name not in buffers:
            raise BundleError(
                f"{self.bundle.root}: {graph} has an {kind} {tensor.name!r} that the loop does not know; "
                f"known are {', '.join(sorted(buffers))}; export the bundle with this version of toprovar"
            )
        buffer = buffers[tensor.name]
        if buffer.dtype != tensor.dtype:
            raise BundleError(
                f"{self.bundle.root}: {graph} takes {tensor.name} as {tensor.dtype}, it is {buffer.dtype}"
            )
        return buffer
