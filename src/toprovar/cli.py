"""The command line: one function per verb, thin over the library.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once. A user's mistake is one line on
stderr and exit status 2; anything else that goes wrong is a defect of toprovar and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, cast

import typer

from toprovar import __version__
from toprovar.errors import InputError, ToprovarError

if TYPE_CHECKING:
    from toprovar.exporter.source import Source
    from toprovar.profiles.calibration import Calibration
    from toprovar.profiles.plan import Plan
    from toprovar.runtime.session import Session
    from toprovar.runtime.text import TextFeatures

__all__ = ["export_main", "main"]

WRONG_RESULT = 1
USER_ERROR = 2
INTERRUPTED = 130

_OPTIONS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
app = typer.Typer(
    name="toprovar",
    help="Compile visual autoregressive image models: prune by attention entropy, export, run, measure.",
    no_args_is_help=True,
    **_OPTIONS,
)
export_app = typer.Typer(**_OPTIONS)

F = TypeVar("F", bound=Callable[..., None])


def main() -> None:
    """Entry point ``toprovar``."""
    _run(app)


def export_main() -> None:
    """Entry point ``toprovar-export``: the same as ``toprovar export``."""
    _run(export_app)


_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, of whichever copy of click Typer uses


def _run(program: typer.Typer) -> None:
    """Typer's own mistakes of a user, an unknown option and the like, are one line here too."""
    try:
        sys.exit(program(standalone_mode=False))
    except _UsageError as error:
        if len(sys.argv) == 1:  # the error is the help
            error.show()
        else:
            message = error.format_message().rstrip(".")
            typer.echo(f"error: {message[0].lower()}{message[1:]}; see {error.ctx.command_path} --help", err=True)
        sys.exit(USER_ERROR)


# What a user can mend, of what the operating system refuses; everything else keeps its traceback.
_MENDABLE = {
    errno.ENOSPC: "free some space and try again",
    getattr(errno, "EDQUOT", errno.ENOSPC): "free some space and try again",  # Windows has none
    errno.EFBIG: "choose a place that takes large files",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
}


def _verb(function: F) -> F:
    """A command whose user's mistakes end in one line and exit status 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except ToprovarError as error:
            _fail(str(error), error)
        except OSError as error:
            if error.errno not in _MENDABLE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"{place}{(error.strerror or str(error)).lower()}; {_MENDABLE[error.errno]}", error)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run  # type: ignore[return-value]


def _fail(message: str, error: BaseException) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(USER_ERROR) from error


# Options that several verbs share. Optional[...] and not "| None": Typer evaluates them, on Python 3.10 too.
BundleArgument = Annotated[Path, typer.Argument(help="The folder that export wrote.", metavar="BUNDLE")]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="What runs it: onnxruntime, torch, tensorrt.")]
ProviderOption = Annotated[
    str, typer.Option(help="Of onnxruntime and torch: auto, cpu, cuda. With torch, auto is cpu.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads per operator. Default: all cores.")]
BatchOption = Annotated[int, typer.Option("--batch-size", "-b", help="Most pictures at once.")]
PromptOption = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Of a text model; repeat.")]
PromptFileOption = Annotated[Path | None, typer.Option("--prompts", help="Text file, a prompt a line.")]
FeaturesOption = Annotated[
    Path | None, typer.Option(help="Encoded prompts in their place: .safetensors or .npz, text_features and text_lens.")
]
ClassOption = Annotated[
    str | None, typer.Option("--class", help="Prompt class of the texts. Default: found from each text.")
]
LabelOption = Annotated[list[str] | None, typer.Option("--label", "-l", help="Name or number; repeat. Default: all.")]
SeedOption = Annotated[int, typer.Option(help="Of the first picture of a label or prompt; the next ones count up.")]
CountOption = Annotated[int, typer.Option("--count", "-n", help="Pictures per label or prompt.")]
BackboneOption = Annotated[
    str, typer.Option(help="Of the checkpoint: var, infinity; infinity-2b, infinity-8b, infinity-125m say its size.")
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Of the transformer. Default: the embedded demo of the backbone.")
]
VaeOption = Annotated[Path | None, typer.Option(help="Checkpoint of the tokenizer that belongs to it.")]
TorchCheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="What target torch runs: the transformer. Default: the embedded demo."),
]
TorchVaeOption = Annotated[Path | None, typer.Option("--vae", help="And its tokenizer.")]
TextEncoderOption = Annotated[
    str | None, typer.Option(help="T5 encoder of a text model: a folder, or a name, google/flan-t5-xl.")
]
AspectOption = Annotated[str | None, typer.Option(help="Of Infinity: height / width; the nearest schedule is used.")]
ResolutionOption = Annotated[str | None, typer.Option(help="Of Infinity: 0.06M, 0.25M, 0.60M, 1M pixels. Default: 1M.")]
TextTokensOption = Annotated[int | None, typer.Option(help="Longest prompt in tokens. Default: as trained.")]
DeviceOption = Annotated[str, typer.Option(help="What measures: auto, cpu, cuda.")]
LabelsOption = Annotated[
    Path | None, typer.Option(help="Text file, a line per label in order: its name and its prompt class.")
]
CfgOption = Annotated[float | None, typer.Option("--cfg", help="Strength of classifier-free guidance.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Logits that can be drawn; 0: all; 1: greedy.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Probability that can be drawn; 0: all.")]
TemperatureOption = Annotated[float | None, typer.Option(help="What logits are divided by.")]
PerClassOption = Annotated[
    int | None, typer.Option(help="Labels or prompts of each class to calibrate with. Default: 4 labels, all prompts.")
]
SeedsOption = Annotated[int, typer.Option("--seeds", help="Pictures per label or prompt to calibrate with.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


# ---------------------------------------------------------------------------------------------------------------------
# Making bundles


@export_app.command(name="toprovar-export")
@app.command(name="export")
@_verb
def export(
    profile: Annotated[str, typer.Option(help="quality, balanced, fast, extreme, dense, or a TOML file.")] = "balanced",
    backbone: BackboneOption = "var",
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
    labels: LabelsOption = None,
    text_encoder: TextEncoderOption = None,
    features: FeaturesOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Of this checkpoint (.json), or prompts to calibrate with (text). Default: calibrate now."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan in place of a profile.")] = None,
    drop_scales: Annotated[int | None, typer.Option(help="Leave out this many last scales.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="onnxruntime, tensorrt, tensorrt-rtx; repeat. Default: onnxruntime."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16.")] = "auto",
    aspect: AspectOption = None,
    resolution: ResolutionOption = None,
    text_tokens: TextTokensOption = None,
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    temperature: TemperatureOption = None,
    per_class: PerClassOption = None,
    seeds: SeedsOption = 2,
    seed: Annotated[int, typer.Option(help="Of the golden trace.")] = 0,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME-PROFILE.bundle.")] = None,
    force: ForceOption = False,
) -> None:
    """Compile a checkpoint into a bundle. Calibrates, plans, prunes, exports, builds engines and packages."""
    _check(seed=seed)
    if output is not None:
        _has_folder(output)
    source = _source(backbone, checkpoint, vae, labels, text_encoder, features, aspect, resolution, text_tokens)
    from toprovar.exporter import build
    from toprovar.exporter.source import SamplingWish

    with _stages() as stage:
        written = build.export(
            source,
            profile=profile,
            calibration=calibration,
            plan=plan,
            drop_scales=drop_scales,
            targets=tuple(target or ("onnxruntime",)),
            precision=precision,
            sampling=SamplingWish(cfg, top_k, top_p, temperature),
            per_class=per_class,
            seeds=range(seeds),
            golden_seed=seed,
            device=device,
            output=output,
            force=force,
            on_stage=stage,
        )
    typer.echo(str(written))


@app.command()
@_verb
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration, JSON.")],
    backbone: BackboneOption = "var",
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
    labels: LabelsOption = None,
    text_encoder: TextEncoderOption = None,
    features: FeaturesOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line, behind a tab its class if it has one.")
    ] = None,
    aspect: AspectOption = None,
    resolution: ResolutionOption = None,
    text_tokens: TextTokensOption = None,
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    temperature: TemperatureOption = None,
    per_class: PerClassOption = None,
    seeds: SeedsOption = 2,
    batch_size: BatchOption = 4,
    device: DeviceOption = "auto",
    force: ForceOption = False,
) -> None:
    """Measure a checkpoint's attention entropy. The result is by layer, scale and prompt class."""
    _free(output, force)
    source = _source(backbone, checkpoint, vae, labels, text_encoder, features, aspect, resolution, text_tokens)
    from toprovar.exporter import build
    from toprovar.exporter.source import SamplingWish

    with _stages() as stage:
        build.calibrate_source(
            source,
            prompts=prompts,
            sampling=SamplingWish(cfg, top_k, top_p, temperature),
            per_class=per_class,
            seeds=range(seeds),
            batch_size=batch_size,
            device=device,
            output=output,
            on_stage=stage,
        )
    typer.echo(str(output))


@app.command()
@_verb
def plan(
    calibration: Annotated[Path, typer.Argument(help="A calibration, JSON.", metavar="CALIBRATION")],
    profile: Annotated[str, typer.Option(help="quality, balanced, fast, extreme, dense, or a TOML file.")] = "balanced",
    drop_scales: Annotated[int | None, typer.Option(help="Leave out this many last scales.")] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            help="Search for the fastest plan above it, in place of a profile: ssim=0.9, psnr_db=30, accuracy=0.97; repeat.",
        ),
    ] = None,
    backbone: BackboneOption = "var",
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
    labels: LabelsOption = None,
    text_encoder: TextEncoderOption = None,
    features: FeaturesOption = None,
    prompts: PromptFileOption = None,
    device: DeviceOption = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Show D, roles, K and FLOPs as tables.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan, JSON.")] = None,
    force: ForceOption = False,
) -> None:
    """Decide what to prune of a calibrated checkpoint. By a profile, or, with --floor, what costs least above a floor.

    Only a search needs the checkpoint: it makes pictures and compares them with the dense ones.
    """
    if output is not None:
        _free(output, force)
    from toprovar.exporter.plan import explain as explained
    from toprovar.exporter.plan import make_plan
    from toprovar.exporter.source import named_profile
    from toprovar.profiles.calibration import load_calibration
    from toprovar.profiles.files import pretty_json
    from toprovar.profiles.plan import save_plan

    measured = load_calibration(calibration)
    if floor:
        source = _source(backbone, checkpoint, vae, labels, text_encoder, features, None, None, None)
        decided = _search(measured, floor, source, None if checkpoint else backbone, prompts, device)
    else:
        from toprovar.demo.embedded import found_profiles

        own = found_profiles(measured.checkpoint_sha256, measured.classes)  # as export takes them
        decided = make_plan(named_profile(profile, drop_scales, own=own), measured)
    if explain:
        _console().print(explained(decided, measured))
    if output is not None:
        save_plan(output, decided)
        typer.echo(str(output))
    elif not explain:
        typer.echo(pretty_json(decided), nl=False)


# ---------------------------------------------------------------------------------------------------------------------
# Using bundles


@app.command()
@_verb
def run(
    bundle: BundleArgument,
    label: LabelOption = None,
    prompt: PromptOption = None,
    prompts: PromptFileOption = None,
    features: FeaturesOption = None,
    prompt_class: ClassOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="A PNG file; several pictures make a grid.")] = Path(
        "out.png"
    ),
    separate: Annotated[bool, typer.Option("--separate", help="Numbered files in place of a grid.")] = False,
    target: TargetOption = "onnxruntime",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 1,
    checkpoint: TorchCheckpointOption = None,
    vae: TorchVaeOption = None,
) -> None:
    """Make pictures."""
    _ends_in(output, ".png", "pictures are written as PNG")
    from toprovar.runtime import pictures

    session = _session(bundle, target, provider, threads, batch_size, checkpoint, vae)
    asked = _asked(session, seed, count, label, prompt, prompts, features, prompt_class)
    with _progress("pictures") as progress:
        result = session.generate(asked.labels, asked.seeds, text=asked.text, on_scale=progress)
    made = len(asked.seeds)
    if made == 1 or not separate:
        rows = [list(result.images[start : start + count]) for start in range(0, made, count)]
        single = pictures.to_bytes(result.images[0])
        captions = asked.captions[::count] if made > count else ()
        pictures.save(output, single if made == 1 else pictures.grid(rows, captions))
        written = [output]
    else:
        written = [output.with_stem(f"{output.stem}-{i:04d}") for i in range(made)]
        for path, image in zip(written, result.images, strict=True):
            pictures.save(path, pictures.to_bytes(image))
    total_ms = sum(timing.total_ms for timing in result.timings)
    typer.echo(f"{', '.join(map(str, written))}: {made} picture{'s' * (made > 1)}, {total_ms / made:.0f} ms each")


@app.command()
@_verb
def sample(
    bundle: BundleArgument,
    benchmark: Annotated[str, typer.Option("--for", help="geneval, dpg, hpsv2, imagereward.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="The benchmark's own prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for its scoring script.")],
    seed: SeedOption = 0,
    target: TargetOption = "onnxruntime",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 1,
    checkpoint: TorchCheckpointOption = None,
    vae: TorchVaeOption = None,
) -> None:
    """Make the pictures that a public benchmark scores. They are in the folders that it reads; goes on where it stopped."""
    _is_folder(output)
    from toprovar.runtime import benchmarks

    kind = cast("benchmarks.Kind", benchmark)
    items = benchmarks.read_items(kind, prompts)
    session = _session(bundle, target, provider, threads, batch_size, checkpoint, vae)
    if not session.takes_text:
        raise InputError(
            f"{bundle}: takes labels; what {benchmark} scores is made from prompts, give a bundle of a text model"
        )

    def generate(prompt: str, seeds: Sequence[int]) -> Any:
        return session.generate(seeds=seeds, text=session.encode([prompt]).repeated(len(seeds))).images

    with _progress(benchmark) as progress:
        written = benchmarks.write_pictures(kind, items, output, generate, seed=seed, on_item=progress)
    typer.echo(f"{output}: {len(written)} pictures of {len(items)} prompts")


@app.command()
@_verb
def inspect(bundle: BundleArgument) -> None:
    """Show what a bundle holds, and check it. Graphs, schedules, sizes, where it comes from, the hash of every file."""
    from toprovar.runtime.bundle import open_bundle
    from toprovar.runtime.inspect import describe

    _console().print(describe(open_bundle(bundle)))


@app.command()
@_verb
def verify(
    bundle: BundleArgument,
    target: TargetOption = "onnxruntime",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference of a pixel in [0, 1]. Default: 0.001; in half precision 2/255."),
    ] = None,
    checkpoint: TorchCheckpointOption = None,
    vae: TorchVaeOption = None,
) -> None:
    """Replay the golden trace of a bundle: equal tokens (but for close calls), equal pictures; exit status 1 if not."""
    from toprovar.runtime import verify as verification

    if tolerance is not None and not 0 <= tolerance <= 1:
        raise InputError(f"tolerance is {tolerance}; give the largest difference of a pixel, 0 to 1")
    session = _session(bundle, target, provider, threads, 1, checkpoint, vae)
    with _progress("golden trace") as progress:
        verdict = verification.verify(session, tolerance, progress)
    for one in verdict.classes:
        typer.echo(str(one))
    if not verdict.passed:
        raise typer.Exit(WRONG_RESULT)


@app.command()
@_verb
def compare(
    bundle: BundleArgument,
    other: Annotated[Path | None, typer.Argument(help="What it is compared with. Default: itself.")] = None,
    target: TargetOption = "onnxruntime",
    other_target: Annotated[str, typer.Option(help="What runs the other one.")] = "onnxruntime",
    label: LabelOption = None,
    prompt: PromptOption = None,
    prompts: PromptFileOption = None,
    features: FeaturesOption = None,
    prompt_class: ClassOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 1,
    checkpoint: TorchCheckpointOption = None,
    vae: TorchVaeOption = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge", help="Of the demos: perceptual and Frechet distance, accuracy, by networks of the demo."
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON; Markdown goes beside it.")] = None,
) -> None:
    """Compare two bundles, or two targets. On the same prompts and noise: equal tokens, PSNR, SSIM."""
    _ends_in(output, ".json", "measurements are written as JSON")
    from toprovar.runtime import compare as comparison

    if other is None and other_target == target:
        raise InputError("compare: a bundle with itself on the same target; give another bundle or --other-target")

    def session(place: Path, on: str) -> Session:
        leave_out = on != "torch" and "torch" in (target, other_target)  # they are for the other one
        files = (None, None) if leave_out else (checkpoint, vae)
        return _session(place, on, provider, threads, batch_size, *files)

    first, second = session(other or bundle, other_target), session(bundle, target)
    asked = _asked(first, seed, count, label, prompt, prompts, features, prompt_class)
    judges = None
    if judge:
        from toprovar.demo.judges import DemoJudges

        judges = DemoJudges(first.takes_text)
    with _progress("pictures") as progress:
        document = comparison.compare(
            first, second, asked.labels, asked.seeds, progress, text=asked.text, captions=asked.captions, judges=judges
        )
    _publish(document, comparison.markdown(document), output)


@app.command()
@_verb
def bench(
    bundle: BundleArgument,
    against: Annotated[list[Path] | None, typer.Option(help="Another bundle, measured in turn; repeat.")] = None,
    prompt_class: Annotated[list[str] | None, typer.Option("--class", help="Prompt class. Default: all.")] = None,
    repeat: Annotated[int, typer.Option(help="Measured runs per prompt class.")] = 10,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 2,
    target: TargetOption = "onnxruntime",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 1,
    trtexec: Annotated[bool, typer.Option("--trtexec", help="Run the engines in trtexec, too (tensorrt).")] = False,
    checkpoint: TorchCheckpointOption = None,
    vae: TorchVaeOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON; Markdown goes beside it.")] = None,
) -> None:
    """Measure latency scale by scale. A bundle that fails its golden trace is not measured."""
    _ends_in(output, ".json", "measurements are written as JSON")
    from toprovar.runtime import bench as benchmark
    from toprovar.runtime import trtexec as other_program

    program = other_program.find_trtexec() if trtexec else None  # before any work

    paths = [bundle, *(against or [])]
    sessions = [_session(path, target, provider, threads, batch_size, checkpoint, vae) for path in paths]
    with _progress("runs") as progress:
        document = benchmark.bench(
            sessions, prompt_classes=prompt_class or (), repeat=repeat, warmup=warmup, on_run=progress
        )
    if program is not None:
        with _progress("trtexec") as progress:
            document["trtexec"] = other_program.measure(
                sessions[0], program, prompt_classes=prompt_class or (), on_run=progress
            )
    _publish(document, benchmark.markdown(document), output)


@app.command()
@_verb
def report(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Bundles, measured now, the first is what others are compared with; or evidence, .json."),
    ],
    label: LabelOption = None,
    prompt: PromptOption = None,
    prompts: PromptFileOption = None,
    features: FeaturesOption = None,
    prompt_class: ClassOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    repeat: Annotated[int, typer.Option(help="Measured runs per prompt class.")] = 5,
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML; Markdown and pictures go beside it.")] = Path(
        "report.html"
    ),
) -> None:
    """Show what a faster picture costs, on one page. Of bundles, measured now, and of stored measurements."""
    _ends_in(output, ".html", "a report is written as HTML")
    from toprovar.runtime import report as reporting

    bundles = [path for path in sources if path.suffix != ".json"]
    parts = [reporting.load(path) for path in sources if path.suffix == ".json"]
    if bundles:
        sessions = [_session(path, "onnxruntime", provider, threads, 1, None, None) for path in bundles]
        asked = _asked(sessions[0], seed, count, label, prompt, prompts, features, prompt_class)
        with _progress("report") as progress:
            measured = reporting.make(
                sessions,
                asked.labels,
                asked.seeds,
                text=asked.text,
                captions=asked.captions,
                repeat=repeat,
                on_progress=lambda _, done, of: progress(done, of),
            )
        parts.insert(0, measured)
    for path in reporting.write(parts, output):
        typer.echo(str(path))


@app.command()
@_verb
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for bundles, pictures and report.")] = Path(
        "demo_output"
    ),
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Take both embedded checkpoints through all of it. Dense, dropped scales, every profile, and a report of them."""
    _check(seed=seed, threads=threads)
    _is_folder(output)
    from toprovar.demo import tour

    with _stages() as stage:
        for path in tour.run(output, threads=threads, seed=seed, on_stage=stage):
            typer.echo(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# What verbs share


def _source(
    backbone: str,
    checkpoint: Path | None,
    vae: Path | None,
    labels: Path | None,
    text_encoder: str | None,
    features: Path | None,
    aspect: str | None,
    resolution: str | None,
    text_tokens: int | None,
) -> Source:
    """The checkpoint that the options name; without any, the embedded demo of the backbone."""
    if checkpoint is None and vae is None and backbone in ("var", "infinity"):
        from toprovar.demo.embedded import embedded_source, embedded_text_source

        if labels or text_encoder or features or aspect or resolution or text_tokens:
            raise InputError(
                "the embedded demo has labels, text encoder and schedule of its own; give --checkpoint and --vae as well"
            )
        return embedded_source() if backbone == "var" else embedded_text_source()
    from toprovar.exporter.source import user_source

    return user_source(
        backbone,
        checkpoint,
        vae,
        labels,
        text_encoder=text_encoder,
        features=features,
        aspect=aspect,
        resolution=resolution,
        text_tokens=text_tokens,
    )


def _search(
    calibration: Calibration, floor: list[str], source: Source, demo: str | None, prompts: Path | None, device: str
) -> Plan:
    """The fastest plan above a floor; what it costs and keeps goes to stderr. `demo`: backbone of an embedded model."""
    from rich.console import Console

    from toprovar.exporter.guard import parse_floor, plan_above, summary

    wish = parse_floor(floor)
    judge = None
    if demo is not None:
        from toprovar.demo.accuracy import judge_of

        judge = judge_of(demo)
    with _stages() as stage:
        decided, found = plan_above(
            source, calibration, wish, prompts=prompts, device=device, judge=judge, on_stage=stage
        )
    Console(stderr=True).print(summary(found))
    return decided


def _session(
    bundle: Path,
    target: str,
    provider: str,
    threads: int | None,
    batch_size: int,
    checkpoint: Path | None,
    vae: Path | None,
) -> Session:
    _check(threads=threads)
    if provider not in _PROVIDERS:
        raise InputError(f"provider is {provider!r}; valid: {', '.join(_PROVIDERS)}")
    if target != "torch" and (checkpoint or vae):
        raise InputError(
            f"--checkpoint, --vae: target {target} runs the bundle's own graphs; they are for target torch"
        )
    from toprovar.runtime.session import Session

    options: dict[str, Any] = {}
    if target == "onnxruntime":
        options = {"provider": provider, "threads": threads}
    elif target == "torch":
        if checkpoint is None and vae is None:
            from toprovar.demo.embedded import embedded_source, embedded_text_source
            from toprovar.runtime.bundle import open_bundle

            var = open_bundle(bundle, verify=False).manifest.backbone == "var"
            source = embedded_source() if var else embedded_text_source()
            checkpoint, vae = source.checkpoint, source.vae
        device = "cuda" if provider == "cuda" else "cpu"
        options = {"checkpoint": checkpoint, "vae": vae, "device": device, "threads": threads}
    return Session(bundle, target, batch_size=batch_size, **options)


class _Asked(NamedTuple):
    """What pictures are made of: for each its caption, its seed, and its label or its text."""

    captions: list[str]
    seeds: list[int]
    labels: list[int] | None
    text: TextFeatures | None


def _asked(
    session: Session,
    seed: int,
    count: int,
    label: list[str] | None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    features: Path | None = None,
    prompt_class: str | None = None,
) -> _Asked:
    """`count` pictures of every label or text asked for, those of one together; where none is named, of what there is."""
    if count < 1:
        raise InputError(f"count is {count}; give 1 or more pictures per label or prompt")
    if not session.takes_text:
        if prompt or prompts or features or prompt_class:
            raise InputError(f"{session.bundle.root}: takes labels, not text; see --label")
        numbers = (
            [session.label(one) for one in label] if label else list(range(min(len(session.labels), _MOST_LABELS)))
        )
        labels = [number for number in numbers for _ in range(count)]
        seeds = [seed + i for _ in numbers for i in range(count)]
        return _Asked([session.labels[number] for number in labels], seeds, labels, None)
    if label:
        session.label(label[0])  # says that there are none
    from toprovar.profiles.prompts import read_features, read_prompts

    texts = [*(prompt or []), *(one.text for one in (read_prompts(prompts) if prompts else []))]
    if features is not None:
        found = session.text(*read_features(features), prompt_class)
        texts = texts or [f"text {i}" for i in range(1, len(found.lengths) + 1)]
        if len(texts) != len(found.lengths):
            raise InputError(
                f"{features}: holds {len(found.lengths)} texts for {len(texts)} prompts; give a row for each"
            )
    elif texts:
        found = session.encode(texts, prompt_class)
    else:
        named, found = session.examples()
        texts = list(named)
    captions = [text for text in texts for _ in range(count)]
    return _Asked(captions, [seed + i for _ in texts for i in range(count)], None, found.repeated(count))


_MOST_LABELS = 12  # of a bundle with a thousand, where none is named


def _publish(document: dict[str, Any], text: str, output: Path | None) -> None:
    """Markdown on stdout; JSON and Markdown in files where one is named."""
    typer.echo(text)
    if output is None:
        return
    from toprovar.profiles.files import pretty_json, write_text

    write_text(output, pretty_json(document))
    write_text(output.with_suffix(".md"), text)


# Before the work, not behind it: what would be wrong with a result's place, or an option that is used late.


def _ends_in(path: Path | None, suffix: str, what: str) -> None:
    if path is None:
        return
    if path.suffix != suffix:
        raise InputError(f"{path}: {what}; give a name that ends in {suffix}")
    _has_folder(path)


def _free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"{path}: is there already; --force replaces it")
    _has_folder(path)


def _has_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: its folder {path.parent} does not exist; make it first")


def _is_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder, it may be new")


def _check(seed: int = 0, threads: int | None = None) -> None:
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed is {seed}; give 0 to 2^64 - 1")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give 1 or more")


_PROVIDERS = ("auto", "cpu", "cuda")


def _console() -> Any:
    from rich.console import Console

    return Console()


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """A line on stderr as each stage begins, with the seconds since the first."""
    from time import monotonic

    start = monotonic()
    yield lambda what: typer.echo(f"[{monotonic() - start:6.1f} s] {what}", err=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"toprovar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
