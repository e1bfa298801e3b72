"""Bundles to measure TensorRT with, and pictures to compare runtimes by.

    python benchmarks/tensorrt_bundle.py infinity FOLDER --plan fast --depth 32    with PyTorch and a GPU
    python benchmarks/tensorrt_bundle.py pictures BUNDLE OUT.npz --target tensorrt [--follow OTHER.npz]
    python benchmarks/tensorrt_bundle.py compare A.npz B.npz [C.png]
    python benchmarks/tensorrt_bundle.py trtexec BUNDLE OUT.json --scales 0 6 12

`infinity` writes Infinity-2B at 1024 x 1024 with random weights in fp16 (speed does not depend on them) and one golden
picture; `--depth` takes fewer of its 32 layers. Its plans are those of benchmarks/infinity.py. `compare` takes pictures A and
B, where B followed the tokens of A, and exits 1 where a pixel differs by more than 2/255; a PNG (of toprovar_run) is held
against A. `trtexec` compares some scales as `toprovar bench --trtexec` does all: trtexec loads an engine anew for every stage
of every scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

TEXT_TOKENS = 64
TEXT_LENGTH = 40
"""Of the golden prompt; the rest is padding, which must be masked."""
CLASS = "default"
CALIBRATION = Path(__file__).parent / "results" / "text-demo-calibration.json"
"""Of the embedded text demo, whose plan is carried over to the larger model, as in benchmarks/infinity.py."""


def write_infinity(folder: Path, plan_name: str, depth: int) -> None:
    """A bundle of random weights; see the module's docstring."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    import infinity

    from toprovar.exporter.calibrate import model_shape
    from toprovar.exporter.graph import GraphExporter
    from toprovar.exporter.package import GoldenPrompt, write_bundle
    from toprovar.exporter.plan import make_dense_plan
    from toprovar.profiles.calibration import load_calibration
    from toprovar.profiles.manifest import Condition
    from toprovar.profiles.plan import ClassPlan, Plan
    from toprovar.profiles.profile import dense_profile, load_profile

    sizes, vae = infinity.SIZES["2b"]
    if depth != sizes.depth:
        sizes = dataclasses.replace(sizes, depth=depth, chunks=min(sizes.chunks, depth))
    infinity.SIZES["2b"] = (sizes, vae)
    backbone = infinity.build("2b")
    backbone.set_precision(torch.float16)
    spec, shape = backbone.spec, model_shape(backbone, TEXT_TOKENS)
    random = hashlib.sha256(b"random weights").hexdigest()
    if plan_name == "dense":
        plan = make_dense_plan(shape, random, (CLASS,), dense_profile(precision="fp16"))
    else:
        profile, calibration = load_profile(plan_name), load_calibration(CALIBRATION)
        assumed = infinity.carried_plan(profile, calibration, infinity.PROMPT_CLASS, backbone)
        run = assumed.scales_run or tuple(range(spec.scales))
        keep = tuple(assumed.keep[scale] for scale in run)
        opening = next(scale for scale, kept in enumerate(keep) if kept < spec.tokens[scale])
        plan = Plan(
            schema="toprovar.plan/1",
            checkpoint_sha256=random,
            model=shape,
            roles=assumed.roles,
            restore=assumed.restore,
            precision="fp16",
            classes={CLASS: ClassPlan(depth=opening, scales_run=run, keep=keep, cache_scale=assumed.cache_scale)},
            profile=profile,
            profile_sha256=profile.sha256,
            calibration_sha256=calibration.sha256,
        )
    text = torch.randn(1, TEXT_TOKENS, spec.text_width, device=backbone.device)
    golden = GoldenPrompt((text, torch.full((1,), TEXT_LENGTH, device=backbone.device, dtype=torch.int32)), (0,))
    write_bundle(
        folder,
        GraphExporter(backbone),
        plan,
        name=f"infinity-2b-{plan_name}" + (f"-{depth}-layers" if depth != 32 else ""),
        condition=Condition(kind="text", text_width=spec.text_width, text_maximum_tokens=TEXT_TOKENS),
        golden={CLASS: golden},
        on_stage=lambda stage: print(stage, flush=True),
    )


def write_pictures(bundle: Path, out: Path, target: str, count: int, follow: Path | None) -> None:
    """Pictures of every label, `count` seeds each: images and tokens.

    With `follow`, an OUT of another target, each scale is shown the tokens drawn there: what differs is not carried on.
    """
    from toprovar.runtime.session import Session

    session, given = Session(bundle, target), None if follow is None else np.load(follow)
    images, kept = [], {}
    for label in session.labels:
        shown, first = None, len(images)
        if given is not None:
            scales = [name.split("_")[2] for name in given.files if name.startswith(f"tokens_{first}_")]
            shown = {int(s): np.stack([given[f"tokens_{first + i}_{s}"] for i in range(count)]) for s in scales}
        result = session.generate([label] * count, range(count), follow=shown)
        for image, tokens in zip(result.images, result.tokens, strict=True):
            kept |= {f"tokens_{len(images)}_{scale}": values for scale, values in tokens.items()}
            images.append(image)
    np.savez(out, images=np.stack(images), labels=np.repeat(session.labels, count), **kept)


def compare(first: Path, second: Path, picture: Path | None) -> bool:
    """Print how the pictures of a target differ from those of another whose tokens it was shown."""
    a, b = np.load(first), np.load(second)
    if picture is not None:
        from PIL import Image

        from toprovar.runtime.pictures import to_bytes

        pixels, expected = np.asarray(Image.open(picture), np.int16), to_bytes(a["images"][0]).astype(np.int16)
        apart = np.abs(pixels - expected)
        found = {"largest_difference_of_a_byte": int(apart.max()), "bytes_that_differ": int((apart > 0).sum())}
        print(json.dumps({"png": picture.name, **found, "bytes": apart.size}))
    names = [name for name in a.files if name.startswith("tokens_")]
    different = sum(int((a[name] != b[name]).sum()) for name in names)
    worst = float(np.abs(a["images"] - b["images"]).max())
    print(
        json.dumps(
            {
                "a": first.stem,
                "b": second.stem,
                "pictures": len(a["images"]),
                "largest_difference_of_a_pixel": round(worst, 6),
                "tokens_drawn_differently": round(different / sum(a[name].size for name in names), 5),
            }
        )
    )
    return worst <= 2 / 255


def compare_trtexec(bundle: Path, out: Path, scales: list[int]) -> None:
    """Scales of a bundle in the Python runtime and in trtexec, as part of a bench document."""
    from toprovar.runtime import trtexec
    from toprovar.runtime.session import Session

    measured = trtexec.measure(Session(bundle, "tensorrt"), scales=scales)
    out.write_text(json.dumps({"trtexec": measured}, indent=1) + "\n")
    print("\n".join(trtexec.markdown(measured)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("infinity")
    make.add_argument("folder", type=Path)
    make.add_argument("--plan", default="dense")
    make.add_argument("--depth", type=int, default=32)
    pictures = verbs.add_parser("pictures")
    pictures.add_argument("bundle", type=Path)
    pictures.add_argument("out", type=Path)
    pictures.add_argument("--target", default="tensorrt")
    pictures.add_argument("--count", type=int, default=2)
    pictures.add_argument("--follow", type=Path)
    two = verbs.add_parser("compare")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    two.add_argument("picture", type=Path, nargs="?")
    other = verbs.add_parser("trtexec")
    other.add_argument("bundle", type=Path)
    other.add_argument("out", type=Path)
    other.add_argument("--scales", type=int, nargs="+", default=[])
    given = parser.parse_args()
    if given.verb == "infinity":
        write_infinity(given.folder, given.plan, given.depth)
    elif given.verb == "pictures":
        write_pictures(given.bundle, given.out, given.target, given.count, given.follow)
    elif given.verb == "trtexec":
        compare_trtexec(given.bundle, given.out, given.scales)
    else:
        return 0 if compare(given.first, given.second, given.picture) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
