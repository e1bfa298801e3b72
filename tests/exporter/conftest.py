"""Exporters of small models with random weights, each exported once per session."""

import pytest
import torch

from tests.backbones.conftest import make_var
from toprovar.exporter.calibrate import model_shape
from toprovar.exporter.graph import GraphExporter
from toprovar.profiles.manifest import Condition, Label
from toprovar.profiles.plan import ClassPlan, Plan
from toprovar.profiles.profile import Profile, dense_profile


@pytest.fixture(scope="session")
def exporter():
    """A VAR of five layers in fp32."""
    return GraphExporter(make_var())


@pytest.fixture(scope="session")
def half_exporter():
    """A VAR of three layers, its matrices and its decoder in fp16."""
    return GraphExporter(make_var(depth=3).set_precision(torch.float16, decoder=torch.float16))


def plan_of(backbone, roles, *, restore="cache", dropped=0, precision="auto"):
    """A plan of two prompt classes that are pruned from different scales on; dense where no layer is "d"."""
    spec, run = backbone.spec, backbone.spec.scales - dropped
    pruned, classes = "d" in roles, {}
    for i, name in enumerate(("coarse", "fine")):
        depth = run - 2 + i if pruned else None
        keep = [n if depth is None or s < depth else max(1, n // 3) for s, n in enumerate(spec.tokens[:run])]
        classes[name] = ClassPlan(
            depth=depth,
            scales_run=tuple(range(run)),
            keep=tuple(keep),
            cache_scale=depth - 1 if pruned and restore == "cache" else None,
        )
    profile = Profile(schema="toprovar.profile/1", name="sample") if pruned else dense_profile(dropped)
    return Plan(
        schema="toprovar.plan/1",
        checkpoint_sha256="c" * 64,
        model=model_shape(backbone),
        roles=roles,
        restore=restore,
        precision=precision,
        classes=classes,
        profile=profile,
        profile_sha256=profile.sha256,
        calibration_sha256="a" * 64 if pruned else None,
    )


CONDITION = Condition(
    kind="label",
    labels=tuple(Label(name=f"thing {i}", prompt_class="fine" if i % 2 else "coarse") for i in range(10)),
)
