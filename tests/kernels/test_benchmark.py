"""What benchmarks/attention.py measures and how it reports a wrong result, without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("benchmark_attention", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_shapes_are_those_of_the_schedules(attention: ModuleType) -> None:
    last = {(p.model, p.rows): p for p in attention.problems(list(attention.MODELS), quick=False)}
    assert {(p.queries, p.keys) for (model, _), p in last.items() if model.startswith("infinity")} == {(4096, 10521)}
    assert last["var-d30", 2].keys == 680 and last["hart-1024", 2].keys == 9750
    assert sum(1 for _ in attention.problems(["infinity-2b"], quick=False)) == 26


def test_a_wrong_result_is_shown_without_a_speed(attention: ModuleType) -> None:
    good = {"median_ms": 1.0, "q20_ms": 0.9, "q80_ms": 1.1, "tflop_s": 500.0, "errors": {}}
    row = {"model": "m", "rows": 2, "heads": 16, "head_dim": 128, "queries": 4, "keys": 9}
    results = {"toprovar": {"wrong": "exceeds"}, "cudnn": good, "naive": {"skipped": "too large"}}
    tokens = [{"op": "gather", "wrong": True, "bytes": 1}]
    machine = dict.fromkeys(("gpu", "driver", "torch", "cuda", "cudnn", "triton", "commit", "date"), "x")
    text = attention.render(
        {"machine": machine, "attention": [row | {"results": results}], "copy_gb_s": 3000.0, "tokens": tokens}
    )
    assert "| 4 x 9 | wrong | - | - | - | 1000 |" in text and "| gather | wrong |" in text
