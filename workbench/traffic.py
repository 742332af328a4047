"""Traffic: what an offloaded model fetched while it ran, beside what a perfect cache would have fetched.

An access is one expert that one layer needs in one pass. It is a hit where the expert was already in the slots that
compute. The oracle has as many slots and knows the future (Belady 1966): no policy can hit more.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.lens.accesses import Accesses
from workbench.lens.capacity import belady, capacity_curve, lru, working_set
from workbench.offloaded import Offloaded
from workbench.sizes import show_bytes
from workbench.transfers import COLUMNS

PHASES = {"prompt": "passes of several tokens", "answer": "passes of one token"}


@dataclass(frozen=True)
class Traffic:
    """Of one store from a visit on. `table`: a row a phase, see `of`; `accesses`: what was asked for, in order."""

    table: pd.DataFrame
    accesses: Accesses
    answers: np.ndarray  # bool [n]: accesses of passes of one token
    hits: np.ndarray  # bool [n]: what the store had
    slots: int
    block: int  # bytes

    @classmethod
    def of(cls, store: Offloaded, since: int = 0) -> "Traffic":
        """Columns of the table: passes, tokens, accesses, hits (what was near and had not been read ahead for this),
        from_far, from_disk, early (read ahead), computed_far, hit_rate, foretold (share of what was read ahead that
        was then asked for), disk_bytes and link_bytes (to the device), waited (seconds), seconds (from the end of the
        pass before to the end of this one, so with attention and sampling), tokens_per_second.

        RequestError where nothing ran since then, or all experts are in memory.
        """
        if not isinstance(store, Offloaded):
            raise RequestError("all experts of this model are in memory, so nothing is fetched. Give a smaller budget.")
        rows = pd.DataFrame(store.transfers.rows[since:].copy(), columns=list(COLUMNS))
        if rows.empty:
            raise RequestError("nothing was generated since then: there is nothing to report.")
        visit, key = store.transfers.accesses
        hits = store.transfers.hits[: len(visit)]
        chosen = (visit >= since) & (visit < since + len(rows))  # it may go on meanwhile
        visit, key = visit[chosen] - since, key[chosen]
        layer, moving = (rows[name].to_numpy().astype(int) for name in ("layer", "moving"))
        blocks = store.experts * len(store.layers)
        accesses = Accesses(visit, layer[visit], key % store.experts, moving[visit], blocks=blocks)
        answer = rows["tokens"].to_numpy() == 1
        return cls(
            _summed(rows, answer, store),
            accesses,
            answer[visit],
            hits[chosen],
            store.near.count,
            store.layout.nbytes,
        )

    @property
    def hit_rate(self) -> float:
        """Of the answers, or of the prompts where there are no answers."""
        return float(self.hits[self._counted].mean())

    @property
    def oracle(self) -> float:
        """What a cache of as many slots would have hit at best, over the same accesses; it begins empty."""
        return float(belady(self.accesses, self.slots)[self._counted].mean())

    @property
    def chance(self) -> float:
        """What as many experts, drawn once at random, would hit: the null."""
        return self.slots / self.accesses.blocks

    @property
    def lru(self) -> float:
        return float(lru(self.accesses, self.slots)[self._counted].mean())

    def curve(self) -> pd.DataFrame:
        """Hit rate at other capacities, by policy; see capacity.capacity_curve."""
        return capacity_curve(self.accesses)

    def working_set(self) -> pd.DataFrame:
        return working_set(self.accesses)

    @property
    def _counted(self) -> np.ndarray:
        return self.answers if self.answers.any() else ~self.answers

    def to_dict(self) -> dict:
        rates = {"hit_rate": self.hit_rate, "oracle": self.oracle, "lru": self.lru, "chance": self.chance}
        return {"phases": self.table.to_dict("index"), "slots": self.slots, "block_bytes": self.block} | rates

    def __str__(self) -> str:
        lines = [f"{self.slots:,} slots of {self.block / 1e6:,.2f} MB for {self.accesses.blocks:,} experts"]
        for phase, row in self.table.iterrows():
            per = row.disk_bytes / row.tokens
            lines.append(
                f"{phase + 's':8}{row.passes:,.0f} passes, {row.tokens:,.0f} tokens, {row.tokens_per_second:,.1f} "
                f"tokens/s; hits {row.hit_rate:.1%} of {row.accesses:,.0f}; read {show_bytes(per)} a token, waited "
                f"{1e3 * row.waited / row.tokens:,.1f} ms a token"
            )
        lines.append(
            f"hit rate {self.hit_rate:.1%}; a perfect cache of this size {self.oracle:.1%}, LRU {self.lru:.1%}, "
            f"experts drawn at random {self.chance:.1%}"
        )
        return "\n".join(lines)


def _summed(rows: pd.DataFrame, answer: np.ndarray, store: Offloaded) -> pd.DataFrame:
    ends = rows.groupby("moving")["at"].max()
    seconds = ends.diff().fillna(rows.loc[rows["moving"] == ends.index[0], "waited"].sum())
    found = {}
    for phase, which in (("prompt", ~answer), ("answer", answer)):
        part = rows[which]
        if part.empty:
            continue
        passes = part.groupby("moving")
        size = store.layout.nbytes
        moved = part["near"].sum() + part["computed_far"].sum()
        ahead = part["read"].sum() - part["disk"].sum()
        one = {
            "passes": passes.ngroups, "tokens": passes["tokens"].first().sum(), "accesses": part["needed"].sum(),
            "hits": part["near"].sum(), "from_far": part["far"].sum(), "from_disk": part["disk"].sum(),
            "computed_far": part["computed_far"].sum(), "early": part["early"].sum(),
            "foretold": min(1.0, part["early"].sum() / ahead) if ahead > 0 else float("nan"),
            "hit_rate": part["near"].sum() / part["needed"].sum(), "disk_bytes": part["read"].sum() * size,
            "link_bytes": (part["needed"].sum() - moved) * size if store.far else 0,
            "waited": part["waited"].sum(), "seconds": seconds[list(passes.groups)].sum(),
        }  # fmt: skip
        found[phase] = one | {"tokens_per_second": one["tokens"] / one["seconds"] if one["seconds"] else 0.0}
    return pd.DataFrame.from_dict(found, orient="index")
