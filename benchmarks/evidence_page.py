"""The tables of docs/evidence.md, made from the stored evidence: `python -m benchmarks.evidence_page docs/evidence.md`.

A table stands between ``<!-- table class -->`` and ``<!-- end -->``: `table` is every policy, `apart` one plan taken apart,
`verdicts` ours against each rival at its own latency.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from toprovar.profiles.evidence import Evidence, Policy, load_evidence
from toprovar.profiles.files import write_text
from toprovar.profiles.profile import SHIPPED

STORED = Path(__file__).resolve().parents[1] / "src" / "toprovar" / "demo" / "evidence"
TAKEN_APART = "ours-floor-88"
_BLOCK = re.compile(r"<!-- (table|apart|verdicts) (class|text) -->\n.*?<!-- end -->", re.DOTALL)
_FAMILIES = ("dense", "drop", "rival", "ours")


def _all(policy: Policy) -> tuple[float, float, str, float, float]:
    """FLOPs, milliseconds of the transformer in PyTorch, SSIM with its interval, perceptual distance, accuracy."""
    group = policy.groups["all"]
    ssim, metrics = group.metrics["ssim"], group.metrics
    text = f"{ssim.mean:.3f} [{ssim.low:.3f}, {ssim.high:.3f}]"
    return (
        group.flops,
        group.transformer["torch"].median_ms,
        text,
        metrics["perceptual"].mean,
        metrics["accuracy"].mean,
    )


def table(evidence: Evidence) -> str:
    """Every policy but the ablations and the mixes of plans by budget, each family by its arithmetic."""
    policies = {policy.name: policy for policy in evidence.policies}
    dense_flops, dense_ms, *_ = _all(policies["dense"])
    rows = []
    for name, policy in policies.items():
        if policy.family not in _FAMILIES or name.startswith("ours-budget"):
            continue
        flops, milliseconds, ssim, perceptual, accuracy = _all(policy)
        title = f"**{policy.title}**" if name.removeprefix("ours-") in SHIPPED else policy.title
        line = (
            f"| {title} | {dense_flops / flops:.2f} x | {dense_ms / milliseconds:.2f} x | {ssim} | {perceptual:.3f} | "
            f"{accuracy:.1%} |"
        )
        rows.append((_FAMILIES.index(policy.family), dense_flops / flops, line))
    head = "| policy | FLOPs | time | SSIM [95%] | perceptual | accuracy |\n| --- | ---: | ---: | --- | ---: | ---: |"
    return "\n".join([head, *(line for *_, line in sorted(rows))])


def apart(evidence: Evidence) -> str:
    """One plan, and the same with a stage off or replaced."""
    dense_flops, *_ = _all(next(policy for policy in evidence.policies if policy.name == "dense"))
    rows = ["| arm | FLOPs | SSIM [95%] | accuracy |", "| --- | ---: | --- | ---: |"]
    for policy in evidence.policies:
        if policy.family == "ablation" or policy.name == TAKEN_APART:
            flops, _, ssim, _, accuracy = _all(policy)
            rows.append(f"| {policy.title} | {dense_flops / flops:.2f} x | {ssim} | {accuracy:.1%} |")
    return "\n".join(rows)


def verdicts(evidence: Evidence) -> str:
    """SSIM over all prompt classes: the best of ours that takes no longer than the rival, against it."""
    titles = {policy.name: policy.title for policy in evidence.policies}
    rows = ["| against | ours, no slower | difference of SSIM [95%] | verdict |", "| --- | --- | --- | --- |"]
    for one in evidence.comparisons:
        if one.metric == "ssim" and one.prompt_class == "all":
            gap = one.difference
            text = "" if gap is None else f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            ours = "–" if one.ours is None else titles[one.ours]
            rows.append(f"| {titles[one.rival]} | {ours} | {text} | {one.verdict} |")
    return "\n".join(rows)


_TABLES: dict[str, Callable[[Evidence], str]] = {"table": table, "apart": apart, "verdicts": verdicts}


def fill(page: str) -> str:
    """The page with every table made anew."""
    stored = {name: load_evidence(STORED / f"{name}.json") for name in ("class", "text")}

    def made(block: re.Match[str]) -> str:
        kind, demo = block.groups()
        return f"<!-- {kind} {demo} -->\n\n{_TABLES[kind](stored[demo])}\n\n<!-- end -->"

    return _BLOCK.sub(made, page)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_text(place, fill(place.read_text(encoding="utf-8")))
