"""Still pictures for saved notebooks, drawn without a browser: heat maps, strips of tokens, bars, stacked areas."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, SOFT, LINE, PAPER, EMPTY = "#1b1f24", "#5d6670", "#c9d1d9", "#ffffff", "#f1f3f5"
# one hue from light to dark (ColorBrewer's Blues): the order is seen without colours too
RAMP = ((222, 235, 247), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 38, 84))
ORANGE = (230, 159, 0)
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")  # Okabe and Ito's
SCALE = 2  # pixels of the file to one of the page, so that text stays crisp
FONT, EAST_ASIAN = "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc"  # where they are installed; else the one Pillow brings


def heat(values: np.ndarray, layers: Sequence[int], n_group: int, title: str, unit: str) -> bytes:
    """PNG of `values` [layers, experts], each zero an empty cell; `unit` says what the numbers count."""
    rows, experts = values.shape
    side = max(5, min(22, 900 // max(1, experts)))
    tall = max(side, 8)
    gap = 4 if n_group > 1 else 0
    group = experts // n_group
    columns = [58 + expert * side + expert // group * gap for expert in range(experts)]
    width, top = columns[-1] + side + 16, 58
    image, draw = _page(max(width, 420), top + rows * tall + 44)
    _text(draw, (16, 10), title, 14, INK)
    small = _font(10)
    for expert in range(0, experts, max(1, group if n_group > 1 else 8)):
        _text(draw, (columns[expert], top - 17), str(expert), 10, SOFT)
    _text(draw, (16, top - 17), "expert", 10, SOFT)
    every = math.ceil(13 / tall)  # labels that would overlap are left out
    largest = values.max() or 1
    for row in range(rows):
        y = top + row * tall
        if row % every == 0:
            _text(draw, (16, y + (tall - 13) / 2), f"layer {layers[row]}", 10, SOFT)
        for expert, x in enumerate(columns):
            share = float(values[row, expert] / largest)
            box = (x * SCALE, y * SCALE, (x + side - 1) * SCALE - 1, (y + tall - 1) * SCALE - 1)
            draw.rectangle(box, fill=_ramp(share) if share else EMPTY)
    y = top + rows * tall + 16
    x = 58
    for step in range(80):
        draw.rectangle(((x + step) * SCALE, y * SCALE, (x + step + 1) * SCALE, (y + 9) * SCALE), fill=_ramp(step / 79))
    _text(draw, (x - 8 - draw.textlength("0", small) / SCALE, y - 2), "0", 10, SOFT)
    _text(draw, (x + 88, y - 2), f"{_short(float(values.max()))} {unit}", 10, SOFT)
    return _png(image)


def strip(
    pieces: Sequence[str], shade: Sequence[float], prompt: Sequence[bool], title: str, scale: tuple[str, str]
) -> bytes:
    """PNG of `pieces` as boxes, tinted by `shade` (0 clear, 1 full, NaN hatched: not measured); `prompt` in grey ink.

    scale: what no tint and full tint mean.
    """
    across, line = 900, 24
    places, x, y = [], 16, 60
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for piece in pieces:
        width = probe.textlength(piece, _font_for(piece, 12)) / SCALE + 8
        if x + width > across - 16 and x > 16:
            x, y = 16, y + line
        places.append((x, y, width))
        x += width + 3
    image, draw = _page(across, y + line + 12)
    _text(draw, (16, 10), title, 14, INK)
    for step in range(80):
        box = ((16 + step) * SCALE, 38 * SCALE, (17 + step) * SCALE, 47 * SCALE)
        draw.rectangle(box, fill=_tint(step / 79))
    measured = "" if not any(map(math.isnan, shade)) else "    hatched: not measured"
    _text(draw, (104, 36), f"{scale[0]} to {scale[1]}{measured}", 10, SOFT)
    for piece, value, before, (x, y, width) in zip(pieces, shade, prompt, places):
        box = [x * SCALE, y * SCALE, min(x + width, across - 16) * SCALE, (y + line - 5) * SCALE]
        if math.isnan(value):
            draw.rectangle(box, fill=PAPER, outline=LINE, width=SCALE)
            for offset in range(int(box[0]), int(box[2]), 5 * SCALE):
                end = min(offset + box[3] - box[1], box[2])
                draw.line((offset, box[3], end, box[3] - (end - offset)), fill="#e4e8ec", width=SCALE)
        else:
            draw.rectangle(box, fill=_tint(value), outline=LINE, width=SCALE)
        draw.text((box[0] + 4 * SCALE, box[1] + SCALE), piece, SOFT if before else INK, _font_for(piece, 12))
    return _png(image)


def bars(rows: Sequence[tuple[str, float]], title: str, mine: str) -> bytes:
    """PNG of positive bytes as horizontal bars on a logarithmic axis; rows whose name begins with `mine` stand out."""
    left, across, tall = 300, 440, 26
    image, draw = _page(900, 66 + tall * len(rows) + 14)
    _text(draw, (16, 10), title, 14, INK)
    sizes = [size for _, size in rows]
    low = math.floor(math.log10(min(sizes, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(sizes, default=1))))

    def place(size: float) -> float:
        return left + across * (math.log10(size) - low) / (high - low)

    for power in range(low, high + 1):
        x = place(10**power)
        draw.line((x * SCALE, 52 * SCALE, x * SCALE, (56 + tall * len(rows)) * SCALE), LINE, SCALE)
        _text(draw, (x - 10, 36), size_of(10**power), 10, SOFT)
    for number, (name, size) in enumerate(rows):
        y = 58 + number * tall
        _text(draw, (16, y + 2), name, 12, INK)
        box = (left * SCALE, (y + 2) * SCALE, max(place(size), left + 1) * SCALE, (y + 17) * SCALE)
        draw.rectangle(box, fill=HUES[0] if name.startswith(mine) else "#9aa4ae")
        _text(draw, (place(size) + 6, y + 2), size_of(size), 12, INK)
    return _png(image)


def areas(x: Sequence[float], parts: Mapping[str, Sequence[float]], title: str, axis: str) -> bytes:
    """PNG of bytes over increasing `x`, stacked from the bottom; each holds until the next. `axis` is what x counts."""
    left, top, across, tall = 84, 44, 600, 260
    image, draw = _page(900, top + tall + 48)
    _text(draw, (16, 10), title, 14, INK)
    stack = np.cumsum([np.asarray(part, float) for part in parts.values()], 0)
    most = float(stack.max(initial=1)) or 1.0
    span = (x[-1] - x[0]) or 1.0

    def point(at: float, size: float) -> tuple[float, float]:
        return (left + across * (at - x[0]) / span) * SCALE, (top + tall * (1 - size / most)) * SCALE

    for number in reversed(range(len(stack))):
        ends = [*x[1:], x[-1]]
        edge = [point(at, size) for start, end, size in zip(x, ends, stack[number]) for at in (start, end)]
        draw.polygon([point(x[0], 0), *edge, point(x[-1], 0)], fill=HUES[number % len(HUES)])
    for step in (0, 0.5, 1):
        _text(draw, (16, top + tall * (1 - step) - 7), size_of(most * step), 10, SOFT)
    for step in (0, 0.5, 1):
        _text(draw, (left + across * step - 8, top + tall + 8), f"{x[0] + span * step:,.1f}", 10, SOFT)
    _text(draw, (left + across / 2 - 30, top + tall + 24), axis, 10, SOFT)
    for number, (name, part) in enumerate(parts.items()):
        y = top + tall - 20 * (number + 1)
        draw.rectangle(((left + across + 18) * SCALE, (y + 3) * SCALE, (left + across + 28) * SCALE, (y + 13) * SCALE),
                       fill=HUES[number % len(HUES)])  # fmt: skip
        _text(draw, (left + across + 34, y), f"{name} {size_of(part[-1])}", 11, INK)
    return _png(image)


def size_of(count: float) -> str:
    """Bytes in words: exact up to 100,000, then in powers of 1,000."""
    if count < 100_000:
        return f"{count:,.0f} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.3g} {' KMGT'[power]}B"


def _page(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
    return image, ImageDraw.Draw(image)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str) -> None:
    draw.text((at[0] * SCALE, at[1] * SCALE), text, colour, _font(size))


@cache
def _font(size: int, name: str = FONT) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(name, size * SCALE)
    except OSError:
        return ImageFont.load_default(size * SCALE)


def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _font(size, EAST_ASIAN if any(character >= "\u2e80" for character in text) else FONT)


def _ramp(share: float) -> tuple[int, int, int]:
    place = min(1.0, max(0.0, share)) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1]))


def _tint(share: float) -> tuple[int, int, int]:
    strength = 0.75 * min(1.0, max(0.0, share))
    return tuple(round(255 + (c - 255) * strength) for c in ORANGE)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.quantize(40, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
