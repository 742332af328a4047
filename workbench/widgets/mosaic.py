"""A mosaic: a still picture of places, one of a few kinds each, with a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor

from workbench.widgets.picture import INK, PAPER, SCALE, SOFT, _font, _page, _png, _text

LEFT, TOP, BELOW = 70, 62, 40


def mosaic(kinds: np.ndarray, layers: Sequence[int], legend: Sequence[tuple[str, str]], title: str) -> bytes:
    """PNG of `kinds` [layers, experts]; kind n has the colour and the words of legend[n]."""
    rows, experts = kinds.shape
    side = max(4, min(22, 840 // max(1, experts)))
    tall = max(6, side)
    width = max(LEFT + experts * side + 16, 640)
    image, draw = _page(width, TOP + rows * tall + BELOW)
    _text(draw, (16, 10), title, 14, INK)
    _text(draw, (16, TOP - 18), "expert", 10, SOFT)
    for expert in range(0, experts, 20 if side < 8 else 8):
        _text(draw, (LEFT + expert * side, TOP - 18), str(expert), 10, SOFT)
    for row in range(0, rows, -(-13 // tall)):
        _text(draw, (16, TOP + row * tall + (tall - 13) / 2), f"layer {layers[row]}", 10, SOFT)
    colours = np.array([ImageColor.getrgb(colour) for colour, _ in legend], np.uint8)
    across, down = side * SCALE, tall * SCALE
    cells = colours[kinds].repeat(down, 0).repeat(across, 1)
    paper = ImageColor.getrgb(PAPER)
    for line in range(SCALE):
        cells[line::down], cells[:, line::across] = paper, paper
    image.paste(Image.fromarray(cells), (LEFT * SCALE, TOP * SCALE))
    x, y = LEFT, TOP + rows * tall + 14
    for colour, words in legend:
        draw.rectangle((x * SCALE, (y + 2) * SCALE, (x + 10) * SCALE, (y + 12) * SCALE), fill=colour)
        _text(draw, (x + 15, y), words, 10, INK)
        x += 32 + int(draw.textlength(words, _font(10))) / SCALE
    return _png(image)
