# SPDX-License-Identifier: Apache-2.0
"""A sheet of images: one row per variant, one column per prompt."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont


BACKGROUND, INK, MUTED = "#ffffff", "#1c1c1e", "#6b6b70"
TILE = 176  # pixels, about the width in which a caption still reads well
GAP, MARGIN = 12, 24
LABEL_SIZE, CAPTION_SIZE = 17, 14
MAX_CAPTION_LINES = 6


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], *, max_prompts: int = 12
) -> Image.Image:
    """Draws images side by side, small ones enlarged pixel by pixel.

    Args:
        rows (`Mapping[str, Sequence[PIL.Image.Image]]`): label → one image per prompt.
        prompts (`Sequence[str]`): captions of the columns.
        max_prompts (`int`, *optional*, defaults to 12): columns; the first prompts are shown.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ValueError: if there is nothing to show, or a row has another number of images than there are prompts.
    """
    if not rows or not prompts or max_prompts < 1:
        raise ValueError(f"Nothing to show: {len(rows)} rows, {len(prompts)} prompts, max_prompts={max_prompts}.")
    for label, images in rows.items():
        if len(images) != len(prompts):
            raise ValueError(f"The row {label!r} has {len(images)} images for {len(prompts)} prompts.")
    shown = min(max_prompts, len(prompts))
    tiles = {label: [to_tile(image, TILE) for image in images[:shown]] for label, images in rows.items()}
    width, height = _largest(tiles)
    label_font, caption_font = (ImageFont.load_default(size) for size in (LABEL_SIZE, CAPTION_SIZE))
    captions = [wrap(prompt, caption_font, width, MAX_CAPTION_LINES) for prompt in prompts[:shown]]
    line = CAPTION_SIZE + 5
    caption_height = line * max(len(lines) for lines in captions)
    label_width = max(int(label_font.getlength(label)) for label in rows) + 2 * GAP
    top = MARGIN + caption_height + GAP
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + label_width + shown * (width + GAP) - GAP,
            top + len(rows) * (height + GAP) - GAP + MARGIN,
        ),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        x = MARGIN + label_width + column * (width + GAP)
        # Captions stand on their images, whatever their number of lines.
        y = MARGIN + caption_height - line * len(lines)
        draw.multiline_text((x, y), "\n".join(lines), fill=MUTED, font=caption_font, spacing=5)
    for row, (label, images) in enumerate(tiles.items()):
        y = top + row * (height + GAP)
        draw.text((MARGIN, y + height // 2), label, fill=INK, font=label_font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(image, (MARGIN + label_width + column * (width + GAP), y))
    return sheet


def to_tile(image: Image.Image, size: int) -> Image.Image:
    """Brings the longer side near `size`: small images by a whole factor, nearest neighbor; large ones by Lanczos."""
    longest = max(image.size)
    if longest * 2 <= size:
        factor = size // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longest <= size:
        return image
    width, height = (max(1, round(side * size / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int) -> list[str]:
    """Breaks a caption into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            candidate = f"{lines[-1]} {piece}".strip()
            if font.getlength(candidate) <= width:
                lines[-1] = candidate
            else:
                lines.append(piece)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip(" ,") + "…"
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A word, cut where it alone is wider than the column (scripts without spaces, URLs)."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _largest(tiles: Mapping[str, Sequence[Image.Image]]) -> tuple[int, int]:
    images = [image for row in tiles.values() for image in row]
    return max(image.width for image in images), max(image.height for image in images)
