"""The TensorRT target and builder as far as they can be checked with no GPU.

What stands for TensorRT here is a mock: it shows that our calls follow the binding's signatures and that mistakes are
refused, and nothing of what TensorRT does.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import types
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from tests.runtime import tiny
from toprovar.errors import BundleError, TargetError
from toprovar.plugins.device import Gpu
from toprovar.profiles.manifest import GraphInfo, TargetInfo, TensorInfo
from toprovar.profiles.noise import scale_noise
from toprovar.runtime import cuda
from toprovar.runtime.bundle import open_bundle
from toprovar.runtime.loop import Loop

GPU = Gpu("Mock GPU", "9.0", "13.0")
SHAPES = ("least", "best", "most")


class TensorIOMode(Enum):
    INPUT = 0
    OUTPUT = 1


class Context:
    """Follows the binding: a shape, then an address for every tensor, then a run."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.device_memory = 0
        self.profile: int | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return stream_handle != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = self.engine.get_tensor_shape(name)
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile) if -1 in fixed else [fixed] * 3
        self.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.expected_shape(name, self)

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.engine.log.append((self.engine.name, dict(self.shapes), dict(self.addresses), self.device_memory))
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        return set(self.addresses) == names and stream_handle != 0


class Engine:
    def __init__(self, name: str, info, profiles, dtypes, log, sizes) -> None:
        self.name, self.log, self._profiles, self._dtypes, self._sizes = name, log, profiles, dtypes, sizes
        self._inputs, self._outputs = {t.name: t for t in info.inputs}, {t.name: t for t in info.outputs}
        self.num_io_tensors = len(self._inputs) + len(self._outputs)
        self.num_optimization_profiles = len(profiles)
        self.device_memory_size = 1000

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return self._dtypes.get(name, {**self._inputs, **self._outputs}[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As the builder leaves it: -1 where sizes differ between profiles."""
        found = {getattr(one, key)[name] for one in self._profiles for key in ("least", "greatest")}
        return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*found, strict=True))

    def get_tensor_profile_shape(self, name: str, profile_index: int):
        assert -1 in self.get_tensor_shape(name), f"{name} has a fixed shape and is in no profile"
        return [getattr(self._profiles[profile_index], key)[name] for key in ("least", "best", "greatest")]

    def expected_shape(self, name: str, context: Context) -> tuple[int, ...]:
        """Sizes by name, from the shapes that were set; N of the next scale from nothing, so as the loop has it."""
        known = {}
        for tensor in self._inputs.values():
            known |= {
                dim: size
                for dim, size in zip(tensor.shape, context.shapes[tensor.name], strict=True)
                if isinstance(dim, str)
            }
        known = {**self._sizes, **known}
        if name == "next_x":
            return (context.shapes["down"][1], known["R"], tiny.WIDTH)
        return tuple(known[dim] if isinstance(dim, str) else dim for dim in self._outputs[name].shape)

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


class FakeCuda:
    """Memory on the host; captures nothing, and counts."""

    stream = 77

    def __init__(self) -> None:
        self.arrays, self.allocations, self.launches = [], 0, 0
        self.recording = False

    def allocate(self, size_bytes: int) -> int:
        self.allocations += 1
        self.arrays.append(np.zeros(size_bytes + 64, np.uint8))
        return (self.arrays[-1].ctypes.data + 63) // 64 * 64

    def write(self, address: int, host: int, size_bytes: int) -> None:
        ctypes.memmove(address, host, size_bytes)

    def read(self, host: int, address: int, size_bytes: int) -> None:
        ctypes.memmove(host, address, size_bytes)

    def synchronize(self) -> None: ...

    def elapsed(self, run, count: int) -> list[float]:
        for _ in range(count):
            run()
        return [0.5] * count

    def begin_capture(self) -> None:
        self.recording = True

    def end_capture(self):
        self.recording = False

        def launch() -> None:
            self.launches += 1

        return launch


@pytest.fixture
def mock(monkeypatch, tmp_path):
    """A bundle with engine files and a TensorRT that 'runs' them."""
    root = tiny.write_bundle(tmp_path / "tiny.bundle")
    engines = {}
    (root / "engines").mkdir()
    for name in ("prefix", "step", "advance", "decoder"):
        (root / "engines" / f"{name}.engine").write_text(name)
        engines[name] = f"engines/{name}.engine"
    document = json.loads((root / "manifest.json").read_text())
    info = {"engines": engines, "version": "8.6.0", "gpu": GPU.name, "compute_capability": "9.0", "batch": 1}
    document["targets"]["tensorrt"] = info
    for file in engines.values():
        content = (root / file).read_bytes()
        document["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    (root / "manifest.json").write_text(json.dumps(document))

    module = types.ModuleType("tensorrt")
    module.__version__ = "8.6.0"
    module.TensorIOMode = TensorIOMode
    module.Logger = lambda severity: severity
    module.Logger.WARNING = 2
    for name in ("float32", "float16", "int32", "bool"):
        setattr(module, name, name)
    log: list = []
    state = types.SimpleNamespace(
        root=root, module=module, log=log, cuda=FakeCuda(), dtypes={}, drop_profiles=False, graphs={}
    )

    def cut_step() -> None:
        """Two engines in place of that of `step`; `between` goes from one to the other."""
        step = open_bundle(root).manifest.graphs["step"]
        between = TensorInfo(name="between", dtype="float32", shape=("N", "R", tiny.WIDTH))
        rest = tuple(tensor for tensor in step.inputs if tensor.name != "x")
        state.graphs["step"] = GraphInfo(file=step.file, inputs=step.inputs[:1], outputs=(between,))
        assert step.inputs[0].name == "x"
        state.graphs["step.1"] = GraphInfo(file=step.file, inputs=(*rest, between), outputs=step.outputs)
        document = json.loads((root / "manifest.json").read_text())
        document["targets"]["tensorrt"]["engines"]["step.1"] = "engines/step.1.engine"
        (root / "engines" / "step.1.engine").write_text("step.1")
        digest = hashlib.sha256(b"step.1").hexdigest()
        document["files"]["engines/step.1.engine"] = {"sha256": digest, "size_bytes": 6}
        (root / "manifest.json").write_text(json.dumps(document))

    state.cut_step = cut_step

    class Runtime:
        def __init__(self, logger) -> None: ...

        def deserialize_cuda_engine(self, serialized_engine):
            name = bytes(serialized_engine).decode()
            bundle = open_bundle(root)
            manifest = bundle.manifest
            from toprovar.exporter.engine import shape_profiles

            constants = {key: value.shape for key, value in bundle.constants.items()}
            graph = state.graphs.get(name) or manifest.graphs[name]
            profiles = shape_profiles(
                graph, name.split(".")[0], manifest.schedules, constants, manifest.model, manifest.condition
            )
            sizes = {"B": 1, "R": 2}
            return Engine(name, graph, profiles[: 1 if state.drop_profiles else None], state.dtypes, log, sizes)

    module.Runtime = Runtime
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("toprovar.runtime.tensorrt.describe_gpu", lambda device: GPU)
    monkeypatch.setattr("toprovar.runtime.tensorrt.load_library", lambda trt: Path("plugins.so"))
    monkeypatch.setattr("toprovar.runtime.tensorrt.noise_of", lambda path: scale_noise)
    monkeypatch.setattr("toprovar.runtime.tensorrt.open_cuda", lambda device: state.cuda)
    return state


def _target(mock, **options):
    from toprovar.runtime.tensorrt import open

    return open(open_bundle(mock.root), **options)


def test_every_scale_is_bound_captured_and_launched_without_allocating(mock):
    target = _target(mock)
    loop = Loop(open_bundle(mock.root), target, 1)
    bound = len(mock.log)
    runs = 1 + 2 * sum(len(s.steps) for s in open_bundle(mock.root).manifest.schedules.values()) + 2
    assert bound == 2 * runs  # once to warm up and once to capture
    allocations = mock.cuda.allocations
    for _ in range(3):
        loop.run("object", {"labels": np.array([0], np.int32)}, [1])
    assert mock.cuda.allocations == allocations
    assert mock.cuda.launches == 3 * (1 + 2 * 3 + 1)
    assert len(mock.log) == bound, "nothing is enqueued by the host"
    assert "8.6.0 Mock GPU" in target.description and "CUDA graphs" in target.description
    assert {entry[3] for entry in mock.log} == {target._scratch}, "engines share their working memory"


def test_stages_of_a_graph_run_behind_each_other_and_share_memory_between_scales(mock):
    mock.cut_step()
    target = _target(mock)
    loop = Loop(open_bundle(mock.root), target, 1)
    names = [entry[0] for entry in mock.log]
    assert [names[i + 1] for i, name in enumerate(names) if name == "step"] == ["step.1"] * names.count("step")
    turn = loop.turns("object")[-1].step
    assert [stage.engine for stage in turn.stages] == ["step", "step.1"]
    assert turn.stages[1].inputs["between"].shape == (turn.stages[0].inputs["x"].shape[0], 2, tiny.WIDTH)
    between = {addresses["between"] for name, _, addresses, _ in mock.log if name in ("step", "step.1")}
    assert len(between) == 1, "all scales, and both stages"
    largest = max(step.tokens for one in open_bundle(mock.root).manifest.schedules.values() for step in one.steps)
    assert any(len(array) == largest * 2 * tiny.WIDTH * 4 + 64 for array in mock.cuda.arrays)
    launches = mock.cuda.launches
    loop.run("object", {"labels": np.array([0], np.int32)}, [1])
    assert mock.cuda.launches == launches + 1 + 2 * 3 + 1, "a step is one CUDA graph, whatever its stages"


def test_without_cuda_graphs_the_host_enqueues(mock):
    loop = Loop(open_bundle(mock.root), _target(mock, cuda_graphs=False), 1)
    bound = len(mock.log)
    loop.run("plain", {"labels": np.array([2], np.int32)}, [1])
    assert mock.cuda.launches == 0 and len(mock.log) == bound + 1 + 2 * 2 + 1


def test_a_step_writes_its_keys_behind_the_past_it_reads(mock):
    Loop(open_bundle(mock.root), _target(mock), 1)
    row = 2 * tiny.HEADS * tiny.HEAD_DIM * 4
    for name, shapes, addresses, _ in mock.log:
        if name == "step":
            for layer in range(3):
                past = shapes[f"past_k_{layer}"][0]
                assert addresses[f"new_k_{layer}"] == addresses[f"past_k_{layer}"] + past * row


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": "8.6.1"}, "built for TensorRT 8.6.1, here is 8.6.0"),
        ({"version": "10.16.1.11"}, "built for TensorRT 10.16.1.11"),
        ({"gpu": "Other GPU"}, "built for GPU Other GPU, here is Mock GPU"),
        ({"compute_capability": "8.9"}, "built for compute capability 8.9, here is 9.0"),
        ({"engines": {}}, "has no TensorRT engine of prefix"),
    ],
)
def test_engines_of_another_machine_are_refused(mock, change, expected):
    bundle = open_bundle(mock.root)
    info = TargetInfo.model_validate({**bundle.manifest.targets["tensorrt"].model_dump(), **change})
    bundle.manifest.targets["tensorrt"] = info
    from toprovar.runtime.tensorrt import open

    with pytest.raises(TargetError, match=r"tensorrt|TensorRT|engines") as caught:
        open(bundle)
    assert expected in str(caught.value)


def test_a_bundle_without_engines_names_the_command_that_adds_them(mock, tmp_path):
    from toprovar.runtime.tensorrt import open

    with pytest.raises(TargetError, match=r"python -m toprovar.exporter.engine_tensorrt"):
        open(open_bundle(tiny.write_bundle(tmp_path / "plain.bundle")))


def test_an_engine_of_other_types_or_shapes_is_refused(mock):
    mock.dtypes["logits"] = "float16"
    with pytest.raises(BundleError, match="takes logits as float16, its graph as float32"):
        Loop(open_bundle(mock.root), _target(mock), 1)
    mock.dtypes.clear()
    mock.drop_profiles = True
    with pytest.raises(TargetError, match="has no profile for"):
        Loop(open_bundle(mock.root), _target(mock), 1)


def test_without_tensorrt_the_error_says_where_it_comes_from(mock, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TargetError, match="use an NVIDIA container"):
        _target(mock)


def test_runs_are_timed_between_two_events(monkeypatch):
    """On a driver that notes what it is asked; an event is a number, and so is the time between two."""
    said, events = [], iter(range(10, 100, 3))

    def driver(name):
        def call(*arguments):
            said.append((name, *(one for one in arguments if isinstance(one, int))))
            if name in ("cuStreamCreate", "cuEventCreate"):
                arguments[0]._obj.value = 7 if name == "cuStreamCreate" else next(events)
            if name == "cuEventElapsedTime":
                arguments[0]._obj.value = arguments[2] - arguments[1]
            return 0

        return call

    fake = types.SimpleNamespace(**{name: driver(name) for name in cuda._SIGNATURES})
    fake.cuDevicePrimaryCtxRetain = lambda pointer, _: setattr(pointer._obj, "value", 1)
    monkeypatch.setattr(cuda, "_driver", lambda: fake)
    gpu = cuda.Cuda()
    said.clear()
    assert gpu.elapsed(lambda: said.append(("run",)), 2) == [3.0, 3.0]
    queued = [one for one in said if one[0] in ("cuEventRecord", "run", "cuStreamSynchronize")]
    record = "cuEventRecord"
    assert queued == [
        (record, 10, 7), ("run",), (record, 13, 7), (record, 16, 7), ("run",), (record, 19, 7), ("cuStreamSynchronize", 7),
    ]  # fmt: skip
    assert [one[1] for one in said if one[0] == "cuEventDestroy_v2"] == [10, 13, 16, 19]
