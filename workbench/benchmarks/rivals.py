"""The two sides of the comparison: this engine, and transformers at its fastest. Both answer the same calls."""

from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from workbench.cache import LatentCache
from workbench.errors import RequestError
from workbench.opening import open_model

CACHE = {torch.float32: "fp32", torch.bfloat16: "bf16"}
GATHERED = 1e8  # bytes of expert weights copied in one pass, beyond which batched_mm was never near the fastest


class Setting(NamedTuple):
    """Which of transformers' own implementations of attention and experts run."""

    attention: str
    experts: str

    def __str__(self) -> str:
        return f"{self.attention} attention, {self.experts} experts"


class Rival(Protocol):
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, T] to [1, T, vocab], without a cache."""

    def start(self, tokens: torch.Tensor) -> object:
        """A new cache holding `tokens` [1, T], T >= 0."""

    def advance(self, tokens: torch.Tensor, cache: object) -> torch.Tensor:
        """The tokens [1, T] continue the cache; logits of the last one."""

    def rewind(self, cache: object, length: int) -> None:
        """The cache holds its first `length` tokens again."""


class Ours:
    """The model as `Engine` calls it, without sampling and text."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.model = open_model(path, dtype=dtype)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)

    def start(self, tokens: torch.Tensor) -> LatentCache:
        cache = LatentCache(self.model.config, format=CACHE[self.model.dtype])
        if tokens.numel():
            self.advance(tokens, cache)
        return cache

    def advance(self, tokens: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        return self.model(tokens, cache, logits="last")

    def rewind(self, cache: LatentCache, length: int) -> None:
        cache.truncate(length)


class Transformers:
    """DeepseekV2ForCausalLM with its own cache of latents, called directly: its `generate` would only add to it."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu", random: bool = False):
        """`random`: of the config only, with weights drawn on the device, for speed alone."""
        try:
            import transformers  # noqa: PLC0415 - the rival, not a dependency
        except ImportError:
            raise RequestError(
                "transformers is not installed, and there is nothing to compare with; pip install 'transformers>=5.23'"
            ) from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.version, self.new_cache = transformers.__version__, transformers.DynamicCache
        kind = transformers.AutoModelForCausalLM
        if random:
            with torch.device(device):
                config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
                self.model = kind.from_config(config, dtype=dtype).eval()
        else:
            self.model = kind.from_pretrained(path, dtype=dtype, local_files_only=True).eval().to(device)

    def settings(self, new: int) -> list[Setting]:
        """All that can run a pass of `new` tokens in reasonable memory."""
        config = self.model.config
        expert = 3 * config.hidden_size * config.moe_intermediate_size * self.model.dtype.itemsize
        experts = ["eager", "grouped_mm"]
        if new * config.num_experts_per_tok * expert <= GATHERED:
            experts.append("batched_mm")  # copies the weights of every chosen expert for every token
        return [Setting(*pair) for pair in product(("eager", "sdpa"), experts)]

    def use(self, setting: Setting) -> None:
        self.model.set_attn_implementation(setting.attention)
        self.model.set_experts_implementation(setting.experts)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits

    def start(self, tokens: torch.Tensor) -> object:
        cache = self.new_cache(config=self.model.config)
        if tokens.numel():
            self.advance(tokens, cache)
        return cache

    def advance(self, tokens: torch.Tensor, cache: object) -> torch.Tensor:
        return self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def rewind(self, cache: object, length: int) -> None:
        surplus = cache.get_seq_length() - length
        if surplus:
            cache.crop(-surplus)
