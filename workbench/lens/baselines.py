"""What the latent cache is compared with: bytes per token of every baseline, and ratios that always carry its name.

"93.3 % less" says nothing without what it is less than: of DeepSeek-67B, another model, in bf16. Sources: the paper's
table 1 for the schemes, its section 3.2.3 and figure 1(b) for DeepSeek-67B.
"""

from typing import NamedTuple

import pandas as pd

from workbench.config import Config
from workbench.lens.schemes import schemes

BF16 = 2  # bytes of an element: what the published models compute and cache in


class Baseline(NamedTuple):
    """Elements that a scheme keeps of a token in all layers, and what stores one of them."""

    name: str
    doc: str
    elements: int
    bytes_each: int = BF16
    own: bool = True  # of the same model: its heads and layers

    @property
    def nbytes(self) -> int:
        return self.elements * self.bytes_each

    def ratio(self, nbytes: float) -> "Ratio":
        """What `nbytes` per token, in all layers, are of this baseline."""
        return Ratio(nbytes, self)


class Ratio(NamedTuple):
    """Bytes per token beside those of a baseline, which its text names."""

    nbytes: float
    baseline: Baseline

    @property
    def share(self) -> float:
        return self.nbytes / self.baseline.nbytes

    @property
    def reduction(self) -> float:
        """1 less the share; negative where more is kept than by the baseline."""
        return 1 - self.share

    def __str__(self) -> str:
        less = f"{self.reduction:.1%} less" if self.share <= 1 else f"{-self.reduction:.1%} more"
        return f"{less} than {self.baseline.name}"


# 95 layers with 8 key-value heads of 128, in bf16 (its config.json): what the paper's 93.3 % is measured against
DEEPSEEK_67B = Baseline(
    "DeepSeek-67B (GQA, bf16)", "another, dense model: 95 layers, 8 key-value heads of 128", 95 * 8 * 128 * 2, own=False
)


def groups_for(config: Config) -> int:
    """Groups of a GQA with these heads: 8, as DeepSeek-67B has, or the most below it that share them evenly."""
    heads = config.num_attention_heads
    return next(groups for groups in range(min(8, max(1, heads // 2)), 0, -1) if heads % groups == 0)


def baselines(config: Config) -> dict[str, Baseline]:
    """By name, largest first: what a token would cost this model under other schemes, and DeepSeek-67B.

    MHA, GQA, MQA   keys and values of its heads, of every group of heads, of one head for all (paper, table 1)
    expanded        keys and values rebuilt from the latent and then cached, as the original remote code does
    latent          the latent and the rotary key as they are computed
    DeepSeek-67B    another model: a ratio to it compares two models, and means something only for V2
    """
    groups = groups_for(config)
    table = schemes(config, groups, BF16)["in all layers"]
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    expanded = heads * (config.qk_head_dim + config.v_head_dim) * layers
    found = [
        Baseline("MHA (bf16)", f"a key and a value for each of the {heads} heads", int(table["MHA"])),
        Baseline("expanded (bf16)", "keys and values of every head rebuilt from the latent, then cached", expanded),
        Baseline(
            f"GQA, {groups} groups (bf16)",
            f"a key and a value for every {heads // groups} heads",
            int(table[f"GQA, {groups} groups"]),
        ),
        Baseline("MQA (bf16)", "one key and one value for all heads", int(table["MQA"])),
        Baseline("latent (bf16)", "the latent and the rotary key, as they are computed", int(table["MLA"])),
        DEEPSEEK_67B,
    ]
    return {one.name: one for one in sorted(found, key=lambda one: -one.nbytes)}


def compare(nbytes: float, config: Config) -> pd.DataFrame:
    """`nbytes` per token, in all layers, beside every baseline: their bytes, the share of them, and the reduction."""
    rows = {
        name: (one.nbytes, one.ratio(nbytes).share, one.ratio(nbytes).reduction, one.own)
        for name, one in baselines(config).items()
    }
    columns = ["bytes per token", "share", "reduction", "same model"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("baseline")
