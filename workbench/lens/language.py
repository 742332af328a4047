"""Which language tokens are of, told by counting: no dictionary, only texts of each language."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.tokenizer import Tokenizer


def telling(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], ratio: float = 3.0) -> pd.Series:
    """Token id -> label, for the tokens that are `ratio` times as frequent in the texts of one label as in any other's.

    texts: label -> texts. Two are added to every count, so that a token must be seen a few times before it tells
    anything. What tells nothing is left out, such as digits. RequestError for fewer than two labels.
    """
    counts = {label: Counter(t for text in those for t in tokenizer.encode(text)) for label, those in texts.items()}
    if len(counts) < 2 or not all(counts.values()):
        raise RequestError("give texts of at least two labels, none of them empty, to tell them apart.")
    table = pd.DataFrame(counts).fillna(0).sort_index() + 2
    table /= table.sum()
    second, best = np.sort(table.to_numpy(), axis=1)[:, -2:].T
    return table.idxmax(axis=1)[best >= ratio * second].rename("label").rename_axis("token")


def share(tokens: Iterable[int], told: pd.Series, label: str) -> float:
    """Of the tokens that tell something, how many tell `label`; NaN where none does. `told` is what `telling` gives."""
    known = told.reindex(list(tokens)).dropna()
    return float((known == label).mean())
