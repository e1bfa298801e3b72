"""The loop on ONNX Runtime gives what the same model in NumPy gives, whose caches are concatenated."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from toprovar.errors import BundleError, InputError, TargetError
from toprovar.profiles.noise import scale_noise
from toprovar.runtime.binding import Turn
from toprovar.runtime.bundle import open_bundle
from toprovar.runtime.loop import MARGINS, Loop
from toprovar.runtime.session import Session, TextFeatures
from toprovar.runtime.target import Array, Buffer
from toprovar.runtime.verify import verify

from . import tiny

PROMPTS = [("disc", 1), ("glow", 2), ("square", 3), ("disc", 4), ("glow", 5)]


def expected(label: str, seed: int) -> tiny.TinyTrace:
    names = [name for name, _ in tiny.LABELS]
    number = names.index(label)
    return tiny.reference(tiny.SCHEDULES[tiny.LABELS[number][1]], number, seed)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_pictures_equal_the_reference_whatever_the_batch(shared_bundle: Path, batch_size: int) -> None:
    session = Session(shared_bundle, batch_size=batch_size, threads=1)
    labels, seeds = zip(*PROMPTS, strict=True)
    for _ in range(2):  # the second time with caches full of the first
        result = session.generate(labels, seeds)
        for image, (label, seed) in enumerate(PROMPTS):
            reference = expected(label, seed)
            assert list(result.tokens[image]) == list(range(len(reference.tokens)))
            for scale, tokens in enumerate(reference.tokens):
                np.testing.assert_array_equal(result.tokens[image][scale], tokens)
            np.testing.assert_allclose(result.codes[image], reference.codes, atol=1e-6)
            np.testing.assert_allclose(result.images[image], reference.image, atol=1e-6)


def test_the_restore_cache_counts(shared_bundle: Path, tmp_path: Path) -> None:
    """Guards the reference itself: without the cache the pruned scale comes out differently."""
    no_cache = {"object": tiny.TinySchedule((1, 4, 5), None), "plain": tiny.SCHEDULES["plain"]}
    other = Session(tiny.write_bundle(tmp_path / "none.bundle", no_cache), threads=1)
    labels, seeds = ["disc"] * 8, range(8)
    with_cache = Session(shared_bundle, threads=1).generate(labels, seeds)
    without = other.generate(labels, seeds)
    assert any((a[2] != b[2]).any() for a, b in zip(with_cache.tokens, without.tokens, strict=True))
    assert all((a[1] == b[1]).all() for a, b in zip(with_cache.tokens, without.tokens, strict=True))


def test_batches_hold_one_prompt_class_each_and_are_timed(session: Session) -> None:
    labels, seeds = zip(*PROMPTS, strict=True)
    session = Session(session.bundle, batch_size=2, threads=1)
    seen: list[tuple[int, int]] = []
    result = session.generate(labels, seeds, on_scale=lambda done, of: seen.append((done, of)))
    assert [(t.prompt_class, t.images) for t in result.timings] == [("object", 2), ("object", 1), ("plain", 2)]
    assert seen == [(done, 8) for done in range(1, 9)]
    assert result.prompt_classes == ("object", "plain", "object", "object", "plain")
    for timing in result.timings:
        parts = timing.prefix_ms + timing.decode_ms + sum(s.noise_ms + s.step_ms + s.advance_ms for s in timing.scales)
        assert 0 < parts <= timing.total_ms


def test_pictures_from_text(tmp_path: Path) -> None:
    """Features shorter than the bundle's longest text are padded; what stands behind a text's end does not matter."""
    session = Session(tiny.write_bundle(tmp_path / "text.bundle", text=True), threads=1, batch_size=2)
    assert verify(session).passed
    labels = [0, 1, 2]
    text = TextFeatures(*tiny.encode(labels), tuple(tiny.LABELS[label][1] for label in labels))
    result = session.generate(seeds=[5, 6, 7], text=text)
    for image, label in enumerate(labels):
        reference = tiny.reference(tiny.SCHEDULES[tiny.LABELS[label][1]], label, 5 + image)
        np.testing.assert_allclose(result.images[image], reference.image, atol=1e-6)
    with pytest.raises(InputError, match="asked for by text"):
        session.generate(["disc"], [0])
    with pytest.raises(InputError, match="no prompt class 'cats'"):
        session.generate(seeds=[1], text=TextFeatures(*tiny.encode([0]), ("cats",)))
    with pytest.raises(InputError, match="a text of 5 tokens; the bundle takes at most 4"):
        session.generate(seeds=[1], text=TextFeatures(np.zeros((1, 5, 2)), np.array([5]), ("plain",)))


def test_a_picture_that_follows_the_tokens_of_another(session: Session) -> None:
    """Each scale is shown the tokens given, and still says which it would have chosen."""
    other = session.generate(["disc"], [3])
    given = {scale: tokens[None] for scale, tokens in other.tokens[0].items()}
    followed = session.generate(["disc"], [4], follow=given)
    np.testing.assert_array_equal(followed.images, other.images)
    np.testing.assert_array_equal(followed.codes, other.codes)
    own = session.generate(["disc"], [4])
    first = min(given)
    np.testing.assert_array_equal(followed.tokens[0][first], own.tokens[0][first])
    assert any((own.tokens[0][scale] != tokens[0]).any() for scale, tokens in given.items())


def test_how_far_followed_tokens_are_from_being_drawn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the scores of the toy model: how much the token's must rise to be the highest."""
    seen: dict[int, tuple[Array, Array]] = {}
    margins_of = Loop._margins

    def record(loop: Loop, turn: Turn, *rest: Array) -> Array:
        seen[turn.scale] = loop._target.read(turn.logits), loop._target.read(turn.noise)  # type: ignore[arg-type]
        return margins_of(loop, turn, *rest)

    monkeypatch.setattr(Loop, "_margins", record)
    kinds = set()
    for seed in range(8):
        given = {scale: tokens[None] for scale, tokens in session.generate(["disc"], [seed]).tokens[0].items()}
        followed = session.generate(["disc"], [seed + 1], follow=given)
        for scale, margins in followed.margins[0].items():
            logits, noise = (values.astype(np.float64) for values in seen[scale])
            scores = 1.5 * logits[:, 0] - 0.5 * logits[:, 1] - np.log(-np.log(noise[:, 0]))
            gaps = scores.max(1) - np.take_along_axis(scores, given[scale][0][:, None], 1)[:, 0]
            parts = gaps / np.abs(logits).max()
            expected = [0.0 if part <= 0 else next((m for m in MARGINS if m >= part), np.inf) for part in parts]
            np.testing.assert_array_equal(margins, expected)
            kinds |= {"drawn" if m == 0 else "far" if m == np.inf else "close" for m in expected}
    assert kinds == {"drawn", "close", "far"}


def test_noise_is_drawn_ahead_and_not_for_a_picture_that_was_interrupted(
    shared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[tuple[int, int]] = []
    second_began, go_on = Event(), Event()

    def draw(seeds: list[int], scale: int, tokens: int, logits: int) -> Array:
        began.append((seeds[0], scale))
        if scale == 1:
            second_began.set()
            go_on.wait(5)
        return scale_noise(seeds, scale, tokens, logits)

    def interrupt(done: int, of: int) -> None:
        assert done == 1 and second_began.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr("toprovar.runtime.loop.scale_noise", draw)
    monkeypatch.setattr("toprovar.runtime.loop.usable_cores", lambda: 1)  # one thread: in order
    session = Session(shared_bundle, threads=1)
    with pytest.raises(KeyboardInterrupt):
        session.generate(["disc"], [1], on_scale=interrupt)
    go_on.set()
    image = session.generate(["disc"], [2]).images[0]
    assert began == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    np.testing.assert_allclose(image, expected("disc", 2).image, atol=1e-6)


def test_labels_by_name_and_by_number(session: Session) -> None:
    by_name = session.generate(["square"], [3])
    np.testing.assert_array_equal(by_name.images, session.generate([1], [3]).images)
    np.testing.assert_array_equal(by_name.images, session.generate([" 1 "], [3]).images)


@pytest.mark.parametrize("label", ["cat", "-1", "3", 3, ""])
def test_unknown_label(session: Session, label: str | int) -> None:
    with pytest.raises(InputError, match="valid: disc, square, glow, or a number from 0 to 2"):
        session.generate([label], [0])


def test_no_label_and_wrong_count_of_seeds(session: Session) -> None:
    with pytest.raises(InputError, match="asked for by label"):
        session.generate()
    with pytest.raises(InputError, match="2 seeds for 1 prompts"):
        session.generate(["disc"], [1, 2])
    with pytest.raises(InputError, match="seed is -1"):
        session.generate(["disc"], [-1])


def test_unknown_target_provider_threads_and_batch(shared_bundle: Path) -> None:
    with pytest.raises(TargetError, match="no such target; valid: onnxruntime, tensorrt, torch"):
        Session(shared_bundle, "tensorflow")
    with pytest.raises(TargetError, match="does not run them"):
        Session(shared_bundle, "tensorrt-rtx")
    with pytest.raises(TargetError, match="valid: auto, cpu, cuda"):
        Session(shared_bundle, provider="tpu")
    with pytest.raises(TargetError, match="0 threads"):
        Session(shared_bundle, threads=0)
    with pytest.raises(InputError, match="batch size is 0"):
        Session(shared_bundle, batch_size=0)


def test_a_graph_that_onnx_runtime_refuses(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"no model")
    tiny.write_manifest(bundle, json.loads((bundle / "manifest.json").read_text()))
    with pytest.raises(TargetError, match=r"refuses .*decoder\.onnx") as caught:
        Session(bundle)
    assert "\n" not in str(caught.value)


def test_an_input_that_nothing_provides(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"]["step"]["inputs"].append({"name": "mystery", "dtype": "float32", "shape": ["N"]})
    tiny.write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match="step has an input 'mystery' that the loop does not know"):
        Session(bundle).generate(["disc"], [0])


def test_a_dtype_that_differs_between_two_graphs(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    logits = next(t for t in manifest["graphs"]["advance"]["inputs"] if t["name"] == "logits")
    logits["dtype"] = "float16"
    tiny.write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match="takes logits as"):
        Session(bundle).generate(["disc"], [0])


def test_a_view_never_leaves_its_buffer() -> None:
    buffer = Buffer(None, 48, "float32", (4, 3))
    assert buffer.view((2, 3), first_row=2).offset_bytes == 24
    with pytest.raises(ValueError, match="leaves a buffer of 48 bytes"):
        buffer.view((3, 3), first_row=2)


def test_new_keys_lie_right_behind_the_past(shared_bundle: Path) -> None:
    """No copy: what step writes is what the next step reads, and no two tensors of one run overlap."""
    bound: list[tuple[dict[str, Buffer], dict[str, Buffer]]] = []

    class Graph:
        def bind(self, inputs, outputs):  # type: ignore[no-untyped-def]
            bound.append((dict(inputs), dict(outputs)))
            return lambda: None

    class Target:
        description = "none"

        def graph(self, name: str) -> Graph:
            return Graph()

        def allocate(self, size_bytes: int) -> np.ndarray:
            return np.zeros(size_bytes, np.uint8)

        def write(self, buffer: Buffer, values: np.ndarray) -> None:
            pass

    from toprovar.runtime.binding import Binding

    Binding(open_bundle(shared_bundle), Target(), 2)  # type: ignore[arg-type]
    steps = [pair for pair in bound if "logits" in pair[1]]
    lengths = {"g": [0, 1, 5], "d": [0, 1, 5]}
    for turn, (inputs, outputs) in enumerate(steps[:3]):
        for layer, role in enumerate(tiny.ROLES):
            past, new = inputs[f"past_k_{layer}"], outputs[f"new_k_{layer}"]
            assert past.memory is new.memory and past.shape[0] == lengths[role][turn]
            assert new.offset_bytes == past.offset_bytes + past.size_bytes
        regions = [
            (id(b.memory), b.offset_bytes, b.offset_bytes + b.size_bytes) for b in (*inputs.values(), *outputs.values())
        ]
        for index, (memory, begin, end) in enumerate(regions):
            for other, start, stop in regions[index + 1 :]:
                assert memory != other or end <= start or stop <= begin
