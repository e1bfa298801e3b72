"""Whether an engine can be used: every profile is taken by an execution context, at the shapes that it is tuned for.

    python -m toprovar.exporter.check_engine step.engine

TensorRT 8.6.0 wrote an engine of which no context took the fourth of ten profiles ("missing offset in id2offset", says its
compiler); the same graph built again was right. The binding ended in a segmentation fault there, so the builder runs this as a
process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import TargetError

__all__ = ["find_fault", "main"]

_FAULT = 3
"""Status for an engine that cannot be used; 1 is Python's own, for an error."""


def find_fault(engine: bytes, name: str) -> str | None:
    """What is wrong with an engine, found by a process of its own; None: nothing.

    Args:
        name: in messages.

    Raises:
        TargetError: it cannot be tried: TensorRT or its plugins are not here. (Without a GPU the binding of 8.6 ends the
            process, which reads as a fault; a builder has found one before.)
    """
    words = [sys.executable, "-m", __name__, "/dev/stdin"]
    done = subprocess.run(words, input=engine, capture_output=True, check=False)
    if done.returncode == 0:
        return None
    texts = [text.decode(errors="replace").strip() for text in (done.stdout, done.stderr)]
    said = ": ".join(text.splitlines()[-1][:200] for text in texts if text)
    if done.returncode == _FAULT:
        return said
    if done.returncode < 0:
        return f"it ended a process by signal {-done.returncode}: {said or 'not a word'}"
    raise TargetError(f"target tensorrt: cannot try {name}: {said or f'status {done.returncode}'}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the status is 3 for an engine that cannot be used, and the last line says why."""
    import tensorrt

    from ..plugins.library import load_library

    (path,) = sys.argv[1:] if arguments is None else arguments
    load_library(tensorrt)
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
    if engine is None:
        print("it cannot be loaded")
        return _FAULT
    for profile in range(engine.num_optimization_profiles):
        print(f"profile {profile}", flush=True)  # the last line, if the process ends here
        if not _takes(tensorrt, engine, profile):
            print(f"profile {profile} of {engine.num_optimization_profiles} is not taken by a context")
            return _FAULT
    return 0


def _takes(trt: Any, engine: Any, profile: int) -> bool:
    context = engine.create_execution_context()
    if context is None or not context.set_optimization_profile_async(profile, 0):  # on the default stream
        return False
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    changing = [name for name in inputs if -1 in tuple(engine.get_tensor_shape(name))]
    return all(context.set_input_shape(name, engine.get_tensor_profile_shape(name, profile)[1]) for name in changing)


if __name__ == "__main__":
    sys.exit(main())
