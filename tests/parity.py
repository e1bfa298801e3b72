"""Compares a backbone with a golden folder, the outputs of the original code:  python -m tests.parity DIR

The folder's config.json names the backbone. Every array of outputs*.safetensors that the backbone knows is compared; a
folder may lack any of them. Prints the worst error of each array beside its tolerance; exits 0 if all hold, 1 if not,
2 if the folder cannot be read.

Given tokens first: logits, code maps and the picture of `tokens` fed back do not depend on a draw. Greedy variants
then run free as well (rows marked "free").
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from toprovar import backbones
from toprovar.backbones.base import Sampling, filter_logits, guide
from toprovar.backbones.checkpoint import read_state_dict
from toprovar.backbones.generate import Trace, generate
from toprovar.backbones.var import VAR
from toprovar.backbones.vqvae import VQVAE, VQVAESpec
from toprovar.errors import ToprovarError

LOGITS = 1e-4
CODES = 1e-4
IMAGE = 1e-4
ENTROPY = 5e-5
HIDDEN = 1e-4
PROBABILITY = 1e-5
EQUAL = 0.0


class Golden:
    """A golden folder: `config`, `arrays` by name, and where the weights are."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ToprovarError(f"{self.folder}/config.json: cannot be read ({error}): give a golden folder") from error
        self.arrays = read_state_dict(self.file("outputs"))

    def file(self, stem: str) -> Path:
        """`<stem>*.safetensors`, or the index of its shards."""
        for pattern in (f"{stem}*.index.json", f"{stem}*.safetensors"):
            if found := sorted(self.folder.glob(pattern)):
                return found[0]
        raise ToprovarError(f"{self.folder}: holds no {stem}*.safetensors: give a golden folder")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Sampling arguments of each variant that has arrays."""
        present = {name.split("/")[0] for name in self.arrays}
        return {name: args for name, args in self.config["variants"].items() if name in present}


@dataclass
class Row:
    """One comparison: the worst absolute error (or how many elements differ) and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # a NaN does not hold


@dataclass
class Report:
    """Comparisons made so far. `compare` skips arrays that the folder lacks."""

    golden: Golden
    rows: list[Row] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)

    def compare(self, name: str, found: Tensor | Callable[[], Tensor], tolerance: float, label: str = "") -> None:
        """Compares `found` (or what it returns) with array `name`; of integers, those that differ are counted."""
        if name not in self.golden.arrays:
            return
        wanted = self.golden.arrays[name]
        found = (found() if callable(found) else found).detach().cpu()
        if found.shape != wanted.shape:
            error = float("inf")
        elif not wanted.is_floating_point():
            error = float((found.long() != wanted.long()).sum())
        else:
            error = float((found.double() - wanted.double()).abs().max())
        self.compared.add(name)
        self.rows.append(Row(f"{name} {label}".strip(), error, tolerance))

    def check(self, name: str, problems: list[str]) -> None:
        """A row for a list of problems, which are printed."""
        for problem in problems:
            print(f"{name}: {problem}")
        self.rows.append(Row(name, float(len(problems)), EQUAL))

    @property
    def holds(self) -> bool:
        return bool(self.rows) and all(row.holds for row in self.rows)

    def print(self) -> None:
        """The table, failures marked, and the arrays that nothing was compared with."""
        width = max((len(row.name) for row in self.rows), default=10)
        print(f"{'array':<{width}}  {'worst error':>11}  {'tolerance':>9}")
        for row in self.rows:
            tolerance = "equal" if row.tolerance == EQUAL else f"{row.tolerance:.1e}"
            print(f"{row.name:<{width}}  {row.error:>11.2e}  {tolerance:>9}  {'' if row.holds else 'FAILED'}".rstrip())
        if unused := sorted(set(self.golden.arrays) - self.compared):
            print(f"not compared: {', '.join(unused)}")
        failed = sum(not row.holds for row in self.rows)
        print(f"{self.golden.folder.name}: {len(self.rows) - failed} of {len(self.rows)} comparisons hold")


# ----------------------------------------------------------------------------------------------------------- VAR


def var_report(golden: Golden) -> Report:
    """Every variant of a VAR folder."""
    report = Report(golden)
    report.compared.add("labels")
    model = load_golden_var(golden)
    report.check("sizes inferred from the files", _wrong_sizes(model, golden.config["config"]))
    for variant, arguments in golden.variants().items():
        _var_variant(report, model, variant, arguments)
    if "tf/logits" in golden.arrays or "tf/x_BLCv_wo_first_l" in golden.arrays:
        _var_training(report, model)
    return report


def load_golden_var(golden: Golden) -> VAR:
    """The folder's model. A trimmed folder has no decoder: zeros stand in for it, and it has no images to compare."""
    config = golden.config["config"]
    options = {"patch_nums": config["patch_nums"], "phi_ratio": config.get("quant_resi", 0.5)}
    if not config.get("attn_l2_norm", True):
        options["heads"] = config["num_heads"]
    vae = read_state_dict(golden.file("vae"))
    if any(key.startswith("decoder.") for key in vae):
        return backbones.load("var", golden.file("var"), golden.file("vae"), encoder=True, **options)  # type: ignore[return-value]
    stand_in = VQVAE(VQVAESpec(channels=(32,), latent_channels=config["z_channels"], encoder=False))
    vae |= {key: torch.zeros_like(value) for key, value in stand_in.state_dict().items() if key.startswith("decoder.")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.safetensors"
        save_file(vae, path)
        return backbones.load("var", golden.file("var"), path, **options)  # type: ignore[return-value]


def _wrong_sizes(model: VAR, config: dict[str, Any]) -> list[str]:
    spec, vae = model.spec, model.vae.spec
    found = {
        "depth": spec.depth,
        "embed_dim": spec.width,
        "num_heads": spec.heads,
        "patch_nums": list(spec.patch_nums),
        "num_classes": spec.classes,
        "shared_aln": spec.shared_aln,
        "attn_l2_norm": spec.cosine,
        "vocab_size": spec.vocab,
        "z_channels": spec.latent_channels,
        "share_quant_resi": vae.phis,
        "num_res_blocks": vae.res_blocks,
    }
    if config.get("share_quant_resi") == 0:  # a phi for every scale
        config = config | {"share_quant_resi": spec.scales}
    return [f"{name} {value}, not {config[name]}" for name, value in found.items() if config.get(name, value) != value]


def _split(tokens: Tensor, model: VAR) -> list[Tensor]:
    """`[B, L]` (or `[B, L, V]`) -> one tensor a scale."""
    return list(tokens.split(list(model.spec.tokens), dim=1))


def _var_variant(report: Report, model: VAR, variant: str, arguments: dict[str, Any]) -> None:
    arrays = report.golden.arrays
    model.sampling = Sampling(guidance=arguments["cfg"], top_k=arguments["top_k"], top_p=arguments["top_p"])
    prefix = model.prefix(arrays["labels"])
    tokens = arrays.get(f"{variant}/tokens")
    common: dict[str, Any] = {
        "record": ("logits", "codes", "inputs", "hidden"),
        "decode": f"{variant}/image" in arrays,
    }
    if arguments.get("more_smooth", False):
        if f"{variant}/h_soft" not in arrays:
            return  # its softmax is as sharp as 1 / 0.0135, so nothing but the given vectors keeps a replay in step
        vectors = _split(arrays[f"{variant}/h_soft"], model)
        common["mixture"] = lambda scale, logits: vectors[scale]
    if tokens is not None:
        report.compared.add(f"{variant}/tokens")
        forced = common | {"tokens": _split(tokens, model)}
        _compare_var(report, model, variant, generate(model, prefix, **forced))
        if any(name.startswith(f"{variant}/attn_entropy") for name in arrays):
            _compare_entropy(report, variant, generate(model, prefix, entropy="head", **forced))
    if arguments["top_k"] == 1:
        _compare_var(report, model, variant, generate(model, prefix, **common), "(free)")


def _compare_var(report: Report, model: VAR, variant: str, trace: Trace, label: str = "") -> None:
    arrays, spec, sampling = report.golden.arrays, model.spec, model.sampling
    constants = [model.scale_constants(scale) for scale in trace.scales]

    def compare(name: str, found: Tensor | Callable[[], Tensor], tolerance: float) -> None:
        report.compare(f"{variant}/{name}", found, tolerance, label)

    def by_row(parts: list[Tensor]) -> Tensor:  # [N, R, *] a scale -> [R, L, *]
        return torch.cat(parts).transpose(0, 1)

    guided = [guide(logits, c["guidance"]) for logits, c in zip(trace.logits, constants, strict=True)]
    compare("x_in", by_row(trace.inputs), HIDDEN)
    for layer in range(spec.depth):
        compare(f"hidden_{layer}", by_row([hidden[layer] for hidden in trace.hidden]), HIDDEN)
    compare("logits_raw", by_row(trace.logits), LOGITS)
    # Guidance is (1 + t) conditional - t unconditional, and multiplies the error of raw logits by up to 1 + 2 t.
    strength = sampling.guidance if isinstance(sampling.guidance, float | int) else max(sampling.guidance)
    compare("logits_cfg", by_row(guided), LOGITS * (1 + 2 * strength))
    if label:
        compare("tokens", torch.cat(trace.tokens, 1), EQUAL)

    def probabilities() -> Tensor:
        # Filtered from the given logits: a token on the edge of top-p may fall either side of it for an error of 1e-7.
        logits = arrays.get(f"{variant}/logits_cfg", by_row(guided))
        return filter_logits(logits, sampling.top_k, sampling.top_p).softmax(-1)

    compare("probs_filtered", probabilities, PROBABILITY)

    if f"{variant}/gumbel_noise" in arrays:
        report.compared.add(f"{variant}/gumbel_noise")
        noise = _split(arrays[f"{variant}/gumbel_noise"], model)
        given = _split(arrays.get(f"{variant}/logits_cfg", by_row(guided)), model)
        mixed = [model.mixed_codes(s, given[s].transpose(0, 1), noise[s].transpose(0, 1)) for s in trace.scales]
        compare("h_soft", torch.cat(mixed, 1), CODES)
    for scale, codes in zip(trace.scales, trace.codes, strict=True):
        compare(f"f_hat_after_scale_{scale}", codes, CODES)
        if scale + 1 < spec.scales:
            compare(f"next_map_{scale}", model.next_map(codes, constants[scale]), CODES)
    compare("f_hat", trace.codes[-1], CODES)
    if trace.image is not None:
        compare("image", trace.image, IMAGE)


def _compare_entropy(report: Report, variant: str, trace: Trace) -> None:
    """`trace.entropy` holds, a scale, a layer, `[R, H, N]`."""
    layers = [torch.cat(parts, -1) for parts in zip(*trace.entropy, strict=True)]
    report.compare(f"{variant}/attn_entropy_per_query", torch.stack(layers), ENTROPY)
    per_head = torch.stack([torch.stack([layer.mean(-1) for layer in scale]) for scale in trace.entropy])
    report.compare(f"{variant}/attn_entropy_per_head", per_head, ENTROPY)
    report.compare(f"{variant}/attn_entropy", per_head.mean(-1), ENTROPY)


def _var_training(report: Report, model: VAR) -> None:
    arrays = report.golden.arrays
    if "argmax/tokens" in arrays:
        tokens = [t.long() for t in _split(arrays["argmax/tokens"], model)]
        report.compare("tf/x_BLCv_wo_first_l", lambda: model.vae.quantize.teacher_input(tokens), CODES)
    given = arrays.get("tf/x_BLCv_wo_first_l")
    if given is not None:
        report.compare("tf/logits", lambda: model.forward_training(arrays["labels"], given), LOGITS)


# ------------------------------------------------------------------------------------------------------ all backbones

# config.json "backbone", lower case -> module and function that makes the report of its folders
REPORTS: dict[str, tuple[str, str]] = {
    "var": ("tests.parity", "var_report"),
    "infinity": ("tests.parity_infinity", "infinity_report"),
}


def report_of(folder: str | Path) -> Report:
    """Compares one golden folder of any backbone."""
    golden = Golden(folder)
    backbone = str(golden.config.get("backbone", "")).lower()
    if backbone not in REPORTS:
        raise ToprovarError(f"{folder}: backbone '{backbone}' has no parity check: there are {', '.join(REPORTS)}")
    module, function = REPORTS[backbone]
    with torch.no_grad():
        report: Report = getattr(import_module(module), function)(golden)
    return report


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        report = report_of(arguments[0])
    except ToprovarError as error:
        print(error, file=sys.stderr)
        return 2
    report.print()
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
