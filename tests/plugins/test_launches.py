"""The C++ core launches what the Python launchers launch: same kernels, grids and parameters, byte by byte.

Both run on a stand-in for the CUDA driver that writes down every launch (fake_cuda.c), so this needs no GPU. It says
nothing about what the kernels compute.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from toprovar.kernels import contract, hopper, tuning

pytestmark = pytest.mark.cpp

WORKSPACE, OUTPUT, SECOND_OUTPUT = 0x7000000000, 0x7100000000, 0x7101000000
ADDRESSES = [0x7200000000 + i * 0x10000000 for i in range(6)]


class Fake:
    """The stand-in driver and the programs that run on it."""

    def __init__(self, folder: Path, cubins: Path, core: Path) -> None:
        self.folder, self.cubins = folder, cubins
        self.program = core / "src" / "toprovar" / "plugins" / "cpp" / "toprovar_drive_ops"
        source = Path(__file__).with_name("fake_cuda.c")
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libcuda.so.1", source], check=True
        )
        sizes = {"pointer": 8, "int32": 4, "float32": 4}
        lines = {}
        for entry in json.loads((cubins / "index.json").read_text())["kernels"]:
            if "parameters" in entry:
                lines[entry["symbol"]] = [sizes[parameter["type"]] for parameter in entry["parameters"]]
        fields = {
            hopper.FORWARD_SYMBOL: ([128] * 9, hopper._ForwardArguments),
            hopper.FINISH_SYMBOL: ([], hopper._FinishArguments),
            hopper.SMALL_SYMBOL: ([], hopper._SmallArguments),
        }
        for symbol, (maps, structure) in fields.items():
            lines[symbol] = maps + [ctypes.sizeof(field[1]) for field in structure._fields_]
        text = "\n".join(f"{symbol} {' '.join(map(str, line))}" for symbol, line in lines.items())
        (folder / "parameters").write_text(text + "\n")

    def _run(
        self, command: list[str], capability: int, **extra: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log = self.folder / "log"
        log.write_text("")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "FAKE_CUDA_LOG": str(log),
            "FAKE_CUDA_PARAMETERS": str(self.folder / "parameters"),
            "FAKE_CUDA_CAPABILITY": str(capability),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
            **extra,
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done, log.read_text().splitlines()

    def core(self, capability: int, plugin: str, number: float, integer: int, *inputs: str, **extra: str):
        """(workspace bytes or the error, launches) of the C++ core."""
        command = [str(self.program), plugin, repr(number), str(integer), hex(WORKSPACE), hex(OUTPUT), *inputs]
        done, launches = self._run(command, capability, **extra)
        return (int(done.stdout) if done.returncode == 0 else done.stderr.strip()), launches

    def python(self, capability: int, script: str) -> list[str]:
        done, launches = self._run([sys.executable, "-c", script], capability)
        assert done.returncode == 0, done.stderr
        return launches


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory, cubins: Path, core_build: Path) -> Fake:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return Fake(tmp_path_factory.mktemp("fake"), cubins, core_build)


def _input(index: int, dtype: str, *shape: int) -> str:
    return f"{ADDRESSES[index]:#x}:{contract.ONNX_DTYPES[dtype]}:{','.join(map(str, shape))}"


def _attention_inputs(dtype: str, n: int, past: int, fresh: int, rows: int, heads: int, head_dim: int) -> list[str]:
    lengths = (n, past, past, fresh, fresh)
    return [_input(i, dtype, length, rows, heads, head_dim) for i, length in enumerate(lengths)]


PROBLEMS = [
    # n, past, fresh, rows, heads, head_dim
    (1, 0, 1, 2, 16, 128),
    (64, 341, 64, 2, 16, 64),
    (200, 333, 200, 2, 30, 96),
    (4096, 6425, 4096, 2, 16, 128),
    (819, 2131, 819, 4, 12, 80),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("plugin", ["EntropyAttention", "CachedAttention"])
def test_triton_attention_is_launched_as_the_loader_launches_it(fake, plugin, problem):
    n, past, fresh, rows, heads, head_dim = problem
    mean = plugin == "EntropyAttention"
    workspace, found = fake.core(80, plugin, 0.125, int(mean), *_attention_inputs("float16", *problem))
    script = f"""
from pathlib import Path
from toprovar.kernels.loader import AttentionLaunch, Library
launch = AttentionLaunch(Library(Path({str(fake.cubins)!r})), 80, "float16", {rows}, {heads}, {head_dim}, {n}, {past},
    {fresh}, 0.125, {"mean" if mean else "none"!r}, sm_count=132)
names = ("q", "past_k", "past_v", "new_k", "new_v")
launch.run({{**dict(zip(names, {ADDRESSES[:5]})), "out": {OUTPUT}, "entropy": {SECOND_OUTPUT if mean else 0}}}, {WORKSPACE})
assert launch.workspace_bytes <= {workspace}, (launch.workspace_bytes, {workspace})
"""
    expected = fake.python(80, script)
    assert len(found) >= 1
    assert found == expected


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("plugin", ["EntropyAttention", "CachedAttention"])
def test_hopper_attention_is_launched_as_hopper_py_launches_it(fake, plugin, problem):
    n, past, fresh, rows, heads, head_dim = problem
    mean = plugin == "EntropyAttention"
    workspace, found = fake.core(90, plugin, 0.125, int(mean), *_attention_inputs("bfloat16", *problem))
    entropy = "mean" if mean else "none"
    variant, plan = hopper.choose("bfloat16", head_dim, n, past, fresh, rows, heads, 132, entropy=entropy)
    parts = 4 * (plan.part_out_floats + plan.part_stats_floats)
    assert parts + (4 * n * rows * heads if mean else 0) <= workspace
    scale = 0.125 * math.log2(math.e)
    sizes = {"queries": n, "past": past, "fresh": fresh, "row_heads": rows * heads, "heads": heads, "scale_log2": scale}
    tensors = dict(zip(("q", "past_k", "past_v", "new_k", "new_v"), ADDRESSES, strict=False))
    sizes |= {"out": OUTPUT, "mean_entropy": SECOND_OUTPUT if mean else 0, "lse": 0}
    if n <= hopper.SMALL_QUERIES and past + fresh <= hopper.SMALL_KEYS:
        sizes |= {"head_entropy": WORKSPACE if mean else 0}
        shape = (rows * heads, hopper.SMALL_THREADS, variant.small_shared_bytes, 0)
        expected = [_line(hopper.SMALL_SYMBOL, shape, [], hopper._SmallArguments, sizes | tensors)]
        if mean:
            sizes |= {"part_out": 0, "part_stats": 0, "full_tiles": rows * heads, "run": 0}
            shape = (rows * -(-n // 32), hopper.FINISH_THREADS, 0, 1)
            expected.append(_line(hopper.FINISH_SYMBOL, shape, [], hopper._FinishArguments, sizes))
        assert found == expected
        return
    stats = WORKSPACE + 4 * plan.part_out_floats
    sizes |= {"part_out": WORKSPACE, "part_stats": stats, "full_tiles": plan.full_tiles, "run": plan.run}
    sizes |= {"head_entropy": stats + 4 * plan.part_stats_floats if mean else 0}

    def tensor_map(address: int, length: int, box: int) -> bytes:
        numbers = [hopper._TENSOR_MAP_DTYPE["bfloat16"], 3, address, head_dim, rows * heads, length]
        return struct.pack("<16q", *numbers, 2 * head_dim, 2 * head_dim * rows * heads, 64, 1, box, 3, 0, 3, 3, 0)

    pieces = list(zip(ADDRESSES[1:5], (past, past, fresh, fresh), strict=True))
    if not past:  # the maps of an empty piece are the other piece's
        pieces[:2] = pieces[2:]
    maps = [tensor_map(ADDRESSES[0], n, variant.tile_m)]
    for box in (variant.tile_n, hopper.SEAM):
        maps += [tensor_map(address, length, box) for address, length in pieces]
    shape = (plan.ctas, variant.threads, variant.shared_bytes, 0)
    expected = [_line(hopper.FORWARD_SYMBOL, shape, maps, hopper._ForwardArguments, sizes)]
    if plan.finish_blocks:
        shape = (plan.finish_blocks, hopper.FINISH_THREADS, 0, 1)
        expected.append(_line(hopper.FINISH_SYMBOL, shape, [], hopper._FinishArguments, sizes))
    assert found == expected


def _line(
    symbol: str,
    shape: tuple[int, int, int, int],
    maps: list[bytes],
    structure: type[ctypes.Structure],
    values: dict[str, float],
) -> str:
    """What fake_cuda.c writes down for (grid, threads, shared bytes, launch attributes) and these parameters."""
    grid, threads, shared, attributes = shape
    words = [one[::-1].hex() for one in maps]
    words += [bytes(field[1](values[field[0]]))[::-1].hex() for field in structure._fields_]
    text = f"{symbol} grid {grid} 1 1 block {threads} 1 1 shared {shared} attributes {attributes} parameters "
    return text + " ".join(words)


def test_hopper_parameters_are_those_of_the_source():
    text = hopper.SOURCE.read_text(encoding="utf-8")
    for symbol, maps, structure in (
        (hopper.FORWARD_SYMBOL, 9, hopper._ForwardArguments),
        (hopper.FINISH_SYMBOL, 0, hopper._FinishArguments),
        (hopper.SMALL_SYMBOL, 0, hopper._SmallArguments),
    ):
        declaration = text[text.rindex(f"{symbol}(") :].split("{")[0]
        names = [one.split()[-1].strip("*)") for one in declaration.split("(", 1)[1].split(",")]
        assert names[maps:] == [field[0] for field in structure._fields_]
        assert all("TensorMap" in one for one in declaration.split("(", 1)[1].split(",")[:maps])


def _token_script(fake: Fake, query: str, arguments: str, sizes: str) -> str:
    return f"""
from pathlib import Path
from toprovar.kernels.loader import Library
library = Library(Path({str(fake.cubins)!r}))
library.load(library.find({query})["name"]).launch({arguments}, {sizes})
"""


@pytest.mark.parametrize(("n", "keep"), [(1, 1), (256, 77), (1024, 1024), (4096, 819), (10000, 3)])
def test_selection_is_launched_with_the_smallest_block_that_holds_the_tokens(fake, n, keep):
    inputs = (_input(0, "float32", 2, n), _input(1, "int32", keep))
    workspace, found = fake.core(90, "SelectTokens", 0.0, 0, *inputs)
    block = next(size for size in tuning.SELECT_BLOCKS if n <= size)
    arguments = f'{{"entropy": {ADDRESSES[0]}, "indices": {OUTPUT}, "n_tokens": {n}, "keep": {keep}}}'
    expected = fake.python(
        90, _token_script(fake, f"kernel='select_kernel', arch=90, block={block}", arguments, "images=2")
    )
    assert (workspace, found) == (0, expected)


def test_gather_is_launched_as_the_loader_launches_it(fake):
    inputs = (_input(0, "float16", 100, 4, 1024), _input(1, "int32", 2, 33))
    workspace, found = fake.core(90, "GatherTokens", 0.0, 0, *inputs)
    arguments = (
        f'{{"x": {ADDRESSES[0]}, "indices": {ADDRESSES[1]}, "kept": {OUTPUT}, "n_tokens": 100, "rows": 4, "images": 2, '
        '"keep": 33, "width_units": 128}'
    )
    query = "op='gather_tokens', arch=90, dtype='float16'"
    expected = fake.python(90, _token_script(fake, query, arguments, "kept_rows=33 * 4, channels=1024"))
    assert (workspace, found) == (0, expected)


@pytest.mark.parametrize(("cached", "source"), [(0, (4, 5)), (1, (4, 5)), (1, (7, 9)), (2, (19, 5)), (2, (4, 20))])
def test_restore_and_scatter_are_launched_as_the_loader_launches_them(fake, cached, source):
    h, w, (hc, wc) = 7, 9, source
    inputs = [_input(0, "float32", h * w, 4, 64), _input(1, "float32", 20, 4, 64), _input(2, "int32", 2, 20)]
    if cached:
        inputs += [_input(3, "float32", hc * wc, 4, 64), _input(4, "float32", h, hc), _input(5, "float32", w, wc)]
    workspace, found = fake.core(90, "RestoreTokens" if cached else "ScatterTokens", 0.0, 0, *inputs)
    grid = (h, w, hc, wc) if cached else (h * w, 1, 1, 1)
    spans = [
        max(-(-(i + 1) * s // n) - i * s // n for i in range(n)) for n, s in ((grid[0], grid[2]), (grid[1], grid[3]))
    ]
    arguments = (
        f'{{"x": {ADDRESSES[0]}, "kept": {ADDRESSES[1]}, "indices": {ADDRESSES[2]}, "cache": {ADDRESSES[3 if cached else 0]}, '
        f'"y": {OUTPUT}, "rows": 4, "images": 2, "keep": 20, "width_units": 8, '
        f'"grid_h": {grid[0]}, "grid_w": {grid[1]}, "cache_h": {grid[2]}, "cache_w": {grid[3]}, '
        f'"span_h": {spans[0]}, "span_w": {spans[1]}}}'
    )
    query = f"op={'restore_tokens' if cached else 'scatter_tokens'!r}, arch=90, dtype='float32', cache={cached}"
    expected = fake.python(90, _token_script(fake, query, arguments, f"token_rows={h * w * 4}, channels=64"))
    assert (workspace, found) == (0, expected)


# --- errors: what failed, what was found, what is valid, what to do ---------------------------------------------------


def test_a_gpu_without_kernels_is_named_with_what_there_is(fake):
    error, launches = fake.core(75, "SelectTokens", 0.0, 0, _input(0, "float32", 2, 8), _input(1, "int32", 3))
    assert launches == []
    assert error == (
        "this GPU is sm_75, the plugin library holds kernels for sm_80, sm_90; build it with -DTOPROVAR_CUDA_ARCHS=75"
    )


def test_a_newer_minor_architecture_runs_the_code_of_an_older_one_below_sm_90(fake):
    for capability in (86, 87, 89):
        workspace, launches = fake.core(
            capability, "SelectTokens", 0.0, 0, _input(0, "float32", 2, 8), _input(1, "int32", 3)
        )
        assert (workspace, len(launches)) == (0, 1)
    assert "sm_103" in fake.core(103, "SelectTokens", 0.0, 0, _input(0, "float32", 2, 8), _input(1, "int32", 3))[0]


@pytest.mark.parametrize(
    ("plugin", "number", "integer", "inputs", "expected"),
    [
        ("SelectTokens", 0.0, 0, (_input(0, "float32", 2, 8), _input(1, "int32", 9)), "keep 9 of 8 tokens"),
        ("SelectTokens", 0.0, 0, (_input(0, "float32", 2, 20000), _input(1, "int32", 9)), "at most 16384 tokens"),
        ("GatherTokens", 0.0, 0, (_input(0, "float16", 8, 2, 30), _input(1, "int32", 1, 4)), "multiples of 8"),
        ("GatherTokens", 0.0, 0, (_input(0, "float16", 8, 3, 32), _input(1, "int32", 2, 4)), "valid are multiples"),
        ("GatherTokens", 0.0, 0, (_input(0, "float16", 8, 32), _input(1, "int32", 2, 4)), "has 2 dimensions, valid are 3"),
        ("EntropyAttention", 0.125, 2, _attention_inputs("float16", 4, 0, 4, 2, 2, 64), "entropy is 2; valid is 0 or 1"),
        ("CachedAttention", 0.125, 1, _attention_inputs("float16", 4, 0, 4, 2, 2, 64), "entropy is 1; valid is 0"),
        ("EntropyAttention", float("nan"), 1, _attention_inputs("float16", 4, 0, 4, 2, 2, 64), "scale is nan"),
        ("EntropyAttention", 0.125, 1, _attention_inputs("float16", 4, 0, 4, 2, 2, 72), "heads of 64, 80, 96 or 128"),
        ("EntropyAttention", 0.125, 1, _attention_inputs("float16", 4, 0, 0, 2, 2, 64), "no keys"),
        (
            "RestoreTokens",
            0.0,
            0,
            (
                _input(0, "float32", 9, 2, 8), _input(1, "float32", 2, 2, 8), _input(2, "int32", 1, 2),
                _input(3, "float32", 4, 2, 8), _input(4, "float32", 3, 3), _input(5, "float32", 3, 2),
            ),
            "cache has 4 tokens",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_before_anything_is_launched(fake, plugin, number, integer, inputs, expected):
    error, launches = fake.core(90, plugin, number, integer, *inputs)
    assert launches == []
    assert expected in error


def test_sizes_that_must_be_equal_are_compared(fake):
    inputs = _attention_inputs("float16", 4, 8, 4, 2, 2, 64)
    inputs[4] = _input(4, "float16", 5, 2, 2, 64)
    error, launches = fake.core(90, "EntropyAttention", 0.125, 1, *inputs)
    assert "size L is 4 in input new_k and 5 in input new_v" in error
    assert launches == []


def test_a_misaligned_tensor_is_refused(fake):
    error, _ = fake.core(90, "SelectTokens", 0.0, 0, f"{ADDRESSES[0] + 4:#x}:1:2,8", _input(1, "int32", 3))
    assert "entropy is at address" in error and "multiples of 16" in error


def test_a_thread_without_a_context_is_told_so(fake):
    inputs = (_input(0, "float32", 2, 8), _input(1, "int32", 3))
    error, _ = fake.core(90, "SelectTokens", 0.0, 0, *inputs, FAKE_CUDA_NO_CONTEXT="1")
    assert error == "no CUDA context is current in this thread; call cudaSetDevice before TensorRT"
