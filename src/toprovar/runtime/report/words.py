"""The words that a reader may not know, explained once. A text marks them as ``{word}`` or ``{word|as written}``."""

from __future__ import annotations

import re

from toprovar.runtime.report.markup import Markup, el, join

__all__ = ["WORDS", "plain", "prose"]

WORDS: dict[str, str] = {
    "scale": "One step of the painting: a grid of tokens. The first is 1 x 1, the last the finest.",
    "token": "One cell of a scale's grid. The model chooses a code for each, and the codes add up to the picture.",
    "layer": "One of the model's processing stages. Every token of a scale passes through all of them, in order.",
    "attention": "How a token gathers what it needs: it weighs all tokens painted so far, and the weights sum to one.",
    "entropy": "How spread out a token's attention is, in nats. Low: it looks at few places, which happens at edges and "
    "objects. High: it looks everywhere alike, as in a plain background.",
    "rho": "The share of a scale's tokens whose entropy is below the scale's mean. It falls where a small, focused part "
    "of the picture stands out from the rest.",
    "tau": "The threshold on rho. Pruning may begin at the first scale where rho has fallen to it.",
    "D": "The scale depth: the first scale where anything is pruned. Everything before it runs in full.",
    "global layer": "A layer that always runs on all tokens, and whose entropy chooses the tokens that are kept.",
    "detail layer": "A layer that, from D on, runs on the kept tokens only.",
    "kept token": "A token that the detail layers work on. The others get what the same layers added at an earlier scale.",
    "component ratio": "How much of a layer's entropy map one pattern explains: its first singular value over its second. "
    "Large: the map is nearly constant, so the layer looks at the picture as a whole.",
    "prompt class": "A group of prompts that share a plan, because their pictures are about equally fine.",
    "dense": "The model as it is: every scale, every layer, every token.",
    "dropped scales": "The last scales left out altogether. Most of the speed of every method of this family is this.",
    "policy": "A rule for what to leave out. All policies here paint from the same weights with the same noise.",
    "interval": "95% bootstrap interval: the pictures are drawn again and again with replacement, and in 95% of the cases "
    "the mean falls inside.",
    "SSIM": "Structural similarity to the dense picture of the same noise: 1 is equal, above 0.9 is hard to tell apart.",
    "PSNR": "Peak signal-to-noise ratio to the dense picture, in dB: 30 is close, 20 is plainly different.",
    "FLOPs": "Arithmetic operations. One multiplication and one addition are two.",
    "floor": "The time a scale would take if all of its arithmetic ran at the best rate seen anywhere in this measurement.",
    "front": "The Pareto front: the policies that no other policy beats in both time and quality.",
    "teacher-forced": "Every scale starts from what the dense model painted, so only the scale's own error shows.",
    "free-running": "Every scale starts from what the policy itself painted, so errors add up, as they do in use.",
    "transformer": "The part of the model that all of this is about. Text encoder and the final decoder are not in it.",
}

_MARK = re.compile(r"\{([^{}|]+)(?:\|([^{}]+))?\}")


def prose(text: str) -> Markup:
    """A sentence as HTML; marked words can be hovered, focused or tapped for their explanation."""
    parts: list[Markup | str] = []
    end = 0
    for match in _MARK.finditer(text):
        parts.append(text[end : match.start()])
        word, shown = match.group(1), match.group(2) or match.group(1)
        parts.append(el("span", shown, class_="word", tabindex=0, data_tip=WORDS[word]))
        end = match.end()
    return join(*parts, text[end:])


def plain(text: str) -> str:
    """The same sentence without marks."""
    return _MARK.sub(lambda match: match.group(2) or match.group(1), text)
