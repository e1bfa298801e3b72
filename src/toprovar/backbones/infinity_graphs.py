"""Infinity on one GPU as a chain of CUDA graphs: one for the condition, one a scale, one for the picture.

The originals spend most of a picture's second in Python and in launches. All sizes are fixed by the plan, so each scale is
captured once and then costs the host one call; between the first scale and the picture nothing else crosses over. The
graphs share one memory pool and are replayed in the order of their capture; a scale reads its input where the scale
before it wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from toprovar.backbones.bsq_vae_cuda import FusedDecoder
from toprovar.backbones.generate import Pruning
from toprovar.backbones.infinity import Infinity
from toprovar.backbones.infinity_cuda import FoldedText, FusedStep, KeyValueCache, ScaleRun, TextKeys, scale_runs
from toprovar.errors import InputError
from toprovar.kernels.fused import draw_bits, embed_words

__all__ = ["InfinityGraphs"]


class InfinityGraphs:
    """A pruned or dense Infinity at one batch size and text length.

    Args:
        backbone: on a CUDA device, its matrices in fp16 or bf16.
        pruning: roles, kept tokens and scales run; None for the dense model.
        images: B.
        text_tokens: T of the features.
        negative: negative prompts are given, too.
        graphs: False runs the same kernels eagerly.
        decoder_dtype: of the VAE.
    """

    def __init__(
        self,
        backbone: Infinity,
        pruning: Pruning | None = None,
        *,
        images: int = 1,
        text_tokens: int = 64,
        negative: bool = False,
        graphs: bool = True,
        decoder_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16",
    ) -> None:
        spec, device = backbone.spec, backbone.device
        pruning = Pruning.none(spec) if pruning is None else pruning
        pruning.check(spec)
        self.backbone = backbone
        self.images = images
        self._text_keys = TextKeys(backbone)
        self._step = FusedStep(backbone, pruning.roles, pruning.restore)
        scales = tuple(range(spec.scales)) if pruning.scales_run is None else pruning.scales_run
        cache_scale = pruning.cache_scale if pruning.restore == "cache" else None
        self.runs: tuple[ScaleRun, ...] = scale_runs(backbone, pruning.keep, scales, cache_scale)
        rows = images * backbone.branches
        self.cache = KeyValueCache(backbone, pruning.roles, rows, self.runs)
        cells = spec.tokens[cache_scale] if cache_scale is not None else 0
        self._span_cache = [torch.zeros(cells, rows, spec.width, device=device) for _ in range(self._step.spans)]
        following = [*scales[1:], spec.scales]
        self._constants = [backbone.scale_constants(s, after) for s, after in zip(scales, following, strict=True)]
        self._decoder = FusedDecoder(backbone.vae, getattr(torch, decoder_dtype))

        self.bits: list[Tensor | None] = [None] * len(self.runs)
        """What the last call drew, a scale run: ``[B, N, bits]`` int32 on the device."""
        self._followed = torch.zeros((), dtype=torch.bool, device=device)
        self._given = [torch.zeros(images, r.tokens, spec.bits, dtype=torch.int32, device=device) for r in self.runs]
        self.seeds = torch.zeros(images, dtype=torch.int64, device=device)
        text = torch.zeros(images, text_tokens, spec.text_width, device=device)
        lengths = torch.full((images,), text_tokens, dtype=torch.int64, device=device)
        self._condition = [text, lengths, *([text.clone(), lengths.clone()] if negative else [])]
        pays = FoldedText.pays(backbone, text_tokens, self.runs)
        self._folded = FoldedText(backbone, rows, text_tokens) if pays else None
        self._context: dict[str, Tensor] = {}
        self._x: Tensor | None = None
        self.codes = backbone.initial_codes(images)
        self.image: Tensor | None = None

        self.stages: list[tuple[str, Callable[[], None]]] = [("prefix", self._prefix)]
        for index, run in enumerate(self.runs):
            self.stages.append((f"scale {run.scale}", lambda index=index: self._scale(index)))  # type: ignore[misc]
        self.stages.append(("decode", self._decode))
        if graphs:
            self._capture()

    # Each stage leaves its results in attributes. Under capture they are addresses in the graphs' memory pool, so a
    # replay of all stages in order is a picture.

    def _prefix(self) -> None:
        prefix = self.backbone.prefix(*self._condition, text_keys=self._text_keys)
        self._context = prefix.context if self._folded is None else prefix.context | self._folded(prefix.context)
        self._x = prefix.x0.clone()
        self.codes = torch.zeros_like(self.codes)

    def _scale(self, index: int) -> None:
        run, constants, backbone = self.runs[index], self._constants[index], self.backbone
        assert self._x is not None
        logits = self._step(run, self._x, self._context, self.cache, self._span_cache)
        sampling = backbone.sampling
        bits = draw_bits(
            logits,
            self.seeds,
            constants["guidance"],
            run.scale,
            top_p=sampling.top_p,
            greedy=sampling.top_k == 1,
        )
        self.bits[index] = bits
        shown = torch.where(self._followed, self._given[index], bits)
        self.codes = backbone.accumulate(shown, self.codes, constants)
        self._x = None
        if "next_position" in constants:
            words, embed = backbone.next_words(self.codes, constants), backbone.word_embed
            position = constants["next_position"]
            self._x = embed_words(words, embed.weight, embed.bias, position, backbone.branches)

    def _decode(self) -> None:
        self.image = self._decoder(self.codes)

    @torch.no_grad()
    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _, stage in self.stages:  # compiles kernels and picks convolution algorithms outside the capture
                stage()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs' pool cannot use what the first run leaves
        pool = torch.cuda.graph_pool_handle()
        replays: list[tuple[str, Callable[[], None]]] = []
        for name, stage in self.stages:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                stage()
            replays.append((name, graph.replay))
        self.stages = replays

    def load(
        self, condition: Sequence[Tensor], seeds: Sequence[int], follow: Mapping[int, Tensor] | None = None
    ) -> None:
        """Gives the stages what they read; running all of `stages` in order then makes the pictures.

        Args:
            condition: as `Infinity.prefix` takes it; text features ``[B, T, text_width]`` with this object's B and T.
            seeds: B of them.
            follow: bits ``[B, N, bits]`` by scale that are added up and shown to the next scale in place of those drawn.

        Raises:
            InputError: sizes other than those this object was made for.
        """
        if len(condition) != len(self._condition) or len(seeds) != self.images:
            raise InputError(
                f"{len(condition)} condition tensors and {len(seeds)} seeds: this was made for {len(self._condition)} and "
                f"{self.images}"
            )
        for found, buffer in zip(condition, self._condition, strict=True):
            if found.shape != buffer.shape:
                raise InputError(f"condition of shape {list(found.shape)}: this was made for {list(buffer.shape)}")
        for found, buffer in zip(condition, self._condition, strict=True):
            buffer.copy_(found)
        self.seeds.copy_(torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in seeds]))
        self._followed.fill_(follow is not None)
        if follow is not None:
            for run, buffer in zip(self.runs, self._given, strict=True):
                buffer.copy_(follow[run.scale])

    @torch.no_grad()
    def generate(self, condition: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Pictures from text; arguments and errors as of `load`.

        Returns: RGB ``[B, 3, height, width]`` fp32 in [0, 1] on the device; the next call overwrites it.
        """
        self.load(condition, seeds)
        for _, stage in self.stages:
            stage()
        assert self.image is not None
        return self.image
