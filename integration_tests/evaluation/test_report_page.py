# SPDX-License-Identifier: Apache-2.0
"""The contact sheet, the plot and the HTML page."""

import html.parser
import sys

import numpy as np
import pytest
from PIL import Image

from diffusers_ternary.evaluation import EvaluationResult, MissingExtraError, contact_sheet, evaluate, write_report
from diffusers_ternary.evaluation.contact_sheet import TILE, to_tile
from integration_tests.support.evaluate_pipelines import FLUX_CALL, tiny_flux


HOSTILE = "<script src='https://example.com/x.js'></script> & \"quotes\""


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    pipeline = tiny_flux()
    return evaluate(pipeline, pipeline, ["a dog", HOSTILE], call_kwargs=FLUX_CALL, progress=False)


class References(html.parser.HTMLParser):
    """Collects every attribute that makes a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]


def test_the_page_needs_nothing_else(result: EvaluationResult, tmp_path) -> None:
    page = write_report(result, tmp_path / "out", student_name="s", teacher_name="t").read_text(encoding="utf-8")
    parser = References()
    parser.feed(page)
    assert len(parser.found) == 2 * 2 + 2  # two pairs, the plot in two color schemes
    assert all(reference.startswith("data:image/") for reference in parser.found)
    assert not parser.tags & {"script", "link", "iframe", "object"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "&lt;script" in page


def test_files_lie_beside_the_page(result: EvaluationResult, tmp_path) -> None:
    write_report(result, tmp_path, student_name="s", teacher_name="t")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    images = {f"images/{index}_{role}.png" for index in (0, 1) for role in ("student", "teacher")}
    assert files == images | {"index.html", "result.json", "contact_sheet.png", "velocity_error.png"}
    assert Image.open(tmp_path / "images/1_teacher.png").tobytes() == result.teacher_images[1].tobytes()


def test_the_page_says_when_it_shows_only_some(result: EvaluationResult, tmp_path) -> None:
    page = write_report(result, tmp_path, student_name="s", teacher_name="t", max_images=1)
    assert "The first 1 of 2" in page.read_text(encoding="utf-8")


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    factor = TILE // 16
    tile = np.asarray(to_tile(Image.fromarray(pixels), TILE))
    assert np.array_equal(tile, pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def test_the_sheet_holds_every_tile() -> None:
    colors = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    tiles = [Image.new("RGB", (16, 16), color) for color in colors]
    sheet = contact_sheet({"a": tiles[:2], "b": tiles[2:]}, ["one", "two " * 80])
    counts = {color: count for count, color in sheet.getcolors(maxcolors=1 << 20)}
    side = TILE // 16 * 16
    for tile in tiles:
        assert counts[tile.getpixel((0, 0))] == side * side


def test_the_sheet_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="'a' has 1 images for 2 prompts"):
        contact_sheet({"a": [Image.new("RGB", (4, 4))]}, ["x", "y"])


def test_large_images_are_scaled_down() -> None:
    assert to_tile(Image.new("RGB", (1024, 512)), TILE).size == (TILE, TILE // 2)


def test_without_matplotlib_the_remedy_is_named(result: EvaluationResult, tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install diffusers-ternary\[evaluate\]"):
        result.plot_velocity_error(tmp_path / "plot.png")
