"""The loop of target `torch` on a GPU where the model is Infinity: one call of the host per scale.

`toprovar.runtime.loop.Loop` binds the four graphs of a bundle and hands every scale's noise over from the host. Here the
plan of the bundle is run by `toprovar.backbones.infinity_graphs`: fused kernels, captured once per prompt class, with
the noise made on the GPU from the seeds. Pictures and tokens are the same, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch

from toprovar.backbones.generate import Pruning
from toprovar.backbones.infinity import Infinity
from toprovar.backbones.infinity_graphs import InfinityGraphs
from toprovar.errors import InputError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.loop import ScaleTiming, Timing, Trace
from toprovar.runtime.target import Array

__all__ = ["GraphLoop", "bundle_pruning"]

_TEXT_STEP = 64
"""Texts are padded to a multiple of this many tokens, so that prompts of about one length share their graphs."""


def bundle_pruning(bundle: Bundle, prompt_class: str, scales: int) -> Pruning:
    """The plan of one prompt class as `toprovar.backbones` takes it; `scales` are those of the model's schedule."""
    steps = {step.scale: step for step in bundle.manifest.schedules[prompt_class].steps}
    restored = any(tensor.name == Names.SPAN_CACHE.format(i=0) for tensor in bundle.graph("step").inputs)
    return Pruning(
        roles=bundle.manifest.model.roles,
        keep=tuple(steps[scale].keep if scale in steps else 1 for scale in range(scales)),
        cache_scale=next((scale for scale, step in steps.items() if step.capture_span_delta), None),
        restore="cache" if restored else "identity",
        scales_run=tuple(steps),
    )


class GraphLoop:
    """A bundle of Infinity on a CUDA GPU at one batch size; used as `toprovar.runtime.loop.Loop` is.

    Args:
        bundle: in half precision.
        backbone: its model on the GPU, matrices and decoder in that precision.
        batch: B.
        graphs: False launches the same kernels one by one.
    """

    def __init__(self, bundle: Bundle, backbone: Infinity, batch: int, *, graphs: bool = True):
        self._bundle = bundle
        self._backbone = backbone
        self._batch = batch
        self._graphs = graphs
        self._engines: dict[str, tuple[int, InfinityGraphs]] = {}

    def run(
        self,
        prompt_class: str,
        condition: Mapping[str, Array],
        seeds: Sequence[int],
        on_scale: Callable[[], None] = lambda: None,
        *,
        follow: Mapping[int, Array] | None = None,
    ) -> Trace:
        """Make B pictures; see `Loop.run`. The times of a scale are the GPU's; `on_scale` is called when it is queued.

        Raises:
            InputError: a condition or seeds of another shape than the batch.
        """
        if len(seeds) != self._batch:
            raise InputError(f"{len(seeds)} seeds for a batch of {self._batch} images; give one seed per image")
        start = perf_counter()
        lengths = torch.from_numpy(condition[Names.TEXT_LENGTHS]).to(torch.int64)
        features = torch.from_numpy(condition[Names.TEXT_FEATURES])
        tokens = min(features.shape[1], -(-int(lengths.max()) // _TEXT_STEP) * _TEXT_STEP)
        engine = self._engine(prompt_class, tokens)
        engine.load(
            (features[:, :tokens], lengths),
            seeds,
            None if follow is None else {scale: torch.from_numpy(bits) for scale, bits in follow.items()},
        )
        clock = _Clock(self._backbone.device)
        with torch.no_grad():
            for name, stage in engine.stages:
                stage()
                clock.tick()
                if name.startswith("scale"):
                    on_scale()
        assert engine.image is not None
        images = engine.image.cpu().numpy()
        total_ms = (perf_counter() - start) * 1e3
        prefix_ms, *step_ms, decode_ms = clock.laps_ms()
        drawn = zip(engine.runs, engine.bits, strict=True)
        return Trace(
            tokens={run.scale: bits.cpu().numpy() for run, bits in drawn if bits is not None},
            codes=engine.codes.cpu().numpy(),
            images=images,
            timing=Timing(
                prompt_class,
                self._batch,
                prefix_ms,
                # Noise and what leads to the next scale are in the scale's graph.
                tuple(ScaleTiming(run.scale, 0.0, ms, 0.0) for run, ms in zip(engine.runs, step_ms, strict=True)),
                decode_ms,
                total_ms,
            ),
        )

    def _engine(self, prompt_class: str, tokens: int) -> InfinityGraphs:
        """The graphs of a prompt class; those of another text length make room first."""
        found = self._engines.get(prompt_class)
        if found is not None and found[0] == tokens:
            return found[1]
        self._engines.pop(prompt_class, None)
        engine = InfinityGraphs(
            self._backbone,
            bundle_pruning(self._bundle, prompt_class, self._backbone.spec.scales),
            images=self._batch,
            text_tokens=tokens,
            graphs=self._graphs,
            decoder_dtype=self._bundle.manifest.precision,
        )
        self._engines[prompt_class] = tokens, engine
        return engine


class _Clock:
    """Laps of the GPU, read when all are over; of the host where there is none."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self.tick()

    def tick(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter() * 1e3)

    def laps_ms(self) -> list[float]:
        laps = []
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) or isinstance(after, float):
                assert isinstance(before, float) and isinstance(after, float)
                laps.append(after - before)
            else:
                laps.append(before.elapsed_time(after))
        return laps
