"""Models side by side, in numbers that follow from their configurations."""

import pandas as pd

from workbench.config import Config


def shapes(*names: str) -> pd.DataFrame:
    """One column a preset of Config. Cache bytes are for bf16, 2 bytes a number."""
    return pd.DataFrame({name: _shape(Config.preset(name)) for name in names})


def _shape(config: Config) -> dict[str, str]:
    total, active = config.parameters()
    row = config.latent_width * config.num_hidden_layers
    return {
        "parameters": count(total),
        "active for one token": count(active),
        "layers": f"{config.num_hidden_layers}",
        "width (hidden size)": f"{config.hidden_size:,}",
        "attention heads": f"{config.num_attention_heads}",
        "routed experts in a layer": f"{config.n_routed_experts}, of which {config.num_experts_per_tok} are chosen",
        "shared experts in a layer": f"{config.n_shared_experts}",
        "vocabulary": f"{config.vocab_size:,}",
        "cached numbers for a token and layer": f"{config.latent_width}",
        "cache for a token, bf16": f"{2 * row:,} bytes",
        "context, tokens": f"{config.max_position_embeddings:,}",
    }


def count(number: int) -> str:
    """A large number in three figures: 235.7 billion, 15.7 billion, 9.1 million."""
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
