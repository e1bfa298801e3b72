"""Quality-guarded planning: the fastest plan above a floor, found by making pictures and comparing them with the dense ones.

For each prompt class the search decides how many last scales are dropped, D, and the kept fraction; the roles are common to all
classes, since a bundle has one graph. Candidates are found on one set of pictures and accepted on another one, held out. What
comes out is a *profile* with every decision spelt out, and so a plan is still a pure function of profile and calibration.

Speed is counted in FLOPs of the transformer, which are the same on every machine. Decisions compare exact means; the
pictures are put into one order first, so that their order, and the seed of the bootstrap, decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from toprovar.backbones.base import Backbone
from toprovar.backbones.generate import Pruning
from toprovar.errors import InputError
from toprovar.exporter.calibrate import Condition, labels_condition
from toprovar.exporter.plan import kept_tokens, role_scores
from toprovar.exporter.policies.engine import Outcome, run_policy
from toprovar.exporter.policies.ours import Planned
from toprovar.exporter.quality import mean_squared_error, ssim
from toprovar.profiles.calibration import Calibration
from toprovar.profiles.evidence import Interval
from toprovar.profiles.flops import ModelShape, dense_flops, plan_flops
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.profile import SCHEMA, ClassOptions, Depth, Profile, QualityFloor, Roles, Tokens
from toprovar.profiles.statistics import bootstrap, exact_mean

__all__ = ["Candidate", "Found", "Judge", "Picture", "Search", "split_pictures"]

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Kept fractions that are tried, by bisection: more tokens are taken to be no worse."""

DETAIL_SHARES = (0.5, 0.75, 1.0)
"""Shares of the layers that may be detail; the first layer never is."""

PRUNED_SCALES = 4
"""D is one of that many last scales run."""

LEAST_GRID = 6
"""Scales with fewer than LEAST_GRID**2 tokens are never pruned."""


@dataclass(frozen=True, order=True)
class Picture:
    """One picture to make: a label or text, and the seed of its noise."""

    prompt: int | str
    seed: int


Judge = Callable[[Tensor, Sequence[Picture]], Tensor]
"""Pictures `[B, 3, h, w]` in [0, 1] and what was asked for -> `[B]`, the share that the judge sees."""


def split_pictures(
    prompts: Mapping[str, Sequence[int | str]], seeds: Sequence[int]
) -> tuple[dict[str, list[Picture]], dict[str, list[Picture]]]:
    """Pictures to search on, and pictures held out, by prompt class: every other one of each class."""
    searched, held_out = {}, {}
    for name, members in prompts.items():
        pictures = _ordered(Picture(prompt, seed) for seed in seeds for prompt in members)
        searched[name], held_out[name] = pictures[::2], pictures[1::2]
    return searched, held_out


def _ordered(pictures: Iterable[Picture]) -> list[Picture]:
    """Numbers and texts do not compare; either way the order is that of content, not of the list given."""
    return sorted(pictures, key=lambda one: (one.seed, isinstance(one.prompt, str), str(one.prompt).zfill(12)))


@dataclass(frozen=True)
class Candidate:
    """A pruning of one prompt class; `cost` FLOPs per picture."""

    run: int
    opening: int | None
    fraction: float
    keep: tuple[int, ...]
    cost: int

    @property
    def key(self) -> tuple[int, int, int, float]:
        """Cheapest first; of equals the one that runs more scales."""
        return (self.cost, -self.run, -1 if self.opening is None else -self.opening, self.fraction)


@dataclass(frozen=True)
class Found:
    """What a search found.

    measured: prompt class -> figure -> its value on the held-out pictures with a 95% interval; cost: FLOPs of a picture over
    the dense model's, per prompt class; evaluations: how many prunings were tried.
    """

    profile: Profile
    measured: dict[str, dict[str, Interval]]
    cost: dict[str, float]
    evaluations: int


@dataclass
class Search:
    """Makes pictures of prunings and remembers their figures, so that one search may serve several floors.

    Args:
        backbone, calibration: of the model.
        searched, held_out: prompt class -> pictures; see `split_pictures`.
        condition: prompts -> tensors of `backbone.prefix`.
        judge: what accuracy is judged by; needed for a floor of accuracy.
        batch_size: pictures at a time.
        on_evaluation: called with a line before each evaluation.

    Raises:
        InputError: a class of the calibration has no pictures.
    """

    backbone: Backbone
    calibration: Calibration
    searched: Mapping[str, Sequence[Picture]]
    held_out: Mapping[str, Sequence[Picture]]
    condition: Condition = labels_condition
    judge: Judge | None = None
    batch_size: int = 8
    on_evaluation: Callable[[str], None] = lambda what: None
    evaluations: int = 0
    _known: dict[tuple[object, ...], dict[str, list[float]]] = field(default_factory=dict)
    _dense: dict[tuple[str, bool, int], Outcome] = field(default_factory=dict)
    _noise: dict[tuple[tuple[int, ...], int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.calibration.classes:
            if not self.searched.get(name) or not self.held_out.get(name):
                raise InputError(f"search: prompt class {name!r} has no pictures; give two or more of each class")
        self.searched = {name: _ordered(pictures) for name, pictures in self.searched.items()}
        self.held_out = {name: _ordered(pictures) for name, pictures in self.held_out.items()}

    @property
    def model(self) -> ModelShape:
        return self.calibration.model

    def find(self, floor: QualityFloor, name: str, description: str = "") -> Found:
        """The fastest plan above the floor, in every prompt class.

        Args:
            floor: at least one figure of it.
            name: of the profile that comes out.

        Raises:
            InputError: a floor without any figure, or of accuracy without a judge.
        """
        before = self.evaluations
        options = {
            roles: {one: self.fastest(one, roles, floor) for one in self.calibration.classes} for roles in self.roles()
        }
        return self.settle(floor, name, options, self.evaluations - before, description)

    def settle(
        self,
        floor: QualityFloor,
        name: str,
        options: Mapping[str, Mapping[str, Candidate]],
        evaluations: int,
        description: str = "",
    ) -> Found:
        """The second half of `find`: which roles, from the fastest candidate of every class for each of them.

        Args:
            options: roles -> prompt class -> what `fastest` gives, which may have been found by several processes.
            evaluations: how many prunings they tried.
        """
        # All classes count alike: how often each is asked for is not known.
        roles = min(options, key=lambda some: (sum(one.cost for one in options[some].values()), some))
        chosen = options[roles]
        measured, cost = {}, {}
        dense = dense_flops(self.model).total
        for one, candidate in chosen.items():
            figures = self.figures(one, self._pruning(candidate, roles), held_out=True)
            measured[one] = {key: bootstrap(values) for key, values in figures.items() if key in ("ssim", "accuracy")}
            measured[one]["psnr_db"] = bootstrap(figures["mse"], _psnr_db)
            cost[one] = candidate.cost / dense
        profile = self._profile(floor, name, description, roles, chosen)
        return Found(profile, measured, cost, evaluations)

    # -- candidates ---------------------------------------------------------------------------------------------

    def roles(self) -> list[str]:
        """Role strings to try, fewest detail layers first: the layers of the most even entropy maps stay global."""
        depth = self.model.depth
        order = sorted(range(1, depth), key=lambda layer: (role_scores(self.calibration, Roles()).ratio[layer], layer))
        found = []
        for share in DETAIL_SHARES:
            detail = set(order[: min(depth - 1, round(share * depth))])
            found.append("".join("d" if layer in detail else "g" for layer in range(depth)))
        return list(dict.fromkeys(found))

    def fastest(self, prompt_class: str, roles: str, floor: QualityFloor) -> Candidate:
        """The cheapest candidate above the floor on both sets; the dense model is always one.

        Raises:
            InputError: a floor without any figure, or of accuracy without a judge.
        """
        if floor == QualityFloor():
            raise InputError("search: the floor is empty; give one like ssim=0.9")
        if floor.accuracy is not None and self.judge is None:
            raise InputError("search: a floor of accuracy needs a judge of the pictures, which this model has none of")
        scales = len(self.model.grids)
        best = self._candidate(scales, None, 1.0, roles)
        for run in range(2, scales + 1):
            whole = self._candidate(run, None, 1.0, roles)
            openings = self._openings(run)
            cheapest = min(
                (self._candidate(run, one, FRACTIONS[0], roles).cost for one in openings), default=whole.cost
            )
            if min(cheapest, whole.cost) >= best.cost:
                continue
            # Pruning is taken to improve nothing: where the scales alone fall below the floor, so does every pruning of them.
            if not self._passes(whole, prompt_class, roles, floor):
                continue
            ladders = [
                [self._candidate(run, opening, fraction, roles) for fraction in FRACTIONS] for opening in openings
            ]
            for candidates in [[whole], *ladders]:
                affordable = [one for one in candidates if one.key < best.key]
                least = self._bisect(affordable, prompt_class, roles, floor)
                for one in affordable[least:]:
                    if self._passes(one, prompt_class, roles, floor, held_out=True):
                        best = one
                        break
        return best

    def _openings(self, run: int) -> list[int]:
        first = max(1, run - PRUNED_SCALES)
        return [scale for scale in range(first, run) if self.model.tokens[scale] >= LEAST_GRID**2]

    def _candidate(self, run: int, opening: int | None, fraction: float, roles: str) -> Candidate:
        tokens = Tokens(keep={} if opening is None else self._keep(run, opening, fraction))
        keep = kept_tokens(self.model, tokens, run, opening, 1.0, "search")
        cost = plan_flops(self.model, roles if opening is not None else "g" * len(roles), keep).total
        return Candidate(run, opening, fraction, keep, cost)

    def _keep(self, run: int, opening: int, fraction: float) -> dict[str, float]:
        return {"x".join(map(str, self.model.grids[scale])): fraction for scale in range(opening, run)}

    def _bisect(self, candidates: Sequence[Candidate], prompt_class: str, roles: str, floor: QualityFloor) -> int:
        """Index of the first candidate that passes on the searched pictures; their number where none does."""
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            if self._passes(candidates[middle], prompt_class, roles, floor):
                high = middle
            else:
                low = middle + 1
        return low

    # -- figures ------------------------------------------------------------------------------------------------

    def _pruning(self, one: Candidate, roles: str) -> Pruning:
        pruned = one.opening is not None
        return Pruning(
            roles=roles if pruned else "g" * len(roles),
            keep=one.keep + self.model.tokens[one.run :],
            cache_scale=one.opening - 1 if one.opening is not None else None,
            scales_run=tuple(range(one.run)),
        )

    def _passes(
        self, one: Candidate, prompt_class: str, roles: str, floor: QualityFloor, held_out: bool = False
    ) -> bool:
        if one.opening is None and one.run == len(self.model.grids):
            return True  # the dense model itself
        figures = self.figures(prompt_class, self._pruning(one, roles), held_out)
        if floor.ssim is not None and exact_mean(figures["ssim"]) < floor.ssim:
            return False
        if floor.psnr_db is not None and _psnr_db(np.array(figures["mse"])) < floor.psnr_db:
            return False
        return floor.accuracy is None or exact_mean(figures["accuracy"]) >= floor.accuracy * exact_mean(
            figures["dense_accuracy"]
        )

    def figures(self, prompt_class: str, pruning: Pruning, held_out: bool) -> dict[str, list[float]]:
        """Figure -> a value a picture."""
        key = (prompt_class, pruning, held_out)
        if key not in self._known:
            self._known[key] = self._measure(prompt_class, pruning, held_out)
        return self._known[key]

    def _measure(self, prompt_class: str, pruning: Pruning, held_out: bool) -> dict[str, list[float]]:
        pictures = (self.held_out if held_out else self.searched)[prompt_class]
        kept = min(k / n for k, n in zip(pruning.keep, self.model.tokens, strict=True))
        run = len(pruning.scales_run or self.model.grids)
        self.on_evaluation(f"{prompt_class}: {run} scales, {pruning.roles.count('d')} detail layers keep {kept:.0%}")
        self.evaluations += 1
        figures: dict[str, list[float]] = {"ssim": [], "mse": []}
        for start in range(0, len(pictures), self.batch_size):
            batch = list(pictures[start : start + self.batch_size])
            dense = self._dense_outcome(prompt_class, held_out, start, batch)
            image = self._run(pruning, batch).image
            assert image is not None and dense.image is not None
            figures["ssim"] += ssim(image, dense.image).tolist()
            figures["mse"] += mean_squared_error(image, dense.image).tolist()
            if self.judge is not None:
                for key, shown in (("accuracy", image), ("dense_accuracy", dense.image)):
                    figures.setdefault(key, []).extend(self.judge(shown, batch).double().tolist())
        return figures

    def _dense_outcome(self, prompt_class: str, held_out: bool, start: int, batch: Sequence[Picture]) -> Outcome:
        key = (prompt_class, held_out, start)
        if key not in self._dense:
            self.on_evaluation(f"{prompt_class}: dense")
            self._dense[key] = self._run(Pruning.none(self.backbone.spec), batch)
        return self._dense[key]

    def _run(self, pruning: Pruning, batch: Sequence[Picture]) -> Outcome:
        backbone, seeds = self.backbone, tuple(picture.seed for picture in batch)
        condition = self.condition([picture.prompt for picture in batch])
        prefix = backbone.prefix(*(tensor.to(backbone.device) for tensor in condition))

        def noise(scale: int) -> Tensor:
            if (seeds, scale) not in self._noise:
                shape = backbone.noise_shape(scale, len(seeds))
                drawn = torch.from_numpy(scale_noise(seeds, scale, shape[0], shape[2]))
                self._noise[seeds, scale] = drawn.to(backbone.device)
            return self._noise[seeds, scale]

        return run_policy(Planned(pruning), backbone, self.model, prefix, seeds, noise)

    # -- the profile --------------------------------------------------------------------------------------------

    def _profile(
        self, floor: QualityFloor, name: str, description: str, roles: str, chosen: Mapping[str, Candidate]
    ) -> Profile:
        scales = len(self.model.grids)
        classes = {}
        for prompt_class, one in chosen.items():
            depth, tokens = Depth(), Tokens(keep={})
            if one.opening is not None:
                depth = Depth(grid=math.isqrt(self.model.tokens[one.opening]))
                tokens = Tokens(keep=self._keep(one.run, one.opening, one.fraction))
            classes[prompt_class] = ClassOptions(depth=depth, tokens=tokens, drop_scales=scales - one.run)
        figures = ((key, getattr(floor, key)) for key in ("ssim", "psnr_db", "accuracy"))
        wish = " and ".join(f"{key} {value:g}" for key, value in figures if value is not None)
        return Profile(
            schema=SCHEMA,
            name=name,
            description=description or f"The fastest found with {wish} or more in every prompt class.",
            roles=Roles(explicit=roles),
            quality_floor=floor,
            classes=classes,
        )


def _psnr_db(errors: np.ndarray) -> float:
    """Of the mean of squared errors; 100 dB where the pictures are equal, so that a mean exists."""
    mean = exact_mean(errors.ravel())
    return 100.0 if mean <= 1e-10 else -10 * math.log10(mean)
