"""One loop over scales for every policy: same noise, same weights, same clock, FLOPs counted as they are spent.

A *policy* decides how a scale is computed and which scale follows. What it does not decide, drawing tokens, adding up codes and
making the next input, is the backbone's own, so that two policies differ in nothing else. Policies whose shapes depend on the
picture (`adaptive`) run one picture at a time, as their original codes do.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toprovar.backbones.base import Backbone, BlockOutput, Constants, EntropyMode, Prefix
from toprovar.errors import InputError
from toprovar.profiles.flops import Flops, ModelShape, conditioning_flops, head_flops, layer_flops

__all__ = ["Outcome", "Policy", "Rows", "State", "run_policy"]

Rows = Literal["both", "conditional", "unconditional"]
"""Which rows of the transformer run."""

# Where the rows R stand in each tensor of a context (`Backbone.prefix` of VAR and Infinity).
_ROW_AXIS = {"modulation": 2, "head_modulation": 1, "cross_k": 2, "cross_v": 2, "text_bias": 0}


class _Cache:
    """Keys and values, a pair a layer, `[P, R, H, D]`, allocated once for all scales dense."""

    def __init__(self, backbone: Backbone, rows: int):
        spec = backbone.spec
        shape = (sum(spec.tokens), rows, spec.heads, spec.head_dim)
        self.stores = [
            tuple(torch.empty(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(2))
            for _ in range(spec.depth)
        ]
        self.lengths = [0] * spec.depth

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.stores[layer]
        return k[: self.lengths[layer]], v[: self.lengths[layer]]

    def append(self, layer: int, new_k: Tensor, new_v: Tensor) -> None:
        start, count = self.lengths[layer], new_k.shape[0]
        for store, new in zip(self.stores[layer], (new_k, new_v), strict=True):
            store[start : start + count].copy_(new)
        self.lengths[layer] = start + count

    def narrow(self, rows: slice) -> None:
        self.stores = [(k[:, rows].contiguous(), v[:, rows].contiguous()) for k, v in self.stores]


class State:
    """A run under way. Policies read it, and call `block`, `head`, `use_rows` and `count`."""

    def __init__(self, backbone: Backbone, shape: ModelShape, prefix: Prefix, seeds: Sequence[int]):
        self.backbone, self.shape, self.seeds = backbone, shape, tuple(seeds)
        self.images = len(seeds)
        self.x = prefix.x0
        self.context: dict[str, Tensor] = dict(prefix.context)
        self.rows: Rows = "both"
        self.cache = _Cache(backbone, prefix.x0.shape[1])
        self.scale = 0
        self.codes = backbone.initial_codes(self.images)
        self.codes_after: dict[int, Tensor] = {}
        """Accumulated codes after each scale run, `[B, latent_channels, h, w]`."""
        self.tokens: dict[int, Tensor] = {}
        self.guided_logits: Tensor | None = None
        """Of the scale before, `[N, B, V]` after guidance."""
        self.flops: dict[int, int] = {}
        self.kept: dict[int, float] = {}
        self.masks: dict[int, Tensor] = {}
        """Which tokens a pruned span kept, `[B, spans, N]` bool, of scales where any was left out."""
        self.memory: dict[str, Any] = {}
        """What a policy keeps from scale to scale."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.backbone.spec.grids[self.scale]

    @property
    def branches(self) -> int:
        """R / B at this scale."""
        return self.x.shape[1] // self.images

    def use_rows(self, rows: Rows) -> None:
        """From this scale on only these rows run; no way back. Nothing happens without guidance."""
        if rows == self.rows or rows == "both" or self.branches == 1:
            return
        part = slice(0, self.images) if rows == "conditional" else slice(self.images, 2 * self.images)
        self.rows = rows
        self.x = self.x[:, part].contiguous()
        for name, value in self.context.items():
            axis = _ROW_AXIS[name]
            self.context[name] = value[(slice(None),) * axis + (part,)].contiguous()
        self.cache.narrow(part)

    def block(self, layer: int, x: Tensor, rope: Tensor | None, entropy: EntropyMode = "none") -> BlockOutput:
        """One layer on tokens `x [n, R, C]`; their keys go into the cache."""
        past_k, past_v = self.cache.past(layer)
        context = self.backbone.layer_context(layer, self.context)
        output = self.backbone.blocks[layer](x, context, past_k, past_v, rope=rope, entropy=entropy)
        self.count(layer_flops(self.shape, x.shape[0], past_k.shape[0] + x.shape[0]))
        self.cache.append(layer, output.new_k, output.new_v)
        return output

    def head(self, x: Tensor) -> Tensor:
        """`x [N, R, C]` -> logits `[N, R, V]`."""
        self.count(head_flops(self.shape, x.shape[0]))
        return self.backbone.head(x, self.context)

    def count(self, flops: Flops | int) -> None:
        """FLOPs of one row, spent by every row that runs."""
        total = flops if isinstance(flops, int) else flops.total
        self.flops[self.scale] = self.flops.get(self.scale, 0) + self.branches * total

    def keep(self, tokens: float) -> None:
        """How many tokens a pruned layer of this scale runs, mean over pictures."""
        self.kept[self.scale] = float(tokens)

    def generators(self, purpose: int) -> list[torch.Generator]:
        """A random generator a picture, of its seed, the scale and the purpose: a picture does not depend on its batch."""
        made = []
        for seed in self.seeds:
            generator = torch.Generator()
            generator.manual_seed((seed * 1_000_003 + self.scale * 1009 + purpose) % (1 << 63))
            made.append(generator)
        return made


class Policy:
    """The dense model, all scales; other policies override what they do differently.

    A policy holds its constants only, and may be run any number of times; what it remembers of a run is in `State.memory`.
    """

    adaptive: ClassVar[bool] = False
    """Shapes or decisions depend on the picture."""

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        """One scale: `x [N, R, C]` -> logits `[N, R, V]`."""
        for layer in range(len(state.backbone.blocks)):
            x = state.block(layer, x, constants.get("rope")).x
        return state.head(x)

    def accumulate(self, state: State, tokens: Tensor, constants: Constants) -> Tensor:
        """Codes after the scale."""
        return state.backbone.accumulate(tokens, state.codes, constants)

    def before(self, state: State) -> None:
        """Called before each scale; may change the rows that run."""

    def following(self, state: State) -> int | None:
        """The scale after this one, asked when its codes are there; None ends the picture."""
        return state.scale + 1 if state.scale + 1 < state.backbone.spec.scales else None


@dataclass
class Outcome:
    """B pictures made by one policy.

    tokens by scale run, `[B, N]` or `[B, N, bits]` int32; drawn: what the policy drew itself, which differs under teacher
    forcing; codes after each scale `[B, latent_channels, h, w]`; image `[B, 3, height, width]` in [0, 1] or None; flops and
    kept tokens by scale, per picture; seconds by scale, for the batch; conditioning: FLOPs once a picture.
    """

    tokens: dict[int, Tensor]
    drawn: dict[int, Tensor]
    codes: dict[int, Tensor]
    image: Tensor | None
    flops: dict[int, int]
    kept: dict[int, float]
    masks: dict[int, Tensor]
    conditioning: int
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def total_flops(self) -> int:
        return self.conditioning + sum(self.flops.values())


@torch.no_grad()
def run_policy(
    policy: Policy,
    backbone: Backbone,
    shape: ModelShape,
    prefix: Prefix,
    seeds: Sequence[int],
    noise: Callable[[int], Tensor] | None,
    *,
    forced: dict[int, Tensor] | None = None,
    decode: bool = True,
) -> Outcome:
    """Make pictures.

    Args:
        shape: of the backbone, for FLOPs.
        prefix: `backbone.prefix` of the B conditions.
        seeds: of the pictures, B; a policy that draws at random starts from them.
        noise: scale -> uniform noise as `Backbone.noise_shape` says, on the backbone's device; None takes the largest logit.
        forced: scale -> tokens to go on with in place of those drawn (teacher forcing).
        decode: False leaves `image` None.

    Raises:
        InputError: an adaptive policy with more than one picture.
    """
    if policy.adaptive and len(seeds) != 1:
        raise InputError(f"{type(policy).__name__} decides picture by picture: give it one at a time, not {len(seeds)}")
    state = State(backbone, shape, prefix, seeds)
    rows = prefix.x0.shape[1] // len(seeds)
    conditioning = rows * conditioning_flops(shape)
    clock = _clock(backbone.device)
    drawn: dict[int, Tensor] = {}
    seconds: dict[int, float] = {}
    scale: int | None = 0
    while scale is not None:
        started = clock()
        state.scale = scale
        policy.before(state)
        constants = dict(_constants(backbone, scale, None))
        if state.rows != "both":  # guidance of one kind of row is those rows' own logits; the temperature stays
            constants["guidance"] = constants["guidance"].sum(0, keepdim=True)
        state.keep(backbone.spec.tokens[scale])
        logits = policy.step(state, state.x, constants)
        tokens = backbone.sample(logits, None if noise is None else noise(scale), constants)
        drawn[scale] = tokens
        if forced is not None:
            tokens = forced[scale]
        state.memory["constants"], state.memory["logits"] = constants, logits
        state.codes = policy.accumulate(state, tokens, constants)
        state.tokens[scale], state.codes_after[scale] = tokens, state.codes
        scale = policy.following(state)
        if scale is not None:
            onward = constants if scale == state.scale + 1 else _constants(backbone, state.scale, scale)
            x = backbone.next_input(state.codes, onward)
            state.x = x if state.rows == "both" else x[:, : len(seeds)]
        seconds[state.scale] = clock() - started
    image = backbone.decode(state.codes) if decode else None
    return Outcome(
        state.tokens,
        drawn,
        state.codes_after,
        image,
        state.flops,
        state.kept,
        state.masks,
        conditioning,
        seconds,
    )


_KNOWN: weakref.WeakKeyDictionary[Backbone, dict[tuple[Any, ...], Constants]] = weakref.WeakKeyDictionary()


def _constants(backbone: Backbone, scale: int, following: int | None) -> Constants:
    """`Backbone.scale_constants`, made once: a runtime has them in its bundle."""
    known = _KNOWN.setdefault(backbone, {})
    key = (scale, following, backbone.sampling)
    if key not in known:
        known[key] = backbone.scale_constants(scale, following)
    return known[key]


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
