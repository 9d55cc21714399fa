# SPDX-License-Identifier: Apache-2.0
"""The words of Scenes: what can be drawn, in which colors, how often and where."""

from __future__ import annotations


CLASSES = (
    *("cat", "dog", "rabbit", "fish", "duck", "horse", "turtle", "butterfly", "crab", "spider"),
    *("car", "bus", "airplane", "boat", "rocket", "house", "hammer", "key", "bell", "umbrella"),
    *("chair", "bed", "guitar", "star", "crown", "shoe", "hat", "anchor", "cactus", "mushroom"),
    *("pear", "carrot", "tulip", "tree", "heart", "moon", "wrench", "teapot", "bone", "leaf"),
)
_IRREGULAR = {"fish": "fish", "bus": "buses", "butterfly": "butterflies", "cactus": "cacti", "leaf": "leaves"}
PLURALS = {name: _IRREGULAR.get(name, f"{name}s") for name in CLASSES}

COLORS = {  # sRGB; GenEval's ten
    "red": (214, 32, 32),
    "orange": (245, 130, 20),
    "yellow": (250, 222, 40),
    "green": (28, 150, 50),
    "blue": (30, 80, 220),
    "purple": (125, 40, 175),
    "pink": (255, 130, 190),
    "brown": (110, 62, 28),
    "black": (18, 18, 18),
    "white": (250, 250, 250),
}
NUMBERS = ("zero", "one", "two", "three", "four")
MAX_COUNT = len(NUMBERS) - 1
