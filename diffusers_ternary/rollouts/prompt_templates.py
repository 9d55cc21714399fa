# SPDX-License-Identifier: Apache-2.0
"""Diverse prompts made up offline: subjects, attributes, counts, colors, relations, settings, styles, light, text.

The forms follow what prompt-following benchmarks ask for (single objects, two objects, counting, colors, positions,
attribute binding), because that is what low-bit models lose first.
"""

import random
from collections.abc import Callable, Sequence


LARGEST = 200_000


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_ANIMALS = _phrases(
    "cat|dog|fox|owl|horse|elephant|rabbit|tiger|penguin|parrot|frog|turtle|octopus|bear|"
    "deer|wolf|hedgehog|flamingo|peacock|lobster|butterfly|camel|dolphin|squirrel|sheep|goat|"
    "lizard|swan"
)
_OBJECTS = _phrases(
    "apple|book|bicycle|teapot|chair|guitar|umbrella|clock|lamp|suitcase|vase|candle|violin|"
    "camera|typewriter|kettle|basket|backpack|mug|piano|telescope|lantern|boat|car|bus|train|"
    "tractor|motorcycle|balloon|pumpkin|cake|pineapple|cupcake|donut|sandwich|robot|drum|"
    "globe|skateboard|surfboard|stop sign|bench|mailbox|sofa|table|bottle|hat|key"
)
_PEOPLE = _phrases(
    "an old fisherman|a young dancer|a chef|an astronaut|a violinist|a gardener|a firefighter|"
    "a child with freckles|a woman in a raincoat|a bearded man|a knight in armour|a schoolteacher|"
    "a street musician|a mountaineer|a potter|two friends|a grandmother|a boxer|a scientist|"
    "a shepherd|a pilot|a girl with braided hair|a monk|a blacksmith"
)
_PLACES = _phrases(
    "a narrow alley in an old town|a mountain lake|a desert with red dunes|a busy night market|"
    "a bamboo forest|a harbour with fishing boats|a terraced rice field|a Gothic cathedral|"
    "a lighthouse on a cliff|a snowy village|an abandoned railway station|a library with tall shelves|"
    "a greenhouse full of ferns|a canyon|a coral reef|a futuristic city|a waterfall in a jungle|"
    "a wheat field|a cosy kitchen|an empty swimming pool|a volcanic island|a train compartment|"
    "a rooftop garden|an ice cave|a vineyard in autumn|a subway platform|a windmill by a canal"
)
_SETTINGS = _phrases(
    "on a wooden table|in a sunny meadow|on a beach|in a dark forest|on a city street|"
    "in front of a brick wall|on a snowy hill|in a messy workshop|by a window|under a bridge|"
    "in a bathtub|on a rooftop|in an art gallery|next to a campfire|in a flower garden|"
    "at the bottom of the sea|on the moon|in a supermarket|on a marble floor|in a hay barn|"
    "on a frozen lake|in a small boat|against a plain grey background|in a field of sunflowers"
)
_ACTIONS = _phrases(
    "reading a newspaper|riding a bicycle|playing chess|drinking tea|looking into the camera|"
    "sleeping|jumping|dancing|painting a picture|waiting in the rain|holding a bunch of flowers|"
    "laughing|repairing a radio|climbing a ladder|eating noodles|blowing soap bubbles|"
    "carrying a stack of books|playing the trumpet"
)
_ANIMAL_ACTIONS = _phrases(
    "sleeping|jumping|wearing a knitted scarf|wearing sunglasses|looking into the camera|running|"
    "eating|yawning|sitting in a cardboard box|wearing a tiny hat|reflected in a puddle|"
    "peeking out of a bag|covered in snow"
)
_COLORS = _phrases("red|blue|green|yellow|orange|purple|pink|black|white|brown|grey|turquoise|golden|silver")
_MATERIALS = _phrases(
    "glass|wood|marble|rusty metal|porcelain|knitted wool|paper|ice|chocolate|moss|polished bronze|clay|velvet|jade"
)
_LOOKS = _phrases("tiny|giant|old|shiny|broken|fluffy|elegant|transparent|striped|spotted|dusty|wet|friendly|grumpy")
_NUMBERS = ("two", "three", "four", "five", "six")
_RELATIONS = _phrases(
    "to the left of|to the right of|above|below|in front of|behind|on top of|next to|inside|leaning against"
)
_STYLES = _phrases(
    "a photo of|a close-up photo of|an oil painting of|a watercolour of|a pencil sketch of|"
    "a woodcut of|a black-and-white photo of|a pixel art picture of|a 3D rendering of|"
    "a children's book illustration of|a vintage poster of|an impressionist painting of|"
    "a comic panel with|a macro photo of|an ink drawing of|a film still of|a stained-"
    "glass window showing|a low-poly rendering of|a paper collage of|a mosaic of|a chalk drawing of|"
    "an isometric illustration of|a studio portrait of|an embroidered picture of"
)
_LIGHTS = _phrases(
    "golden hour|soft morning light|harsh midday sun|neon light|candlelight|moonlight|fog|"
    "heavy rain|backlight|overcast sky|a thunderstorm|studio lighting|long shadows|northern lights|"
    "dappled light|dusk"
)
_CAMERAS = _phrases(
    "wide angle|shallow depth of field|seen from above|seen from below|centred composition|"
    "long exposure|highly detailed|muted colours|vivid colours|minimalist|symmetrical composition|"
    "bird's-eye view"
)
_TEXTS = _phrases(
    "OPEN|HELLO|CAFE|SALE|WELCOME|TEA|LIBRARY|NO ENTRY|FRESH BREAD|MUSIC|EXIT|TAXI|HOTEL|"
    "LOVE|1984|JAZZ NIGHT|THANK YOU|STOP|DREAM|BOOKS|SUMMER|ROUTE 66|ZOO|GOOD MORNING"
)
_SIGNS = _phrases(
    "a neon sign|a wooden sign|a chalkboard|a T-shirt|a coffee mug|a birthday cake|a shop window|a book cover"
)


def template_prompts(count: int, seed: int = 0) -> list[str]:
    """Makes up different prompts; the same ones for the same seed, on every machine, and a prefix of longer lists.

    Args:
        count (`int`): how many.
        seed (`int`, *optional*, defaults to 0): of the choice.

    Raises:
        ValueError: for a count below 1 or above 200,000, or a negative seed.
    """
    if not 1 <= count <= LARGEST:
        raise ValueError(f"{count} prompts cannot be made from templates. Ask for 1 to {LARGEST:,}.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative. Give 0 or more.")
    words = _Words(seed)
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        # In turn, so that every form has its share in a list of any length.
        prompt = _FORMS[words.drawn % len(_FORMS)](words)
        words.drawn += 1
        prompts.setdefault(prompt.casefold(), prompt)
    return list(prompts.values())


class _Words:
    """Random choices. `random()` is the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.drawn = 0

    def pick(self, choices: Sequence[str]) -> str:
        return choices[int(self._random.random() * len(choices))]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def thing(self) -> str:
        """An object or animal, described by a color, a material or a look."""
        name = self.pick(_OBJECTS if self.chance(0.6) else _ANIMALS)
        return self.described(name)

    def described(self, name: str) -> str:
        parts = [name]
        if self.chance(0.6):
            parts.insert(0, self.pick(_COLORS))
        if self.chance(0.3):
            parts.insert(0, self.pick(_LOOKS))
        text = with_article(" ".join(parts))
        return f"{text} made of {self.pick(_MATERIALS)}" if name in _OBJECTS and self.chance(0.15) else text

    def finished(self, text: str) -> str:
        """With a style in front of most, light and camera behind some, and a capital letter or not."""
        if self.chance(0.7):
            text = f"{self.pick(_STYLES)} {text}"
        if self.chance(0.4):
            text = f"{text}, {self.pick(_LIGHTS)}"
        if self.chance(0.25):
            text = f"{text}, {self.pick(_CAMERAS)}"
        return text[0].upper() + text[1:] if self.chance(0.3) else text


def with_article(phrase: str) -> str:
    """`phrase` after a or an."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    """Plural of the nouns above."""
    irregular = {"sheep": "sheep", "deer": "deer", "wolf": "wolves"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def _one(words: _Words) -> str:
    return words.finished(f"{words.thing()} {words.pick(_SETTINGS)}")


def _animal(words: _Words) -> str:
    text = f"{words.described(words.pick(_ANIMALS))} {words.pick(_ANIMAL_ACTIONS)}"
    return words.finished(f"{text} {words.pick(_SETTINGS)}" if words.chance(0.5) else text)


def _person(words: _Words) -> str:
    text = f"{words.pick(_PEOPLE)} {words.pick(_ACTIONS)}"
    return words.finished(f"{text} {words.pick(_SETTINGS)}" if words.chance(0.5) else text)


def _place(words: _Words) -> str:
    text = words.pick(_PLACES)
    return words.finished(f"{text} with {words.thing()}" if words.chance(0.4) else f"{text}, {words.pick(_LIGHTS)}")


def _two(words: _Words) -> str:
    return words.finished(f"{words.thing()} and {words.thing()}")


def _position(words: _Words) -> str:
    return words.finished(f"{words.thing()} {words.pick(_RELATIONS)} {words.thing()}")


def _count(words: _Words) -> str:
    parts = [words.pick(_NUMBERS)]
    if words.chance(0.5):
        parts.append(words.pick(_COLORS))
    parts.append(plural(words.pick(_OBJECTS if words.chance(0.6) else _ANIMALS)))
    return words.finished(f"{' '.join(parts)} {words.pick(_SETTINGS)}")


def _two_counts(words: _Words) -> str:
    first, second = words.pick(_OBJECTS), words.pick(_ANIMALS)
    return words.finished(f"{words.pick(_NUMBERS)} {plural(first)} and {words.pick(_NUMBERS)} {plural(second)}")


def _binding(words: _Words) -> str:
    first, second = words.pick(_OBJECTS), words.pick(_OBJECTS)
    text = f"{with_article(f'{words.pick(_COLORS)} {first}')} and {with_article(f'{words.pick(_COLORS)} {second}')}"
    return words.finished(f"{text} {words.pick(_SETTINGS)}")


def _text(words: _Words) -> str:
    return words.finished(f'{words.pick(_SIGNS)} that says "{words.pick(_TEXTS)}" {words.pick(_SETTINGS)}')


_FORMS: tuple[Callable[[_Words], str], ...] = (
    _one,
    _animal,
    _person,
    _place,
    _two,
    _position,
    _count,
    _two_counts,
    _binding,
    _text,
)
