"""Noise: random weights of a given shape, packed as a recipe says, with which a model computes something sane.

What they are made to have:

sane activations  Embeddings have an rms of 1; each branch adds about 1 / sqrt(2 layers) of that, whatever the routed
                  scaling factor (attention ATTENDED times as much where it reads one token, and less where it averages
                  over several); all other matrices keep the size of what they read. Scores are of order 1.
uneven load       The first columns of all embeddings are the same (SHARED of the width): a direction that all hidden
                  states share, and along which every router row has a random part, FAVOURED times as large. So each
                  layer has favourites of its own. Values leave these columns out, or layers would pile them up.
locality          Rotary rows of queries and keys are one matrix over those columns, in pairs that turn once in some
                  12 to 300 tokens: the shared part then scores NEARBY nats at distance 0, and less with distance. What
                  attention adds is thus an average over the last tokens, and changes slowly; routers read it too.
open sampling     Logits spread by LOGITS. Rows of special tokens and of ids that the tokenizer does not have are small:
                  answers are text, and end by their length.

Codes are drawn from a stock of 65,536 runs of 16 codes, each the rounding of a normal distribution as a quantiser gives
it: legal (a quantiser never uses the highest code), and so of mean 0, which random bits are not. Scales make up for the
spread, and vary: were they alike, a wrong one would not show.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from workbench import ops
from workbench.blocks import Layout
from workbench.codec import FP8, Codec, Codes, Float, Groups, Tiles, pack_bits
from workbench.config import Config
from workbench.matrix import Matrix
from workbench.recipe import Recipe
from workbench.rope import frequencies, softmax_scale

RUN, RUNS = 16, 1 << 16  # numbers drawn together, and how many such runs there are
PARTS = torch.arange(192.0, 256.0)  # of 255: the scales of groups
SHARED = 1 / 8  # of the hidden width
NEARBY = 5.0  # nats
TURNS = (0.02, 0.5)  # radians a token
QUERY = 0.7  # size of queries, for scores of order 1
ATTENDED = 6.0  # what attention adds, for a single token; an average over tokens is smaller
SWIGLU = 0.6  # rms of silu(a) * b for normal a and b
ROUTED = 2.0  # spread of router logits
FAVOURED = 2.0  # how much more of the shared columns routers read
LOGITS = 3.0
QUIET = 0.05  # size of the rows of the head for what is no text


@dataclass(frozen=True)
class Noise:
    """The weights of one seed. A tensor depends on its name, the seed, the recipe and the config alone."""

    config: Config
    recipe: Recipe
    seed: int = 0

    def weights(self, name: str, shape: tuple[int, ...]) -> Matrix:
        """One tensor, packed as it is stored; plain ones are floats of the config's type."""
        config, codec = self.config, self._codec(name)
        if name.endswith("norm.weight"):
            return Matrix.pack(codec, 1 + 0.05 * self._normal(name, shape))
        if name.endswith(".mlp.gate.weight"):
            rows = self._normal(name, shape) * ROUTED * shape[-1] ** -0.5
            rows[:, : self._same] *= FAVOURED
            return Matrix.pack(codec, rows)
        matrix = Matrix.empty(codec, shape)
        fill(matrix, self._spread(name, shape[-1]), self._draws(name))
        kind, layer = name.split(".")[-2], ".".join(name.split(".")[:3])
        heads, content = config.num_attention_heads, config.qk_nope_head_dim
        numbers = matrix.parts[0].view(torch.uint8)
        shared = numbers[:, : self._same * numbers.shape[-1] // shape[-1]]
        if kind == "embed_tokens":
            shared.copy_(shared[0].clone())
        elif kind == "lm_head":
            scales = matrix.parts[-1][config.bos_token_id :]
            scales.copy_(scales.float() * QUIET)
        elif kind == "kv_a_proj_with_mqa":  # values leave the shared columns out: an average would grow by them alone
            shared.copy_(codec.pack(torch.zeros(self._same))[0].view(torch.uint8))
            matrix[config.kv_lora_rank :].copy_(Matrix.pack(codec, self._turning(layer)))
        elif kind == "q_a_proj":  # the first of the query's latent are what the rotary key is, and q_b_proj reads them
            matrix[: config.qk_rope_head_dim].copy_(Matrix.pack(codec, self._turning(layer)))
        elif kind in ("q_proj", "q_b_proj"):
            rows = self._turning(layer) if kind == "q_proj" else torch.eye(config.qk_rope_head_dim, shape[-1])
            for part, its in zip(matrix.parts, Matrix.pack(codec, rows).parts):
                part.unflatten(0, (heads, -1))[:, content:] = its
        return matrix

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        """One expert, into bytes [layout.nbytes]."""
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        draws, bank = self._draws(name), layout.bank(into.zero_()[None])
        fill(bank.gate_up[0], self._spread(f"{name}.up_proj.weight", layout.hidden), draws)
        fill(bank.down[0], self._spread(f"{name}.down_proj.weight", layout.width), draws)

    def _spread(self, name: str, width: int) -> float:
        """The standard deviation of the weights of a matrix with `width` inputs."""
        branch, unit = (2 * self.config.num_hidden_layers) ** -0.5, width**-0.5
        kind = name.split(".")[-2]
        if kind == "embed_tokens":
            return 1.0
        if kind == "down_proj":
            return branch * unit / SWIGLU / (self._gates if ".experts." in name else 1.0)
        return unit * {"lm_head": LOGITS, "o_proj": ATTENDED * branch, "q_proj": QUERY, "q_b_proj": QUERY}.get(
            kind, 1.0
        )

    @cached_property
    def _gates(self) -> float:
        """Size of what independent experts of size 1 sum to: the root of the mean sum of squared gates."""
        logits = self._normal("gates", (1024, self.config.n_routed_experts)) * ROUTED
        return float(ops.route(logits, self.config).gates.square().sum(-1).mean().sqrt())

    @property
    def _same(self) -> int:
        """How many columns all embeddings share: whole runs."""
        return max(1, int(self.config.hidden_size * SHARED) // RUN) * RUN

    def _turning(self, layer: str) -> torch.Tensor:
        """Rotary rows [R, D], for queries and keys alike, so that what they read of the shared columns scores best at
        distance 0: that is the sum of its squares there.
        """
        config = self.config
        turns = frequencies(config).repeat_interleave(2)
        used = (turns >= TURNS[0]) & (turns <= TURNS[1])
        rows = self._normal(f"{layer}.turning", (config.qk_rope_head_dim, config.hidden_size))
        size = (NEARBY / softmax_scale(config) / used.sum().clamp(min=1)) ** 0.5
        rows[:, : self._same] *= (used * size + ~used * 0.1)[:, None] * self._same**-0.5
        rows[:, self._same :] *= 0.1 * config.hidden_size**-0.5
        return rows

    def _codec(self, name: str) -> Codec:
        return self.recipe.codec(name) or Float(getattr(torch, self.config.dtype))

    def _draws(self, name: str) -> np.random.PCG64:
        return np.random.PCG64(int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:16]))

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(np.random.Generator(self._draws(name)).standard_normal(shape, dtype=np.float32))


def fill(matrix: Matrix, spread: float, draws: np.random.PCG64) -> None:
    """Random numbers of that standard deviation, in place; those a codec stores have the spread a quantiser gives."""
    codec, numbers = matrix.codec, matrix.parts[0]
    stock, size = _stock(codec)
    if isinstance(codec, Float):
        stock = (stock.float() * spread).to(codec.dtype)
    else:
        scales = matrix.parts[1:]
        scales[-1].copy_(_uneven(scales[-1].shape, draws) / PARTS.square().mean().sqrt() * (spread / size))
        if isinstance(codec, Groups):
            scales[0].copy_(_uneven(scales[0].shape, draws))
            scales[1].mul_(255 / PARTS.square().mean().sqrt())
    _draw(stock, draws, numbers)


def _uneven(shape: tuple[int, ...], draws: np.random.PCG64) -> torch.Tensor:
    """Numbers out of PARTS."""
    count = math.prod(shape)
    drawn = torch.from_numpy(draws.random_raw(-(-count // 8)).view(np.uint8))[:count]
    return PARTS[0] + drawn.view(shape) // 4


def _draw(stock: torch.Tensor, draws: np.random.PCG64, into: torch.Tensor) -> None:
    """Fills rows with runs of the stock."""
    runs = stock.view(torch.uint8).numpy()
    runs = runs.view(np.dtype((np.void, runs.shape[1])))[:, 0]
    rows = into.view(torch.uint8).numpy()
    each = -(-rows.shape[1] // runs.itemsize)
    step = max(1, (1 << 19) // each)
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        picks = draws.random_raw(-(-len(some) * each // 4)).view(np.uint16)[: len(some) * each]
        some[:] = runs.take(picks).view(np.uint8).reshape(len(some), -1)[:, : rows.shape[1]]


@cache
def _stock(codec: Codec) -> tuple[torch.Tensor, float]:
    """Runs of numbers as that codec stores them, [RUNS, width], and their root mean square before any scale."""
    half = torch.from_numpy(np.random.default_rng(0).standard_normal((RUNS // 2, RUN), dtype=np.float32))
    normal = torch.cat([half, -half])
    if isinstance(codec, Codes | Groups):
        most = 2 ** (codec.bits - 1) - 1
        numbers = (normal * most / 3).round().clamp(-most, most)
        stored = pack_bits(numbers.long() + most, codec.bits)
    elif isinstance(codec, Tiles):
        stored = (normal * torch.finfo(FP8).max / 4).clamp(-448, 448).to(FP8)
        numbers = stored.float()
    else:
        stored = numbers = normal.to(codec.dtype)
    return stored, float(numbers.float().square().mean().sqrt())
