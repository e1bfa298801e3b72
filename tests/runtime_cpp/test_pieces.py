"""Pieces of the C++ runtime give what their Python originals give: hashes, noise, rounding, files."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.runtime import tiny
from toprovar.profiles.noise import scale_noise, uniform
from toprovar.runtime.pictures import to_bytes

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="module")
def ask(programs: Path):
    """Lines in, lines out."""

    def call(*lines: str) -> list[str]:
        command = [programs / "toprovar_unit_tests"]
        done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return call


def _floats(line: str) -> np.ndarray:
    return np.array([float.fromhex(word) for word in line.split()], np.float32)


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1 << 20, (1 << 20) + 17])
def test_sha256(ask, tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert ask(f"sha256 {tmp_path / 'file'}") == [hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize(
    ("seed", "scale", "count"), [(0, 0, 1), (1, 0, 5), (2**32 + 7, 3, 64), (2**64 - 1, 12, 1001), (5, 2**32 - 1, 9)]
)
def test_noise_is_that_of_python_bit_by_bit(ask, seed, scale, count):
    (line,) = ask(f"noise {seed} {scale} {count}")
    assert np.array_equal(_floats(line), uniform(seed, scale, count))


def test_noise_of_a_batch_is_laid_out_as_python_lays_it_out(ask):
    (line,) = ask("batchnoise 4 7 5 3 9 2000000000000")
    assert np.array_equal(_floats(line).reshape(7, 3, 5), scale_noise([3, 9, 2000000000000], 4, 7, 5))


def test_threads_draw_a_large_scale_in_parts(ask):
    (line,) = ask("batchnoise 9 333 301 5 6")
    assert np.array_equal(_floats(line).reshape(333, 2, 301), scale_noise([5, 6], 9, 333, 301))


def test_half_and_bfloat_round_to_nearest_even(ask):
    random = np.random.default_rng(0)
    values = np.concatenate(
        [
            [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e30, -1e30, np.inf, -np.inf, 6e-8, 2.9e-8, 3e-8, 6.1e-5],
            [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, 1e-40],
            random.standard_normal(200) * 10.0 ** random.integers(-9, 6, 200),
        ]
    ).astype(np.float32)
    text = " ".join(float(value).hex() for value in values)
    half, bfloat = ask(f"half {text}", f"bfloat {text}")
    words = half.split()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert [int(word, 16) for word in words[::2]] == expected.view(np.uint16).tolist()
    assert np.array_equal(_floats(" ".join(words[1::2])), expected.astype(np.float32))
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert [int(word, 16) for word in bfloat.split()[::2]] == rounded.tolist()


def test_nan_stays_nan(ask):
    for line in ask("half nan", "bfloat nan"):
        assert line.split()[1].lstrip("-") == "nan"


def test_safetensors_are_read_as_they_were_written(ask, tmp_path):
    tensors = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b/c": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 7), np.float16),
        "scalar": np.array(3, np.int32),
    }
    save_file(tensors, tmp_path / "file", metadata={"key": "value"})
    (line,) = ask(f"safetensors {tmp_path / 'file'}")
    expected = [
        f"{name} {value.dtype} {list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
        for name, value in sorted(tensors.items())
    ]
    assert line.strip().rstrip(";").split("; ") == expected


def _file(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "header does not fit"),
        (b"\x01\x02", "header does not fit"),
        (_file({}, size=2**63), "header does not fit"),
        (_file({}, size=10), "header does not fit"),
        (_file(b"{nonsense"), "no readable safetensors"),
        (_file([1]), "no JSON object"),
        (_file(b'{"a": 3}'), "tensor 'a'"),
        (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 8), "where 8 bytes belong"),
        (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4), "bytes 0 to 8 of 4"),
        (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, b"\0" * 8), "bytes 8 to 4"),
        (_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 8), "negative"),
        (_file({"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}}, b"\0" * 8), "too large"),
        (_file({"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}, b"\0" * 8), "element type F8"),
        (_file({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 8), "data_offsets"),
    ],
)
def test_a_broken_safetensors_file_is_refused(ask, tmp_path, content, expected):
    (tmp_path / "file").write_bytes(content)
    (line,) = ask(f"safetensors {tmp_path / 'file'}")
    assert line.startswith("error: ") and expected in line


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (64, 33)])
def test_a_png_is_read_back_as_the_pixels_that_python_makes(ask, tmp_path, height, width):
    image_module = pytest.importorskip("PIL.Image")
    assert ask(f"png {tmp_path / 'a.png'} {height} {width}") == ["written"]
    values = (np.arange(3 * height * width) % 307).astype(np.float32) / np.float32(300) - np.float32(0.01)
    found = np.asarray(image_module.open(tmp_path / "a.png"))
    assert found.shape == (height, width, 3)
    assert np.array_equal(found, to_bytes(values.reshape(3, height, width)))
    assert not list(tmp_path.glob("*.part"))


def test_a_png_that_cannot_be_written_is_an_error(ask, tmp_path):
    (line,) = ask(f"png {tmp_path / 'nowhere' / 'a.png'} 2 2")
    assert "cannot be written" in line


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.write_bundle(tmp_path / "tiny.bundle")


def test_a_bundle_is_opened(ask, bundle):
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert ask(f"bundle {bundle}") == [f"tiny 7 files 1 spans {digest}"]


def _edit(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _spoil_unknown_key(m):
    m["model"]["surprise"] = 1


def _spoil_schema(m):
    m["schema"] = "toprovar.bundle/2"


def _spoil_contract(m):
    m["contract_version"] = 99


def _spoil_outside(m):
    m["files"]["../outside"] = {"sha256": "0" * 64, "size_bytes": 0}


def _spoil_absolute(m):
    m["files"]["/etc/passwd"] = {"sha256": "0" * 64, "size_bytes": 0}


def _spoil_size(m):
    m["files"]["step.onnx"]["size_bytes"] += 1


def _spoil_hash(m):
    m["files"]["step.onnx"]["sha256"] = "0" * 64


def _spoil_past(m):
    m["schedules"]["object"]["steps"][1]["past_detail"] = 7


def _spoil_keep(m):
    m["schedules"]["object"]["steps"][1]["keep"] = 7


def _spoil_roles(m):
    m["model"]["roles"] = "dgg"


def _spoil_constant(m):
    m["schedules"]["object"]["steps"][0]["constants"]["up"] = "missing"


def _spoil_type(m):
    m["model"]["width"] = "4"


def _spoil_negative(m):
    m["model"]["heads"] = -2


def _spoil_label(m):
    m["condition"]["labels"][0]["prompt_class"] = "nothing"


def _spoil_graph(m):
    m["graphs"]["step"]["file"] = "other.onnx"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_spoil_unknown_key, "unknown key 'surprise'"),
        (_spoil_schema, 'reads "toprovar.bundle/1"'),
        (_spoil_contract, "version 99 of the op contract"),
        (_spoil_outside, "leads outside"),
        (_spoil_absolute, "leads outside"),
        (_spoil_size, "the manifest says"),
        (_spoil_hash, "has changed since"),
        (_spoil_past, "the scales before it leave"),
        (_spoil_keep, "keep is 7; valid are 1 to 4"),
        (_spoil_roles, "g first"),
        (_spoil_constant, "needs 'missing'"),
        (_spoil_type, 'width is "4"'),
        (_spoil_negative, "heads is -2"),
        (_spoil_label, "which has no schedule"),
        (_spoil_graph, "lists no other.onnx"),
    ],
)
def test_a_spoilt_bundle_is_refused(ask, bundle, change, expected):
    _edit(bundle, change)
    (line,) = ask(f"bundle {bundle}")
    assert line.startswith("error: ") and expected in line


def test_a_link_out_of_the_bundle_is_refused(ask, bundle, tmp_path):
    (bundle / "step.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle / "step.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert "leads outside" in ask(f"bundle {bundle}")[0]


def test_what_is_no_bundle_is_refused(ask, tmp_path):
    assert "has no manifest.json" in ask(f"bundle {tmp_path}")[0]
    (tmp_path / "manifest.json").write_text("{")
    assert "parse error" in ask(f"bundle {tmp_path}")[0]
