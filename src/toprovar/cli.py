"""The command line: one function per verb, thin over the library.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once. A user's mistake is one line on
stderr and exit status 2; anything else that goes wrong is a defect of toprovar and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from toprovar import __version__
from toprovar.errors import InputError, ToprovarError

if TYPE_CHECKING:
    from toprovar.exporter.source import Source
    from toprovar.runtime.session import Session

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
    app()


def export_main() -> None:
    """Entry point ``toprovar-export``: the same as ``toprovar export``."""
    export_app()


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
ProviderOption = Annotated[str, typer.Option(help="Of onnxruntime and torch: auto, cpu, cuda.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads per operator. Default: all cores.")]
BatchOption = Annotated[int, typer.Option("--batch-size", "-b", help="Most pictures at once.")]
LabelOption = Annotated[list[str] | None, typer.Option("--label", "-l", help="Name or number; repeat. Default: all.")]
SeedOption = Annotated[int, typer.Option(help="Of the first picture of a label; the next ones count up.")]
CountOption = Annotated[int, typer.Option("--count", "-n", help="Pictures per label.")]
BackboneOption = Annotated[str, typer.Option(help="Model family of the checkpoint: var.")]
CheckpointOption = Annotated[Path | None, typer.Option(help="Of the transformer. Default: the embedded demo.")]
VaeOption = Annotated[Path | None, typer.Option(help="Checkpoint of the tokenizer that belongs to it.")]
LabelsOption = Annotated[
    Path | None, typer.Option(help="Text file, a line per label in order: its name and its prompt class.")
]
CfgOption = Annotated[float | None, typer.Option("--cfg", help="Strength of classifier-free guidance.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Logits that can be drawn; 0: all; 1: greedy.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Probability that can be drawn; 0: all.")]
PromptsOption = Annotated[int, typer.Option("--prompts", help="Labels per prompt class to calibrate with.")]
SeedsOption = Annotated[int, typer.Option("--seeds", help="Pictures per label to calibrate with.")]
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
    calibration: Annotated[Path | None, typer.Option(help="Of this checkpoint. Default: calibrate now.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan in place of a profile.")] = None,
    drop_scales: Annotated[int | None, typer.Option(help="Leave out this many last scales.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="onnxruntime, tensorrt-rtx.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16.")] = "auto",
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    prompts: PromptsOption = 4,
    seeds: SeedsOption = 2,
    seed: Annotated[int, typer.Option(help="Of the golden trace.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME-PROFILE.bundle.")] = None,
    force: ForceOption = False,
) -> None:
    """Compile a checkpoint into a bundle: calibrate, plan, prune, export, build engines, package."""
    from toprovar.exporter import build
    from toprovar.exporter.source import SamplingWish

    with _stages() as stage:
        written = build.export(
            _source(backbone, checkpoint, vae, labels),
            profile=profile,
            calibration=calibration,
            plan=plan,
            drop_scales=drop_scales,
            targets=tuple(target or ("onnxruntime",)),
            precision=precision,
            sampling=SamplingWish(cfg, top_k, top_p),
            prompts_per_class=prompts,
            seeds=range(seeds),
            golden_seed=seed,
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
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    prompts: PromptsOption = 4,
    seeds: SeedsOption = 2,
    batch_size: BatchOption = 4,
    force: ForceOption = False,
) -> None:
    """Measure a checkpoint's attention entropy: per token, layer, scale and prompt class."""
    _free(output, force)
    from toprovar.exporter import build
    from toprovar.exporter.source import SamplingWish

    with _stages() as stage:
        stage("load the checkpoint")
        loaded = build.load(_source(backbone, checkpoint, vae, labels), SamplingWish(cfg, top_k, top_p))
        stage("calibrate")
        build.measure(loaded, prompts_per_class=prompts, seeds=range(seeds), output=output, batch_size=batch_size)
    typer.echo(str(output))


@app.command()
@_verb
def plan(
    calibration: Annotated[Path, typer.Argument(help="A calibration, JSON.", metavar="CALIBRATION")],
    profile: Annotated[str, typer.Option(help="quality, balanced, fast, extreme, or a TOML file.")] = "balanced",
    drop_scales: Annotated[int | None, typer.Option(help="Leave out this many last scales.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show D, roles, K and FLOPs as tables.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan, JSON.")] = None,
    force: ForceOption = False,
) -> None:
    """Decide what a profile prunes of a calibrated checkpoint."""
    if output is not None:
        _free(output, force)
    from toprovar.exporter.plan import explain as explained
    from toprovar.exporter.plan import make_plan
    from toprovar.exporter.source import named_profile
    from toprovar.profiles.calibration import load_calibration
    from toprovar.profiles.files import pretty_json
    from toprovar.profiles.plan import save_plan

    measured = load_calibration(calibration)
    decided = make_plan(named_profile(profile, drop_scales), measured)
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
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
) -> None:
    """Make pictures."""
    _ends_in(output, ".png", "pictures are written as PNG")
    from toprovar.runtime import pictures

    session = _session(bundle, target, provider, threads, batch_size, checkpoint, vae)
    names, labels, seeds = _prompts(session, label, seed, count)
    with _progress("pictures") as progress:
        result = session.generate(labels, seeds, on_scale=progress)
    if len(labels) == 1 or not separate:
        rows = [list(result.images[start : start + count]) for start in range(0, len(labels), count)]
        single = pictures.to_bytes(result.images[0])
        pictures.save(output, single if len(labels) == 1 else pictures.grid(rows, names if len(names) > 1 else ()))
        written = [output]
    else:
        written = [output.with_stem(f"{output.stem}-{i:04d}") for i in range(len(labels))]
        for path, image in zip(written, result.images, strict=True):
            pictures.save(path, pictures.to_bytes(image))
    total_ms = sum(timing.total_ms for timing in result.timings)
    typer.echo(f"{', '.join(map(str, written))}: {len(labels)} pictures, {total_ms / len(labels):.0f} ms each")


@app.command()
@_verb
def inspect(bundle: BundleArgument) -> None:
    """Show what a bundle holds: graphs, schedules, sizes, where it comes from. Checks every file."""
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
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
) -> None:
    """Replay the golden trace: equal tokens, equal pictures. Exit status 1 if not."""
    from toprovar.runtime import verify as verification

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
    seed: SeedOption = 0,
    count: CountOption = 1,
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 1,
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON; Markdown goes beside it.")] = None,
) -> None:
    """Compare two bundles, or two targets, on the same prompts and noise: equal tokens, PSNR, SSIM."""
    _ends_in(output, ".json", "measurements are written as JSON")
    from toprovar.runtime import compare as comparison

    if other is None and other_target == target:
        raise InputError("compare: a bundle with itself on the same target; give another bundle or --other-target")
    first = _session(other or bundle, other_target, provider, threads, batch_size, checkpoint, vae)
    second = _session(bundle, target, provider, threads, batch_size, checkpoint, vae)
    _, labels, seeds = _prompts(first, label, seed, count)
    with _progress("pictures") as progress:
        document = comparison.compare(first, second, labels, seeds, progress)
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
    checkpoint: CheckpointOption = None,
    vae: VaeOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON; Markdown goes beside it.")] = None,
) -> None:
    """Measure latency scale by scale. A bundle that fails its golden trace is not measured."""
    _ends_in(output, ".json", "measurements are written as JSON")
    from toprovar.runtime import bench as benchmark

    paths = [bundle, *(against or [])]
    sessions = [_session(path, target, provider, threads, batch_size, checkpoint, vae) for path in paths]
    with _progress("runs") as progress:
        document = benchmark.bench(
            sessions, prompt_classes=prompt_class or (), repeat=repeat, warmup=warmup, on_run=progress
        )
    _publish(document, benchmark.markdown(document), output)


@app.command()
@_verb
def report(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles; the first is what others are compared with.")],
    label: LabelOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    repeat: Annotated[int, typer.Option(help="Measured runs per prompt class.")] = 5,
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML; Markdown, JSON, PNG go beside it.")] = Path(
        "report.html"
    ),
) -> None:
    """Latency, fidelity and pictures of bundles on one page."""
    _ends_in(output, ".html", "a report is written as HTML")
    from toprovar.runtime import report as reporting

    sessions = [_session(path, "onnxruntime", provider, threads, 1, None, None) for path in bundles]
    _, labels, seeds = _prompts(sessions[0], label, seed, count)
    with _progress("report") as progress:
        made = reporting.make(
            sessions, labels, seeds, repeat=repeat, on_progress=lambda _, done, of: progress(done, of)
        )
    for path in reporting.write(made, output):
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
    """The embedded checkpoint through the whole of toprovar: dense, dropped scales, every profile; report."""
    from toprovar.demo import tour

    with _stages() as stage:
        for path in tour.run(output, threads=threads, seed=seed, on_stage=stage):
            typer.echo(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# What verbs share


def _source(backbone: str, checkpoint: Path | None, vae: Path | None, labels: Path | None) -> Source:
    """The checkpoint that the options name; without any, the embedded demo."""
    if checkpoint is None and vae is None:
        from toprovar.demo.embedded import embedded_source

        if labels is not None or backbone != "var":
            raise InputError("the embedded demo is a var with labels of its own; give --checkpoint and --vae as well")
        return embedded_source()
    from toprovar.exporter.source import user_source

    return user_source(backbone, checkpoint, vae, labels)


def _session(
    bundle: Path,
    target: str,
    provider: str,
    threads: int | None,
    batch_size: int,
    checkpoint: Path | None,
    vae: Path | None,
) -> Session:
    from toprovar.runtime.session import Session

    options: dict[str, Any] = {}
    if target == "onnxruntime":
        options = {"provider": provider, "threads": threads}
    elif target == "torch":
        if checkpoint is None and vae is None:
            from toprovar.demo.embedded import embedded_source

            source = embedded_source()
            checkpoint, vae = source.checkpoint, source.vae
        device = "cuda" if provider == "cuda" else "cpu"
        options = {"checkpoint": checkpoint, "vae": vae, "device": device, "threads": threads}
    return Session(bundle, target, batch_size=batch_size, **options)


def _prompts(
    session: Session, label: list[str] | None, seed: int, count: int
) -> tuple[list[str], list[int], list[int]]:
    """Names of the labels asked for; and, for every picture, label and seed, those of one label together."""
    if count < 1:
        raise InputError(f"count is {count}; give 1 or more pictures per label")
    numbers = [session.label(one) for one in label] if label else list(range(min(len(session.labels), _MOST_LABELS)))
    names = [session.labels[number] for number in numbers]
    return names, [n for n in numbers for _ in range(count)], [seed + i for _ in numbers for i in range(count)]


_MOST_LABELS = 12  # of a bundle with a thousand, where none is named


def _publish(document: dict[str, Any], text: str, output: Path | None) -> None:
    """Markdown on stdout; JSON and Markdown in files where one is named."""
    typer.echo(text)
    if output is None:
        return
    from toprovar.profiles.files import pretty_json, write_text

    write_text(output, pretty_json(document))
    write_text(output.with_suffix(".md"), text)


def _ends_in(path: Path | None, suffix: str, what: str) -> None:
    """Before the work, not behind it."""
    if path is not None and path.suffix != suffix:
        raise InputError(f"{path}: {what}; give a name that ends in {suffix}")


def _free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"{path}: is there already; --force replaces it")


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
