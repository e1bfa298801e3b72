"""What each hole of the paper and its filling are worth, measured on a demo model. docs/method.md quotes the tables.

    python -m benchmarks.method measure --demo class -o benchmarks/results/method-class.json [--pictures 48]
    python -m benchmarks.method fill docs/method.md benchmarks/results/method-*.json

Pictures are compared on the same noise, all scales run, one choice changed at a time. SSIM is to the dense picture, with 95%
bootstrap intervals over pictures; differences are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.evidence import WEIGHTS, Demo, Noise, batches, class_demo, held_out_pictures, run_batch, text_demo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toprovar.backbones.base import EntropyMode
from toprovar.backbones.generate import generate
from toprovar.exporter.calibrate import calibrate
from toprovar.exporter.plan import make_plan, role_scores
from toprovar.exporter.policies.engine import Policy, State
from toprovar.exporter.policies.ours import Planned
from toprovar.exporter.prune import pruning
from toprovar.exporter.quality import ssim
from toprovar.profiles.calibration import Calibration
from toprovar.profiles.files import pretty_json, write_text
from toprovar.profiles.flops import dense_flops, plan_flops
from toprovar.profiles.plan import Plan
from toprovar.profiles.profile import Depth, Profile, Roles, Tokens
from toprovar.profiles.statistics import bootstrap
from toprovar.runtime.bench import machine_lines
from toprovar.runtime.machine import describe_machine

BLOCK = 128
"""Keys at a time in the recurrence."""

FIXED = Depth(grid=12)
"""Where tokens, roles and restore are compared, every class is pruned from the same scale on."""


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence, on the model's own scores


class Scores(TorchDispatchMode):
    """Sees the arguments of every attention: q, keys of the past, new keys, softmax scale."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.toprovar.entropy_attention.default:
            q, past_k, _, new_k, _, scale = args[:6]
            self.seen.append((q, torch.cat([past_k, new_k]), scale))
        return func(*args, **(kwargs or {}))


def recurrences(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[..., L]` float64 -> entropies `[...]`: two passes, our recurrence, the printed one (its sign mended)."""
    log_p = scores.log_softmax(-1)
    truth = -(log_p.exp() * log_p).sum(-1)
    m = torch.full_like(truth, -1e30)
    total, u, e = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    for block in scores.split(BLOCK, -1):
        m_new = torch.maximum(m, block.amax(-1))
        shrink, s = (m - m_new).exp(), block - m_new[..., None]
        p = s.exp()
        u = shrink * (u + (m - m_new) * total) + (p * s).sum(-1)
        e = shrink * e + (p * s).sum(-1)  # log P~ is s: what Algorithm 2 adds, without the term of the moved maximum
        total = shrink * total + p.sum(-1)
        m = m_new
    return truth, total.log() - u / total, total.log() - e / total


@torch.no_grad()
def recurrence_table(demo: Demo, kept: float = 0.5) -> list[dict[str, Any]]:
    """Per scale of 12 x 12 or more: errors of both recurrences, and how many of the tokens chosen are other ones."""
    rows: dict[int, list[tuple[float, ...]]] = {}
    spec = demo.backbone.spec
    for pictures in held_out_pictures(demo, len(demo.classes)).values():
        noise = Noise(demo.backbone, [pictures[0].seed])
        trace = generate(demo.backbone, demo.prefix([pictures[0].prompt]), noise=noise.shaped, decode=False)
        with Scores() as scores:
            generate(demo.backbone, demo.prefix([pictures[0].prompt]), tokens=trace.tokens, decode=False)
        for index, (q, k, scale) in enumerate(scores.seen[-spec.depth * spec.scales :]):
            at = index // spec.depth
            if spec.tokens[at] < 144 or k.shape[0] <= BLOCK:
                continue
            logits = torch.einsum("nhd,lhd->hnl", q[:, 0].double(), k[:, 0].double()) * scale
            truth, ours, printed = (value.mean(0) for value in recurrences(logits))
            count = round(kept * len(truth))
            chosen, wrong = (set(one.argsort(stable=True)[:count].tolist()) for one in (truth, printed))
            errors = (float((value - truth).abs().max()) for value in (ours, printed))
            rows.setdefault(at, []).append(
                (*errors, float((printed - truth).abs().mean()), 1 - len(chosen & wrong) / count)
            )
    return [
        {
            "scale": scale,
            "ours_max_nats": max(row[0] for row in found),
            "printed_max_nats": max(row[1] for row in found),
            "printed_mean_nats": float(np.mean([row[2] for row in found])),
            "other_tokens": float(np.mean([row[3] for row in found])),
        }
        for scale, found in sorted(rows.items())
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens


@dataclasses.dataclass(frozen=True)
class Sampled(Planned):
    """K tokens drawn without replacement with eq. 6 as odds, in place of the K of least entropy."""

    alphas: tuple[float, float] = (0.4, 0.9)

    def _score(self, state: State, layer: int, entropy: Tensor) -> Tensor:
        score = super()._score(state, layer, entropy)
        ranks = score.argsort(1).argsort(1) / max(score.shape[1] - 1, 1)
        phi = (state.scale + 1) / state.backbone.spec.scales
        keep = 1 - (self.alphas[0] + (self.alphas[1] - self.alphas[0]) * phi * ranks)
        rows = [torch.rand(score.shape[1], generator=one) for one in state.generators(2000 + layer)]
        gumbel = -torch.log(-torch.log(torch.stack(rows).clamp(1e-9, 1 - 1e-7))).to(score.device)
        return -(torch.log(keep.clamp_min(1e-6)) + gumbel)


@dataclasses.dataclass(frozen=True)
class BothRows(Planned):
    """Entropy averaged over the rows with and without the condition, in place of those with it."""

    def _score(self, state: State, layer: int, entropy: Tensor) -> Tensor:
        mean = entropy if entropy.dim() == 2 else entropy.mean(1)
        return mean.reshape(-1, state.images, mean.shape[-1]).mean(0)


@dataclasses.dataclass(frozen=True)
class EveryHead(Planned):
    """The most focused head of each token, in place of the mean over heads."""

    def _mode(self) -> EntropyMode:
        return "head"

    def _score(self, state: State, layer: int, entropy: Tensor) -> Tensor:
        return entropy[: state.images].amin(1)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing pictures


class Comparer:
    """SSIM with the dense pictures, a value a picture, of any choice of policies by prompt class."""

    def __init__(self, demo: Demo, pictures: int, batch: int):
        self.demo = demo
        self.batches = list(batches(demo, held_out_pictures(demo, pictures), batch))
        self.noise = [Noise(demo.backbone, [one.seed for one in part]) for _, part in self.batches]
        self.dense = [self._images(Policy(), i) for i in range(len(self.batches))]

    def _images(self, policy: Policy, index: int) -> Tensor:
        image = run_batch(self.demo, policy, self.batches[index][1], self.noise[index])[0].image
        assert image is not None
        return image

    def __call__(self, policies: Callable[[str], Policy]) -> np.ndarray:
        values = [ssim(self._images(policies(name), i), self.dense[i]) for i, (name, _) in enumerate(self.batches)]
        return torch.cat(values).cpu().numpy()

    def table(self, choices: Sequence[tuple[str, Callable[[str], Policy]]]) -> list[dict[str, Any]]:
        """Rows of (choice, SSIM, difference from the first choice)."""
        rows: list[dict[str, Any]] = []
        first: np.ndarray | None = None
        for name, policies in choices:
            values = self(policies)
            first = values if first is None else first
            rows.append({"choice": name, "ssim": _interval(values), "difference": _interval(values - first)})
            print(f"  {name}: SSIM {values.mean():.4f}", flush=True)
        return rows


def _interval(values: np.ndarray) -> list[float]:
    found = bootstrap(values)
    return [round(value, 5) for value in (found.mean, found.low, found.high)]


def plan_of(calibration: Calibration, **options: Any) -> Plan:
    """A plan with all scales run; shipped values (balanced) where nothing is said."""
    wish = {"roles": Roles(max_detail=0.6), "tokens": Tokens(alpha_min=0.4, alpha_max=0.9), "depth": FIXED, **options}
    return make_plan(Profile(schema="toprovar.profile/1", name="method", **wish), calibration)


def planned(plan: Plan, kind: type[Planned] = Planned, **options: Any) -> Callable[[str], Policy]:
    return lambda name: kind(pruning(plan, name), **options)


def arithmetic(demo: Demo, plan: Plan) -> float:
    """Mean over classes of the plan's share of the dense FLOPs."""
    dense = dense_flops(demo.shape).total
    return float(np.mean([plan_flops(demo.shape, plan.roles, one.keep).total / dense for one in plan.classes.values()]))


def directions(demo: Demo, compare: Comparer, calibration: Calibration) -> list[dict[str, Any]]:
    """Which scale the test opens, in both directions, with and without a least grid."""
    rows = []
    for direction in ("<=", ">="):
        for least in (12, 1):
            plan = plan_of(calibration, depth=Depth(tau=0.4, direction=direction, min_grid=least))
            values = compare(planned(plan))
            depth = {
                name: None if one.depth is None else demo.shape.grids[one.depth] for name, one in plan.classes.items()
            }
            rows.append(
                {
                    "direction": direction,
                    "least_grid": least,
                    "depth": depth,
                    "arithmetic": arithmetic(demo, plan),
                    "ssim": _interval(values),
                }
            )
            print(f"  rho {direction} tau from {least}: {depth}, SSIM {values.mean():.4f}", flush=True)
    return rows


def keep_probabilities(demo: Demo, calibration: Calibration) -> dict[str, Any]:
    """Range of eq. 6 over the tokens of the last scale in one picture: as printed, times N, and by rank."""
    name, pictures = next(iter(held_out_pictures(demo, len(demo.classes)).items()))
    noise = Noise(demo.backbone, [pictures[0].seed])
    trace = generate(demo.backbone, demo.prefix([pictures[0].prompt]), noise=noise.shaped, entropy="mean", decode=False)
    scores = role_scores(calibration, Roles()).score
    ranges: dict[str, list[float]] = {"as printed": [], "times N": [], "by rank": []}
    for layer, score in zip(trace.entropy[-1], scores, strict=True):
        entropy = layer[0].double()
        share = entropy / entropy.sum()
        ranks = entropy.argsort().argsort() / (len(entropy) - 1)
        for key, h in (("as printed", share), ("times N", share * len(entropy)), ("by rank", ranks)):
            keep = 1 - (0.4 + 0.5 * score * h).clamp(0, 1)
            ranges[key] += [float(keep.min()), float(keep.max())]
    return {"prompt_class": name, **{key: [min(values), max(values)] for key, values in ranges.items()}}


def ratios(calibration: Calibration) -> dict[str, Any]:
    """The principal component ratio over the layers, raw and centred; R of the literal rule at beta 1; noise beside it."""
    raw, centred = role_scores(calibration, Roles(matrix="raw")), role_scores(calibration, Roles(matrix="centred"))
    grid = calibration.model.grids[raw.scale]
    noise = torch.randn(64, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(noise - noise.mean((1, 2), keepdim=True))
    lifted = torch.linalg.svdvals(1 + 0.1 * noise)
    ranks = [np.argsort(np.argsort(one.ratio)) for one in (raw, centred)]
    return {
        "grid": list(grid),
        "raw": [round(value, 3) for value in raw.ratio],
        "centred": [round(value, 3) for value in centred.ratio],
        "beta_median": raw.beta,
        "largest_R_at_beta_1": float(np.exp(-(min(raw.ratio) - 1))),
        "spearman_raw_centred": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
        "noise_centred": float((sigma[:, 0] / sigma[:, 1]).mean()),
        "noise_raw_cv_10_percent": float((lifted[:, 0] / lifted[:, 1]).mean()),
    }


def role_choices(calibration: Calibration) -> list[tuple[str, str]]:
    """As many detail layers each time: those of lowest ratio, of highest, alternating, the last ones, the first ones."""
    depth, lowest = calibration.model.depth, plan_of(calibration).roles
    count = lowest.count("d")
    order = sorted(range(1, depth), key=lambda layer: role_scores(calibration, Roles()).ratio[layer])

    def letters(chosen: Sequence[int]) -> str:
        return "".join("d" if layer in set(chosen) else "g" for layer in range(depth))

    alternating = sorted(range(1, depth), key=lambda layer: (layer % 2 == 0, layer))
    centred = plan_of(calibration, roles=Roles(matrix="centred", max_detail=0.6)).roles
    return [
        ("lowest raw ratio (the rule)", lowest),
        ("lowest centred ratio", centred),
        ("highest raw ratio", letters(order[-count:])),
        ("every second layer first", letters(alternating[:count])),
        ("the last layers", letters(range(depth - count, depth))),
        ("the first layers behind the first", letters(range(1, count + 1))),
    ]


# ---------------------------------------------------------------------------------------------------------------------


def measure(demo: Demo, pictures: int, batch: int) -> dict[str, Any]:
    """All tables."""
    prompts = {name: members[:8] for name, members in demo.prompts.items()}
    device = demo.backbone.device
    calibration = calibrate(
        demo.backbone,
        prompts,
        [0, 1],
        checkpoint_sha256=demo.sha256,
        condition=demo.condition,
        batch_size=batch,
        text_tokens=demo.shape.text_tokens,
        progress=False,
    )
    document: dict[str, Any] = {
        "schema": "toprovar.method/1",
        "demo": demo.name,
        "title": demo.title,
        "checkpoint_sha256": demo.sha256,
        "pictures": pictures,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "machine": describe_machine(),
        "grids": [list(grid) for grid in demo.shape.grids],
        "rho": {name: list(one.rho.mean) for name, one in calibration.classes.items()},
        "recurrence": recurrence_table(demo),
        "keep_probability": keep_probabilities(demo, calibration),
        "ratios": ratios(calibration),
    }
    compare = Comparer(demo, pictures, batch)
    document["direction"] = directions(demo, compare, calibration)
    base = plan_of(calibration)
    document["roles_of_the_rule"] = base.roles
    document["arithmetic"] = arithmetic(demo, base)
    document["tokens"] = compare.table(
        [
            ("K of least entropy (the rule)", planned(base)),
            ("K drawn with eq. 6 as odds", planned(base, Sampled)),
            ("K at random: eq. 6 as printed", planned(base, choice="random")),
            ("K of most entropy", planned(base, choice="highest")),
        ]
    )
    document["heads_and_rows"] = compare.table(
        [
            ("mean over heads, conditional rows (the rule)", planned(base)),
            ("each head weighted by its temperature", planned(base, choice="temperature")),
            ("the most focused head", planned(base, EveryHead)),
            ("mean over heads, both rows", planned(base, BothRows)),
        ]
    )
    choices = role_choices(calibration)
    rows = compare.table([(n, planned(plan_of(calibration, roles=Roles(explicit=one)))) for n, one in choices])
    document["roles"] = [{**row, "roles": one} for row, (_, one) in zip(rows, choices, strict=True)]
    document["restore"] = compare.table(
        [
            ("what the span added at the last dense scale, resized (the rule)", planned(base)),
            ("nothing: the token passes through", planned(plan_of(calibration, restore="identity"))),
        ]
    )
    return document


# ---------------------------------------------------------------------------------------------------------------------
# Tables of docs/method.md, made from the documents of both demos

NAMES = {"var-demo": "class demo", "infinity-demo": "text demo"}


def tables(documents: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Lines of Markdown by the name of their place."""
    made = {"conditions": [line for document in documents for line in _conditions(document)]}
    made["recurrence"] = _rows(
        (
            "model",
            "scale",
            "ours, worst, nats",
            "printed, mean, nats",
            "printed, worst, nats",
            "kept tokens that are wrong ones",
        ),
        [
            (
                NAMES[document["demo"]],
                _grid(document, row["scale"]),
                f"{row['ours_max_nats']:.0e}",
                f"{row['printed_mean_nats']:.3f}",
                f"{row['printed_max_nats']:.3f}",
                f"{row['other_tokens']:.1%}",
            )
            for document in documents
            for row in document["recurrence"]
        ],
    )
    made["rho"] = []
    for document in documents:
        sides = [_grid(document, scale) for scale in range(len(document["grids"]))]
        curves = [(name, *(f"{value:.2f}" for value in row)) for name, row in document["rho"].items()]
        made["rho"] += [*_rows((f"rho, {NAMES[document['demo']]}", *sides), curves), ""]
    made["direction"] = _rows(
        ("model", "D is the first scale with", "at or past", "D by prompt class", "arithmetic", "SSIM"),
        [
            (
                NAMES[document["demo"]],
                f"rho {row['direction']} 0.4",
                f"{row['least_grid']}x{row['least_grid']}",
                ", ".join(
                    f"{name} {'x'.join(map(str, grid)) if grid else 'none'}" for name, grid in row["depth"].items()
                ),
                f"{row['arithmetic']:.0%}",
                _span(row["ssim"]),
            )
            for document in documents
            for row in document["direction"]
        ],
    )
    made["keep_probability"] = _rows(
        ("P_keep of the last scale's tokens", *(f"{NAMES[document['demo']]}" for document in documents)),
        [
            (
                f"h {key}",
                *(
                    f"{one['keep_probability'][key][0]:.4f} to {one['keep_probability'][key][1]:.4f}"
                    for one in documents
                ),
            )
            for key in ("as printed", "times N", "by rank")
        ],
    )
    made["ratios"] = []
    for document in documents:
        own = document["ratios"]
        layers = [str(layer + 1) for layer in range(len(own["raw"]))]
        rows = [(key, *(f"{value:.1f}" for value in own[key])) for key in ("raw", "centred")]
        rows.append(("role", *document["roles_of_the_rule"]))
        name = NAMES[document["demo"]]
        made["ratios"] += [*_rows((f"layer, {name}", *layers), rows), ""]
        made["ratios"] += [
            f"Noise has {own['noise_centred']:.2f} centred, and {own['noise_raw_cv_10_percent']:.0f} raw on a mean ten times "
            f"its deviation. With beta 1 the largest R of any layer is {own['largest_R_at_beta_1']:.0e}; the median beta is "
            f"{own['beta_median']:.3f}. Rank correlation of raw and centred: {own['spearman_raw_centred']:+.2f}.",
            "",
        ]
    for key in ("tokens", "heads_and_rows", "roles", "restore"):
        columns = ["choice"]
        for document in documents:
            columns += [f"SSIM, {NAMES[document['demo']]}", "difference"]
        lines = []
        for index, row in enumerate(documents[0][key]):
            cells = [row["choice"]]
            for document in documents:
                own = document[key][index]
                cells += [_span(own["ssim"]), "" if index == 0 else _span(own["difference"], signed=True)]
            lines.append(tuple(cells))
        made[key] = _rows(tuple(columns), lines)
    return made


def _conditions(document: dict[str, Any]) -> list[str]:
    machine = machine_lines(document["machine"])
    return [
        f"- {NAMES[document['demo']]}: checkpoint {document['checkpoint_sha256'][:12]}, {document['pictures']} held-out "
        f"pictures on {document['device']}, {document['arithmetic']:.0%} of the dense arithmetic where "
        "one choice is changed at a time",
        *(f"  {line}" for line in machine),
    ]


def _grid(document: dict[str, Any], scale: int) -> str:
    return "x".join(map(str, document["grids"][scale]))


def _span(value: Sequence[float], signed: bool = False) -> str:
    mean, low, high = (f"{one:+.3f}" if signed else f"{one:.3f}" for one in value)
    return f"{mean} ({low} to {high})"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def fill(text: str, documents: Sequence[dict[str, Any]]) -> str:
    """`text` with its measured places, ``<!-- measured NAME -->`` to ``<!-- end -->``, written anew.

    Raises:
        KeyError: a place of another name.
    """
    made = tables(documents)
    return re.sub(
        r"(<!-- measured (\w+) -->\n).*?(<!-- end -->)",
        lambda place: place[1] + "\n".join(["", *made[place[2]], ""]).rstrip() + "\n\n" + place[3],
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("measure", help="measure a demo model")
    one.add_argument("--demo", choices=("class", "text"), default="class")
    one.add_argument("--weights", type=Path, default=WEIGHTS)
    one.add_argument("--device", default="cpu")
    one.add_argument("--pictures", type=int, default=48)
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("-o", "--output", type=Path, required=True)
    two = verbs.add_parser("fill", help="write the tables of a text anew")
    two.add_argument("text", type=Path)
    two.add_argument("documents", type=Path, nargs="+")
    options = parser.parse_args()
    if options.verb == "fill":
        documents = [json.loads(path.read_text()) for path in options.documents]
        write_text(options.text, fill(options.text.read_text(), documents))
        return
    make = class_demo if options.demo == "class" else text_demo
    document = measure(make(options.weights, torch.device(options.device)), options.pictures, options.batch)
    write_text(options.output, pretty_json(document))


if __name__ == "__main__":
    main()
