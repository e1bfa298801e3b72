"""What a scene of the text demo holds, and the sentence that says so.

    Scene(3, "red", "striped", "disc", "blue", "checkered")  <->  "three red striped discs on a blue checkered floor"

Imports no torch: a command line can check a prompt before anything is loaded.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from toprovar.profiles.tokenizer import split_words

__all__ = [
    "COLOURS",
    "COUNTS",
    "MAX_WORDS",
    "SHAPES",
    "TEXTURES",
    "WORD_IDS",
    "Scene",
    "caption",
    "held_out",
    "parse",
    "prompt_class",
]

COUNTS: tuple[str, ...] = ("one", "two", "three", "four")
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
SHAPES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring", "heart")

_SYNONYMS: dict[str, str] = {
    "a": "one",
    "an": "one",
    "the": "one",
    **{str(n + 1): name for n, name in enumerate(COUNTS)},
    **{shape + "s": shape for shape in SHAPES},
    "circle": "disc",
    "circles": "disc",
    "ground": "floor",
    "checked": "checkered",
    "spotted": "dotted",
}
_WORDS: tuple[str, ...] = (*COUNTS, *COLOURS, *TEXTURES, *SHAPES, "on", "floor")

WORD_IDS: dict[str, int] = {word: i for i, word in enumerate(_WORDS, start=1)}
"""Every word the demo knows -> its number for the word encoder, from 1; 0 is padding. Synonyms share a number."""
WORD_IDS |= {word: WORD_IDS[meaning] for word, meaning in _SYNONYMS.items()}

MAX_WORDS = 16
"""Longest prompt of the word encoder; a full caption has at most 9 words."""


@dataclass(frozen=True)
class Scene:
    """One to four equal things on a floor; the floor never has their colour."""

    count: int
    colour: str
    texture: str
    shape: str
    floor_colour: str
    floor_texture: str

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("count", self.count, range(1, len(COUNTS) + 1)),
            ("colour", self.colour, COLOURS),
            ("texture", self.texture, TEXTURES),
            ("shape", self.shape, SHAPES),
            ("floor_colour", self.floor_colour, COLOURS),
            ("floor_texture", self.floor_texture, TEXTURES),
        ):
            if value not in valid:
                raise ValueError(f"{name} of a scene is {value!r}; valid: {', '.join(map(str, valid))}")
        if self.colour == self.floor_colour:
            raise ValueError(f"things and floor are both {self.colour}; choose two colours")


def caption(scene: Scene) -> str:
    """Return the sentence of a scene; a plain texture is not named."""

    def texture(name: str) -> str:
        return "" if name == "plain" else name + " "

    things = f"{COUNTS[scene.count - 1]} {scene.colour} {texture(scene.texture)}{scene.shape}{'s' * (scene.count > 1)}"
    article = "an" if scene.floor_colour[0] in "aeiou" else "a"
    return f"{things} on {article} {scene.floor_colour} {texture(scene.floor_texture)}floor"


def parse(text: str) -> Scene:
    """Read a caption back. Word order inside each half is free; digits, "a" and "circles" are understood.

    Raises:
        ValueError: the sentence has no "on", or lacks or repeats a word of one kind, or has a word nobody knows.
    """
    words = [_SYNONYMS.get(word, word) for word in split_words(text)]
    if words.count("on") != 1:
        raise ValueError(f"caption {text!r} must read '<things> on <floor>', with one 'on'")
    split = words.index("on")

    def pick(half: list[str], kind: str, valid: tuple[str, ...], default: str | None = None) -> str:
        found = [word for word in half if word in valid]
        if len(found) != 1 and (found or default is None):
            raise ValueError(f"caption {text!r} needs one {kind}, found {len(found)}; valid: {', '.join(valid)}")
        return found[0] if found else str(default)

    things, floor = words[:split], words[split + 1 :]
    known = {*COUNTS, *COLOURS, *TEXTURES, *SHAPES, "floor"}
    strangers = [word for word in things + floor if word not in known]
    if strangers:
        raise ValueError(f"caption {text!r} has words the demo does not know: {', '.join(strangers)}")
    return Scene(
        COUNTS.index(pick(things, "count", COUNTS)) + 1,
        pick(things, "colour", COLOURS),
        pick(things, "texture", TEXTURES, "plain"),
        pick(things, "shape", SHAPES),
        pick(floor, "floor colour", COLOURS),
        pick(floor, "floor texture", TEXTURES, "plain"),
    )


def prompt_class(scene: Scene) -> str:
    """Return the fineness of a scene: `plain` (no texture at all), `texture` (both textured), else `object`."""
    textured = (scene.texture != "plain") + (scene.floor_texture != "plain")
    return ("plain", "object", "texture")[textured]


def held_out(scene: Scene) -> bool:
    """Whether training never shows this combination of count, colour, texture and shape (one in 13 of them)."""
    count, colour, texture, shape, _, _ = astuple(scene)
    number = ((count * 8 + COLOURS.index(colour)) * 4 + TEXTURES.index(texture)) * 6 + SHAPES.index(shape)
    return (number * 2654435761 >> 7) % 13 == 0
