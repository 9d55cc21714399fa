# SPDX-License-Identifier: Apache-2.0
"""The language of the pixel people: nine attributes, and prompts that express them.

One prompt reads ``smiling person, long red hair, tan skin, no glasses, blue cap, striped green shirt, pink
background``. Every attribute that a prompt names can be seen in the picture: a bald head has no hair color, and hats
are only worn over hair styles that stay visible below them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass


HAIR_STYLES = ("short", "long", "curly", "mohawk", "bald")
HAIR_COLORS = ("black", "brown", "blonde", "red", "green", "blue", "purple")
SKINS = ("light", "tan", "dark")
EXPRESSIONS = ("smiling", "laughing", "frowning", "serious")
EYEWEARS = ("no glasses", "glasses", "sunglasses")
HATS = ("no hat", "cap", "beanie", "top hat")
SHIRT_PATTERNS = ("plain", "striped", "checked")
SHIRT_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
BACKGROUNDS = ("white", "gray", "green", "blue", "pink")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "expression": EXPRESSIONS,
    "hair_style": HAIR_STYLES,
    "hair_color": HAIR_COLORS,
    "skin": SKINS,
    "eyewear": EYEWEARS,
    "hat": HATS,
    "shirt_pattern": SHIRT_PATTERNS,
    "shirt_color": SHIRT_COLORS,
    "background": BACKGROUNDS,
}
"""Attribute name -> its values, in the order of the judge's classes."""

HELD_OUT_KEY = ("hair_style", "hair_color", "eyewear", "shirt_color")
"""The attributes whose combination decides whether a portrait may be trained on."""
HELD_OUT_PERCENT = 15

_HAT_STYLES = (
    "short",
    "long",
    "bald",
)  # what is left of a mohawk or of curls under a hat cannot be told apart
_NO_HAIR = "bald head"


@dataclass(frozen=True)
class Portrait:
    """What one picture shows. ``hair_color`` is None exactly when ``hair_style`` is ``"bald"``."""

    expression: str
    hair_style: str
    hair_color: str | None
    skin: str
    eyewear: str
    hat: str
    shirt_pattern: str
    shirt_color: str
    background: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            value = getattr(self, name)
            if value not in values and not (name == "hair_color" and value is None):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(values)}.")
        if (self.hair_color is None) != (self.hair_style == "bald"):
            raise ValueError(
                f"hair_color={self.hair_color!r} with hair_style={self.hair_style!r}: "
                "a bald head has no hair color (None), every other style has one."
            )
        if self.hat != "no hat" and self.hair_style not in _HAT_STYLES:
            raise ValueError(
                f"hat={self.hat!r} over hair_style={self.hair_style!r} would hide the hair; "
                f"hats go with {', '.join(_HAT_STYLES)}."
            )

    @property
    def held_out(self) -> bool:
        """Whether this combination of :data:`HELD_OUT_KEY` was kept away from all training (by SHA-256)."""
        key = "|".join(str(getattr(self, name)) for name in HELD_OUT_KEY)
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT

    def labels(self) -> dict[str, str]:
        """The visible attributes, by name: all nine, or eight for a bald head."""
        return {name: getattr(self, name) for name in ATTRIBUTES if getattr(self, name) is not None}


def phrases(portrait: Portrait) -> tuple[str, ...]:
    """The seven phrases that describe a portrait completely, in their usual order."""
    hair = _NO_HAIR if portrait.hair_color is None else f"{portrait.hair_style} {portrait.hair_color} hair"
    return (
        f"{portrait.expression} person",
        hair,
        f"{portrait.skin} skin",
        portrait.eyewear,
        portrait.hat,
        f"{portrait.shirt_pattern} {portrait.shirt_color} shirt",
        f"{portrait.background} background",
    )


def prompt_of(portrait: Portrait) -> str:
    """The complete prompt of a portrait, e.g. ``"serious person, bald head, dark skin, glasses, ..."``."""
    return ", ".join(phrases(portrait))


def caption(portrait: Portrait, rng: random.Random, *, drop: float = 0.1, empty: float = 0.1) -> str:
    """A training caption: the phrases shuffled, some dropped, sometimes none (for classifier-free guidance).

    Args:
        portrait: What the picture shows.
        rng: Source of randomness.
        drop: Probability of each phrase to be left out.
        empty: Probability of the empty caption.
    """
    if rng.random() < empty:
        return ""
    kept = [phrase for phrase in phrases(portrait) if rng.random() >= drop]
    if rng.random() < 0.5:  # half in the usual order, which is how people will write them
        rng.shuffle(kept)
    return ", ".join(kept)


def attributes_of(prompt: str) -> dict[str, str]:
    """Read a prompt back: the attributes it mentions, by name.

    Args:
        prompt: Comma-separated phrases of this grammar, in any order; phrases may be missing.

    Raises:
        ValueError: If a phrase does not belong to the grammar, or an attribute is mentioned twice.
    """
    found: dict[str, str] = {}
    for phrase in filter(None, (part.strip() for part in prompt.lower().split(","))):
        for name, value in _read_phrase(phrase).items():
            if name in found:
                raise ValueError(f"{prompt!r} mentions {name} twice: {found[name]!r} and {value!r}.")
            found[name] = value
    return found


def _read_phrase(phrase: str) -> dict[str, str]:
    head, _, noun = phrase.rpartition(" ")
    first, _, second = head.partition(" ")
    if phrase == _NO_HAIR:
        read = {"hair_style": "bald"}
    elif phrase in EYEWEARS:
        read = {"eyewear": phrase}
    elif phrase in HATS:
        read = {"hat": phrase}
    elif noun == "person":
        read = {"expression": head}
    elif noun == "skin":
        read = {"skin": head}
    elif noun == "background":
        read = {"background": head}
    elif noun == "hair":
        read = {"hair_style": first, "hair_color": second}
    elif noun == "shirt":
        read = {"shirt_pattern": first, "shirt_color": second}
    else:
        read = {}
    if not read or any(value not in ATTRIBUTES[name] for name, value in read.items()):
        raise ValueError(
            f"{phrase!r} is not a phrase of the pixel-people grammar; "
            "see diffusers_ternary.demo.grammar.ATTRIBUTES for the values."
        )
    return read


def sample_portrait(rng: random.Random) -> Portrait:
    """Draw a portrait: every value of an attribute about equally likely, hats only over styles that show below."""
    hair_style = rng.choices(HAIR_STYLES, weights=(6, 6, 4, 4, 3))[0]
    hat = rng.choice(HATS) if hair_style in _HAT_STYLES else "no hat"
    return Portrait(
        expression=rng.choice(EXPRESSIONS),
        hair_style=hair_style,
        hair_color=None if hair_style == "bald" else rng.choice(HAIR_COLORS),
        skin=rng.choice(SKINS),
        eyewear=rng.choice(EYEWEARS),
        hat=hat,
        shirt_pattern=rng.choice(SHIRT_PATTERNS),
        shirt_color=rng.choice(SHIRT_COLORS),
        background=rng.choice(BACKGROUNDS),
    )


def sample_portraits(count: int, seed: int, *, held_out: bool) -> list[Portrait]:
    """Draw ``count`` portraits, all from the held-out combinations or all from the others."""
    rng = random.Random(f"pixel people {'held out' if held_out else 'training'} {seed}")
    portraits: list[Portrait] = []
    while len(portraits) < count:
        portrait = sample_portrait(rng)
        if portrait.held_out == held_out:
            portraits.append(portrait)
    return portraits


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Complete prompts whose attribute combination the teacher and the judge have never seen.

    Args:
        count: Number of prompts.
        seed: The same seed gives the same prompts, on every machine.
    """
    return [prompt_of(portrait) for portrait in sample_portraits(count, seed, held_out=True)]


def training_prompts(count: int, seed: int = 0) -> list[str]:
    """Complete prompts from the combinations that training may use (for calibration and distillation).

    Args:
        count: Number of prompts.
        seed: The same seed gives the same prompts, on every machine.
    """
    return [prompt_of(portrait) for portrait in sample_portraits(count, seed, held_out=False)]
