"""Sizes of memory as people write them: "16GiB" is 16 x 2^30 bytes, "16GB" 16 x 10^9."""

import re

from workbench.errors import RequestError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """A whole number of bytes, or such as "16GiB", "4 GB", "500MB". RequestError for anything else, and for none."""
    found = 0
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)) and (match[2].upper() or "B") in UNITS:
        number, unit = re.sub("[_,]", "", match[1]), UNITS[match[2].upper() or "B"]
        found = int(float(number) * unit) if "." in number else int(number) * unit
    if found <= 0:
        raise RequestError(f'{size!r} is no size of memory: say a number of bytes, or such as "16GiB" or "4GB".')
    return found


def show_bytes(size: int) -> str:
    """Three or four figures, in powers of ten: "4.46 MB"."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= 0.9995 * UNITS[unit]:
            return f"{size / UNITS[unit]:,.{2 if abs(size) < 99.95 * UNITS[unit] else 0}f} {unit}"
    return f"{size} B"
