"""A text-conditional model from its files to pictures, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from toprovar.backbones.text import load_text_encoder
from toprovar.cli import app
from toprovar.exporter.calibrate import classes_by_fineness
from toprovar.profiles.calibration import load_calibration
from toprovar.runtime.bundle import open_bundle
from toprovar.runtime.session import Session

from .text_checkpoint import PROMPTS, TEXT_TOKENS, TEXT_WIDTH, TextCheckpoint


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def one_line(result: Any) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]  # stages
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return str(lines[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TextCheckpoint:
    return TextCheckpoint(tmp_path_factory.mktemp("text") / "a")


@pytest.fixture(scope="module")
def bundle(checkpoint: TextCheckpoint) -> Path:
    """Calibrated and exported in one command, as the design writes it."""
    path = checkpoint.folder / "half.bundle"
    options = ["--calibration", checkpoint.prompts, "--profile", checkpoint.profile, "--seeds", 1, "-o", path]
    assert done("export", *checkpoint.options, *options).strip() == str(path)
    return path


def test_the_bundle_holds_all_that_text_needs(bundle: Path, checkpoint: TextCheckpoint) -> None:
    manifest = open_bundle(bundle).manifest
    condition = manifest.condition
    assert (condition.kind, condition.text_width, condition.text_maximum_tokens) == ("text", TEXT_WIDTH, TEXT_TOKENS)
    assert condition.text_encoder is not None and condition.text_encoder.name == str(checkpoint.t5)
    assert [(one.name, one.prompt_class) for one in condition.examples] == [(t[0], name) for name, t in PROMPTS.items()]
    assert list(manifest.schedules) == list(PROMPTS) and manifest.model.roles == "gdg"
    assert manifest.provenance.load_options == {"resolution": "0.06M"}
    measured = load_calibration(bundle / "calibration.json")
    assert {name: list(one.prompts) for name, one in measured.classes.items()} == PROMPTS


def test_every_target_replays_the_golden_trace(bundle: Path, checkpoint: TextCheckpoint) -> None:
    for options in ((), ("--target", "torch", "--checkpoint", checkpoint.infinity, "--vae", checkpoint.vae)):
        text = done("verify", bundle, *options)
        assert text.count("tokens of all 7 scales are equal") == 2


def test_the_encoder_in_the_bundle_is_the_checkpoints(bundle: Path, checkpoint: TextCheckpoint) -> None:
    session = Session(bundle, threads=1)
    texts = [text for of in PROMPTS.values() for text in of]
    found, expected = session.encode(texts), load_text_encoder(checkpoint.t5).encode(texts)
    np.testing.assert_allclose(found.features, expected.features.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.lengths, expected.lengths.numpy())
    assert found.prompt_classes == tuple(name for name, of in PROMPTS.items() for _ in of)
    assert session.encode(texts[:1], "fine").prompt_classes == ("fine",)


def test_pictures_by_prompt_by_file_and_by_features(bundle: Path, checkpoint: TextCheckpoint, tmp_path: Path) -> None:
    """The same prompt is the same picture, however it is given."""
    prompt, session = PROMPTS["fine"][0], Session(bundle, threads=1)
    text = session.encode([prompt])
    np.savez(tmp_path / "f.npz", text_features=text.features, text_lens=text.lengths)
    (tmp_path / "p.txt").write_text(prompt + "\n")
    for name, option in (
        ("a", ["--prompt", prompt]),
        ("b", ["--prompts", tmp_path / "p.txt"]),
        ("c", ["--features", tmp_path / "f.npz"]),
    ):
        done("run", bundle, *option, "--seed", 3, "-o", tmp_path / f"{name}.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] == pictures[2]
    done("run", bundle, "-p", prompt, "-p", "a blue floor", "-n", 2, "--separate", "-o", tmp_path / "d.png")
    assert len(list(tmp_path.glob("d-*.png"))) == 4
    golden = Session(bundle, threads=1).examples()
    assert golden[0] == (PROMPTS["plain"][0], PROMPTS["fine"][0])


def test_compare_bench_and_inspect_take_text(bundle: Path, checkpoint: TextCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    options = ["--checkpoint", checkpoint.infinity, "--vae", checkpoint.vae, "-o", out]
    done("compare", bundle, "--other-target", "torch", "-p", "three red discs on a floor", *options)
    document = json.loads(out.read_text())
    assert document["images"][0]["label"] == "three red discs on a floor"
    assert set(document["all"]["agreement"].values()) == {1.0}
    assert "| scale 6 | 16x16 | 256 |" in done("bench", bundle, "--repeat", 1, "--warmup", 0)
    assert f"encoder: {checkpoint.t5}" in done("inspect", bundle).replace("\n", "")


def test_features_in_place_of_an_encoder(bundle: Path, checkpoint: TextCheckpoint, tmp_path: Path) -> None:
    """Row by row the prompts' features: the same calibration and golden trace, and a bundle that takes no prompts."""
    text = load_text_encoder(checkpoint.t5).encode([text for of in PROMPTS.values() for text in of])
    np.savez(tmp_path / "f.npz", text_features=text.features.numpy(), text_lens=text.lengths.numpy())
    options = [*checkpoint.files, "--features", tmp_path / "f.npz", "--profile", checkpoint.profile, "--seeds", 1]
    other = tmp_path / "features.bundle"
    done("export", *options, "--calibration", checkpoint.prompts, "-o", other)
    first, second = (load_calibration(path / "calibration.json") for path in (bundle, other))
    assert first.sha256 == second.sha256
    assert (other / "golden.safetensors").read_bytes() == (bundle / "golden.safetensors").read_bytes()
    assert "was exported without a text encoder" in one_line(run("run", other, "-p", "a blue floor"))
    # With a calibration the rows have no names; each class shows the text that is most like it.
    done("export", *options, "--calibration", other / "calibration.json", "-o", other, "--force")
    examples = open_bundle(other).manifest.condition.examples
    assert [one.prompt_class for one in examples] == ["plain", "fine"] and examples[0].name.startswith("text ")


def test_classes_are_found_by_fineness(checkpoint: TextCheckpoint, tmp_path: Path) -> None:
    """Without classes; the order of the prompts changes nothing of what a plan is made of."""
    texts = [text for of in PROMPTS.values() for text in of]
    found = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(order))
        options = ["--prompts", tmp_path / f"{name}.txt", "--seeds", 1, "-o", tmp_path / f"{name}.json"]
        done("calibrate", *checkpoint.options, *options)
        found.append(load_calibration(tmp_path / f"{name}.json"))
    assert list(found[0].classes) == ["coarse", "medium", "fine"]
    rho = [np.mean(one.rho.mean[5:]) for one in found[0].classes.values()]  # from 12 x 12 on
    assert rho == sorted(rho)
    for one in found[0].classes:
        assert set(found[0].classes[one].prompts) == set(found[1].classes[one].prompts)
        np.testing.assert_allclose(found[0].classes[one].rho.mean, found[1].classes[one].rho.mean, atol=1e-4)
    assert found[0].discriminants is not None and set(found[0].discriminants) == set(found[0].classes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": 0.5}, {"all": "a"}),
        ({"a": 0.5, "b": 0.1, "c": 0.4}, {"all": "bca"}),
        ({"a": 0.5, "b": 0.1, "c": 0.4, "d": 0.1}, {"coarse": "bd", "fine": "ca"}),
        ({"a": 0.4, "b": 0.4, "c": 0.4, "d": 0.4}, {"coarse": "ab", "fine": "cd"}),
        (
            {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.21, "e": 0.41, "f": 0.4, "g": 0.39},
            {"coarse": "ab", "medium": "cd", "fine": "gfe"},
        ),
        (
            {"a": 0.9, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.1, "f": 0.1},
            {"coarse": "bc", "medium": "de", "fine": "fa"},
        ),
    ],
)  # fmt: skip
def test_natural_breaks(values: dict[str, float], expected: dict[str, str]) -> None:
    for order in (values, dict(reversed(values.items()))):
        assert {name: "".join(texts) for name, texts in classes_by_fineness(order).items()} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "latin.txt").write_bytes(b"a caf\xe9\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "long.txt").write_text("red " * 13 + "\n")
    (folder / "some.txt").write_text("red discs\tplain\nblue floor\n")
    (folder / "twice.txt").write_text("red discs\nred discs\n")
    np.savez(folder / "narrow.npz", text_features=np.ones((1, 3, 7), np.float32), text_lens=np.array([3]))
    np.savez(folder / "one.npz", text_features=np.ones((1, 3, TEXT_WIDTH), np.float32), text_lens=np.array([3]))
    np.savez(folder / "wide.npz", text_features=np.ones((1, 20, TEXT_WIDTH), np.float32), text_lens=np.array([20]))
    return folder


FILES = ["--checkpoint", "{infinity}", "--vae", "{vae}"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--backbone", "infinity-2b"], "--checkpoint is missing: infinity-2b is a transformer (--checkpoint) and its "
         "tokenizer (--vae), infinity_2b_reg.pth and infinity_vae_d32reg.pth; give both"),
        (["--backbone", "infinity-2b", "--checkpoint", "{infinity}"], "--vae is missing"),
        (["--backbone", "infinity-2b", *FILES], "--text-encoder is missing: infinity-2b takes text"),
        (["--backbone", "infinity", *FILES, "--text-encoder", "./none"], "--calibration is missing"),
        (["--backbone", "infinity", *FILES, "--text-encoder", "{bad}/none", "--calibration", "{prompts}"], "no such folder"),
        (["--backbone", "infinity", "--checkpoint", "{bad}/none.pth", "--vae", "{vae}", "--text-encoder", "{t5}",
          "--calibration", "{prompts}"], "no such file"),
        (["{options}", "--device", "cuda", "--calibration", "{prompts}"], "finds no GPU; use --device cpu"),
        (["{options}", "--device", "tpu", "--calibration", "{prompts}"], "valid: auto, cpu, cuda"),
        (["{options}", "--calibration", "{bad}/none.txt"], "give a text file with one prompt a line"),
        (["{options}", "--calibration", "{bad}/latin.txt"], "line 1: byte 6 (0xe9) is not UTF-8"),
        (["{options}", "--calibration", "{bad}/empty.txt"], "no prompt in it"),
        (["{options}", "--calibration", "{bad}/long.txt", "--text-tokens", "12"], "has 14 tokens and the model takes 12"),
        (["{options}", "--calibration", "{bad}/long.txt"], "one has 14 tokens, and the model takes 12"),
        (["{options}", "--calibration", "{bad}/some.txt"], "'blue floor' has no prompt class and others have"),
        (["{options}", "--calibration", "{bad}/twice.txt"], "'red discs' is there twice"),
        (["{options}", "--calibration", "{prompts}", "--aspect", "wide"], "aspect ratio 'wide' is no number"),
        (["{options}", "--calibration", "{prompts}", "--resolution", "4K"], "choose one of 0.06M"),
        (["--backbone", "infinity", "--checkpoint", "{infinity}", "--vae", "{infinity}", "--text-encoder", "{t5}",
          "--calibration", "{prompts}"], "expected an Infinity VAE"),
        (["{options}", "--labels", "{prompts}"], "takes text, not labels"),
        (["--backbone", "infinity-8b", *FILES, "--text-encoder", "{t5}", "--calibration", "{prompts}", "--resolution",
          "0.06M"], "has 3 layers of width 48, and the backbone that was named 40 layers of width 3584"),
        (["{files}", "--features", "{bad}/narrow.npz"], "text features have 7 channels"),
        (["{files}", "--features", "{bad}/wide.npz"], "one has 20 tokens, and the model takes 12"),
        (["{files}", "--features", "{bad}/one.npz", "--calibration", "{prompts}"], "features of 1 texts for 6 prompts"),
        (["--backbone", "var", *FILES, "--text-encoder", "{t5}"], "var takes labels and has one schedule"),
        (["--backbone", "var", "--calibration", "{prompts}"], "ends in .json"),
        (["--backbone", "infinity", "--resolution", "1M"], "the embedded demo has labels, text encoder and schedule"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(
    checkpoint: TextCheckpoint,
    bad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"bad": bad, "infinity": checkpoint.infinity, "vae": checkpoint.vae, "t5": checkpoint.t5}
    names["prompts"] = checkpoint.prompts
    given: list[object] = []
    for option in options:
        whole = {"{options}": checkpoint.options, "{files}": checkpoint.files}.get(option)
        given += whole if whole is not None else [option.format(**names)]
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("there is a GPU")
    assert text in one_line(run("export", *given))
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-p", ""], "prompt: empty"),
        (["-p", "red", "-p", " "], "prompt 2: empty"),
        (["-p", "red " * 13], "has 14 tokens and the model takes 12: shorten it"),
        (["-p", "caf\udce9"], "not UTF-8"),
        (["-l", "disc"], "has no labels, its pictures are asked for by text"),
        (["-p", "red", "--class", "cats"], "no prompt class 'cats'; valid: plain, fine"),
        (["--prompts", "{bad}/latin.txt"], "is not UTF-8"),
        (["--features", "{bad}/narrow.npz"], "text features of width 7"),
        (["--features", "{bad}/wide.npz"], "up to 20 tokens"),
        (["--features", "{bad}/one.npz", "-p", "a", "-p", "b"], "holds 1 texts for 2 prompts"),
    ],
)
def test_prompts_that_a_bundle_does_not_take(
    bundle: Path, bad: Path, tmp_path: Path, options: list[str], text: str
) -> None:
    result = run("run", bundle, *(option.format(bad=bad) for option in options), "-o", tmp_path / "x.png")
    assert text in one_line(result)
    assert not (tmp_path / "x.png").exists()
