"""What each way of sharing keys and values among heads keeps of a token (paper, table 1)."""

import pandas as pd

from workbench.config import Config
from workbench.errors import RequestError


def schemes(config: Config, groups: int, bytes_each: int = 2) -> pd.DataFrame:
    """One row a scheme, of one model with these heads: elements kept for a token in a layer, in all layers, bytes.

    MHA      a key and a value for every head
    GQA      for every one of `groups` groups of heads; MQA for all heads together
    MLA      one latent, from which keys and values of all heads are computed, and one rotary key
    A key is as wide as a value, as in the paper's table. RequestError for groups that do not divide the heads.
    """
    heads = config.num_attention_heads
    if not 1 <= groups <= heads or heads % groups:
        raise RequestError(f"groups must divide the {heads} heads; got {groups}.")
    pair = 2 * config.v_head_dim
    kept = {"MHA": heads * pair, f"GQA, {groups} groups": groups * pair, "MQA": pair, "MLA": config.latent_width}
    table = pd.DataFrame({"in a layer": kept})
    table["in all layers"] = table["in a layer"] * config.num_hidden_layers
    table["bytes"] = table["in all layers"] * bytes_each
    table["share of MHA"] = table["in a layer"] / kept["MHA"]
    return table.rename_axis("scheme")
