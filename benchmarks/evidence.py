"""Every policy on the demo models: same noise, same weights, same harness. Writes what `toprovar report` shows.

    python -m benchmarks.evidence search  --demo class --out DIR [--weights DIR] [--device cuda]
    python -m benchmarks.evidence mixes   --demo class --out DIR
    python -m benchmarks.evidence quality --demo class --out DIR --pictures 216 [--part 0/4]
    python -m benchmarks.evidence method  --demo class --out DIR
    python -m benchmarks.evidence latency --demo class --out DIR --threads 2
    python -m benchmarks.evidence bundles --demo class --out DIR --threads 2
    python -m benchmarks.evidence build   --demo class --out DIR -o class.evidence.json

Each step goes on where it stopped: finished pictures are lines of JSON in DIR, and `--part i/n` shares the pictures of a
step among processes. Quality may be measured on a GPU and latency on a CPU: pictures do not depend on the machine beyond
rounding.

- search: calibration, and a profile for each floor of `FLOORS` and `BETWEEN`, in DIR/profiles.
- mixes: of the plans found and of dropped scales, for each budget of FLOPs the most faithful choice on average: a floor
  asks the same of every prompt class, a budget may be spent where it helps most.
- quality: tokens, SSIM, PSNR, perceptual distance, features, accuracy, FLOPs as run, of every policy on held-out prompts.
- method: what the method rests on: tau, error growth, normalisations, costs, pictures looked at closely.
- latency: transformer and total per picture in PyTorch, batch 1, policies in turn.
- bundles: the same by ONNX Runtime, of the policies that exist as bundles: dense, dropped scales, ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from toprovar import backbones
from toprovar.backbones.base import Backbone, Constants, Prefix
from toprovar.backbones.generate import Trace, generate
from toprovar.demo import embedded, embedded_text
from toprovar.demo.accuracy import Accuracy, caption_accuracy, label_accuracy
from toprovar.demo.captions import caption, prompt_class
from toprovar.demo.classifier import frechet_distance
from toprovar.demo.labels import CLASSES, PROMPT_CLASSES
from toprovar.demo.perceptual import PerceptualNet
from toprovar.demo.pictures import HELD_OUT
from toprovar.demo.scenes import random_scenes, scene_of
from toprovar.demo.word_encoder import load_word_encoder
from toprovar.errors import InputError
from toprovar.exporter import build as exporting
from toprovar.exporter.calibrate import calibrate, component_ratio, map_statistics, model_shape
from toprovar.exporter.plan import make_plan, role_scores
from toprovar.exporter.policies.catalogue import Entry, catalogue
from toprovar.exporter.policies.engine import Outcome, Policy, State, run_policy
from toprovar.exporter.policies.ours import Choice, Planned, head_temperatures, token_scores
from toprovar.exporter.policies.rivals import DropLast
from toprovar.exporter.prune import pruning
from toprovar.exporter.quality import code_error, equal_share, mean_squared_error, ssim
from toprovar.exporter.search import Candidate, Picture, Search, split_pictures
from toprovar.exporter.source import SamplingWish, Source, named_profile
from toprovar.profiles import evidence as ev
from toprovar.profiles.calibration import Calibration, load_calibration
from toprovar.profiles.files import write_text
from toprovar.profiles.flops import ModelShape, dense_flops, plan_flops
from toprovar.profiles.manifest import sha256_checkpoint
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.profile import (
    SCHEMA,
    SHIPPED,
    ClassOptions,
    Profile,
    QualityFloor,
    Roles,
    Tokens,
    load_profile,
)
from toprovar.profiles.statistics import bootstrap, exact_mean
from toprovar.runtime import bench
from toprovar.runtime.machine import describe_machine
from toprovar.runtime.session import Session

WEIGHTS = Path(embedded.__file__).parent / "weights"

FLOORS = {name: load_profile(name).quality_floor for name in SHIPPED}

BETWEEN = {
    f"floor-{round(100 * ssim)}": QualityFloor(ssim=ssim, accuracy=accuracy)
    for ssim, accuracy in ((0.88, 0.97), (0.75, 0.9), (0.65, 0.8), (0.5, 0.6))
}
"""More points of our line, so that every rival has one of ours of its own latency beside it."""

APART = "floor-88"
"""The profile that is taken apart, stage by stage: it prunes the most tokens of those that look good."""

BUDGETS = (0.05, 0.08, 0.11, 0.14, 0.17, 0.21, 0.26, 0.33, 0.41, 0.5, 0.65, 0.8)
"""Shares of the dense model's FLOPs, mean over prompt classes, for `mixes`."""

CALIBRATION_SEED, SEARCH_SEED, QUALITY_SEED = 0, 100, 10_000
"""First seeds: no picture of one step is one of another."""


# ---------------------------------------------------------------------------------------------------------------------
# The two demo models


@dataclass
class Demo:
    """A model, its prompts and its judges.

    prompts: prompt class -> labels or texts to calibrate and search with; held_out: those that quality is measured on.
    """

    name: str
    title: str
    backbone: Backbone
    shape: ModelShape
    sha256: str
    prompts: dict[str, list[int | str]]
    held_out: dict[str, list[int | str]]
    condition: Callable[[Sequence[int | str]], tuple[Tensor, ...]]
    accuracy: Accuracy
    perceptual: PerceptualNet
    bitwise: bool
    split: str
    source: Callable[[], Source]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.prompts)

    def prefix(self, prompts: Sequence[int | str]) -> Prefix:
        return self.backbone.prefix(*(tensor.to(self.backbone.device) for tensor in self.condition(prompts)))

    def judge(self, images: Tensor, pictures: Sequence[Picture]) -> Tensor:
        return self.accuracy(images, [picture.prompt for picture in pictures])


def as_embedded(model: Backbone, wish: SamplingWish) -> Backbone:
    """The model with the sampling that its demo wishes."""
    given = {name: value for name, value in dataclasses.asdict(wish).items() if value is not None}
    model.sampling = dataclasses.replace(model.sampling, **given)
    return model


def class_demo(weights: Path, device: torch.device) -> Demo:
    """The class-conditional demo; every class is held out by its seeds."""
    files = [weights / "var.safetensors", weights / "vae.safetensors"]
    model = as_embedded(backbones.load("var", *files, device=device), embedded.SAMPLING)
    labels = {group: [CLASSES.index(name) for name in names] for group, names in PROMPT_CLASSES.items()}

    return Demo(
        "var-demo",
        "Class-conditional demo (VAR)",
        model,
        model_shape(model),
        sha256_checkpoint([files[0]], [files[1]]),
        {name: list(members) for name, members in labels.items()},
        {name: list(members) for name, members in labels.items()},
        lambda prompts: (torch.tensor([int(p) for p in prompts], dtype=torch.int32),),
        label_accuracy(weights, device),
        PerceptualNet.load(weights / "perceptual.safetensors").to(device),
        bitwise=False,
        split="The model has twelve classes, so pictures are held out by their seeds: none was used to calibrate or to plan.",
        source=lambda: dataclasses.replace(embedded.embedded_source(), checkpoint=files[0], vae=files[1]),
    )


def text_demo(weights: Path, device: torch.device) -> Demo:
    """The text-conditional demo; prompts are held out by their text."""
    files = embedded_text.TextDemo(weights)
    loaded = backbones.load("infinity", files.checkpoint, files.vae, resolution=embedded_text.RESOLUTION, device=device)
    model = as_embedded(loaded, embedded_text.SAMPLING)
    encoder = load_word_encoder(files.word_encoder, device=device)
    calibration: dict[str, list[int | str]] = {}
    for prompt in embedded.calibration_prompts(per_class=12):
        calibration.setdefault(str(prompt.prompt_class), []).append(prompt.text)
    used = {text for texts in calibration.values() for text in texts}
    held_out: dict[str, list[int | str]] = {name: [] for name in calibration}
    for row in random_scenes(HELD_OUT + 16384 + np.arange(4096)):
        scene = scene_of(row)
        text = caption(scene)
        if text not in used and text not in held_out[prompt_class(scene)]:
            held_out[prompt_class(scene)].append(text)

    @torch.no_grad()
    def condition(prompts: Sequence[int | str]) -> tuple[Tensor, ...]:
        text = encoder.encode([str(prompt) for prompt in prompts])
        return text.features, text.lengths

    words = [len(str(prompt).split()) for prompts in held_out.values() for prompt in prompts]
    return Demo(
        "infinity-demo",
        "Text-conditional demo (Infinity)",
        model,
        model_shape(model, round(float(np.mean(words)))),
        sha256_checkpoint([files.checkpoint], [files.vae]),
        calibration,
        held_out,
        condition,
        caption_accuracy(weights, device),
        PerceptualNet.load(weights / "perceptual.safetensors").to(device),
        bitwise=True,
        split="Prompts are held out by their text: none was used to calibrate or to plan.",
        source=lambda: embedded.embedded_text_source(files),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: lines of JSON, one a finished piece


class Lines:
    """Finished pieces of a step, a line of JSON each, of all the parts that wrote into this folder."""

    def __init__(self, folder: Path, step: str, part: tuple[int, int] = (0, 1)):
        self.folder, self.step = folder, step
        self.path = folder / f"{step}.{part[0]}-of-{part[1]}.jsonl"
        self.done = {self._key(line) for line in self.read()}

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return (line["policy"], line["prompt"], line["seed"])

    def read(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(f"{self.step}.*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # cut off by an interrupt; made again
                    continue

    def missing(self, policy: str, pictures: Sequence[Picture]) -> list[int]:
        return [i for i, one in enumerate(pictures) if (policy, one.prompt, one.seed) not in self.done]

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines))
        self.done |= {self._key(line) for line in lines}


def batches(
    demo: Demo, pictures: dict[str, list[Picture]], size: int, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, list[Picture]]]:
    """Pictures of one class at a time; part i of n takes every n-th batch."""
    number = 0
    for name in demo.classes:
        for start in range(0, len(pictures[name]), size):
            if number % part[1] == part[0]:
                yield name, pictures[name][start : start + size]
            number += 1


def held_out_pictures(demo: Demo, count: int) -> dict[str, list[Picture]]:
    """`count` pictures over all classes: prompts in turn, a seed of its own for each."""
    per_class = -(-count // len(demo.classes))
    found = {}
    for number, (name, prompts) in enumerate(demo.held_out.items()):
        first = QUALITY_SEED + number * per_class
        found[name] = [Picture(prompts[i % len(prompts)], first + i) for i in range(per_class)]
    return found


class Noise:
    """The noise of a batch on the device, made once for all policies; pictures in parallel."""

    def __init__(self, backbone: Backbone, seeds: Sequence[int]):
        self.backbone, self.seeds = backbone, tuple(seeds)
        self.scales: dict[int, Tensor] = {}

    def __call__(self, scale: int) -> Tensor:
        if scale not in self.scales:
            tokens, _, logits = self.backbone.noise_shape(scale, len(self.seeds))
            with ThreadPoolExecutor(8) as pool:
                parts = list(pool.map(lambda seed: scale_noise([seed], scale, tokens, logits), self.seeds))
            self.scales[scale] = torch.from_numpy(np.concatenate(parts, axis=1)).to(self.backbone.device)
        return self.scales[scale]

    def shaped(self, scale: int, shape: tuple[int, ...]) -> Tensor:
        """As `toprovar.backbones.generate` asks for it."""
        return self(scale)

    def of(self, image: int) -> Callable[[int], Tensor]:
        return lambda scale: self(scale)[:, image : image + 1]


def run_batch(demo: Demo, policy: Policy, batch: Sequence[Picture], noise: Noise, **options: Any) -> list[Outcome]:
    """One outcome for the batch, or one a picture of an adaptive policy."""
    seeds = [picture.seed for picture in batch]
    if not policy.adaptive:
        prefix = demo.prefix([picture.prompt for picture in batch])
        return [run_policy(policy, demo.backbone, demo.shape, prefix, seeds, noise, **options)]
    return [
        run_policy(policy, demo.backbone, demo.shape, demo.prefix([one.prompt]), [one.seed], noise.of(i), **options)
        for i, one in enumerate(batch)
    ]


def our_profiles(out: Path) -> list[Profile]:
    """Those that `search` found, mildest first; without them the shipped ones."""
    found = sorted((out / "profiles").glob("*.toml"))
    profiles = [load_profile(path) for path in found] or [load_profile(name) for name in SHIPPED]
    return sorted(profiles, key=lambda one: (-(one.quality_floor.ssim or 0.0), one.name))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def search(demo: Demo, args: argparse.Namespace) -> None:
    """Calibration, and a profile for each floor. Prompt classes and roles are shared among processes."""
    calibration = measured(demo, args)
    looking = searcher(demo, calibration, args)
    floors = {**FLOORS, **BETWEEN}
    began = time.perf_counter()
    shares = [(group, roles) for roles in looking.roles() for group in demo.classes]
    if args.workers > 1:
        with ProcessPoolExecutor(min(args.workers, len(shares)), multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(search_share, [args] * len(shares), *zip(*shares, strict=True)))
    else:
        found = [share_of(looking, group, roles) for group, roles in shares]
    seconds = time.perf_counter() - began
    (args.out / "profiles").mkdir(parents=True, exist_ok=True)
    report = {}
    for name, floor in floors.items():
        options: dict[str, dict[str, Candidate]] = {}
        for (group, roles), (candidates, _) in zip(shares, found, strict=True):
            options.setdefault(roles, {})[group] = candidates[name]
        tried = sum(counts[name] for _, counts in found)
        one = looking.settle(floor, name, options, tried)
        report[name] = {
            "floor": floor.model_dump(exclude_none=True),
            "cost": one.cost,
            "measured": {g: {k: v.model_dump() for k, v in row.items()} for g, row in one.measured.items()},
            "evaluations": tried,
            "seconds": round(seconds / len(floors), 1),
            "roles": one.profile.roles.explicit,
        }
        write_text(args.out / "profiles" / f"{name}.toml", profile_toml(one.profile, demo.sha256))
        keys = ("ssim", "accuracy")
        kept = {g: " ".join(f"{key} {row[key].mean:.3f}" for key in keys) for g, row in one.measured.items()}
        print(
            f"{name}: FLOPs { ({g: round(v, 3) for g, v in one.cost.items()}) }, {kept}, {tried} prunings", flush=True
        )
    write_text(args.out / "search.json", json.dumps(report, indent=1))


def searcher(demo: Demo, calibration: Calibration, args: argparse.Namespace) -> Search:
    searched, held_out = split_pictures(demo.prompts, [SEARCH_SEED + i for i in range(args.seeds)])
    return Search(demo.backbone, calibration, searched, held_out, demo.condition, demo.judge, batch_size=args.batch)


def search_share(args: argparse.Namespace, group: str, roles: str) -> tuple[dict[str, Candidate], dict[str, int]]:
    """In a process of its own."""
    demo = load_demo(args)
    return share_of(searcher(demo, measured(demo, args), args), group, roles)


def share_of(looking: Search, group: str, roles: str) -> tuple[dict[str, Candidate], dict[str, int]]:
    """The fastest of one class with these roles above each floor, and how many prunings each took."""
    candidates, counts = {}, {}
    for name, floor in {**FLOORS, **BETWEEN}.items():
        before = looking.evaluations
        candidates[name] = looking.fastest(group, roles, floor)
        counts[name] = looking.evaluations - before
    return candidates, counts


def mixes(demo: Demo, args: argparse.Namespace) -> None:
    """A profile for each budget, chosen on all pictures of the search, none of which quality is measured on."""
    calibration = measured(demo, args)
    looking = searcher(demo, calibration, args)
    scales, dense = len(demo.shape.grids), dense_flops(demo.shape).total
    floors = [profile for profile in our_profiles(args.out) if profile.quality_floor != QualityFloor()]
    whole = {f"drop-{n}": ClassOptions(tokens=Tokens(keep={}), drop_scales=n) for n in range(min(scales, 6))}
    best: dict[float, tuple[float, str, dict[str, ClassOptions]]] = {}
    for roles in dict.fromkeys(str(profile.roles.explicit) for profile in floors):
        pool: dict[str, list[tuple[float, float, ClassOptions]]] = {}
        for group in demo.classes:
            found = {one.name: one.classes[group] for one in floors if one.roles.explicit == roles}
            for options in {**whole, **found}.values():
                wish = Profile(schema=SCHEMA, name="mix", roles=Roles(explicit=roles), classes={group: options})
                plan = make_plan(wish, calibration)
                cost = plan_flops(demo.shape, plan.roles, plan.for_class(group).keep).total / dense
                way = pruning(plan, group)
                if plan.for_class(group).depth is None:  # the same pictures whatever the roles
                    way = dataclasses.replace(way, roles="g" * demo.shape.depth)
                halves = [looking.figures(group, way, held_out=half)["ssim"] for half in (False, True)]
                similar = exact_mean([value for half in halves for value in half])
                pool.setdefault(group, []).append((cost, similar, options))
        for choice in itertools.product(*pool.values()):
            cost, similar = (
                sum(values) / len(choice) for values in ([c for c, _, _ in choice], [s for _, s, _ in choice])
            )
            for budget in BUDGETS:
                if cost <= budget and (budget not in best or similar > best[budget][0]):
                    best[budget] = (similar, roles, {g: one[2] for g, one in zip(pool, choice, strict=True)})
    for budget, (similar, roles, classes) in best.items():
        name = f"budget-{round(100 * budget):02d}"
        profile = Profile(
            schema=SCHEMA,
            name=name,
            description=f"The most faithful mix of plans with at most {budget:.0%} of the dense FLOPs on average.",
            roles=Roles(explicit=roles),
            classes=classes,
        )
        write_text(args.out / "profiles" / f"{name}.toml", profile_toml(profile, demo.sha256))
        print(f"{name}: SSIM {similar:.3f}", flush=True)


def measured(demo: Demo, args: argparse.Namespace) -> Calibration:
    """The calibration in the folder, made where it is missing."""
    path: Path = args.out / "calibration.json"
    if path.exists():
        found = load_calibration(path)
        found.check_checkpoint(demo.sha256)
        return found
    prompts = {name: members[:8] for name, members in demo.prompts.items()}
    return calibrate(
        demo.backbone,
        prompts,
        [CALIBRATION_SEED, CALIBRATION_SEED + 1],
        checkpoint_sha256=demo.sha256,
        condition=demo.condition,
        output=path,
        batch_size=args.batch,
        text_tokens=demo.shape.text_tokens,
        progress=False,
    )


def profile_toml(profile: Profile, checkpoint_sha256: str) -> str:
    """A found profile as the TOML that a person would write."""
    lines = [
        f"# Found by `python -m benchmarks.evidence search` for checkpoint {checkpoint_sha256[:12]}.",
        f'schema = "{profile.schema_version}"',
        f'name = "{profile.name}"',
        f'description = "{profile.description}"',
        "",
        "[roles]",
        f'explicit = "{profile.roles.explicit}"',
    ]
    if floor := profile.quality_floor.model_dump(exclude_none=True):
        lines += ["", "[quality_floor]", *(f"{key} = {value}" for key, value in floor.items())]
    for name, options in profile.classes.items():
        lines += ["", f"[classes.{name}]", f"drop_scales = {options.drop_scales}"]
        if options.depth.grid is not None:
            lines += [f"depth = {{ grid = {options.depth.grid} }}"]
        keep = ", ".join(f'"{grid}" = {fraction}' for grid, fraction in (options.tokens.keep or {}).items())
        lines += [f"tokens = {{ keep = {{ {keep} }} }}" if keep else "tokens = { keep = {} }"]
    return "\n".join([*lines, ""])


def computation(policy: Policy, demo: Demo) -> Hashable:
    """What a policy does, whatever it is called: plans that prune nothing are dropped scales and nothing else."""
    scales = demo.shape.tokens
    if isinstance(policy, DropLast):
        return ("drop", policy.scales)
    if isinstance(policy, Planned):
        run = policy.pruning.scales_run or tuple(range(len(scales)))
        if all(policy.pruning.keep[s] == scales[s] for s in run):
            return ("drop", len(scales) - len(run))
    return policy if type(policy) is not Policy else ("drop", 0)


def finished(
    demo: Demo, entries: Sequence[Entry], lines: Lines, pictures: dict[str, list[Picture]], args: argparse.Namespace
) -> dict[Hashable, list[dict[str, Any]]]:
    """(computation, pictures of a batch) -> their records, of what was measured before under any name."""
    records = {Lines._key(one): one for one in lines.read()}
    known: dict[Hashable, list[dict[str, Any]]] = {}
    for group, batch in batches(demo, pictures, args.batch):
        for entry in entries:
            found = [records.get((entry.name, one.prompt, one.seed)) for one in batch]
            if all(found):
                known[computation(entry.for_class(group), demo), tuple(batch)] = [one for one in found if one]
    return known


def quality(demo: Demo, args: argparse.Namespace) -> None:
    """Figures of every policy on held-out pictures; what two policies do alike is done once."""
    entries = catalogue(measured(demo, args), our_profiles(args.out), APART)
    lines = Lines(args.out, "quality", args.part)
    pictures = held_out_pictures(demo, args.pictures)
    known = finished(demo, entries, lines, pictures, args)
    write_text(args.out / f"machine.quality.{args.part[0]}.json", json.dumps(machine(args)))
    spent: dict[str, float] = {}
    for group, batch in batches(demo, pictures, args.batch, args.part):
        todo = [entry for entry in entries if lines.missing(entry.name, batch)]
        if any((computation(one.for_class(group), demo), tuple(batch)) not in known for one in todo):
            noise = Noise(demo.backbone, [picture.seed for picture in batch])
            dense = run_batch(demo, Policy(), batch, noise)[0]
            assert dense.image is not None
            dense_features = features(demo, dense.image)
        for entry in todo:
            began = time.perf_counter()
            policy = entry.for_class(group)
            key = (computation(policy, demo), tuple(batch))
            if key not in known:
                outcomes = [dense] if entry.name == "dense" else run_batch(demo, policy, batch, noise)
                known[key] = figures(demo, batch, group, outcomes, dense, dense_features)
            lines.add([{**one, "policy": entry.name} for one in known[key]])
            spent[entry.name] = spent.get(entry.name, 0.0) + time.perf_counter() - began
    print(json.dumps({name: round(seconds, 1) for name, seconds in spent.items()}))


@torch.no_grad()
def features(demo: Demo, images: Tensor) -> Tensor:
    return demo.perceptual.features(images)


@torch.no_grad()
def figures(
    demo: Demo,
    batch: Sequence[Picture],
    group: str,
    outcomes: Sequence[Outcome],
    dense: Outcome,
    dense_features: Tensor,
) -> list[dict[str, Any]]:
    """A record of each picture."""
    images = torch.cat([one.image for one in outcomes if one.image is not None])
    assert dense.image is not None
    per_picture = {
        "ssim": ssim(images, dense.image),
        "mse": mean_squared_error(images, dense.image),
        "perceptual": demo.perceptual.distance(images, dense.image),
        "accuracy": demo.judge(images, batch),
    }
    vectors = dense_features if outcomes[0] is dense else features(demo, images)
    records = []
    for i, picture in enumerate(batch):
        own, place = (outcomes[0], i) if len(outcomes) == 1 else (outcomes[i], 0)
        shares = {s: own.tokens[s][place] == dense.tokens[s][i] for s in own.tokens if s in dense.tokens}
        tokens = [same if same.dim() == 1 else same.all(-1) for same in shares.values()]
        record = {
            "prompt": picture.prompt,
            "seed": picture.seed,
            "prompt_class": group,
            **{name: float(values[i]) for name, values in per_picture.items()},
            "tokens": float(torch.cat(tokens).double().mean()),
            "features": [round(float(v), 5) for v in vectors[i]],
            "flops": {str(s): value for s, value in own.flops.items()},
            "conditioning": own.conditioning,
            "kept": {str(s): value for s, value in own.kept.items()},
        }
        if demo.bitwise:
            record["bits"] = float(torch.cat([same.flatten() for same in shares.values()]).double().mean())
        records.append(record)
    return records


def latency(demo: Demo, args: argparse.Namespace) -> None:
    """Wall time per picture of every policy in turn, batch 1."""
    entries = catalogue(measured(demo, args), our_profiles(args.out), APART)
    lines = Lines(args.out, "latency")
    torch.set_num_threads(args.threads)
    pictures = held_out_pictures(demo, args.pictures)
    run_one(demo, Policy(), pictures[demo.classes[0]][0])  # caches, allocations
    earlier = {Lines._key(one): one for one in lines.read()}
    machine_file = (
        args.out / "machine.latency.json"
    )  # one machine for all times: remove it, and the lines, to change it
    if not machine_file.exists():
        write_text(machine_file, json.dumps({**machine(args), "threads": args.threads}))
    for repeat in range(args.repeat):
        for group, batch in batches(demo, pictures, 1):
            # A repeat is a line of its own: its number stands in the seed, which the picture's noise does not take.
            prompt, seed = batch[0].prompt, batch[0].seed + 10**6 * repeat
            known: dict[Hashable, dict[str, Any]] = {}
            for entry in entries:
                if one := earlier.get((entry.name, prompt, seed)):
                    known[computation(entry.for_class(group), demo)] = one
            for entry in entries:
                if (entry.name, prompt, seed) in lines.done:
                    continue
                key = computation(entry.for_class(group), demo)
                if key not in known:
                    seconds, total = run_one(demo, entry.for_class(group), batch[0])
                    ms = {str(scale): 1e3 * value for scale, value in seconds.items()}
                    times = {"scales_ms": ms, "total_ms": 1e3 * total}
                    known[key] = {"prompt": prompt, "seed": seed, "prompt_class": group, **times}
                lines.add([{**known[key], "policy": entry.name}])


def bundles(demo: Demo, args: argparse.Namespace) -> None:
    """Bundles of the dense model, of dropped scales and of our profiles, timed in turn by ONNX Runtime."""
    calibration = measured(demo, args)
    checkpoint = exporting.load(demo.source())
    wishes = [named_profile("dense"), *(named_profile("dense", n) for n in (1, 2, 3)), *our_profiles(args.out)]
    sessions = []
    for wish in wishes:
        name = f"ours-{wish.name}" if wish.classes or wish.tokens.keep != {} else wish.name
        path = args.out / "bundles" / f"{name}.bundle"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            exporting.assemble(checkpoint, exporting.decide(checkpoint, wish, calibration), calibration, path)
        sessions.append(Session(path, threads=args.threads))
    document = bench.bench(sessions, repeat=args.repeat, warmup=1)
    write_text(args.out / "bundles.json", json.dumps({**document, "threads": args.threads}))
    print(bench.markdown(document)[-3000:])


def run_one(demo: Demo, policy: Policy, picture: Picture) -> tuple[dict[int, float], float]:
    """Seconds of each scale, and of all from the condition to the picture. Noise is made beforehand."""
    noise = Noise(demo.backbone, [picture.seed])
    for scale in range(demo.backbone.spec.scales):
        noise(scale)
    began = time.perf_counter()
    prefix = demo.prefix([picture.prompt])
    outcome = run_policy(policy, demo.backbone, demo.shape, prefix, [picture.seed], noise)
    if demo.backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return outcome.seconds, time.perf_counter() - began


def machine(args: argparse.Namespace) -> dict[str, Any]:
    found = describe_machine()
    if args.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the method rests on


def method(demo: Demo, args: argparse.Namespace) -> None:
    """tau, error growth, normalisations, costs, and pictures looked at closely."""
    calibration = measured(demo, args)
    entries = {entry.name: entry for entry in catalogue(calibration, our_profiles(args.out), APART)}
    pictures = held_out_pictures(demo, args.pictures)
    document: dict[str, Any] = {"tau": {}, "errors": [], "normalisations": {}, "costs": []}
    for group, batch in batches(demo, pictures, args.batch):
        noise = Noise(demo.backbone, [picture.seed for picture in batch])
        stopping(demo, group, batch, noise, document)
        growing(demo, group, batch, noise, entries, document)
    document["costs"] = costs(demo, calibration, entries, args)
    write_text(args.out / "method.json", json.dumps(document))
    arrays, examples = look_closely(demo, entries, pictures)
    np.savez_compressed(args.out / "examples.npz", **arrays)  # type: ignore[arg-type]
    write_text(args.out / "examples.json", json.dumps(examples))


_NORMALISATIONS: dict[Choice, str] = {
    "entropy": "Mean over heads, in nats (as planned)",
    "temperature": "Each head's entropy weighted by its temperature",
    "log-keys": "Over the log of the number of keys",
}


@torch.no_grad()
def stopping(demo: Demo, group: str, batch: Sequence[Picture], noise: Noise, document: dict[str, Any]) -> None:
    """(rho, SSIM with the finished picture) of every picture and scale; rho by normalisation; ranks between them."""
    spec, backbone = demo.backbone.spec, demo.backbone
    rho: list[Tensor] = []
    by_choice: dict[str, list[list[float]]] = {name: [] for name in _NORMALISATIONS}
    correlations: dict[str, list[float]] = {name: [] for name in _NORMALISATIONS}
    keys = 0
    layers = range(spec.depth)

    def reduce(scale: int, trace: Trace) -> None:
        nonlocal keys
        keys += spec.tokens[scale]
        heads = [layer[: len(batch)] for layer in trace.entropy[-1]]  # [B, H, N] each
        trace.entropy[-1].clear()
        mean = torch.stack([layer.mean(1) for layer in heads]).mean(0)
        rho.append((mean < mean.mean(1, keepdim=True)).double().mean(1).cpu())
        for name in _NORMALISATIONS:
            scored = [token_scores(name, heads[i], head_temperatures(backbone, i), keys) for i in layers]
            averaged = torch.stack(scored).mean(0)
            by_choice[name].append((averaged < averaged.mean(1, keepdim=True)).double().mean(1).tolist())
            if spec.tokens[scale] >= 36:
                for one, plain in zip(scored, heads, strict=True):
                    ranks = [values.argsort(1).argsort(1).double() for values in (one, plain.mean(1))]
                    ranks = [values - values.mean(1, keepdim=True) for values in ranks]
                    r = (ranks[0] * ranks[1]).sum(1) / (ranks[0].norm(dim=1) * ranks[1].norm(dim=1))
                    correlations[name] += r.tolist()

    trace = generate(
        backbone,
        demo.prefix([picture.prompt for picture in batch]),
        noise=noise.shaped,
        entropy="head",
        record=("codes",),
        after_scale=reduce,
    )
    assert trace.image is not None
    points = document["tau"].setdefault(group, [])
    for scale in range(spec.scales - 1):
        similar = ssim(backbone.decode(trace.codes[scale]), trace.image)
        points += [[scale, float(r), float(s)] for r, s in zip(rho[scale], similar, strict=True)]
    table = document["normalisations"].setdefault(group, {})
    for name in _NORMALISATIONS:
        one = table.setdefault(name, {"rho": [], "correlation": []})
        one["rho"] += np.array(by_choice[name]).T.tolist()
        one["correlation"] += correlations[name]


ERRORS_OF = (
    f"ours-{APART}", "ours-balanced", "fastvar-hart", "stagevar", f"{APART}-random", f"{APART}-identity",
)  # fmt: skip


def growing(
    demo: Demo, group: str, batch: Sequence[Picture], noise: Noise, entries: dict[str, Entry], document: dict[str, Any]
) -> None:
    """Token and code errors after each scale: free-running, and with the dense tokens given at every scale."""
    dense = run_batch(demo, Policy(), batch, noise, decode=False)[0]
    for name in ERRORS_OF:
        if name not in entries:
            continue
        policy = entries[name].for_class(group)
        for mode, forced in (("free-running", None), ("teacher-forced", dense.tokens)):
            one = run_batch(demo, policy, batch, noise, forced=forced, decode=False)[0]
            scales = list(one.drawn)
            wrong = [1 - equal_share(one.drawn[s], dense.tokens[s]) for s in scales]
            if demo.bitwise:
                wrong = [(one.drawn[s] != dense.tokens[s]).double().mean((1, 2)) for s in scales]
            codes = []
            for s in scales:
                after = one.codes[s]
                if forced is not None:  # the codes of its own tokens on the dense codes before
                    before = dense.codes[s - 1] if s else demo.backbone.initial_codes(len(batch))
                    after = demo.backbone.accumulate(one.drawn[s], before, demo.backbone.scale_constants(s))
                codes.append(code_error(after, dense.codes[s]))
            document["errors"].append(
                {
                    "policy": name,
                    "prompt_class": group,
                    "mode": mode,
                    "scales": scales,
                    "token_error": [values.tolist() for values in wrong],
                    "code_error": [values.tolist() for values in codes],
                }
            )


class _WithEntropy(Policy):
    """The dense model that also computes entropy in the layers that would select."""

    def __init__(self, layers: Sequence[int]):
        self.layers = set(layers)

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        for layer in range(len(state.backbone.blocks)):
            x = state.block(layer, x, constants.get("rope"), "mean" if layer in self.layers else "none").x
        return state.head(x)


def costs(
    demo: Demo, calibration: Calibration, entries: dict[str, Entry], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What calibration, planning, entropy and role scores take on this machine."""
    picture = held_out_pictures(demo, len(demo.classes))[demo.classes[0]][0]
    fast = entries["ours-fast"].for_class(demo.classes[0])
    assert isinstance(fast, Planned)
    roles = fast.pruning.roles
    selecting = [i for i in range(len(roles) - 1) if roles[i] == "g" and roles[i + 1] == "d"]

    def fastest(policy: Policy) -> float:
        return min(sum(run_one(demo, policy, picture)[0].values()) for _ in range(3))

    plain, with_entropy = fastest(Policy()), fastest(_WithEntropy(selecting))
    grid = demo.backbone.spec.grids[role_scores(calibration, load_profile("balanced").roles).scale]
    maps = torch.rand(demo.backbone.spec.depth, *grid, dtype=torch.float64, device=demo.backbone.device)
    component_ratio(maps)
    began = time.perf_counter()
    for _ in range(5):
        component_ratio(maps)
    roles_s = (time.perf_counter() - began) / 5
    began = time.perf_counter()
    for _ in range(20):
        make_plan(load_profile("balanced"), calibration)
    planning = (time.perf_counter() - began) / 20
    images = sum(one.images for one in calibration.classes.values())
    note = f"{len(selecting)} of {len(roles)} layers, every scale; dense {1e3 * plain:.0f} ms"
    rows = [
        (
            "calibration",
            "Calibration",
            calibration.wall_time_s,
            "model",
            f"{images} pictures with the entropy of every layer",
        ),
        ("roles", "Role scores: SVD of the entropy map of each layer", roles_s, "model", "of one picture"),
        ("plan", "Plan from profile and calibration", planning, "model", ""),
        ("entropy", "Entropy in the layers that select", max(0.0, with_entropy - plain), "image", note),
    ]
    search_file = args.out / "search.json"
    if search_file.exists():
        spent = json.loads(search_file.read_text())
        seconds = sum(one["seconds"] for one in spent.values())
        tried = sum(one["evaluations"] for one in spent.values())
        rows.insert(
            3, ("search", f"Search for plans above {len(spent)} floors", seconds, "model", f"{tried} prunings tried")
        )
    return [{"name": n, "title": t, "seconds": s, "per": per, "note": note} for n, t, s, per, note in rows]


SHOWN = (
    "dense", "drop-2", "fastvar", "skipvar-84", "sparsevar", "fastervar", "ours-balanced", "ours-fast", "ours-extreme",
)  # fmt: skip
"""Whose pictures are kept: the document and its arrays come with the package."""


def look_closely(
    demo: Demo, entries: dict[str, Entry], pictures: dict[str, list[Picture]]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Arrays and facts of a picture of each class; see `toprovar.profiles.evidence.Example`."""
    arrays: dict[str, np.ndarray] = {}
    examples = []
    backbone = demo.backbone
    for group in demo.classes:
        for number, picture in enumerate(pictures[group][:1]):
            key, noise = f"{group}-{number}", Noise(backbone, [picture.seed])
            trace = generate(backbone, demo.prefix([picture.prompt]), noise=noise.shaped, entropy="mean")
            rho = []
            for scale, layers in enumerate(trace.entropy):
                maps = torch.stack([layer[0] for layer in layers])
                statistics = map_statistics(maps[:, None].cpu(), backbone.spec.grids[scale])
                rho.append(float(statistics.rho[0]))
                shape = (len(layers), *backbone.spec.grids[scale])
                arrays[f"{key}.entropy.{scale}"] = maps.reshape(shape).cpu().numpy().astype(np.float16)
            shown = []
            for name in SHOWN:
                if name not in entries:
                    continue
                outcome = run_batch(demo, entries[name].for_class(group), [picture], noise)[0]
                assert outcome.image is not None
                arrays[f"{key}.image.{name}"] = png(outcome.image[0])
                shown.append(name)
                for scale, mask in outcome.masks.items():
                    grid = backbone.spec.grids[scale]
                    kept = mask[0].reshape(-1, *grid).cpu().numpy().astype(np.uint8)
                    arrays[f"{key}.kept.{name}.{scale}"] = kept
            prompt = CLASSES[picture.prompt] if isinstance(picture.prompt, int) else picture.prompt
            examples.append(
                {
                    "key": key,
                    "prompt": prompt,
                    "prompt_class": group,
                    "seed": picture.seed,
                    "rho": rho,
                    "policies": shown,
                }
            )
    return arrays, examples


def png(image: Tensor) -> np.ndarray:
    """`[3, h, w]` in [0, 1] -> the bytes of a PNG file, uint8 [n]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return np.frombuffer(file.getvalue(), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The document


def build(demo: Demo, args: argparse.Namespace) -> None:
    """Everything in the folder as one document of `toprovar.profiles.evidence`."""
    calibration = measured(demo, args)
    profiles = our_profiles(args.out)
    entries = catalogue(calibration, profiles, APART)
    table = Table(list(Lines(args.out, "quality").read()), demo.classes)
    times = list(Lines(args.out, "latency").read())
    fast = next((profile for profile in profiles if profile.name == "fast"), profiles[0])
    plan = make_plan(fast, calibration)
    scores = role_scores(calibration, load_profile("balanced").roles)
    policies = tuple(policy_of(entry, demo, table, times) for entry in entries if entry.name in table.policies)
    bundles_file = args.out / "bundles.json"
    if bundles_file.exists():
        benched = json.loads(bundles_file.read_text())
        repeat = benched["settings"]["repeat"]
        timed = {one["name"]: {**one, "repeat": repeat} for one in benched["bundles"]}
        policies = tuple(with_bundle(one, timed[one.name]) if one.name in timed else one for one in policies)
    method_file, examples_file = args.out / "method.json", args.out / "examples.json"
    found = json.loads(method_file.read_text()) if method_file.exists() else {}
    arrays: ev.Arrays = {}
    examples: tuple[ev.Example, ...] = ()
    if examples_file.exists():
        with np.load(args.out / "examples.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
        names = {policy.name for policy in policies}
        for one in json.loads(examples_file.read_text()):
            shown = tuple(name for name in one["policies"] if name in names)
            examples += (ev.Example(**{**one, "rho": tuple(one["rho"]), "policies": shown}),)
    latency_machine = args.out / "machine.latency.json"
    document = ev.Evidence(
        schema=ev.SCHEMA,
        name=demo.name,
        title=demo.title,
        checkpoint_sha256=demo.sha256,
        model=demo.shape,
        classes=demo.classes,
        split=f"{demo.split} {table.count} pictures.",
        policies=policies,
        comparisons=tuple(compared(policies, table, demo.classes)),
        rho={name: one.rho.mean for name, one in calibration.classes.items()},
        tau=fast.depth.tau if all(one.depth.grid is None for one in fast.classes.values()) else None,
        depth={name: one.depth for name, one in plan.classes.items()},
        role_scores=scores.ratio,
        role_scale=scores.scale,
        roles=plan.roles,
        tau_fits={name: tau_fit(points) for name, points in found.get("tau", {}).items()},
        errors=tuple(errors_of(found.get("errors", []), {policy.name for policy in policies})),
        normalisations=tuple(normalisations_of(found.get("normalisations", {}), table)),
        costs=tuple(ev.Cost(**one) for one in found.get("costs", [])),
        examples=examples,
        arrays_sha256="0" * 64 if arrays else None,
        quality_machine=json.loads((args.out / "machine.quality.0.json").read_text()),
        latency_machine=json.loads(latency_machine.read_text()) if latency_machine.exists() else None,
    )
    ev.save_evidence(args.output, document, arrays)
    print(f"{args.output}: {len(policies)} policies, {table.count} pictures, {len(document.comparisons)} comparisons")


class Table:
    """The records of the quality step, by policy and prompt class, each in one order of pictures."""

    def __init__(self, records: Sequence[dict[str, Any]], classes: Sequence[str]):
        by_policy: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        for one in records:
            by_policy.setdefault(one["policy"], {})[str(one["prompt"]), one["seed"]] = one
        if "dense" not in by_policy:
            raise InputError("evidence: no picture of the dense model is there; run the quality step")
        # Only pictures that every policy has made, so that all are compared on the same ones.
        common = sorted(set.intersection(*(set(pictures) for pictures in by_policy.values())))
        self.count = len(common)
        self.policies = {name: [pictures[key] for key in common] for name, pictures in by_policy.items()}
        self.groups = [*classes, ev.ALL]

    def of(self, policy: str, group: str) -> list[dict[str, Any]]:
        return [one for one in self.policies[policy] if group in (ev.ALL, one["prompt_class"])]

    def column(self, policy: str, group: str, name: str) -> np.ndarray:
        return np.array([one[name] for one in self.of(policy, group)], dtype=np.float64)


def psnr_db(errors: np.ndarray) -> float:
    return float(-10 * np.log10(max(errors.mean(), 1e-10)))


def policy_of(entry: Entry, demo: Demo, table: Table, times: Sequence[dict[str, Any]]) -> ev.Policy:
    groups = {}
    for group in table.groups:
        records = table.of(entry.name, group)
        if not records:
            continue
        names = ["ssim", "perceptual", "accuracy", "tokens", *(["bits"] if demo.bitwise else [])]
        metrics = {name: bootstrap(table.column(entry.name, group, name)) for name in names}
        metrics["psnr_db"] = bootstrap(table.column(entry.name, group, "mse"), psnr_db)
        if group == ev.ALL:  # one class has fewer pictures than there are features
            metrics["frechet"] = frechet_of(table, entry.name)
        own = [one for one in times if one["policy"] == entry.name and group in (ev.ALL, one["prompt_class"])]
        groups[group] = ev.Group(
            images=len(records),
            metrics=metrics,
            flops=float(np.mean([one["conditioning"] + sum(one["flops"].values()) for one in records])),
            transformer={"torch": latency_of(own, transformer_ms)} if own else {},
            total={"torch": latency_of(own, lambda one: float(one["total_ms"]))} if own else {},
            scales=scale_costs(records, own) if group != ev.ALL else (),
        )
    return ev.Policy(
        name=entry.name,
        title=entry.title,
        family=entry.family,
        series=entry.series,
        description=entry.description,
        source=entry.source,
        mapping=entry.mapping,
        settings=dict(entry.settings),
        groups=groups,
    )


def frechet_of(table: Table, policy: str) -> ev.Interval:
    both = np.concatenate([table.column(name, ev.ALL, "features") for name in (policy, "dense")], axis=1)
    half = both.shape[1] // 2

    def distance(rows: np.ndarray) -> float:
        first, second = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :half], rows[:, half:]))
        return max(0.0, frechet_distance(first, second))

    return bootstrap(both, distance, draws=100)


def with_bundle(policy: ev.Policy, timed: dict[str, Any]) -> ev.Policy:
    """The policy with the times of its bundle; those of all classes are means, as each class is asked for alike."""

    def latency(values: Sequence[dict[str, float]]) -> ev.Latency:
        median, p20, p80 = (float(np.mean([one[key] for one in values])) for key in ("median", "q20", "q80"))
        return ev.Latency(median_ms=median, p20_ms=p20, p80_ms=p80, repeats=timed["repeat"])

    groups = {}
    for group, figures in policy.groups.items():
        own = [one for name, one in timed["classes"].items() if group in (ev.ALL, name)]
        times = {key: latency([one[f"{key}_ms"] for one in own]) for key in ("transformer", "total")}
        groups[group] = figures.model_copy(
            update={key: {**getattr(figures, key), "onnxruntime": times[key]} for key in times}
        )
    return policy.model_copy(update={"groups": groups})


def transformer_ms(record: dict[str, Any]) -> float:
    return float(sum(record["scales_ms"].values()))


def latency_of(records: Sequence[dict[str, Any]], value_ms: Callable[[dict[str, Any]], float]) -> ev.Latency:
    """Quantiles of each prompt class, and the mean of these over the classes: each is asked for alike."""
    by_class: dict[str, list[float]] = {}
    for one in records:
        by_class.setdefault(one["prompt_class"], []).append(value_ms(one))
    quantiles = np.mean([np.quantile(values, (0.2, 0.5, 0.8)) for values in by_class.values()], axis=0)
    p20, median, p80 = (float(value) for value in quantiles)
    return ev.Latency(median_ms=median, p20_ms=p20, p80_ms=p80, repeats=len(records))


def scale_costs(records: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> tuple[ev.ScaleCost, ...]:
    scales = sorted({int(s) for one in records for s in one["flops"]})
    found = []
    for s in scales:
        ran = [one for one in records if str(s) in one["flops"]]
        ms = [one["scales_ms"][str(s)] for one in times if str(s) in one["scales_ms"]]
        found.append(
            ev.ScaleCost(
                scale=s,
                kept=float(np.mean([one["kept"][str(s)] for one in ran])),
                # A picture that left the scale out spent nothing on it.
                flops=float(sum(one["flops"][str(s)] for one in ran) / len(records)),
                latency_ms=float(np.median(ms)) * len(ms) / len(times) if ms else None,
            )
        )
    return tuple(found)


Verdict = Literal["better", "equal", "worse"]

COMPARED = ("ssim", "perceptual", "accuracy")


def compared(policies: Sequence[ev.Policy], table: Table, classes: Sequence[str]) -> Iterator[ev.Comparison]:
    """Each rival, and each row of dropped scales, with the most faithful of ours that takes no longer."""
    ours = [policy for policy in policies if policy.family in ("ours",)]
    for rival in policies:
        if rival.family not in ("rival", "drop"):
            continue
        for group in (*classes, ev.ALL):
            timed = all("torch" in policy.groups[group].transformer for policy in [rival, *ours])
            kind: Literal["latency", "flops"] = "latency" if timed else "flops"

            def cost(policy: ev.Policy, group: str = group, timed: bool = timed) -> float:
                one = policy.groups[group]
                return one.transformer["torch"].median_ms if timed else one.flops

            # Two timings of one program differ by a per cent or two.
            fast_enough = [policy for policy in ours if cost(policy) <= cost(rival) * (1.02 if timed else 1.001)]
            for metric in COMPARED:
                lower = ev.METRICS[metric].better == "lower"
                if not fast_enough:
                    yield ev.Comparison(
                        rival=rival.name, prompt_class=group, metric=metric, by=kind, ours=None, difference=None,
                        verdict="none", reason="None of our settings is as fast.",
                    )  # fmt: skip
                    continue
                sign = -1.0 if lower else 1.0
                best = max(fast_enough, key=lambda one: sign * one.groups[group].metrics[metric].mean)
                values = [table.column(name, group, metric) for name in (best.name, rival.name)]
                difference = bootstrap(sign * (values[0] - values[1]))
                verdict: Verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "equal"
                yield ev.Comparison(
                    rival=rival.name, prompt_class=group, metric=metric, by=kind, ours=best.name,
                    difference=difference, verdict=verdict, reason=reason_of(verdict, rival, best, group, metric),
                )  # fmt: skip


def reason_of(verdict: Verdict, rival: ev.Policy, ours: ev.Policy, group: str, metric: str) -> str:
    """A sentence made from the figures, where ours is not better."""
    if verdict == "better":
        return ""
    own, other = (policy.groups[group].metrics[metric].mean for policy in (ours, rival))
    unit = f"{ev.METRICS[metric].title} {own:.3f} and {other:.3f}"
    if verdict == "equal":
        return f"The interval of the difference holds 0: {unit}."
    return f"{unit}: at this speed {rival.title} keeps more."


def tau_fit(points: Sequence[Sequence[float]]) -> ev.TauFit:
    """A straight line of SSIM over rho through pictures at scales of 6 x 6 and more, and where it has 0.8."""
    rows = np.array([(rho, similar) for _, rho, similar in points if rho > 0])

    def crossing(some: np.ndarray) -> float:
        if some[:, 0].std() < 1e-9:
            return float("nan")
        slope, offset = np.polyfit(some[:, 0], some[:, 1], 1)
        return float((0.8 - offset) / slope) if abs(slope) > 1e-9 else float("nan")

    generator = np.random.Generator(np.random.PCG64(0))
    drawn = [crossing(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(500)]
    center = crossing(rows)
    correlation = float(np.corrcoef(rows.T)[0, 1]) if rows.std(0).min() > 0 else 0.0
    tau = None
    if np.isfinite([center, *drawn]).all():
        low, high = np.quantile(drawn, (0.025, 0.975))
        if 0 <= low <= center <= high <= 1:  # else the points do not say
            tau = ev.Interval(mean=center, low=float(low), high=float(high))
    shown = rows[np.linspace(0, len(rows) - 1, min(len(rows), 240)).astype(int)]
    return ev.TauFit(
        points=tuple((round(float(r), 4), round(float(s), 4)) for r, s in shown), tau=tau, correlation=correlation
    )


def errors_of(found: Sequence[dict[str, Any]], names: set[str]) -> Iterator[ev.Error]:
    """Means over the pictures of each class, and of all."""
    keys = {(one["policy"], one["mode"]) for one in found if one["policy"] in names}
    for policy, mode in sorted(keys):
        own = [one for one in found if (one["policy"], one["mode"]) == (policy, mode)]
        for group in [*dict.fromkeys(one["prompt_class"] for one in own), ev.ALL]:
            members = [one for one in own if group in (ev.ALL, one["prompt_class"])]
            scales = sorted(
                {s for one in members for s in one["scales"]}
            )  # a mean over the pictures that ran the scale

            table = {}
            for name in ("token_error", "code_error"):
                rows = [
                    [v for one in members if s in one["scales"] for v in one[name][one["scales"].index(s)]]
                    for s in scales
                ]
                table[name] = tuple(float(np.mean(row)) for row in rows)
            yield ev.Error(policy=policy, prompt_class=group, mode=mode, scales=tuple(scales), **table)


def normalisations_of(found: dict[str, Any], table: Table) -> Iterator[ev.Normalisation]:
    if not found:
        return
    policies = {"entropy": f"ours-{APART}", "temperature": f"{APART}-temperature", "log-keys": f"{APART}-log-keys"}
    for name, title in _NORMALISATIONS.items():
        rho = {group: tuple(np.mean(one[name]["rho"], axis=0).tolist()) for group, one in found.items()}
        correlations = [value for one in found.values() for value in one[name]["correlation"]]
        policy = policies[name]
        metrics = {}
        if policy in table.policies:
            metrics = {key: bootstrap(table.column(policy, ev.ALL, key)) for key in ("ssim", "perceptual", "accuracy")}
        yield ev.Normalisation(
            name=name,
            title=title,
            rho=rho,
            rank_correlation=float(np.clip(np.mean(correlations), -1, 1)),
            metrics=metrics,
        )


# ---------------------------------------------------------------------------------------------------------------------


def load_demo(args: argparse.Namespace) -> Demo:
    """The model, in fp32 throughout: pictures of a GPU shall be those of a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {"class": class_demo, "text": text_demo}[args.demo](args.weights, torch.device(args.device))


def part_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {
        "search": search,
        "mixes": mixes,
        "quality": quality,
        "method": method,
        "latency": latency,
        "bundles": bundles,
        "build": build,
    }
    parser.add_argument("step", choices=steps)
    parser.add_argument("--demo", choices=("class", "text"), required=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of both demos' files and judges")
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("-o", "--output", type=Path, help="the document; build only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=216, help="over all prompt classes")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt to search with")
    parser.add_argument("--repeat", type=int, default=3, help="of latency")
    parser.add_argument("--threads", type=int, default=2, help="of latency")
    parser.add_argument("--part", type=part_of, default=(0, 1), metavar="I/N")
    parser.add_argument("--workers", type=int, default=1, help="processes of search")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps[args.step](load_demo(args), args)


if __name__ == "__main__":
    main()
