"""Puts together what a run of benchmarks/tensorrt.sh left in a folder: one JSON, and the Markdown that is made of it.

    python benchmarks/tensorrt_table.py FOLDER --out benchmarks/results/tensorrt-NAME.json

A part that is missing is left out; a step that failed is named. FOLDER/notes.txt, a line each, says what the numbers do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from toprovar.runtime import trtexec


def read(path: Path) -> Any:
    """A JSON file, or None where there is none or it is broken (its step is named as failed)."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sanitizer_said(path: Path) -> str | None:
    """The sum that compute-sanitizer ends with."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.strip("= ") for line in reversed(lines) if "ERROR SUMMARY" in line), None)


def collect(folder: Path) -> dict[str, Any]:
    """Everything that was measured, by part."""
    steps = (
        [line.split() for line in (folder / "steps.txt").read_text().splitlines()]
        if (folder / "steps.txt").is_file()
        else []
    )
    notes = folder / "notes.txt"
    document: dict[str, Any] = {
        "machine": read(folder / "machine.json"),
        "notes": notes.read_text().splitlines() if notes.is_file() else [],
        "failed": [name for code, name in steps if code != "rc=0"],
        "plugins": read(folder / "ops.json"),
        "sanitizer": sanitizer_said(folder / "sanitizer.log"),
        "verified": {},
        "compared": {},
        "bundles": {},
        "torch": next((read(path) for path in sorted(folder.glob("torch/infinity-*.json"))), None),
    }
    for path in sorted(folder.glob("verify_*.log")):
        document["verified"][path.stem.removeprefix("verify_")] = [
            line for line in path.read_text().splitlines() if " images; " in line
        ]
    for path in sorted(folder.glob("compare_*.log")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
        document["compared"][path.stem.removeprefix("compare_")] = lines
    for path in sorted(folder.glob("bench_*_*.json")):
        _, language, name = path.stem.split("_", 2)
        if found := read(path):
            document["bundles"].setdefault(name, {})[language] = found
    return document


def markdown(document: dict[str, Any]) -> str:
    """The tables of a collected run."""
    lines = ["# TensorRT", ""]
    if machine := document["machine"]:
        lines += [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += [f"- {note}" for note in document["notes"]] + ([""] if document["notes"] else [])
    if document["failed"]:
        lines += [f"Steps that failed: {', '.join(document['failed'])}.", ""]
    if plugins := document["plugins"]:
        lines += plugin_lines(plugins)
    if document.get("sanitizer"):
        lines += [f"compute-sanitizer over small cases of them: {document['sanitizer']}", ""]
    if document["verified"]:
        lines += ["## Golden traces", ""]
        lines += [f"- `{name}`: {line}" for name, found in document["verified"].items() for line in found] + [""]
    if document["compared"]:
        lines += ["## Pictures, and what ONNX Runtime makes of the same tokens", ""]
        lines += [f"- `{name}`: {line}" for name, found in document["compared"].items() for line in found] + [""]
    if document["bundles"]:
        lines += latency_lines(document) + scale_lines(document)
    for found in document["bundles"].values():
        if "trtexec" in found.get("py", {}):
            lines += trtexec.markdown(found["py"]["trtexec"])
    return "\n".join(lines) + "\n"


def plugin_lines(plugins: dict[str, Any]) -> list[str]:
    """Errors and times of every case."""
    rows, behaviour = plugins["cases"], plugins["behaviour"]
    lines = [
        f"## Plugins alone, TensorRT {plugins['tensorrt']}, fp16: {sum(row['good'] for row in rows)} of {len(rows)} right",
        "",
        "| case | plugin | error of out | entropy, nats | different | ms | TFLOP/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row[key]:.1e}" if key in row else "" for key in ("out_relative", "entropy_nats")]
        cells += [f"{row['different']:.0f}" if "different" in row else ""]
        cells += [f"{row[key]:{form}}" if key in row else "" for key, form in (("ms", ".4f"), ("tflops", ".0f"))]
        right = "" if row["good"] and row.get("good_in_graph", True) else " **wrong**"
        lines.append(f"| {row['case']}{right} | {row['plugin']} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"- {name}: {found}" for name, found in behaviour.items()), ""]


def latency_lines(document: dict[str, Any]) -> list[str]:
    """Transformer, decoder and picture of every bundle, beside PyTorch's of the same run."""
    lines = [
        "## Latency, ms (median; 20 % to 80 %)",
        "",
        "| bundle | class | runtime | transformer | decoder | picture |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]

    def span(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['q20']:.2f} to {value['q80']:.2f})"

    for name, found in document["bundles"].items():
        for language, title in (("cpp", "C++"), ("py", "Python")):
            if "bundles" not in found.get(language, {}):
                continue
            for prompt_class, one in found[language]["bundles"][0]["classes"].items():
                cells = " | ".join(span(one[key]) for key in ("transformer_ms", "decode_ms", "total_ms"))
                lines.append(f"| {name} | {prompt_class} | {title} | {cells} |")
    for row in (document["torch"] or {}).get("rows", []):
        cells = f"{row['transformer_ms']:.2f} | {row['decode_ms']:.2f} | {row['total_ms']:.2f}"
        lines.append(f"| infinity-{row['model']} {row['case']} | | PyTorch, CUDA graphs, bf16 | {cells} |")
    return [*lines, ""]


def scale_lines(document: dict[str, Any]) -> list[str]:
    """Every scale of the bundles of Infinity in the C++ runtime, beside PyTorch's of the same run."""
    columns: dict[str, dict[int, float]] = {}
    for name, found in document["bundles"].items():
        if "infinity" in name and "cpp" in found:
            for one in found["cpp"]["bundles"][0]["classes"].values():
                columns[name] = {s["scale"]: s["step_ms"]["median"] + s["advance_ms"]["median"] for s in one["scales"]}
    if not columns:
        return []
    for row in (document["torch"] or {}).get("rows", []):
        columns[f"PyTorch {row['case']}"] = {int(scale): ms for scale, ms in row["scale_ms"].items()}
    lines = [
        "## Every scale of Infinity: step and what follows it, ms (median)",
        "",
        f"| scale | {' | '.join(columns)} |",
        "| ---: |" + " ---: |" * len(columns),
    ]
    for scale in sorted({scale for one in columns.values() for scale in one}):
        cells = [f"{one[scale]:.2f}" if scale in one else "" for one in columns.values()]
        lines.append(f"| {scale} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    document = collect(given.folder)
    text = markdown(document)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(text)
    print(text)
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
