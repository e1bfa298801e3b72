"""From a checkpoint on disk to pictures, through the command line: every runtime agrees, every mistake is one line."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from toprovar.backbones.text import load_text_encoder
from toprovar.cli import app
from toprovar.demo import tour
from toprovar.exporter.source import SamplingWish, Source, TextSource, named_profile, read_labels
from toprovar.profiles.evidence import load_evidence
from toprovar.profiles.prompts import Prompt
from toprovar.runtime.bundle import open_bundle

from .backbones.conftest import make_var
from .text_checkpoint import PROMPTS, RESOLUTION, TextCheckpoint

PROFILE = """schema = "toprovar.profile/1"
name = "half"
[depth]
grid = 4
[roles]
explicit = "gddgd"
[tokens]
alpha_min = 0.5
alpha_max = 0.5
"""

Invoke = Callable[..., Any]


class Checkpoint:
    """A random VAR on disk, with a profile and labels for it."""

    def __init__(self, folder: Path, seed: int = 0):
        folder.mkdir()
        model = make_var(seed=seed)
        self.folder = folder
        self.var, self.vae = folder / "var.safetensors", folder / "vae.safetensors"
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file({key: value for key, value in state.items() if not key.startswith("vae.")}, self.var)
        save_file({key[4:]: value for key, value in state.items() if key.startswith("vae.")}, self.vae)
        self.profile, self.labels = folder / "half.toml", folder / "labels.txt"
        self.profile.write_text(PROFILE)
        self.labels.write_text("".join(f"thing {i} {'fine' if i % 2 else 'coarse'}\n" for i in range(10)))

    @property
    def options(self) -> list[object]:
        return ["--checkpoint", self.var, "--vae", self.vae, "--labels", self.labels]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def one_line(result: Any) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]  # stages
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return str(lines[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("checkpoint") / "a")


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> Path:
    path = checkpoint.folder / "calibration.json"
    result = run("calibrate", *checkpoint.options, "--per-class", 2, "--seeds", 1, "-o", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, calibration: Path) -> Path:
    path = checkpoint.folder / "half.bundle"
    result = run(
        "export", *checkpoint.options, "--profile", checkpoint.profile, "--calibration", calibration, "-o", path
    )
    assert result.exit_code == 0 and result.stdout.strip() == str(path), result.output
    return path


def test_every_target_replays_the_golden_trace(bundle: Path, checkpoint: Checkpoint) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.model.roles == "gddgd" and set(manifest.schedules) == {"coarse", "fine"}
    assert [step.keep for step in manifest.schedules["fine"].steps] == [1, 4, 9, 8, 18]
    for options in ((), ("--target", "torch", "--checkpoint", checkpoint.var, "--vae", checkpoint.vae)):
        result = run("verify", bundle, *options)
        assert result.exit_code == 0 and result.stdout.count("tokens of all 5 scales are equal") == 2, result.output


def test_two_targets_make_the_same_pictures(bundle: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = ["--checkpoint", checkpoint.var, "--vae", checkpoint.vae, "-l", "thing 1", "-l", 2, "--batch-size", 2]
    result = run("compare", bundle, "--other-target", "torch", *options)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("| all")]
    assert "1.0000" in rows[0] and rows[1] == "| all | 100.0% | 100.0% | 100.0% | 100.0% | 100.0% |"


def _small_var(var: Path, vae: Path, labels: Path) -> Source:
    """In place of the embedded checkpoint; called in another process, as the next one."""
    return Source("small", "var", var, vae, read_labels(labels), SamplingWish(top_k=1))


def _small_text(folder: Path) -> Source:
    prompts = tuple(Prompt(text, name) for name, texts in PROMPTS.items() for text in texts)
    return Source(
        "words",
        "infinity",
        folder / "infinity.safetensors",
        folder / "vae.safetensors",
        text=TextSource("t5", lambda: load_text_encoder(folder / "t5"), prompts=prompts),
        load_options={"resolution": RESOLUTION},
    )


@pytest.mark.slow
def test_the_tour_makes_every_bundle_and_a_report(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`toprovar demo` with smaller models in place of the embedded ones."""
    small_var = partial(_small_var, checkpoint.var, checkpoint.vae, checkpoint.labels)
    small_text = partial(_small_text, TextCheckpoint(tmp_path / "text").folder)
    demos = (
        tour.Demo("class", small_var, ("thing 0", "thing 1")),
        tour.Demo("text", small_text, (PROMPTS["plain"][0], PROMPTS["fine"][0]), ("fast",), per_class=1),
    )
    monkeypatch.setattr(tour, "DEMOS", demos)
    monkeypatch.setattr(tour, "EVIDENCE", tmp_path / "none stored")
    out = tmp_path / "out"
    result = run("demo", "-o", out, "--threads", 1)
    assert result.exit_code == 0, result.output
    evidence = [load_evidence(out / f"report-{name}-bundles.json") for name in ("var", "infinity")]
    names = [[policy.name for policy in one.policies] for one in evidence]
    assert names == [["dense", "drop-2", "quality", "balanced", "fast", "extreme"], ["dense", "drop-2", "fast"]]
    manifest = open_bundle(out / "class" / "drop-2.bundle").manifest
    assert manifest.model.roles == "ggggg" and manifest.provenance.calibration_sha256 is None
    assert manifest.sampling.top_k == 1
    dense = open_bundle(out / "text" / "dense.bundle").manifest
    assert list(dense.schedules) == list(PROMPTS) and dense.condition.prompt_classes is not None
    assert {path.name for path in out.iterdir()} == {
        *("class", "text", "report.html", "report.md"),
        *(
            f"report-{name}-bundles.{suffix}"
            for name in ("var", "infinity")
            for suffix in ("json", "png", "safetensors")
        ),
    }


def test_a_profile_with_changes_says_so() -> None:
    assert named_profile("fast").name == "fast"
    dropped = named_profile("fast", drop_scales=1, precision="fp16")
    assert (dropped.name, dropped.drop_scales, dropped.drop_rho, dropped.precision) == ("fast-drop-1", 1, None, "fp16")
    assert named_profile("dense", 2).name == "drop-2" and named_profile("dense").tokens.keep == {}


def test_plan_explains_itself_and_is_what_export_decides(
    checkpoint: Checkpoint, calibration: Path, bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    result = run("plan", calibration, "--profile", checkpoint.profile, "--explain", "-o", path)
    assert result.exit_code == 0 and "gddgd" in result.stdout and "GFLOP" in result.stdout
    assert (bundle / "plan.json").read_bytes() == path.read_bytes()
    assert (bundle / "calibration.json").read_bytes() == calibration.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture(scope="module")
def bad(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    data = checkpoint.var.read_bytes()
    (folder / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "code.pth").write_bytes(pickle.dumps(print))
    torch.save(Path, folder / "code-in-zip.pth")
    (folder / "notes.txt").write_text("hello")
    (folder / "typo.toml").write_text(PROFILE.replace("alpha_min", "alpha_mim"))
    (folder / "broken.toml").write_text("name =")
    (folder / "few.txt").write_text("one coarse\ntwo fine\n")
    (folder / "classless.txt").write_text("one\n")
    (folder / "calibration.json").write_text("{}")
    (folder / "cut.json").write_text('{"schema": ')
    return folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--checkpoint", "{bad}/none.safetensors", "--vae", "{vae}"], "no such file"),
        (["--checkpoint", "{bad}/truncated.safetensors", "--vae", "{vae}"], "truncated"),
        (["--checkpoint", "{bad}/empty.safetensors", "--vae", "{vae}"], "truncated or not a safetensors file"),
        (["--checkpoint", "{bad}/code.pth", "--vae", "{vae}"], "pickled code"),
        (["--checkpoint", "{bad}/code-in-zip.pth", "--vae", "{vae}"], "pickled code"),
        (["--checkpoint", "{bad}/notes.txt", "--vae", "{vae}"], "unknown kind of checkpoint"),
        (["--checkpoint", "{vae}", "--vae", "{vae}"], "this is a VQVAE"),
        (["--checkpoint", "{var}", "--vae", "{var}"], "this is a VAR transformer"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--backbone", "infinity"], "--text-encoder is missing"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--backbone", "dalle"], "backbone 'dalle' is unknown"),
        (["--checkpoint", "{var}"], "--vae is missing"),
        (["--vae", "{vae}"], "--checkpoint is missing"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--profile", "turbo"], "expected one of quality, balanced"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--profile", "{bad}/typo.toml"], "tokens.alpha_mim: unknown key"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--profile", "{bad}/broken.toml"], "not valid TOML"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--profile", "{bad}/none.toml"], "no such file"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--labels", "{bad}/few.txt"], "has 10 classes, but 2 labels"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--labels", "{bad}/classless.txt"], "its prompt class"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--labels", "{bad}/none.txt"], "cannot be read"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--calibration", "{bad}/calibration.json"], "expected"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--calibration", "{bad}/cut.json"], "not valid JSON"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--calibration", "{bad}/none.json"], "no such file"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--precision", "int4"], "valid: auto, fp32, fp16"),
        (
            ["--checkpoint", "{var}", "--vae", "{vae}", "--target", "coreml"],
            "valid: onnxruntime, tensorrt, tensorrt-rtx",
        ),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--drop-scales", "9", "--profile", "dense"], "fewer than the 5"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--top-p", "7"], "top_p is 7"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--temperature", "0"], "temperature is 0"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--cfg", "nan"], "guidance is nan; give finite numbers"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--per-class", "0"], "0 prompts per class"),
        (["--checkpoint", "{var}", "--vae", "{vae}", "--seeds", "0"], "no seed"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    checkpoint: Checkpoint,
    bad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"bad": bad, "var": checkpoint.var, "vae": checkpoint.vae}
    result = run("export", *(option.format(**names) for option in options))
    assert text in one_line(result)
    assert not list(tmp_path.iterdir()), "something was written"


def test_the_parts_of_another_checkpoint_are_refused(
    checkpoint: Checkpoint, calibration: Path, bundle: Path, tmp_path: Path
) -> None:
    other = Checkpoint(tmp_path / "other", seed=1)
    output = tmp_path / "x.bundle"
    plan = bundle / "plan.json"
    assert "checkpoint_sha256" in one_line(run("export", *other.options, "--plan", plan, "-o", output))
    result = run("export", *other.options, "--profile", other.profile, "--calibration", calibration, "-o", output)
    assert "checkpoint_sha256" in one_line(result)
    result = run("verify", bundle, "-t", "torch", "--checkpoint", other.var, "--vae", other.vae)
    assert "give the checkpoints that it was exported from" in one_line(result)
    result = run("verify", bundle, "-t", "torch", "--checkpoint", checkpoint.var, "--vae", other.vae)
    assert "give the checkpoints that it was exported from" in one_line(result)
    assert not output.exists()


def test_what_is_there_is_replaced_only_by_force(bundle: Path, checkpoint: Checkpoint, calibration: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    options = [*checkpoint.options, "--profile", checkpoint.profile, "--calibration", calibration, "-o", bundle]
    assert "--force replaces it" in one_line(run("export", *options))
    assert "--force replaces it" in one_line(run("calibrate", *checkpoint.options, "-o", calibration))
    assert (bundle / "manifest.json").read_bytes() == before


def test_force_spares_what_is_no_bundle(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    options = [*checkpoint.options, "--profile", "dense", "-o", tmp_path / "precious", "--force"]
    assert "is no bundle, so it is left alone" in one_line(run("export", *options))
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(("limit_bytes", "profile"), [(100, "quality"), (10_000, "dense")])
def test_a_disk_that_fills_up_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, limit_bytes: int, profile: str
) -> None:
    """While calibrating, and while writing graphs. The limit on a file's size stands for the end of the disk."""
    arguments = ["export", *map(str, checkpoint.options), "--profile", profile, "-o", str(tmp_path / "x.bundle")]
    code = f"import sys; sys.argv[1:] = {arguments!r}; import toprovar.cli; toprovar.cli.main()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())
