"""A toy next-scale model as a bundle: graphs in ONNX's text form, and the same model in NumPy, caches concatenated.

It has what the loop must get right and nothing more: context from prefix, caches of two lengths, selection, a span that
is restored from a cached scale, constants per scale, noise, codes, and two prompt classes with different schedules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from safetensors.numpy import load_file, save_file

from toprovar import __version__
from toprovar.kernels.contract import CONTRACT_VERSION
from toprovar.profiles.flops import ModelShape
from toprovar.profiles.noise import scale_noise
from toprovar.profiles.plan import ClassPlan, Plan, save_plan
from toprovar.profiles.profile import Profile, QualityFloor

WIDTH, HEADS, HEAD_DIM, LOGITS, SIDE = 4, 2, 2, 7, 3
ROLES = "gdg"
GRIDS = ((1, 1), (2, 2), (3, 3))
LABELS = (("disc", "object"), ("square", "object"), ("glow", "plain"))
ENLARGE = np.kron(np.eye(SIDE), np.ones((4, 1))).astype(np.float32)
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'

PREFIX = (
    HEADER
    + """prefix (int32[B] labels) => (float[1, R, 4] x, float[R, 4] context) {
    cond = Cast <to = 1> (labels)
    uncond = Mul (cond, zero)
    both = Concat <axis = 0> (cond, uncond)
    row = Unsqueeze (both, last)
    phase = Add (row, iota)
    context = Cos (phase)
    first = Sin (phase)
    x = Unsqueeze (first, front)
}"""
)

# The label is what the first channel of the text's own tokens adds up to; the second output has the size T.
TEXT_PREFIX = (
    HEADER
    + """prefix (float[B, T, 2] text_features, int32[B] text_lengths)
 => (float[1, R, 4] x, float[R, 4] context, float[B, T] text_mask) {
    size = Shape <start = 1, end = 2> (text_features)
    count = Squeeze (size)
    start = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    position = Range (start, count, step)
    lengths = Unsqueeze (text_lengths, last)
    lengths_long = Cast <to = 7> (lengths)
    inside = Less (position, lengths_long)
    text_mask = Cast <to = 1> (inside)
    first_channel = Gather <axis = 2> (text_features, zero_index)
    own = Mul (first_channel, text_mask)
    cond = ReduceSum <keepdims = 0> (own, one)
    uncond = Mul (cond, zero)
    both = Concat <axis = 0> (cond, uncond)
    row = Unsqueeze (both, last)
    phase = Add (row, iota)
    context = Cos (phase)
    first = Sin (phase)
    x = Unsqueeze (first, front)
}"""
)
TEXT_TOKENS = 4

STEP = (
    HEADER
    + """step (float[N, R, 4] x, float[R, 4] context, int32[K] keep_slots,
    float[h, hc] area_rows, float[w, wc] area_cols,
    float[P_global, R, 2, 2] past_k_0, float[P_global, R, 2, 2] past_v_0,
    float[P_detail, R, 2, 2] past_k_1, float[P_detail, R, 2, 2] past_v_1,
    float[P_global, R, 2, 2] past_k_2, float[P_global, R, 2, 2] past_v_2, float[M, R, 4] span_cache_0)
 => (float[N, R, 7] logits, float[N, R, 2, 2] new_k_0, float[N, R, 2, 2] new_v_0,
    float[K, R, 2, 2] new_k_1, float[K, R, 2, 2] new_v_1,
    float[N, R, 2, 2] new_k_2, float[N, R, 2, 2] new_v_2, float[K, R, 4] span_delta_0) {
    %LAYER(x, past_k_0, past_v_0, new_k_0, new_v_0, x_1)
    first_channel = Gather <axis = 2> (x_1, zero_index)
    rows = Shape <start = 1, end = 2> (x)
    images = Div (rows, two)
    conditional = Slice (first_channel, front, images, one)
    by_image = Transpose <perm = [1, 0]> (conditional)
    keep = Shape (keep_slots)
    lowest, unsorted = TopK <axis = 1, largest = 0> (by_image, keep)
    kept_up, order = TopK <axis = 1, largest = 0> (unsorted, keep)
    by_token = Transpose <perm = [1, 0]> (kept_up)
    both_rows = Concat <axis = 1> (by_token, by_token)
    column = Unsqueeze (both_rows, last)
    index = Concat <axis = 2> (column, column, column, column)
    before = GatherElements <axis = 0> (x_1, index)
    %LAYER(before, past_k_1, past_v_1, new_k_1, new_v_1, after)
    span_delta_0 = Sub (after, before)
    area_shape_r = Shape <start = 1, end = 2> (area_rows)
    area_shape_c = Shape <start = 1, end = 2> (area_cols)
    flat_width = Constant <value_ints = [-1]> ()
    grid_shape = Concat <axis = 0> (area_shape_r, area_shape_c, flat_width)
    grid = Reshape (span_cache_0, grid_shape)
    by_channel = Transpose <perm = [2, 0, 1]> (grid)
    tall = MatMul (area_rows, by_channel)
    cols_t = Transpose <perm = [1, 0]> (area_cols)
    resized = MatMul (tall, cols_t)
    back = Transpose <perm = [1, 2, 0]> (resized)
    x_shape = Shape (x)
    restored = Reshape (back, x_shape)
    filled = Add (x_1, restored)
    x_2 = ScatterElements <axis = 0> (filled, index, after)
    %LAYER(x_2, past_k_2, past_v_2, new_k_2, new_v_2, x_3)
    logits = MatMul (x_3, head)
}"""
)

# Attention is replaced by tanh of the summed keys times the summed values: it sees all of the past, and its order not.
LAYER = """
    {o}_c = Add ({x}, context)
    {o}_shape = Constant <value_ints = [0, 0, 2, 2]> ()
    {k} = Reshape ({o}_c, {o}_shape)
    {v} = Mul ({k}, {k})
    {o}_ks = Concat <axis = 0> ({pk}, {k})
    {o}_vs = Concat <axis = 0> ({pv}, {v})
    {o}_k = ReduceMean <keepdims = 0> ({o}_ks, front)
    {o}_v = ReduceMean <keepdims = 0> ({o}_vs, front)
    {o}_kv = Mul ({o}_k, {o}_v)
    {o}_t = Tanh ({o}_kv)
    {o}_flat = Constant <value_ints = [0, -1]> ()
    {o}_r = Reshape ({o}_t, {o}_flat)
    {o}_y = Add ({x}, {o}_r)
    {o} = Sin ({o}_y)
"""

ADVANCE = (
    HEADER
    + """advance (float[N, R, 7] logits, float[N, B, 7] noise, float[B, 1, 3, 3] codes,
    float[N, 9] up, float[9, N_next] down)
 => (int32[B, N] tokens, float[B, 1, 3, 3] codes_out, float[N_next, R, 4] next_x) {
    rows = Shape <start = 1, end = 2> (logits)
    images = Div (rows, two)
    cond = Slice (logits, front, images, one)
    uncond = Slice (logits, images, rows, one)
    guided = Sub (cond, uncond)
    guided_half = Mul (guided, half)
    mixed = Add (cond, guided_half)
    log_u = Log (noise)
    negative = Neg (log_u)
    log_log = Log (negative)
    scores = Sub (mixed, log_log)
    best = ArgMax <axis = 2, keepdims = 0> (scores)
    best_int = Cast <to = 6> (best)
    tokens = Transpose <perm = [1, 0]> (best_int)
    values = Cast <to = 1> (tokens)
    spread = MatMul (values, up)
    codes_shape = Shape (codes)
    added = Reshape (spread, codes_shape)
    codes_out = Add (codes, added)
    flat = Flatten (codes_out)
    pooled = MatMul (flat, down)
    by_token = Transpose <perm = [1, 0]> (pooled)
    both = Concat <axis = 1> (by_token, by_token)
    column = Unsqueeze (both, last)
    wide = Add (column, iota)
    next_x = Cos (wide)
}"""
)

DECODER = (
    HEADER
    + """decoder (float[B, 1, 3, 3] codes) => (float[B, 3, 12, 12] image) {
    tall = MatMul (enlarge, codes)
    wide = MatMul (tall, enlarge_t)
    squeezed = Sigmoid (wide)
    image = Concat <axis = 1> (squeezed, squeezed, squeezed)
}"""
)


def _model(text: str) -> onnx.ModelProto:
    while "%LAYER(" in text:
        before, _, rest = text.partition("%LAYER(")
        arguments, _, after = rest.partition(")")
        x, pk, pv, k, v, o = (argument.strip() for argument in arguments.split(","))
        text = before + LAYER.format(x=x, pk=pk, pv=pv, k=k, v=v, o=o) + after
    model = onnx.parser.parse_model(text)
    head = np.random.default_rng(0).normal(size=(WIDTH, LOGITS)).astype(np.float32)
    constants = {
        "zero": np.float32(0),
        "half": np.float32(0.5),
        "iota": np.arange(WIDTH, dtype=np.float32),
        "zero_index": np.int64(0),
        "front": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "last": np.array([-1]),
        "head": head,
        "enlarge": ENLARGE,
        "enlarge_t": 0.1 * ENLARGE.T,
    }
    used = {name for node in model.graph.node for name in node.input}
    for name in sorted(used & set(constants)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constants[name]), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def area_matrix(size: int, source: int) -> np.ndarray:
    """Adaptive-average resize of `source` cells to `size`: `[size, source]`."""
    matrix = np.zeros((size, source), np.float32)
    for i in range(size):
        begin, end = i * source // size, -(-(i + 1) * source // size)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


@dataclass(frozen=True)
class TinySchedule:
    """keep per scale that runs; the scale whose span fills the cache, or None."""

    keep: tuple[int, ...]
    capture: int | None


SCHEDULES = {"object": TinySchedule((1, 4, 5), 1), "plain": TinySchedule((1, 3), 0)}


def constants() -> dict[str, np.ndarray]:
    tensors = {}
    for s, (h, w) in enumerate(GRIDS):
        tensors[f"up_{s}"] = np.kron(area_matrix(SIDE, h), area_matrix(SIDE, w)).T.copy()
        tensors[f"down_{s}"] = np.kron(area_matrix(h, SIDE), area_matrix(w, SIDE)).T.copy()
        for c, (hc, wc) in enumerate(GRIDS[:2]):
            tensors[f"area_rows_{s}_{c}"] = area_matrix(h, hc)
            tensors[f"area_cols_{s}_{c}"] = area_matrix(w, wc)
    return tensors


def _info(model: onnx.ModelProto, file: str) -> dict[str, Any]:
    def tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind = {1: "float32", 6: "int32"}[value.type.tensor_type.elem_type]
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        return {"name": value.name, "dtype": kind, "shape": shape}

    graph = model.graph
    return {"file": file, "inputs": [tensor(v) for v in graph.input], "outputs": [tensor(v) for v in graph.output]}


def _steps(schedule: TinySchedule) -> list[dict[str, Any]]:
    steps, past_global, past_detail = [], 0, 0
    for s, keep in enumerate(schedule.keep):
        last = s == len(schedule.keep) - 1
        h, w = GRIDS[s]
        cached = schedule.capture if schedule.capture is not None and s > schedule.capture else 0
        steps.append(
            {
                "scale": s,
                "grid": [h, w],
                "tokens": h * w,
                "keep": keep,
                "past_global": past_global,
                "past_detail": past_detail,
                "capture_span_delta": s == schedule.capture,
                "last": last,
                "constants": {
                    "area_rows": f"area_rows_{s}_{cached}",
                    "area_cols": f"area_cols_{s}_{cached}",
                    "up": f"up_{s}",
                    "down": "down_0" if last else f"down_{s + 1}",
                },
            }
        )
        past_global, past_detail = past_global + h * w, past_detail + keep
    return steps


def _plan(schedules: dict[str, TinySchedule]) -> Plan:
    """What the schedules decide, as an exporter writes it."""
    tokens = [h * w for h, w in GRIDS]
    classes = {}
    for name, schedule in schedules.items():
        run = len(schedule.keep)
        depth = next((s for s, keep in enumerate(schedule.keep) if keep < tokens[s]), None)
        cache = None if depth is None else depth - 1
        classes[name] = ClassPlan(depth=depth, scales_run=tuple(range(run)), keep=schedule.keep, cache_scale=cache)
    pruned = any(one.depth is not None for one in classes.values())
    profile = Profile(schema="toprovar.profile/1", name="tiny", quality_floor=QualityFloor(ssim=0.999))
    return Plan(
        schema="toprovar.plan/1",
        checkpoint_sha256="0" * 64,
        model=ModelShape(
            backbone="var", depth=len(ROLES), width=WIDTH, ffn_width=WIDTH, logits=LOGITS, code_channels=1, grids=GRIDS
        ),
        roles=ROLES if pruned else "g" * len(ROLES),
        restore="cache",
        precision="fp32",
        classes=classes,
        profile=profile,
        profile_sha256=profile.sha256,
        calibration_sha256="2" * 64 if pruned else None,
    )


def encode(labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Texts that stand for labels: features `[B, 3, 2]` with nonsense behind the text's end, lengths `[B]`."""
    features = np.full((len(labels), 3, 2), 9, np.float32)
    lengths = np.array([1 + label % 3 for label in labels], np.int32)
    for text, label, length in zip(features, labels, lengths, strict=True):
        text[:length, 0] = label / length
    return features, lengths


def write_bundle(
    root: Path, schedules: dict[str, TinySchedule] | None = None, name: str = "tiny", *, text: bool = False
) -> Path:
    """Write the bundle, golden trace included (made by `reference`). `text`: asked for by text, not by label."""
    schedules = schedules or SCHEDULES
    root.mkdir(parents=True)
    graphs = {}
    prefix = TEXT_PREFIX if text else PREFIX
    for graph, source in {"prefix": prefix, "step": STEP, "advance": ADVANCE, "decoder": DECODER}.items():
        model = _model(source)
        onnx.save(model, root / f"{graph}.onnx")
        graphs[graph] = _info(model, f"{graph}.onnx")
    save_file(constants(), root / "constants.safetensors")
    golden = {}
    for prompt_class, schedule in schedules.items():
        labels = [index for index, (_, of) in enumerate(LABELS) if of == prompt_class]
        seeds = [7 + label for label in labels]
        traces = [reference(schedule, label, seed) for label, seed in zip(labels, seeds, strict=True)]
        if text:
            features, lengths = encode(labels)
            golden[f"{prompt_class}/text_features"], golden[f"{prompt_class}/text_lengths"] = features, lengths
        else:
            golden[f"{prompt_class}/labels"] = np.array(labels, np.int32)
        golden[f"{prompt_class}/seeds"] = np.array(seeds, np.int64)
        for s in range(len(schedule.keep)):
            golden[f"{prompt_class}/tokens_{s}"] = np.stack([trace.tokens[s] for trace in traces])
        golden[f"{prompt_class}/codes"] = np.stack([trace.codes for trace in traces])
        golden[f"{prompt_class}/image"] = np.stack([trace.image for trace in traces])
    save_file(golden, root / "golden.safetensors")
    save_plan(root / "plan.json", _plan(schedules))
    manifest = {
        "schema": "toprovar.bundle/1",
        "toprovar_version": __version__,
        "contract_version": CONTRACT_VERSION,
        "name": name,
        "backbone": "var",
        "precision": "float32",
        "model": {
            "depth": len(ROLES),
            "width": WIDTH,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "logits": LOGITS,
            "roles": ROLES,
            "rows_per_image": 2,
            "code_shape": [1, SIDE, SIDE],
            "image_size": [4 * SIDE, 4 * SIDE],
            "parameters": WIDTH * LOGITS,
        },
        "condition": {"kind": "text", "text_width": 2, "text_maximum_tokens": TEXT_TOKENS}
        if text
        else {"kind": "label", "labels": [{"name": n, "prompt_class": c} for n, c in LABELS if c in schedules]},
        "sampling": {"guidance": 0.5, "top_k": 0, "top_p": 0.0, "temperature": 1.0},
        "graphs": graphs,
        "schedules": {key: {"steps": _steps(schedule)} for key, schedule in schedules.items()},
        "targets": {"onnxruntime": {}},
        "provenance": {
            "checkpoint_sha256": "0" * 64,
            "profile": name,
            "profile_sha256": "1" * 64,
            "calibration_sha256": "2" * 64,
            "plan_sha256": "3" * 64,
        },
    }
    write_manifest(root, manifest)
    return root


def write_half_bundle(root: Path, token: int) -> Path:
    """A bundle that says it is in half precision, with `token` as one of the 28 golden tokens of `object`."""

    def change(tokens: np.ndarray) -> np.ndarray:
        tokens[1, 2] = token
        return tokens

    write_bundle(root)
    change_golden(root, "object/tokens_2", change, precision="float16")  # of the last scale: nothing follows
    return root


def change_golden(root: Path, name: str, change: Callable[[np.ndarray], np.ndarray], **manifest: Any) -> None:
    """Another array in the golden trace, and other fields of the manifest; every hash is right."""
    golden = load_file(root / "golden.safetensors")
    golden[name] = change(golden[name])
    save_file(golden, root / "golden.safetensors")
    write_manifest(root, json.loads((root / "manifest.json").read_text()) | manifest)


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the hashes of what lies in the folder now."""
    files = sorted(path for path in root.iterdir() if path.name != "manifest.json")
    manifest["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
        for path in files
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


@dataclass(frozen=True)
class TinyTrace:
    tokens: list[np.ndarray]
    codes: np.ndarray
    image: np.ndarray


def reference(schedule: TinySchedule, label: int, seed: int) -> TinyTrace:
    """The toy model, one picture, fp32 NumPy."""
    tensors = constants()
    head = np.random.default_rng(0).normal(size=(WIDTH, LOGITS)).astype(np.float32)
    iota = np.arange(WIDTH, dtype=np.float32)
    phase = np.array([[label], [0]], np.float32) + iota
    context, x = np.cos(phase), np.sin(phase)[None]
    past: list[list[np.ndarray]] = [[] for _ in ROLES]
    codes = np.zeros((1, SIDE, SIDE), np.float32)
    cache, tokens = None, []

    def layer(i: int, x: np.ndarray) -> np.ndarray:
        past[i].append(x + context)
        keys = np.concatenate(past[i])
        return np.sin(x + np.tanh(keys.mean(0) * (keys * keys).mean(0)))

    for s, keep in enumerate(schedule.keep):
        x = layer(0, x)
        kept = np.sort(np.argsort(x[:, 0, 0], kind="stable")[:keep])
        before = x[kept]
        after = layer(1, before)
        if cache is not None:
            source = GRIDS[schedule.capture or 0]
            rows, cols = area_matrix(GRIDS[s][0], source[0]), area_matrix(GRIDS[s][1], source[1])
            resized = np.einsum("ai,bj,ijrc->abrc", rows, cols, cache.reshape(*source, 2, WIDTH))
            x = x + resized.reshape(x.shape)
        x = x.copy()
        x[kept] = after
        if s == schedule.capture:
            cache = after - before
        x = layer(2, x)
        logits = x @ head
        mixed = logits[:, 0] + 0.5 * (logits[:, 0] - logits[:, 1])
        noise = scale_noise([seed], s, len(x), LOGITS)[:, 0]
        drawn = (mixed - np.log(-np.log(noise))).argmax(-1).astype(np.int32)
        tokens.append(drawn)
        codes = codes + (drawn.astype(np.float32) @ tensors[f"up_{s}"]).reshape(codes.shape)
        if s + 1 < len(schedule.keep):
            pooled = codes.reshape(-1) @ tensors[f"down_{s + 1}"]
            x = np.cos(np.stack([pooled, pooled], 1)[..., None] + iota)
    image = np.repeat(1 / (1 + np.exp(-(ENLARGE @ codes @ (0.1 * ENLARGE.T)))), 3, axis=0)
    return TinyTrace(tokens, codes, image.astype(np.float32))
