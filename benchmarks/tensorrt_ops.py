"""The plugins alone, through real TensorRT engines: right, how fast, and well behaved.

    python benchmarks/tensorrt_ops.py cases FOLDER               with PyTorch: inputs, and what the oracle makes of them
    python benchmarks/tensorrt_ops.py run FOLDER --out OUT.json  with TensorRT's binding: engines, errors, times

The two need not be the same Python: TensorRT 8.6 has a binding for Python 3.10 and older only. Every shape is in fp16: the
scales of Infinity-2B at 1024 x 1024 as the dense model and a pruned layer see them, the embedded demo's head size, and
odd sizes. Outputs are poisoned with NaN before every run. `--few` runs a few small cases, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toprovar.errors import ToprovarError
from toprovar.kernels import contract

Array = npt.NDArray[Any]

# Tokens of each scale of Infinity at 1024 x 1024, and those of a pruned layer that keeps an eighth from 40 x 40 on.
SCALES = (1, 4, 16, 36, 64, 144, 256, 400, 576, 1024, 1600, 2304, 4096)
KEPT = (*SCALES[:10], 200, 288, 512)
QUERIES_CHECKED = 96
"""Of a large case: the oracle computes each query by itself, in float64."""


@dataclass(frozen=True)
class Case:
    """One run of one plugin. Arrays lie in FOLDER/<name>.npz: inputs by name, and expected outputs as `want_<name>`.

    `queries` are the rows of `out` and columns of `entropy` that the oracle computed; none: all.
    """

    name: str
    plugin: str
    attributes: Mapping[str, float | int]
    inputs: Mapping[str, tuple[int, ...]]
    few: bool = False
    flops: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# With PyTorch


def make_cases(folder: Path) -> None:
    """Write inputs and oracle results of every case."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.kernels.cases import attention_inputs
    from toprovar.kernels import oracle

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []

    def keep(case: Case, arrays: Mapping[str, Any]) -> None:
        np.savez(folder / f"{case.name}.npz", **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
        cases.append(case)

    sizes: list[tuple[str, int, int, int, int, int, str, bool]] = []  # name, N, P, L, H, D, distribution, entropy
    past = past_kept = 0
    for scale, (tokens, kept) in enumerate(zip(SCALES, KEPT, strict=True)):
        sizes.append((f"2b_scale{scale}", tokens, past, tokens, 16, 128, "normal", True))
        if kept < tokens:
            sizes.append((f"2b_scale{scale}_kept", kept, past_kept, kept, 16, 128, "normal", False))
        past, past_kept = past + tokens, past_kept + kept
    for n, p, new in ((1, 0, 1), (7, 3, 5), (65, 129, 67), (333, 200, 333), (129, 1000, 1)):
        for heads, dim in ((16, 128), (4, 64)):
            sizes.append((f"odd_{n}_{p}_{new}_d{dim}", n, p, new, heads, dim, "hot", True))
    for index, (name, n, p, new, heads, dim, distribution, entropy) in enumerate(sizes):
        x, scale_factor = attention_inputs(distribution, (n, p, new, 2, heads, dim), torch.float16, index)
        some = torch.randperm(n, generator=torch.Generator().manual_seed(index))[:QUERIES_CHECKED].sort().values
        moved = [tensor.to(device) for tensor in (x.q[some], *x[1:])]
        out, entropies, _ = oracle.attention_oracle(*moved, scale_factor)
        arrays = {**x._asdict(), "queries": some, "want_out": out.float()}
        if entropy:
            arrays["want_entropy"] = entropies.mean(1).float()
        inputs = {key: tuple(value.shape) for key, value in x._asdict().items()}
        attributes: dict[str, float | int] = {"scale": scale_factor} | ({"entropy": 1} if entropy else {})
        plugin = "EntropyAttention" if entropy else "CachedAttention"
        flops = 4.0 * n * (p + new) * dim * heads * 2
        keep(Case(name, plugin, attributes, inputs, few=n * (p + new) < 1 << 17, flops=flops), arrays)

    generator = torch.Generator().manual_seed(0)
    for h, w, hc, wc, k, width, few in ((64, 64, 32, 32, 512, 2048, False), (7, 9, 5, 4, 11, 264, True)):
        n, rows = h * w, 2
        scores = torch.rand(1, n, generator=generator)
        scores[0, :: max(n // 5, 1)] = scores[0, 0]  # ties
        chosen = oracle.select_oracle(scores, k)
        keep_slots = torch.zeros(k, dtype=torch.int32)
        x = torch.randn(n, rows, width, generator=generator).half()
        kept_rows = torch.randn(k, rows, width, generator=generator).half()
        cache = torch.randn(hc * wc, rows, width, generator=generator).half()
        area_rows, area_cols = oracle.area_matrix(h, hc).float(), oracle.area_matrix(w, wc).float()
        ops = {
            "SelectTokens": ({"entropy": scores, "keep_slots": keep_slots}, "indices", chosen),
            "GatherTokens": ({"x": x, "indices": chosen}, "kept", oracle.gather_oracle(x, chosen)),
            "ScatterTokens": (
                {"x": x, "kept": kept_rows, "indices": chosen},
                "y",
                oracle.scatter_oracle(x, kept_rows, chosen),
            ),
            "RestoreTokens": (
                {"x": x, "kept": kept_rows, "indices": chosen, "cache": cache, "rows": area_rows, "cols": area_cols},
                "y",
                oracle.restore_oracle(x, kept_rows, chosen, cache, area_rows, area_cols).float(),
            ),
        }
        for plugin, (given, output, wanted) in ops.items():
            inputs = {key: tuple(value.shape) for key, value in given.items()}
            keep(Case(f"{plugin}_{h}x{w}", plugin, {}, inputs, few=few), {**given, f"want_{output}": wanted})
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    print(f"{folder}: {len(cases)} cases")


# ---------------------------------------------------------------------------------------------------------------------
# With TensorRT


def one_node_graph(plugin: str, attributes: Mapping[str, float | int], path: Path, fixed: Mapping[str, int]) -> None:
    """An ONNX graph of one plugin node as the exporter writes it; axes in `fixed` have that size, all others are symbolic."""
    from onnx import TensorProto, helper, save

    from toprovar.plugins.contract_header import PLUGINS

    spec = next(one for one in PLUGINS if one.name == plugin)

    def info(tensor: contract.TensorSpec) -> Any:
        kind = {"T": TensorProto.FLOAT16}.get(tensor.dtype) or contract.ONNX_DTYPES[tensor.dtype]
        return helper.make_tensor_value_info(tensor.name, kind, [fixed.get(axis, axis) for axis in tensor.shape])

    inputs, outputs = spec.op.inputs, spec.op.outputs[: spec.outputs]
    node = helper.make_node(
        plugin,
        [tensor.name for tensor in inputs],
        [tensor.name for tensor in outputs],
        name="op",
        domain=contract.DOMAIN,
        plugin_namespace=contract.PLUGIN_NAMESPACE,
        plugin_version=contract.PLUGIN_VERSION,
        **attributes,
    )
    graph = helper.make_graph([node], plugin, [info(one) for one in inputs], [info(one) for one in outputs])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))


class Runner:
    """An engine's context with a stream, inputs and outputs of its own."""

    def __init__(self, engine: Any, arrays: Mapping[str, Array]) -> None:
        import tensorrt

        from toprovar.runtime.cuda import open_cuda

        self.cuda = open_cuda()
        self.context = engine.create_execution_context()
        self.outputs: dict[str, tuple[int, Array]] = {}
        self._memory: list[int] = []
        self.context.set_optimization_profile_async(0, self.cuda.stream)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        for name in inputs:
            host = np.ascontiguousarray(arrays[name])
            address = self._allocate(host.nbytes)
            if host.nbytes:
                self.cuda.write(address, host.ctypes.data, host.nbytes)
            if not (self.context.set_input_shape(name, host.shape) and self.context.set_tensor_address(name, address)):
                raise SystemExit(f"{name} of shape {host.shape} is refused")
        for name in names:
            if name not in inputs:
                shape = tuple(self.context.get_tensor_shape(name))
                host = np.empty(shape, tensorrt.nptype(engine.get_tensor_dtype(name)))
                address = self._allocate(host.nbytes)
                self.outputs[name] = (address, host)
                self.context.set_tensor_address(name, address)
        self.poison()

    def _allocate(self, size: int) -> int:
        self._memory.append(self.cuda.allocate(max(size, 1)))
        return self._memory[-1]

    def poison(self) -> None:
        """Every byte of every output becomes 0xff: NaN, or -1."""
        for address, host in self.outputs.values():
            self.cuda.call("cuMemsetD8Async", "poisoning", address, 0xFF, host.nbytes, self.cuda.stream)

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.cuda.stream):
            raise SystemExit("enqueue failed; TensorRT's messages above say why")

    def read(self) -> dict[str, Array]:
        for address, host in self.outputs.values():
            self.cuda.read(host.ctypes.data, address, host.nbytes)
        return {name: host.copy() for name, (_, host) in self.outputs.items()}

    def capture(self) -> Callable[[], None]:
        """The run as a CUDA graph; `enqueue` must have run before."""
        self.cuda.begin_capture()
        try:
            self.enqueue()
        finally:
            graph = self.cuda.end_capture()
        return graph

    def close(self) -> None:
        self.cuda.synchronize()
        for address in self._memory:
            self.cuda.free(address)


def errors(case: Case, arrays: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[bool, dict[str, float]]:
    """Whether a case is within the contract's tolerances, and by how much it differs."""
    tolerance, queries = contract.TOLERANCES["float16"], arrays.get("queries")
    measured: dict[str, float] = {}
    good = True
    for name, values in found.items():
        wanted = arrays[f"want_{name}"]
        some = values if queries is None else values[:, queries] if name == "entropy" else values[queries]
        difference = np.abs(some.astype(np.float64) - wanted)
        if name == "entropy":
            measured["entropy_nats"] = float(difference.max())
            good &= measured["entropy_nats"] <= tolerance.entropy_nats
        elif name == "indices" or case.plugin in ("GatherTokens", "ScatterTokens"):
            measured["different"] = float((some != wanted).sum())
            good &= measured["different"] == 0
        else:
            measured["out_relative"] = float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
            good &= measured["out_relative"] <= tolerance.out_relative
    return bool(good), measured


def milliseconds(run: Callable[[], None], runner: Runner, repeat: int = 5) -> float:
    """Of one replay, from batches that are long enough for the host's clock; the median batch."""
    times = []
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            run()
        runner.cuda.synchronize()
        if (spent := time.perf_counter() - start) > 0.02:
            times.append(spent / count * 1e3)
            if len(times) == repeat:
                return float(np.median(times))
        else:
            count *= 2


def free_bytes(runner: Runner) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    runner.cuda.driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value


def run_cases(folder: Path, out: Path, engines: Path, few: bool) -> bool:
    """Build (or reuse) an engine per plugin and head size, run every case, write OUT. True where all is right."""
    import tensorrt

    from toprovar.exporter.engine import EngineOptions, ShapeProfile
    from toprovar.exporter.engine_tensorrt import TensorRtBuilder
    from toprovar.plugins.library import load_library

    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text())]
    load_library(tensorrt)
    engines.mkdir(parents=True, exist_ok=True)
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
    builder: TensorRtBuilder | None = None
    groups: dict[str, list[Case]] = {}
    for case in cases:
        head = "".join(f"_{value:g}" for value in case.attributes.values())
        shape = "x".join(map(str, case.inputs["q"][1:])) if "q" in case.inputs else ""
        groups.setdefault(f"{case.plugin}{head}_{shape}", []).append(case)
    rows: list[dict[str, Any]] = []
    loaded: dict[str, tuple[Any, list[Case]]] = {}
    for key, members in groups.items():
        file = engines / f"{key}.engine"
        if not file.is_file():
            builder = builder or TensorRtBuilder(engines / "timing.cache")
            graph = engines / f"{key}.onnx"
            fixed = dict(zip("RHD", members[0].inputs["q"][1:], strict=True)) if "q" in members[0].inputs else {}
            one_node_graph(members[0].plugin, members[0].attributes, graph, fixed)
            names = members[0].inputs
            bounds = [
                {
                    name: tuple(pick(case.inputs[name][i] for case in members) for i in range(len(names[name])))
                    for name in names
                }
                for pick in (min, max)
            ]
            built = builder.build(graph, [ShapeProfile(bounds[0], bounds[1], bounds[1])], EngineOptions())
            file.write_bytes(built.data)
            print(f"{key}: built in {built.seconds:.1f} s", flush=True)
        engine = runtime.deserialize_cuda_engine(file.read_bytes())
        loaded[key] = (engine, members)
        for case in members:
            if few and not case.few:
                continue
            arrays = dict(np.load(folder / f"{case.name}.npz"))
            runner = Runner(engine, arrays)
            runner.enqueue()
            good, measured = errors(case, arrays, runner.read())
            row: dict[str, Any] = {"case": case.name, "plugin": case.plugin, "good": good, **measured}
            if not few:
                graph_run = runner.capture()
                runner.poison()
                graph_run()
                row["good_in_graph"], _ = errors(case, arrays, runner.read())
                row["ms"] = round(milliseconds(graph_run, runner), 5)
                if case.flops:
                    row["tflops"] = round(case.flops / row["ms"] / 1e9, 1)
            runner.close()
            rows.append(row)
            words = (f"{name}={value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items())
            print(*words, flush=True)
    behaviour = (
        {} if few else behave(folder, *next(pair for key, pair in loaded.items() if key.startswith("EntropyAttention")))
    )
    document = {"tensorrt": tensorrt.__version__, "cases": rows, "behaviour": behaviour}
    out.write_text(json.dumps(document, indent=1) + "\n")
    good = all(row["good"] and row.get("good_in_graph", True) for row in rows)
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} cases within tolerance; {behaviour}")
    return good and all(value["good"] for value in behaviour.values())


def behave(folder: Path, engine: Any, members: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """A thousand runs at changing shapes leak nothing; two contexts on two streams at once give what each gives alone."""
    pair = [case for case in members if case.name in ("2b_scale6", "2b_scale9")]
    arrays = [dict(np.load(folder / f"{case.name}.npz")) for case in pair]
    runners = [Runner(engine, one) for one in arrays]
    alone = []
    for runner in runners:
        runner.enqueue()
        alone.append(runner.read())
        runner.poison()
        runner.cuda.synchronize()
    for _ in range(50):
        for runner in runners:
            runner.enqueue()
    equal = all(
        np.array_equal(found[name], value, equal_nan=False)
        for runner, expected in zip(runners, alone, strict=True)
        for found in (runner.read(),)
        for name, value in expected.items()
    )
    first, shapes = runners[0], [case.inputs for case in pair]
    larger = Runner(engine, arrays[1])  # memory for both shapes

    def turn(i: int) -> None:
        for name, shape in shapes[i % 2].items():
            larger.context.set_input_shape(name, shape)
        larger.enqueue()

    for i in range(20):
        turn(i)
    larger.cuda.synchronize()
    before, host = free_bytes(first), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(1000):
        turn(i)
    larger.cuda.synchronize()
    lost, grown = before - free_bytes(first), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host) * 1024
    for runner in (*runners, larger):
        runner.close()
    return {
        "two_contexts_at_once": {"good": equal, "runs": 50},
        "thousand_runs": {"good": lost <= 0 and grown < 4 << 20, "gpu_bytes_lost": lost, "host_bytes_grown": grown},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("cases", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tensorrt-ops.json"))
    parser.add_argument("--engines", type=Path, help="folder of engines; default: FOLDER/engines")
    parser.add_argument("--few", action="store_true")
    given = parser.parse_args()
    if given.verb == "cases":
        make_cases(given.folder)
        return 0
    try:
        return 0 if run_cases(given.folder, given.out, given.engines or given.folder / "engines", given.few) else 1
    except ToprovarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
