"""One engine in a process of its own, as trtexec runs it, but in our runtime.

    python -m toprovar.runtime.alone RUN.json

prints the median of runs of one CUDA graph queued behind each other, in milliseconds. `bench --trtexec` asks for it where
the two programs differ: in a bundle's process the same engine lies beside others, and can be faster (stage 0 of Infinity-2B's
`step` at its first scale, H100: 1.605 ms there, alone 1.690, in trtexec 1.688).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toprovar.errors import TargetError

__all__ = ["main", "time_alone"]


def time_alone(
    engine: Path, profile: int, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Path], runs: int
) -> float:
    """Milliseconds on the GPU of a run of an engine that has a process to itself.

    Args:
        shapes: of the inputs.
        values: files of raw input values, by input; the others are empty.
        runs: so many, after a tenth to warm up; the median counts.

    Raises:
        TargetError: the process failed.
    """
    inputs = {name: [list(shape), str(values.get(name, ""))] for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "run.json"
        asked.write_text(json.dumps({"engine": str(engine), "profile": profile, "inputs": inputs, "runs": runs}))
        done = subprocess.run([sys.executable, "-m", __name__, str(asked)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise TargetError(f"{engine.name} in a process of its own: {said[-1] if said else f'status {done.returncode}'}")
    return float(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    import tensorrt

    from toprovar.plugins.library import load_library
    from toprovar.runtime.cuda import open_cuda

    (path,) = sys.argv[1:] if arguments is None else arguments
    asked: dict[str, Any] = json.loads(Path(path).read_text())
    cuda = open_cuda(0)
    load_library(tensorrt)
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(Path(asked["engine"]).read_bytes())
    context = engine.create_execution_context()
    context.set_optimization_profile_async(asked["profile"], cuda.stream)
    for name, (shape, file) in asked["inputs"].items():
        context.set_input_shape(name, shape)
        values = np.fromfile(file, np.uint8) if file else np.zeros(1, np.uint8)
        memory = cuda.allocate(values.nbytes)
        cuda.write(memory, values.ctypes.data, values.nbytes)
        context.set_tensor_address(name, memory)
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        if name not in asked["inputs"]:
            size = tensorrt.volume(context.get_tensor_shape(name)) * engine.get_tensor_dtype(name).itemsize
            context.set_tensor_address(name, cuda.allocate(max(size, 1)))

    def enqueue() -> None:
        if not context.execute_async_v3(cuda.stream):
            raise TargetError("the engine failed to run; TensorRT's messages say why")

    enqueue()  # what TensorRT does once for new shapes must not be captured
    cuda.synchronize()
    cuda.begin_capture()
    enqueue()
    launch = cuda.end_capture()
    cuda.elapsed(launch, max(1, asked["runs"] // 10))
    print(float(np.median(cuda.elapsed(launch, asked["runs"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
