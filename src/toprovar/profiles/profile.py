"""The profile: a wish, in TOML. Every hole that the paper leaves is an option here.

Source of the rules: ToProVAR (arXiv 2602.22948). The paper contradicts itself or is silent in several places; each
option says what the paper writes, which value is its literal rule, and which value is the default and why. A profile is
about no checkpoint in particular: grids are named by their side, so that one profile serves every schedule.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from toprovar.errors import FormatError
from toprovar.profiles.files import Strict, model_from_toml, read_document, sha256_json

__all__ = [
    "SHIPPED",
    "ClassOptions",
    "Depth",
    "Grid",
    "Profile",
    "QualityFloor",
    "RoleString",
    "Roles",
    "Tokens",
    "dense_profile",
    "load_profile",
    "parse_profile",
]

SCHEMA: Final = "toprovar.profile/1"
SHIPPED = ("quality", "balanced", "fast", "extreme")
"""Names of the profiles that come with the package, mildest first."""

Grid = tuple[int, int]
"""(h, w) of a token map."""

_GRID = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


def _grid_name(text: str) -> str:
    if not _GRID.fullmatch(text):
        raise ValueError(f"found {text!r}, expected a grid as height x width, like '32x32'")
    return text


def _role_string(text: str) -> str:
    if not re.fullmatch(r"g[gd]*", text):
        raise ValueError(f"found {text!r}, expected a letter per layer, 'g' or 'd', the first one 'g'")
    return text


RoleString = Annotated[str, AfterValidator(_role_string)]
GridName = Annotated[str, AfterValidator(_grid_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Depth(Strict):
    """Scale stage (paper section 3.2 and appendix A.5): the scale depth D, the first scale that is pruned.

    ``rho_s`` is the share of tokens of scale s whose entropy is below the mean of their map (eq. 3). The paper measures
    it online for each image; a plan has fixed shapes, so it is measured at calibration and averaged per prompt class.
    Where the test never passes, nothing is pruned (the paper's own fallback).
    """

    tau: Fraction = 0.4
    """Threshold on rho. Paper: 0.4 for every backbone, from images whose SSIM with the dense result exceeds 0.8."""

    direction: Literal["<=", ">="] = "<="
    """D is the first scale with rho <= tau (appendix A.5, eq. 13; default) or with rho >= tau (main text, eq. 3 ff.).

    The paper states both. With ``>=`` the test passes at the first few scales, since rho of most maps is near 0.5."""

    min_grid: int = Field(default=12, ge=1)
    """Scales with fewer than min_grid**2 tokens are never pruned. Not in the paper, where rho alone decides; rho of
    the smallest maps is noise (it is 0 at the 1 x 1 scale), and they hold few of the FLOPs."""

    rho: Literal["mean"] | tuple[Annotated[int, Field(ge=0)], ...] = "mean"
    """Whose maps rho is taken from. The paper does not say. ``"mean"``: the map averaged over all layers (default); a
    list of layers: the mean of the rho of each of them."""

    grid: int | None = Field(default=None, ge=1)
    """Fixed depth: D is the first scale with at least grid**2 tokens, and rho is not looked at. Not in the paper."""

    @model_validator(mode="after")
    def _check(self) -> Depth:
        if isinstance(self.rho, tuple):
            if not self.rho:
                raise ValueError('rho: found an empty list, expected "mean" or at least one layer')
            if len(set(self.rho)) != len(self.rho):
                raise ValueError(f"rho: found {list(self.rho)}, expected each layer once")
        return self


class Roles(Strict):
    """Layer stage (paper section 3.3): which layers are *global* (dense) and which are *detail* (pruned).

    ``varrho = sigma1 / sigma2`` of the layer's h x w entropy map, ``R = exp(-beta (varrho - 1))`` (eq. 4); R near 0 is
    global, R near 1 detail. Fixed at calibration: the paper finds the classes stable over prompts. The first layer is
    always global, since its entropy chooses the tokens of the layers behind it.
    """

    matrix: Literal["raw", "centred"] = "raw"
    """``raw``: SVD of the entropy map as it is (the paper's literal rule, and the default). All entries are positive,
    so the ratio then says how constant the map is. ``centred``: the map's mean is taken off first, and the ratio says
    how far one pattern of rows and columns explains the map (1.0 to 1.25 for noise)."""

    grid: int = Field(default=12, ge=2)
    """The representative scale: the first one with at least grid**2 tokens (the last one where none has). Paper: scale
    6, "12 x 12" if counted from 1 and "16 x 16" if from 0; it does not say which."""

    beta: Literal["median"] | Annotated[float, Field(gt=0)] = "median"
    """Slope of R; the paper gives no value. ``"median"``: the layer of median varrho gets R = 0.5 (default)."""

    cut: Fraction = 0.5
    """A layer is detail where R >= cut; 0 makes every layer a candidate. The paper gives no value; with the median beta
    and 0.5, half of the layers are detail."""

    max_detail: Fraction = 1.0
    """At most this share of the layers is detail, those of highest R. Not in the paper (1.0: no limit)."""

    explicit: RoleString | None = None
    """The roles themselves, a letter per layer, ``g`` or ``d``; the scores are then not looked at."""


class Tokens(Strict):
    """Token stage (paper section 3.4): how many tokens the detail layers keep at a scale s >= D.

    ``P_keep(i) = 1 - clip(alpha_min + (alpha_max - alpha_min) q_i, 0, 1)``, ``q_i = phi(s) R h_i`` (eqs. 5 and 6). The
    paper's ``h_i`` is the entropy divided by the sum over all tokens, about 1/N, which makes eq. 6 prune every token
    with probability alpha_min; here ``h_i`` is the rank of the token's entropy scaled to 0..1. The sum of P_keep,
    rounded, is the fixed count K of the scale, and the K tokens of lowest entropy are kept (the paper leaves open
    whether to sample or to threshold).
    """

    alpha_min: Fraction = 0.4
    """Probability of pruning the most focused token. The paper gives no value."""

    alpha_max: Fraction = 0.9
    """Probability of pruning the most diffuse token of the last scale. The paper gives no value; it reports that
    detail layers stand the removal of 90% of their tokens."""

    scale_weight: Literal["linear", "none"] = "linear"
    """phi(s): ``linear`` is s / S counted from 1 (eq. 5, the paper's literal rule, and the default); ``none`` is 1."""

    layer_score: bool = False
    """True puts R into q_i as eq. 5 does. K is one number per scale, so it is the mean R over the detail layers. False
    (default) takes R = 1: the cut has already made a layer's class a yes or no."""

    keep: dict[GridName, Annotated[float, Field(gt=0, le=1)]] | None = None
    """Kept fraction per grid, like ``"32x32" = 0.6`` (the form of FastVAR's settings), in place of all of the above.
    Grids that are not listed are dense, and so an empty table prunes nothing."""

    @model_validator(mode="after")
    def _check(self) -> Tokens:
        if self.alpha_min > self.alpha_max:
            raise ValueError(
                f"alpha_min: found {self.alpha_min}, expected at most alpha_max, which is {self.alpha_max}"
            )
        return self


class QualityFloor(Strict):
    """The least fidelity to the dense result that is acceptable, for each prompt class.

    `toprovar.exporter.search` looks for the fastest plan above it. Everywhere else it is a wish that a comparison checks, not a
    setting: it travels in the plan, and a report of a bundle against its dense twin says which figures fall below it.
    """

    ssim: Fraction | None = None
    """Mean structural similarity to the dense picture of the same noise."""

    psnr_db: float | None = Field(default=None, ge=0)
    """Mean peak signal-to-noise ratio to the dense picture of the same noise, in dB."""

    accuracy: Fraction | None = None
    """Share of the dense model's own accuracy, as a judge of what was asked for sees it in both."""


class ClassOptions(Strict):
    """What may differ between prompt classes. A table under ``[classes.NAME]`` starts from the profile's own values."""

    depth: Depth = Depth()
    tokens: Tokens = Tokens()
    drop_scales: Annotated[int, Field(ge=0)] | tuple[GridName, ...] = 0
    drop_rho: Fraction | None = None


class Profile(Strict):
    """A wish: how to prune, whatever the checkpoint."""

    schema_version: Literal["toprovar.profile/1"] = Field(alias="schema")
    name: Name
    description: str = ""

    depth: Depth = Depth()
    roles: Roles = Roles()
    tokens: Tokens = Tokens()

    drop_scales: Annotated[int, Field(ge=0)] | tuple[GridName, ...] = 0
    """The last scales, left out altogether: how many, or their grids. The picture is decoded from the codes so far.
    FastVAR's public Infinity-2B code drops two (48 x 48 and 64 x 64), and the paper's 11-scale table very probably does
    too; 0 is the default, because most of the speed of such a setting is this switch and not the pruning."""

    drop_rho: Fraction | None = None
    """Scales are dropped only for prompt classes whose rho at the last scale is at most this; None (default): for all.
    The paper's observation behind tau (Fig. 8: pictures that the last scales hardly change have a rho near 0.4), used
    as its "scale only" arm does, but per prompt class: plain pictures lose nothing, fine textures keep their detail."""

    restore: Literal["cache", "identity"] = "cache"
    """What a pruned token gets from a span of detail layers. The paper does not say. ``cache``: the span's branch
    output at the last dense scale, resized by area (FastVAR's rule, default); ``identity``: nothing."""

    precision: Literal["auto", "fp32", "fp16"] = "auto"
    """Of weights and activations in the graphs. ``auto``: what suits the target, fp32 for ONNX Runtime on a CPU and
    fp16 for TensorRT. Entropy and softmax are fp32 always."""

    quality_floor: QualityFloor = QualityFloor()

    classes: dict[Name, ClassOptions] = Field(default_factory=dict)
    """Options of single prompt classes; what a table leaves out is as above."""

    def for_class(self, name: str) -> ClassOptions:
        """The options of one prompt class."""
        own = self.classes.get(name)
        return own or ClassOptions(
            depth=self.depth, tokens=self.tokens, drop_scales=self.drop_scales, drop_rho=self.drop_rho
        )

    @property
    def sha256(self) -> str:
        """Hash of the content with all defaults filled in: comments, order and spelling of the file do not count."""
        return sha256_json(self)


def _inherit(table: dict[str, Any]) -> dict[str, Any]:
    """Complete the tables of each prompt class with the profile's own, so that a class states only what differs."""
    classes = table.get("classes")
    if not isinstance(classes, dict):
        return table
    complete = {}
    for name, options in classes.items():
        if isinstance(options, dict):
            options = dict(options)
            for section in ("depth", "tokens"):
                common, own = table.get(section, {}), options.get(section, {})
                if isinstance(common, dict) and isinstance(own, dict):
                    options[section] = {**common, **own}
            options.setdefault("drop_scales", table.get("drop_scales", 0))
            if "drop_rho" in table:
                options.setdefault("drop_rho", table["drop_rho"])
        complete[name] = options
    return {**table, "classes": complete}


def _parse(data: bytes, source: str) -> Profile:
    return model_from_toml(Profile, data, source, "profile", before=_inherit)


def parse_profile(text: str, source: str = "profile") -> Profile:
    """Read a profile from TOML text.

    Raises:
        FormatError: one line that names `source`, the key, what was found and what is expected.
    """
    return _parse(text.encode("utf-8"), source)


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Read a shipped profile by name, or a TOML file by path (anything with a separator or a ``.toml`` ending).

    Raises:
        FormatError: no such profile, or it does not follow the format.
    """
    text = os.fspath(name_or_path)
    if text in SHIPPED:
        source = f"{text}.toml"
        return _parse(resources.files(__package__).joinpath("data", source).read_bytes(), source)
    path = Path(text)
    if path.suffix != ".toml" and path.name == text and not path.is_file():
        raise FormatError(
            f"profile {text!r}: not known; expected one of {', '.join(SHIPPED)}, or the path of a .toml file"
        )
    return _parse(read_document(path, "profile"), text)


def dense_profile(
    drop_scales: int | tuple[str, ...] = 0, precision: Literal["auto", "fp32", "fp16"] = "auto"
) -> Profile:
    """The profile that prunes nothing: the dense graph, or, with `drop_scales`, what dropping scales alone does."""
    count = drop_scales if isinstance(drop_scales, int) else len(drop_scales)
    return Profile(
        schema=SCHEMA,
        name=f"drop-{count}" if count else "dense",
        description=f"No pruning; the last {count} scales are dropped." if count else "No pruning: every scale dense.",
        tokens=Tokens(keep={}),
        drop_scales=drop_scales,
        precision=precision,
    )
