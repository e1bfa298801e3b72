"""Every policy of the comparison, for a model at hand: rivals, dropped scales, ours, and ours with each stage off in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from toprovar.backbones.generate import Pruning
from toprovar.exporter.plan import make_plan, role_scores
from toprovar.exporter.policies.engine import Policy
from toprovar.exporter.policies.grids import place
from toprovar.exporter.policies.ours import Literally, Planned
from toprovar.exporter.policies.rivals import SKIPVAR_MODELS, DropLast, FasterVar, FastVar, SkipVar, SparseVar
from toprovar.exporter.prune import pruning
from toprovar.profiles.calibration import Calibration
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.profile import Profile, Roles

__all__ = ["Entry", "catalogue"]

Family = Literal["dense", "drop", "rival", "ours", "ablation"]

_MAPPING = (
    "Constants are published for Infinity-2B at 1024 x 1024. A scale takes the setting of the grid of the nearest place (its "
    "side over the last grid's), a range of layers keeps its share of the depth."
)


@dataclass(frozen=True)
class Entry:
    """A policy and how a report names it; the texts are those of `toprovar.profiles.evidence.Policy`."""

    name: str
    title: str
    family: Family
    series: str
    description: str
    policies: Mapping[str, Policy]
    """Prompt class -> policy; under "" the one of all classes."""
    source: str = ""
    mapping: str = ""
    settings: Mapping[str, JsonValue] = field(default_factory=dict)

    def for_class(self, prompt_class: str) -> Policy:
        return self.policies.get(prompt_class) or self.policies[""]


def catalogue(calibration: Calibration, profiles: Sequence[Profile], apart: str = "fast") -> list[Entry]:
    """All policies, the dense one first.

    Args:
        calibration: of the model; plans, roles and the literal rule come from it.
        profiles: ours, mildest first.
        apart: name of the one that is taken apart stage by stage.
    """
    return [
        Entry("dense", "Dense", "dense", "dense", "Every scale, layer and token.", {"": Policy()}),
        *_dropped(calibration.model),
        *_rivals(),
        *_literal(calibration),
        *_ours(calibration, profiles, apart),
    ]


def _dropped(model: ModelShape) -> list[Entry]:
    entries = [
        Entry(
            f"drop-{n}",
            f"Last {'scale' if n == 1 else f'{n} scales'} dropped",
            "drop",
            "drop",
            "The last scales are left out and nothing else is done: most of the speed of every method of this kind.",
            {"": DropLast(n)},
            settings={"scales": n},
        )
        for n in range(1, min(4, len(model.grids)))
    ]
    left = sum(place(model.grids, scale) > 0.25 + 1e-6 for scale in range(len(model.grids)))
    exit_ = Entry(
        "fixed-exit",
        "Fixed exit",
        "drop",
        "drop",
        "The picture ends at a fixed early scale, a quarter of the last grid's side.",
        {"": DropLast(left)},
        source='ToProVAR (arXiv 2602.22948), Table 10, "fixed scale exit"; the paper names no scale',
        settings={"scales": left},
    )
    return entries + ([exit_] if left > 3 else [])


def _rivals() -> list[Entry]:
    fastvar = "FastVAR, ICCV 2025 (arXiv 2503.23367); csguoh/FastVAR, commit 34cdd65"
    skipvar = "SkipVAR (arXiv 2506.08908); fakerone-li/SkipVAR, commit 607be0e"
    fastervar = "StageVAR / FasterVAR (arXiv 2512.16483); sen-mao/FasterVAR, commit 0653b99"
    entries = [
        Entry(
            "fastvar",
            "FastVAR",
            "rival",
            "FastVAR",
            "Drops the last two scales; before them, tokens near the mean token take a cached earlier output.",
            {"": FastVar()},
            fastvar,
            _MAPPING,
            {"ratios": {"32": 0.4, "40": 0.5}, "skipped": [48, 64], "cached": 24, "layers": "3 to 27 of 32"},
        ),
        Entry(
            "fastvar-hart",
            "FastVAR, as for HART",
            "rival",
            "FastVAR",
            "The same with the constants published for HART: no scale is dropped, the last two are pruned.",
            {"": FastVar(**FastVar.HART)},
            fastvar,
            _MAPPING,
            {"ratios": {"48": 0.5, "64": 0.75}, "skipped": [], "cached": 36, "layers": "all"},
        ),
        *(
            Entry(
                f"skipvar-{goal[2:]}",
                f"SkipVAR {goal}",
                "rival",
                "SkipVAR",
                "Decides for each picture, from its edges and spectrum, which last scales to leave out or to run unguided.",
                {"": SkipVar(model)},
                skipvar,
                _MAPPING + " Its decision models were trained on Infinity-2B and are used as they are.",
                {"decision_model": f"SSIM {goal}"},
            )
            for goal, model in SKIPVAR_MODELS.items()
        ),
        *(
            Entry(
                name,
                title,
                "rival",
                "SparseVAR",
                "Leaves out tokens that the middle layers changed little at the scale before; anchors stand in for them.",
                {"": SparseVar(threshold)},
                "SparseVAR, ICCV 2025 (arXiv 2507.20454); as re-implemented in Weepingchestnut/Lvar, commit f94b7ec",
                _MAPPING + " The distance of anchors stays 4 tokens.",
                {"threshold": threshold, "anchors": 4, "similarity": 0.8},
            )
            for name, title, threshold in (("sparsevar", "SparseVAR", 0.6), ("sparsevar-7", "SparseVAR 0.7", 0.7))
        ),
        Entry(
            "fastervar",
            "FasterVAR",
            "rival",
            "FasterVAR",
            "Drops the last two scales; the one before them runs unconditional rows only, on random mixtures of tokens.",
            {"": FasterVar()},
            fastervar,
            _MAPPING,
            {"alpha": 0.96, "skipped": [48, 64], "rows": "unconditional"},
        ),
        Entry(
            "stagevar",
            "FasterVAR, no scale dropped",
            "rival",
            "FasterVAR",
            "The same at every late scale, none of them dropped: the published tables have ratios for all three.",
            {"": FasterVar(skipped=())},
            fastervar,
            _MAPPING,
            {"alpha": 0.96, "skipped": [], "rows": "unconditional"},
        ),
    ]
    return entries


def _literal(calibration: Calibration) -> list[Entry]:
    scores = role_scores(calibration, Roles()).score
    return [
        Entry(
            f"toprovar-literal{f'-drop-{drop}' if drop else ''}",
            f"ToProVAR, to the letter{', last two scales dropped' if drop else ''}",
            "rival",
            "ToProVAR, to the letter",
            "The paper's formulas as printed: tokens are dropped at random with nearly equal probability, nothing is restored.",
            {"": Literally(scores, drop=drop)},
            "ToProVAR (arXiv 2602.22948), eqs. 3 to 6, A.5",
            "D at each picture's own rho, with the direction of appendix A.5.",
            {"tau": 0.4, "alpha_min": 0.4, "alpha_max": 0.9, "beta": "median", "restore": "identity", "dropped": drop},
        )
        for drop in (0, 2)
        if drop < len(calibration.model.grids)
    ]


def _ours(calibration: Calibration, profiles: Sequence[Profile], apart: str) -> list[Entry]:
    entries = []
    for profile in profiles:
        plan = make_plan(profile, calibration)
        prunings = {name: pruning(plan, name) for name in plan.classes}
        entries.append(
            Entry(
                f"ours-{profile.name}",
                f"toprovar {profile.name}",
                "ours",
                "toprovar",
                profile.description or f"Our plan of the profile {profile.name}.",
                {name: Planned(one) for name, one in prunings.items()},
                settings={
                    "roles": plan.roles,
                    "keep": {name: list(one.keep) for name, one in plan.classes.items()},
                    "plan": plan.sha256,
                },
            )
        )
        if profile.name == apart:
            entries += _taken_apart(apart, calibration.model, prunings)
    return entries


def _taken_apart(whole: str, model: ModelShape, prunings: Mapping[str, Pruning]) -> list[Entry]:
    """One of our plans with one stage off or replaced, all else as it is."""
    replaced = dataclasses.replace

    def entry(name: str, title: str, description: str, change: Mapping[str, Policy]) -> Entry:
        return Entry(f"{whole}-{name}", f"{whole}, {title}", "ablation", f"{whole}, a stage off", description, change)

    def undropped(one: Pruning) -> Pruning:
        """All scales run; those that were dropped keep the share of the last one before them."""
        run = len(one.scales_run or one.keep)
        share = one.keep[run - 1] / model.tokens[run - 1]
        keep = one.keep[:run] + tuple(max(1, round(share * tokens)) for tokens in model.tokens[run:])
        return replaced(one, keep=keep, scales_run=None)

    def without_scales(one: Pruning) -> Pruning:
        """Pruned from the second scale on, with the share that the first pruned scale keeps."""
        pruned = [kept / model.tokens[s] for s, kept in enumerate(one.keep) if kept < model.tokens[s]]
        if not pruned:
            return one
        keep = tuple(
            tokens if scale == 0 else min(one.keep[scale], max(1, round(pruned[0] * tokens)))
            for scale, tokens in enumerate(model.tokens)
        )
        return replaced(one, keep=keep, cache_scale=None if one.cache_scale is None else 0)

    all_detail = "g" + "d" * (model.depth - 1)
    changes: list[tuple[str, str, str, dict[str, Policy]]] = [
        (
            "no-drop",
            "no scale dropped",
            "Every scale is run; the dropped ones are pruned as the last one before them.",
            {name: Planned(undropped(one)) for name, one in prunings.items()},
        ),
        (
            "no-scale-stage",
            "without the scale stage",
            "Pruned from the second scale on, in place of from D.",
            {name: Planned(without_scales(one)) for name, one in prunings.items()},
        ),
        (
            "no-layer-stage",
            "without the layer stage",
            "Every layer but the first is pruned.",
            {
                name: Planned(replaced(one, roles=all_detail) if "d" in one.roles else one)
                for name, one in prunings.items()
            },
        ),
        (
            "no-token-stage",
            "without the token stage",
            "Detail layers are left out for all tokens of pruned scales.",
            {name: Planned(one, skips=True) for name, one in prunings.items()},
        ),
        (
            "identity",
            "nothing restored",
            "A pruned token passes through; nothing is restored from an earlier scale.",
            {name: Planned(replaced(one, restore="identity", cache_scale=None)) for name, one in prunings.items()},
        ),
        (
            "random",
            "random tokens",
            "As many tokens are kept, chosen at random.",
            {name: Planned(one, choice="random") for name, one in prunings.items()},
        ),
        (
            "highest",
            "highest entropy kept",
            "The tokens of most entropy are kept, as NOVA (arXiv 2602.01345) would have it.",
            {name: Planned(one, choice="highest") for name, one in prunings.items()},
        ),
        (
            "temperature",
            "entropy per head temperature",
            "The entropy of each head is multiplied by its temperature before the mean.",
            {name: Planned(one, choice="temperature") for name, one in prunings.items()},
        ),
        (
            "log-keys",
            "entropy over log of keys",
            "The entropy is divided by the log of the number of keys; within a scale that changes no ranking.",
            {name: Planned(one, choice="log-keys") for name, one in prunings.items()},
        ),
    ]
    return [entry(*change) for change in changes]
