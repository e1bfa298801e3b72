"""Calibrations made up for tests: every number can be chosen, and what is not chosen is plausible."""

from collections.abc import Sequence

from toprovar.profiles.calibration import SCHEMA, Calibration, Measurement, PerLayer, PerScale
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.profile import Profile, parse_profile

CHECKPOINT = "c" * 64
GRIDS = tuple((n, n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))
RHO = (0.0, 0.5, 0.5, 0.5, 0.5, 0.45, 0.44, 0.39, 0.38, 0.37)


def a_shape(grids: Sequence[tuple[int, int]] = GRIDS, depth: int = 12) -> ModelShape:
    return ModelShape(
        backbone="var", depth=depth, width=256, ffn_width=1024, logits=1024, code_channels=16, grids=tuple(grids)
    )


def a_measurement(
    shape: ModelShape,
    rho: Sequence[float],
    ratio: Sequence[float],
    images: int = 2,
    rho_layers: Sequence[Sequence[float]] | None = None,
) -> Measurement:
    """`ratio` is the same at every scale; the centred one is half as far from 1."""
    zeros = tuple(tuple(0.0 for _ in range(shape.depth)) for _ in shape.grids)
    measured = [min(grid) >= 2 for grid in shape.grids]
    raw = tuple(tuple(ratio) if yes else () for yes in measured)
    centred = tuple(tuple(1 + (value - 1) / 2 for value in row) for row in raw)
    empty = tuple(tuple(0.0 for _ in row) for row in raw)
    layers = zeros if rho_layers is None else tuple(tuple(row) for row in rho_layers)
    return Measurement(
        prompts=tuple(range(images)),
        images=images,
        rho=PerScale(mean=tuple(rho), sd=tuple(0.0 for _ in rho)),
        rho_layers=PerLayer(mean=layers, sd=zeros),
        entropy_nats=PerLayer(mean=zeros, sd=zeros),
        ratio_raw=PerLayer(mean=raw, sd=empty),
        ratio_centred=PerLayer(mean=centred, sd=empty),
    )


def a_calibration(
    shape: ModelShape | None = None,
    rho: Sequence[float] = RHO,
    ratio: Sequence[float] | None = None,
    classes: Sequence[str] = ("plain", "texture"),
) -> Calibration:
    shape = a_shape() if shape is None else shape
    ratio = [2.0 + layer for layer in range(shape.depth)] if ratio is None else ratio
    return Calibration(
        schema=SCHEMA,
        toprovar_version="0",
        checkpoint_sha256=CHECKPOINT,
        model=shape,
        sampling={"guidance": 1.5, "top_k": 900},
        seeds=(0,),
        classes={name: a_measurement(shape, rho, ratio) for name in classes},
        wall_time_s=1.0,
    )


def a_profile(text: str = "") -> Profile:
    return parse_profile(f'schema = "toprovar.profile/1"\nname = "t"\n{text}', "t.toml")
