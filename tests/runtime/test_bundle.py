"""Every way in which a bundle can be broken gives one line that says what was found and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toprovar.errors import BundleError
from toprovar.profiles.files import sha256_file
from toprovar.runtime.bundle import open_bundle

from . import tiny


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(root: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message
    return message


def test_a_sound_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert set(opened.manifest.schedules) == {"object", "plain"}
    assert opened.manifest_sha256 == sha256_file(bundle / "manifest.json")
    assert opened.graph("step").inputs[0].name == "x"
    assert opened.constants["up_0"].shape == (1, 9)


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing.bundle")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "x.bundle").write_text("x")
    assert "is a file" in refused(tmp_path / "x.bundle")


def test_missing_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    assert "has no manifest.json" in refused(bundle)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000], ids=["empty", "truncated", "not-utf8", "deep"])
def test_manifest_that_is_not_json(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "not valid JSON" in refused(bundle)


@pytest.mark.parametrize("text", ["[]", "3", '{"schema": "toprovar.bundle/9"}'])
def test_manifest_of_another_schema(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert "this toprovar reads 'toprovar.bundle/1'" in refused(bundle)


def test_unknown_key(bundle: Path) -> None:
    edit(bundle, lambda m: m["model"].update(dept=3))
    message = refused(bundle)
    assert "model.dept: unknown key" in message and "depth" in message


def test_other_contract_version(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(contract_version=99))
    assert "version 99 of the op contract" in refused(bundle)


@pytest.mark.parametrize("name", ["../evil.onnx", "/etc/passwd", "a/../../evil", "c:evil", "..\\evil", ""])
def test_a_name_outside_the_folder(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size_bytes": 1}}))
    assert "outside the bundle's folder" in refused(bundle)


def test_a_graph_outside_the_folder(bundle: Path) -> None:
    edit(bundle, lambda m: m["graphs"]["step"].update(file="../step.onnx"))
    assert "outside the bundle's folder" in refused(bundle)


def test_a_link_that_leaves_the_folder(bundle: Path) -> None:
    (bundle / "step.onnx").rename(bundle.parent / "elsewhere.onnx")
    (bundle / "step.onnx").symlink_to(bundle.parent / "elsewhere.onnx")
    assert "step.onnx leads outside the bundle's folder" in refused(bundle)


def test_a_linked_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle.parent / "m.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "m.json")
    assert "leads outside" in refused(bundle)


def test_a_link_inside_the_folder_is_fine(bundle: Path) -> None:
    (bundle / "step.onnx").rename(bundle / "real.onnx")
    (bundle / "step.onnx").symlink_to("real.onnx")
    open_bundle(bundle)


def test_missing_file(bundle: Path) -> None:
    (bundle / "decoder.onnx").unlink()
    assert "decoder.onnx is missing" in refused(bundle)


def test_truncated_file(bundle: Path) -> None:
    data = (bundle / "step.onnx").read_bytes()
    (bundle / "step.onnx").write_bytes(data[:-1])
    assert f"step.onnx has {len(data) - 1} bytes, the manifest says {len(data)}" in refused(bundle)


@pytest.mark.parametrize("name", ["prefix.onnx", "step.onnx", "constants.safetensors", "golden.safetensors"])
def test_a_changed_byte(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert f"{name} has changed" in refused(bundle)


def test_a_size_is_checked_before_the_file_is_read(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"]["step.onnx"].update(size_bytes=1 << 60))
    assert "step.onnx has" in refused(bundle)


def test_a_file_that_is_not_hashed(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].pop("step.onnx"))
    assert "does not hash: step.onnx" in refused(bundle)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda steps: steps[1].update(past_global=2), "past is 2 and 1 tokens"),
        (lambda steps: steps[1].update(tokens=5), "tokens 5 is not 2 x 2"),
        (lambda steps: steps[1].update(keep=5), "keeps 5 of 4"),
        (lambda steps: steps[0].update(last=True), "last is True"),
        (lambda steps: steps[2].update(scale=1), "scales ascend"),
        (lambda steps: steps[2].update(capture_span_delta=True), "captures span deltas but keeps 5"),
    ],
)
def test_a_schedule_that_would_read_what_was_never_written(bundle: Path, change: Any, text: str) -> None:
    edit(bundle, lambda m: change(m["schedules"]["object"]["steps"]))
    assert text in refused(bundle)


def test_a_label_without_a_schedule(bundle: Path) -> None:
    edit(bundle, lambda m: m["schedules"].pop("plain"))
    assert "'glow' is of prompt class 'plain', which has no schedule" in refused(bundle)


def test_a_constant_that_is_not_there(bundle: Path) -> None:
    edit(bundle, lambda m: m["schedules"]["plain"]["steps"][0]["constants"].update(up="up_9"))
    with pytest.raises(BundleError, match="scale 0 needs 'up_9'"):
        _ = open_bundle(bundle).constants


def test_constants_that_are_no_safetensors_file(bundle: Path) -> None:
    (bundle / "constants.safetensors").write_bytes(b"nonsense")
    tiny.write_manifest(bundle, json.loads((bundle / "manifest.json").read_text()))
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        _ = open_bundle(bundle).constants
