"""Plan and backbone -> the step module of the pruned graph, and the loop over scales of each prompt class."""

from __future__ import annotations

from toprovar.backbones.base import Backbone, Spec
from toprovar.backbones.generate import Pruning
from toprovar.backbones.step import Step
from toprovar.errors import FormatError
from toprovar.profiles.manifest import ScaleStep, Schedule
from toprovar.profiles.plan import Plan

__all__ = ["check_fit", "prune", "pruning", "schedule", "schedules"]


def check_fit(plan: Plan, spec: Spec) -> None:
    """Raises FormatError where the plan is of a model of other sizes."""
    for key in ("backbone", "depth", "width", "grids"):
        found, expected = getattr(plan.model, key), getattr(spec, key)
        if found != expected:
            raise FormatError(
                f"plan: model.{key}: found {found}, expected {expected}, as the checkpoint has; make a plan for it"
            )


def prune(backbone: Backbone, plan: Plan) -> Step:
    """The step of the plan: one module, and so one graph, for all prompt classes and scales.

    The blocks are shared with the backbone. A plan that prunes nothing has no selection in its step.

    Raises:
        FormatError: the plan is of a model of other sizes.
    """
    check_fit(plan, backbone.spec)
    return Step(backbone, plan.roles, plan.restore)


def schedule(plan: Plan, prompt_class: str) -> Schedule:
    """The loop of one prompt class: every scale that is run, with its sizes. `constants` are the packager's to fill in.

    The past of a layer holds the kept tokens of the scales before: all of them in global layers, K in detail layers.

    Raises:
        FormatError: the plan has no such class.
    """
    one = plan.for_class(prompt_class)
    steps = []
    past_global = past_detail = 0
    for scale, keep in zip(one.scales_run, one.keep, strict=True):
        tokens = plan.model.tokens[scale]
        steps.append(
            ScaleStep(
                scale=scale,
                grid=plan.model.grids[scale],
                tokens=tokens,
                keep=keep,
                past_global=past_global,
                past_detail=past_detail,
                capture_span_delta=scale == one.cache_scale,
                last=scale == one.scales_run[-1],
            )
        )
        past_global, past_detail = past_global + tokens, past_detail + keep
    return Schedule(steps=tuple(steps))


def schedules(plan: Plan) -> dict[str, Schedule]:
    """`schedule` of every prompt class."""
    return {name: schedule(plan, name) for name in plan.classes}


def pruning(plan: Plan, prompt_class: str) -> Pruning:
    """The plan of one prompt class as `toprovar.backbones.generate` takes it.

    Raises:
        FormatError: the plan has no such class.
    """
    one = plan.for_class(prompt_class)
    return Pruning(
        roles=plan.roles,
        keep=one.keep + plan.model.tokens[len(one.keep) :],
        cache_scale=one.cache_scale,
        restore=plan.restore,
        scales_run=one.scales_run,
    )
