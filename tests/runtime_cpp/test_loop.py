"""The C++ loop and command line on the toy bundle: the graphs are C++ on the host, everything else is the real thing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.runtime import tiny

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny.bundle")


@pytest.fixture(scope="module")
def run(programs: Path, tmp_path_factory):
    head = tmp_path_factory.mktemp("head") / "head.bin"
    head.write_bytes(np.random.default_rng(0).normal(size=(tiny.WIDTH, tiny.LOGITS)).astype(np.float32).tobytes())

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [programs / "toprovar_run_tiny", head, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    return call


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_golden_trace_is_replayed_with_equal_tokens(run, bundle, batch):
    done = run(bundle, "--verify", "--batch", batch)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["object", "plain"]
    assert all(": ok, " in line and "scales are equal" in line for line in lines)


def test_a_bundle_that_prunes_nothing_is_replayed(run, tmp_path):
    schedules = {name: tiny.TinySchedule((1, 4, 9), None) for name in tiny.SCHEDULES}
    done = run(tiny.write_bundle(tmp_path / "dense.bundle", schedules, "dense"), "--verify")
    assert done.returncode == 0, done.stderr + done.stdout


def test_a_wrong_trace_is_found_with_the_scale_where_it_begins(run, tmp_path):
    def change(tokens):
        tokens[1, 2] += 1
        return tokens

    root = tiny.write_bundle(tmp_path / "wrong.bundle")
    tiny.change_golden(root, "object/tokens_1", change)
    done = run(root, "--verify")
    assert done.returncode == 1

    from toprovar.runtime.session import Session
    from toprovar.runtime.verify import verify

    lines = [str(one).rsplit(" by ", 1)[0] for one in verify(Session(root, threads=1)).classes]
    assert [line.rsplit(" by ", 1)[0] for line in done.stdout.splitlines()] == lines
    assert lines[0].startswith(
        "object: WRONG, 2 images; scale 1 is the first that differs, in 1 of 8 tokens, all scales in "
    )
    for token in range(tiny.LOGITS):
        half = tiny.write_half_bundle(tmp_path / f"{token}.bundle", token)
        done = run(half, "--verify", "--tolerance", 1)
        verdict = verify(Session(half, threads=1), tolerance=1)
        assert done.returncode == (0 if verdict.passed else 1)
        lines = [str(one).rsplit(" by ", 1)[0] for one in verdict.classes]
        assert [line.rsplit(" by ", 1)[0] for line in done.stdout.splitlines()] == lines

    done = run(root, "--bench")
    assert done.returncode == 2
    assert "fails its golden trace, so nothing is measured" in done.stderr


def test_bench_writes_the_document_of_the_python_bench(run, bundle):
    done = run(bundle, "--bench", "--repeat", 3, "--warmup", 1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    from toprovar.runtime.bench import bench, markdown
    from toprovar.runtime.session import Session

    expected = bench([Session(bundle, threads=1)], repeat=3, warmup=1)

    def keys(value: object) -> object:
        if isinstance(value, dict):
            return {key: keys(one) for key, one in value.items() if key != "versions"}
        return [keys(one) for one in value] if isinstance(value, list) else None

    assert keys(found) == keys(expected)
    assert list(found["bundles"][0]["classes"]) == list(expected["bundles"][0]["classes"])
    assert "| scale 2 | 3x3 | 9 | 5 |" in markdown(found)


def test_pictures_are_those_of_the_python_runtime(run, bundle, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    from toprovar.runtime.pictures import to_bytes
    from toprovar.runtime.session import Session

    done = run(bundle, "--label", "disc", "--label", 1, "--seed", 11, "-o", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out-0.png"), str(tmp_path / "out-1.png")]
    result = Session(bundle, threads=1).generate(["disc", 1], [11, 12])
    for i, image in enumerate(result.images):
        found = np.asarray(image_module.open(tmp_path / f"out-{i}.png")).astype(int)
        assert np.abs(found - to_bytes(image)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no bundle is given"),
        (("{bundle}",), "give --label"),
        (("{bundle}", "--label", "moon"), "no label 'moon'; valid: disc, square, glow, or a number from 0 to 2"),
        (("{bundle}", "--label", "3"), "no label '3'"),
        (("{bundle}", "--label", "disc", "--label", "glow"), "a batch is of one class"),
        (("{bundle}", "--label", "disc", "--batch", "2"), "1 labels for a batch of 2"),
        (("{bundle}", "--label", "disc", "--seed", "-1"), "--seed is '-1'"),
        (("{bundle}", "--label", "disc", "--seed", "1x"), "--seed is '1x'"),
        (("{bundle}", "--label"), "--label needs a value"),
        (("{bundle}", "--bench", "--repeat", "0"), "--repeat is '0'; valid are 1"),
        (("{bundle}", "--surprise"), "unknown option --surprise"),
        (("{bundle}", "other"), "two bundles"),
        (("{bundle}", "--verify", "--prompt-class", "moon"), "no prompt class 'moon'"),
        (("{bundle}x", "--verify"), "has no manifest.json"),
        (("{bundle}", "--label", "disc", "-o", "/nowhere/a.png"), "/nowhere/a.png: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, bundle, arguments, expected):
    done = run(*(word.format(bundle=bundle) for word in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert expected in done.stderr


def test_help_names_every_option(run):
    done = run("--help")
    assert done.returncode == 0
    source = (Path(__file__).parents[2] / "src/toprovar/runtime/cpp/command.cpp").read_text()
    for option in {line.split('"')[1] for line in source.splitlines() if 'word == "--' in line}:
        assert option in done.stdout
