"""The command line: instant help, one line for a user's mistake, exit status, files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import toprovar.cli
from toprovar.cli import app, export_app
from toprovar.runtime import verify

from .runtime import tiny

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny.bundle")


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "text.bundle", text=True)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in an empty folder; a traceback fails the test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


def one_line(result: Any) -> str:
    """The message of a user's mistake."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return str(result.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, toprovar.cli\n"
        "try: toprovar.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic', 'PIL', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "toprovar", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(invoke: Invoke, verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0 and "Usage:" in result.output


def test_the_verbs_that_are_promised() -> None:
    wanted = {"export", "calibrate", "plan", "run", "sample", "inspect", "compare", "bench", "verify", "report", "demo"}
    assert wanted <= set(VERBS)


def test_toprovar_export_is_toprovar_export() -> None:
    (alone,) = export_app.registered_commands
    (verb,) = [command for command in app.registered_commands if command.name == "export"]
    assert alone.callback is verb.callback


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").output == f"toprovar {toprovar.__version__}\n"


def test_an_unknown_option_exits_with_2(invoke: Invoke) -> None:
    assert invoke("run", "x.bundle", "--nonsense").exit_code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Verbs on a bundle


def test_run_writes_a_picture(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    result = invoke("run", bundle, "--label", "disc", "--seed", 1)
    assert result.exit_code == 0 and result.output.startswith("out.png: 1 picture, ")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (12, 12)
        expected = tiny.reference(tiny.SCHEDULES["object"], 0, 1).image
        assert np.abs(np.asarray(image).transpose(2, 0, 1) / 255 - expected).max() < 0.5 / 255 + 1e-6


def test_run_writes_a_grid_or_numbered_files(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    assert invoke("run", bundle, "-l", "disc", "-l", "glow", "-n", 3, "-o", "grid.png").exit_code == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width == 3 * 18 + 6
    assert invoke("run", bundle, "-l", "disc", "-n", 2, "--separate", "-o", "a.png").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "a-0000.png", "a-0001.png"}


def test_the_seed_says_which_picture(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    for name, arguments in {"a": ("--seed", 2), "b": ("--seed", 2, "--batch-size", 4), "c": ("--seed", 5)}.items():
        invoke("run", bundle, "-l", "disc", "-n", 2, "--separate", "-o", f"{name}.png", *arguments)
    files = {name: (tmp_path / f"{name}-0001.png").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_inspect_shows_what_is_in_a_bundle(invoke: Invoke, bundle: Path) -> None:
    result = invoke("inspect", bundle)
    assert result.exit_code == 0
    for text in (
        "gdg",
        "graph step",
        "past_k_0 … past_k_2 (2)",
        "schedule of prompt class object",
        "golden.safetensors",
    ):
        assert text in result.output


def test_verify_says_ok_or_exits_with_1(invoke: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("verify", bundle)
    assert result.exit_code == 0 and "object: ok, 2 images" in result.output
    result = invoke("verify", bundle, "--tolerance", 0)
    assert result.exit_code == 1 and "WRONG" in result.output


def test_bench_and_compare_write_json_and_markdown(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    dense = tiny.write_bundle(
        tmp_path / "dense.bundle", {name: tiny.TinySchedule((1, 4, 9), None) for name in tiny.SCHEDULES}, "dense"
    )
    result = invoke("bench", bundle, "--against", dense, "--repeat", 2, "--warmup", 0, "-o", "bench.json")
    assert result.exit_code == 0 and result.stdout.strip() == (tmp_path / "bench.md").read_text().strip()
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["schema"] == "toprovar.bench/1" and document["ratios"][0]["against"] == "dense"
    result = invoke("compare", bundle, dense, "-n", 2, "-o", "compare.json")
    assert result.exit_code == 0
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["reference"]["name"] == "dense" and document["all"]["images"] == 6
    assert "| all | 6 |" in (tmp_path / "compare.md").read_text()


def test_report(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    result = invoke("report", bundle, "-l", "disc", "--repeat", 1, "-o", "r.html")
    assert result.exit_code == 0
    assert result.stdout.split() == [
        "r.html",
        "r.md",
        *(f"r-var-bundles.{kind}" for kind in ("json", "safetensors", "png")),
    ]
    again = invoke("report", "r-var-bundles.json", "-o", "again.html")
    assert again.exit_code == 0 and again.stdout.split() == ["again.html", "again.md", "again-var-bundles.png"]
    assert (tmp_path / "again.html").read_text() == (tmp_path / "r.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "nothing.bundle", "-l", "disc"), "nothing.bundle: no such folder"),
        (("inspect", "nothing.bundle"), "no such folder"),
        (("run", "{bundle}", "-l", "cat"), "no label 'cat'; valid: disc, square, glow"),
        (("run", "{bundle}", "-l", "disc", "-n", "0"), "count is 0"),
        (("run", "{bundle}", "-l", "disc", "--seed", "-1"), "seed is -1"),
        (("run", "{bundle}", "-l", "disc", "-o", "x.jpg"), "ends in .png"),
        (("run", "{bundle}", "-l", "disc", "-o", "no/x.png"), "does not exist; make it first"),
        (("run", "{bundle}", "-l", "disc", "-t", "tensorflow"), "no such target"),
        (("run", "{bundle}", "-l", "disc", "-t", "tensorrt-rtx"), "does not run them"),
        (("run", "{bundle}", "-l", "disc", "-t", "torch"), "give the checkpoints that it was exported from"),
        (("run", "{bundle}", "-l", "disc", "-t", "torch", "--vae", "x"), "give --checkpoint and --vae"),
        (("run", "{bundle}", "-l", "disc", "--provider", "cuda"), "no CUDA provider"),
        (("run", "{bundle}", "-l", "disc", "--batch-size", "0"), "batch size is 0"),
        (("run", "{bundle}", "-l", "disc", "--checkpoint", "x"), "--checkpoint, --vae: target onnxruntime runs"),
        (
            ("run", "{bundle}", "-l", "disc", "-t", "torch", "--provider", "gpu"),
            "provider is 'gpu'; valid: auto, cpu, cuda",
        ),
        (("run", "{bundle}", "-l", "disc", "-t", "torch", "--threads", "0"), "threads is 0"),
        (("verify", "{bundle}", "--tolerance", "nan"), "tolerance is nan"),
        (("calibrate", "-o", "no/c.json"), "no/c.json: cannot be written: its folder no does not exist"),
        (("export", "-o", "no/x.bundle"), "its folder no does not exist"),
        (("export", "--seed", "-1"), "seed is -1"),
        (("export", "--backbone", "cat"), "backbone 'cat' is unknown: it is one of var, infinity, infinity-125m"),
        (("demo", "--threads", "0"), "threads is 0"),
        (("demo", "-o", "{bundle}/manifest.json"), "is a file; name a folder"),
        (("compare", "{bundle}", "{text}"), "labels; give two bundles of one model"),
        (("compare", "{bundle}"), "give another bundle or --other-target"),
        (("bench", "{bundle}", "--class", "cats"), "no prompt class 'cats'"),
        (("bench", "{bundle}", "--repeat", "1", "-o", "x.txt"), "ends in .json"),
        (("report", "{bundle}", "{bundle}"), "give each its own name"),
        (("report", "nothing.json"), "nothing.json: no such file; expected a file of measurements"),
        (("report", "nothing.bundle"), "no such folder"),
        (("report", "{bundle}", "-o", "r.pdf"), "ends in .html"),
    ],
)
def test_a_mistake_is_one_line(
    invoke: Invoke, bundle: Path, text_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    assert text in one_line(invoke(*(argument.format(bundle=bundle, text=text_bundle) for argument in arguments)))
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run",), "error: missing argument 'BUNDLE'; see "),
        (("run", "x.bundle", "--seed", "abc"), "error: invalid value for '--seed': "),
        (("run", "x.bundle", "--surprise"), "error: no such option: --surprise"),
        (("moon",), "error: no such command 'moon'; see "),
    ],
)
def test_what_typer_refuses_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["toprovar", *arguments])
    with pytest.raises(SystemExit) as stopped:
        toprovar.cli.main()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith(text) and message.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(
    invoke: Invoke, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = one_line(invoke("run", bundle, "-l", "disc"))
    assert "out.png: cannot be written: no space left on device" in message
    assert not list(tmp_path.iterdir())


def test_a_full_disk_where_no_one_expects_it_is_one_line_too(
    invoke: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache")

    monkeypatch.setattr(verify, "verify", full)
    assert "cache: no space left on device; free some space" in one_line(invoke("verify", bundle))


def test_a_defect_keeps_its_traceback(invoke: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(verify, "verify", broken)
    with pytest.raises(ZeroDivisionError):
        invoke("verify", bundle)


def test_an_interruption_exits_with_130(invoke: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupted)
    result = invoke("verify", bundle)
    assert result.exit_code == 130 and result.stderr == "interrupted\n"
