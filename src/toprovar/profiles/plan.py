"""The plan: a decision, in JSON. A pure function of a profile and a calibration (`toprovar.exporter.plan`).

Which layers are pruned is decided once per checkpoint, since the paper finds the layer classes stable; from which scale
on, and to how many tokens, is decided per prompt class. Everything is linked by hash.
"""

from __future__ import annotations

import os
from typing import Final, Literal

from pydantic import Field, model_validator

from toprovar.errors import FormatError
from toprovar.profiles.files import Sha256, Strict, model_from_json, pretty_json, read_document, sha256_json, write_text
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.profile import Name, Profile, RoleString

__all__ = ["SCHEMA", "ClassPlan", "Plan", "load_plan", "save_plan"]

SCHEMA: Final = "toprovar.plan/1"


class ClassPlan(Strict):
    """How the pictures of one prompt class are made."""

    depth: int | None = Field(ge=1)
    """D, the first scale where fewer than all tokens are kept; None where nothing is pruned."""
    scales_run: tuple[int, ...] = Field(min_length=1)
    """Scales that are run: all, or all but the last ones."""
    keep: tuple[int, ...] = Field(min_length=1)
    """K of every scale that is run; N where it is dense."""
    cache_scale: int | None = Field(ge=0)
    """The dense scale whose span outputs restore pruned tokens: D - 1; None where nothing is restored from it."""


class Plan(Strict):
    """A decision for one checkpoint."""

    schema_version: Literal["toprovar.plan/1"] = Field(alias="schema")
    checkpoint_sha256: Sha256
    model: ModelShape
    roles: RoleString
    """A letter per layer: g global, d detail. All g where no class prunes anything."""
    restore: Literal["cache", "identity"]
    precision: Literal["auto", "fp32", "fp16"]
    classes: dict[Name, ClassPlan] = Field(min_length=1)
    profile: Profile
    """The wish itself, so that a plan explains itself."""
    profile_sha256: Sha256
    calibration_sha256: Sha256 | None
    """None for a dense plan, which needs no measurement."""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if len(self.roles) != self.model.depth:
            raise ValueError(f"roles: found {len(self.roles)} letters, expected {self.model.depth}, one per layer")
        if self.profile_sha256 != self.profile.sha256:
            raise ValueError(
                f"profile_sha256: found {self.profile_sha256[:12]}…, expected {self.profile.sha256[:12]}…, "
                "the hash of the profile inside; the plan was edited: make it again"
            )
        for name, one in self.classes.items():
            self._check_class(f"classes.{name}", one)
        pruned = any(one.depth is not None for one in self.classes.values())
        if pruned != ("d" in self.roles):
            expected = (
                "at least one d, since a class prunes tokens" if pruned else "only g, since no class prunes tokens"
            )
            raise ValueError(f"roles: found {self.roles!r}, expected {expected}")
        if pruned and self.calibration_sha256 is None:
            raise ValueError("calibration_sha256: found nothing, expected a hash: a plan that prunes has a calibration")
        return self

    def _check_class(self, where: str, one: ClassPlan) -> None:
        tokens = self.model.tokens
        if one.scales_run != tuple(range(len(one.scales_run))) or len(one.scales_run) > len(tokens):
            raise ValueError(
                f"{where}.scales_run: found {list(one.scales_run)}, expected 0, 1, 2, … in order, below {len(tokens)}"
            )
        if len(one.keep) != len(one.scales_run):
            raise ValueError(
                f"{where}.keep: found {len(one.keep)} scales, expected {len(one.scales_run)}, those that are run"
            )
        for scale, kept in enumerate(one.keep):
            if not 1 <= kept <= tokens[scale]:
                raise ValueError(f"{where}.keep.{scale}: found {kept}, expected 1 to {tokens[scale]}")
        first = next((scale for scale, kept in enumerate(one.keep) if kept < tokens[scale]), None)
        if one.depth != first:
            raise ValueError(
                f"{where}.depth: found {one.depth}, expected {first}, the first scale that keeps fewer than all"
            )
        cache = first - 1 if first is not None and self.restore == "cache" else None
        if one.cache_scale != cache:
            raise ValueError(
                f"{where}.cache_scale: found {one.cache_scale}, expected {cache}, the last dense scale before depth"
            )

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return sha256_json(self)

    def for_class(self, name: str) -> ClassPlan:
        """The plan of one prompt class.

        Raises:
            FormatError: the plan has no such class.
        """
        if name not in self.classes:
            raise FormatError(f"plan: prompt class {name!r} is not in it; expected one of {', '.join(self.classes)}")
        return self.classes[name]

    def check_checkpoint(self, sha256: str, source: str = "plan") -> None:
        """Raises FormatError where this is a plan of another checkpoint."""
        if sha256 != self.checkpoint_sha256:
            raise FormatError(
                f"{source}: checkpoint_sha256: found {self.checkpoint_sha256[:12]}…, expected {sha256[:12]}…, "
                "the given checkpoint; make a plan for it, or give the checkpoint that was planned"
            )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan.

    Raises:
        FormatError: missing, or it does not follow the format; one line.
    """
    return model_from_json(Plan, read_document(path, "plan"), os.fspath(path), "plan")


def save_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Write a plan atomically; the same plan gives the same bytes."""
    write_text(path, pretty_json(plan))
