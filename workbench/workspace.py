"""The workspace: bytes that a pass takes while it lasts, beside weights and cache, by the arithmetic of its steps.

It follows model.py and ops.py line by line, and adds what their libraries take inside; the tests hold both together.
It follows model.py and ops.py line by line, and adds what their libraries take inside; the tests hold both together.
W = C + R, K chosen, E experts, I expert width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

import torch

from workbench import native
from workbench.codec import Codec, Codes, Float, Groups, Tiles
from workbench.config import Config
from workbench.formats import Format, Packed, Plain
from workbench.model import absorbing_is_cheaper
from workbench.ops import SCORES, rows_at_once
from workbench.packed import FEW, UNPACKED
from workbench.recipe import Recipe
from workbench.residents import expert_layouts
from workbench.ring import TOGETHER

FLOAT, LONG, PACKING = 4, 8, 40  # bytes; the last of an element while it is packed: codes as int64, scales searched
UP = "self_attn.kv_b_proj.weight"
SAMPLING = 64  # bytes a logit while a token is drawn: numbers in float64, their order


class Workspace(NamedTuple):
    """Bytes at the worst moment of each phase of a pass. Phases follow each other; `beside` is there all the time."""

    beside: int = 0  # the stream of the layers, rotations, what the recorder of the routing keeps
    embedding: int = 0
    attention: int = 0  # projections, scores, keys and values that are rebuilt
    experts: int = 0  # with the router, the shared ones, and the outputs before they are summed
    dense: int = 0
    logits: int = 0  # with what drawing a token takes

    @property
    def nbytes(self) -> int:
        return self.beside + max(self[1:])

    def join(self, other: "Workspace") -> "Workspace":
        """The worst of both."""
        return Workspace(*map(max, self, other))


def workspace(
    config: Config,
    recipe: Recipe | None,
    dtype: torch.dtype,
    format: Format,
    context: int,
    batch: int = 1,
    chunk: int = 512,
    compiled: bool | None = None,
) -> Workspace:
    """The worst of all passes: chunks of up to `chunk` tokens of one prompt, steps of `batch` sequences at a time.

    `compiled`: whether the kernel for packed weights is there; None asks on this machine.
    """
    if compiled is None:
        compiled = native.kernel() is not None
    worst = Workspace()
    passes = [(new, length, 1) for new, length in _prompts(config, min(chunk, context), context)]
    passes += [(1, length, batch) for length in {min(context, FEW), context}]
    for (new, length, rows), alone in product(passes, (True, False)):
        worst = worst.join(Pass(config, recipe, dtype, format, new, length, rows, alone, compiled).workspace)
    return worst


def _prompts(config: Config, chunk: int, context: int) -> Iterator[tuple[int, int]]:
    """Chunks of a prompt, of all lengths where the worst may be: the last one may be shorter than the others, and how
    the attention is computed depends on both numbers.
    """
    lengths = {context} | {min(context, 2**power) for power in range(3, context.bit_length())}
    for length in lengths:
        most = min(chunk, length)
        news = {most, min(most, FEW), min(most, FEW + 1)} | {2**power for power in range(most.bit_length())}
        few, many = 0, most + 1  # absorbing is cheaper up to `few` new tokens
        while many - few > 1:
            new = (few + many) // 2
            few, many = (new, many) if absorbing_is_cheaper(config, new, length) else (few, new)
        news |= {max(1, few), min(most, few + 1)}
        yield from product(news, [length])


@dataclass(frozen=True)
class Pass:
    """T = `new` tokens of each of `batch` sequences, each of S = `length` tokens then.

    `alone`: the blocks of a sequence are neighbours, so plain rows are read where they are.
    """

    config: Config
    recipe: Recipe | None
    dtype: torch.dtype
    format: Format
    new: int
    length: int
    batch: int = 1
    alone: bool = True
    compiled: bool = False

    @property
    def workspace(self) -> Workspace:
        config = self.config
        layers = range(config.num_hidden_layers)
        dense = any(not config.is_moe(layer) for layer in layers)
        return Workspace(
            self._beside(),
            self._embedding(),
            self._attention(),
            self._experts() if any(map(config.is_moe, layers)) else 0,
            self._dense(config.intermediate_size, "mlp") if dense else 0,
            self._logits(),
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a copy of an activation in fp32, where that takes one."""
        return 0 if self.dtype == torch.float32 else FLOAT

    def _codecs(self, name: str) -> frozenset[Codec | None]:
        return _codecs(self.recipe, self.config.num_hidden_layers, name)

    def _unpacked(self, count: int, codec: Codec | None, by_kernel: bool = True) -> int:
        """While `count` weights are unpacked, themselves included; nothing where they are computed with as they are."""
        if codec is None or (isinstance(codec, Float) and codec.dtype == self.dtype):
            return 0
        if isinstance(codec, Float):
            return count * self.size
        if isinstance(codec, Tiles):
            return count * (2 * FLOAT + self.size)
        if by_kernel and self.compiled and _compiles(codec):
            return count * self.size
        return count * _bytes_to_unpack(codec)

    def _linear(self, tokens: int, width: int, out: int, codecs: Iterable[Codec | None]) -> int:
        """While x [tokens, width] is multiplied by a matrix [out, width], the result included: see packed.linear."""
        made = tokens * out * self.size
        if self.compiled and tokens <= FEW and all(map(_compiles, codecs)):
            return made + tokens * (width + out) * FLOAT
        step = max(1, UNPACKED // width)
        pieces = made if out > step and set(codecs) != {None} else 0  # put together afterwards
        return made + pieces + max(self._unpacked(min(out, step) * width, codec) for codec in codecs)

    def _beside(self) -> int:
        config, tokens = self.config, self.tokens
        stream = 3 * tokens * config.hidden_size * self.size
        rotations = tokens * config.qk_rope_head_dim // 2 * torch.complex64.itemsize + 4 * tokens * LONG
        layers, chosen = sum(map(config.is_moe, range(config.num_hidden_layers))), config.num_experts_per_tok
        kept = max(tokens, TOGETHER) * layers * ((chosen + 1) * (LONG + FLOAT) + chosen * FLOAT)
        return stream + rotations + 3 * kept  # as they were, joined, and in order

    def _embedding(self) -> int:
        """Rows of it, unpacked at once."""
        rows = self.tokens * self.config.hidden_size
        [codec] = self._codecs("model.embed_tokens.weight")
        return rows * self.size + self._unpacked(rows, codec, by_kernel=False)

    def _norm(self, width: int) -> int:
        return self.tokens * width * (self.wide + 3 * FLOAT + 2 * self.size)

    def _attention(self) -> int:
        config, tokens, size = self.config, self.tokens, self.size
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        query, wide = heads * config.qk_head_dim, config.latent_width
        down = self._codecs("self_attn.kv_a_proj_with_mqa.weight")
        first = (rank or query) + wide
        held = tokens * hidden * size  # what is read
        moments = [self._norm(hidden), held + self._linear(tokens, hidden, first, down)]
        held += tokens * first * size
        if rank is not None:
            up = self._codecs("self_attn.q_b_proj.weight")
            held += tokens * rank * size
            moments.append(held + max(self._norm(rank), self._linear(tokens, rank, query, up)))
            held += tokens * query * size
        turned = tokens * (heads + 1) * config.qk_rope_head_dim
        moments.append(held + turned * (2 * size + self.wide + 2 * FLOAT))
        held += turned * size + 2 * tokens * wide * size  # and the latent after its norm, and the row
        moments.append(held + tokens * wide * (PACKING if isinstance(self.format, Packed) else 2 * FLOAT))
        out = tokens * heads * config.v_head_dim * size
        moments.append(held + (2 * out if self.batch > 1 else 0) + self._recalled())
        onto = self._codecs("self_attn.o_proj.weight")
        moments.append(held + 2 * out + self._linear(tokens, heads * config.v_head_dim, hidden, onto))
        return max(moments)

    def _recalled(self) -> int:
        """Attention.recall of one sequence, by the form it will choose."""
        config, format, row = self.config, self.format, self.config.latent_width
        few = min(self.length, rows_at_once(self.new, config.num_attention_heads))
        form = self._absorbed if absorbing_is_cheaper(config, self.new, self.length) else self._expanded
        parts = self._absorbed_parts if form == self._absorbed else self._expanded_parts
        as_it_is = isinstance(format, Plain) and format.dtype == self.dtype
        if as_it_is and self.alone:
            return form(self.length)
        if isinstance(format, Packed):
            codecs = (format.latent, config.kv_lora_rank), (format.rope, config.qk_rope_head_dim)
            each = sum(self._unpacked(width, codec, by_kernel=False) for codec, width in codecs)
            each += row * self.size + (2 * row * self.size if format.recent else 0)
        else:
            each = row * (self.size + format.dtype.itemsize)
        return few * each + (form(few) if few == self.length else parts(few))

    @property
    def _up(self) -> int:
        """Weights that rebuild keys and values."""
        config = self.config
        return config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank

    def _lifting(self) -> int:
        """ops.lift or ops.lower, the result included."""
        config = self.config
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        inner = max(config.qk_nope_head_dim, config.v_head_dim)
        made = self.new * heads * (latent + inner) * self.size
        if self.compiled and self.new <= FEW and all(map(_compiles, self._codecs(UP))):
            return made + self.new * heads * (latent + inner) * FLOAT
        copied = self._up * self.size  # where the library wants the rows of one kind together
        return made + copied + max(self._unpacked(self._up, codec, by_kernel=False) for codec in self._codecs(UP))

    def _absorbed(self, rows: int) -> int:
        """Over rows that come in one piece: ops._attend_shared."""
        config, new, heads = self.config, self.new, self.config.num_attention_heads
        query = new * heads * config.latent_width * self.size
        out = new * heads * config.kv_lora_rank * self.size
        scores = heads * rows * min(new, max(1, SCORES // (heads * rows)))
        each = 2 * FLOAT + (1 if new > 1 else 0) + (self.size if self.wide else 0)
        keys = rows * config.latent_width * self.size if self.wide else 0  # a copy that the library multiplies
        return query + max(out + self._lifting(), 2 * out + scores * each + new * rows + keys)

    def _expanded(self, rows: int) -> int:
        """Over rows that come in one piece: keys and values of every head, then one fused kernel."""
        config, new, heads = self.config, self.new, self.config.num_attention_heads
        width, value = config.qk_head_dim, config.v_head_dim
        rebuilt = self._linear(rows, config.kv_lora_rank, heads * (config.qk_nope_head_dim + value), self._codecs(UP))
        whole = rows * heads * (config.qk_nope_head_dim + value + width) * self.size
        padded = rows * heads * width * self.size if width > value else 0
        query = 2 * new * heads * width * self.size  # and what comes out
        mask = new * rows * (2 + FLOAT)
        return query + max(rebuilt + rows * config.kv_lora_rank * self.size, whole + padded + mask)

    def _absorbed_parts(self, rows: int) -> int:
        """ops.attend_in_parts over the rows themselves."""
        config, heads = self.config, self.config.num_attention_heads
        width, latent = config.latent_width, config.kv_lora_rank
        query = self.new * heads * width * self.size
        state = self._carried(width, latent)
        keys = 2 * rows * (width + latent) * self.wide + rows * width * (self.size + FLOAT)
        scores = heads * self.new * rows
        out = self.new * heads * latent * self.size
        return query + max(self._lifting() + out, state + keys + 4 * FLOAT * scores + self.new * rows)

    def _expanded_parts(self, rows: int) -> int:
        """ops.attend_in_parts: while one part is rebuilt, the last one and its scores are still there."""
        config, heads = self.config, self.config.num_attention_heads
        width, value, latent = config.qk_head_dim, config.v_head_dim, config.kv_lora_rank
        query = self.new * heads * width * self.size
        state = self._carried(width, value)
        scores = heads * self.new * rows
        both = config.qk_nope_head_dim + value
        rebuilt = rows * heads * (both + width) * self.size
        wide = rows * heads * (width + value) * self.wide
        part = self._linear(rows, latent, heads * both, self._codecs(UP)) + rows * (latent + heads * width) * self.size
        old = wide or rebuilt
        return query + state + self.new * rows + max(
            old + 2 * FLOAT * scores + max(part, rebuilt + wide), max(wide, rebuilt) + 4 * FLOAT * scores
        )  # fmt: skip

    def _carried(self, width: int, value: int) -> int:
        """The query in fp32, the sums so far, and the next ones."""
        heads = self.new * self.config.num_attention_heads
        return heads * FLOAT * ((width if self.wide else 0) + 3 * value + 6)

    def _experts(self) -> int:
        config, tokens, size = self.config, self.tokens, self.size
        hidden, width, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
        experts = config.n_routed_experts
        read = tokens * hidden * size
        router = tokens * hidden * self.wide + experts * hidden * self.wide + 6 * tokens * experts * FLOAT
        order = 6 * tokens * (chosen + 1) * LONG
        outputs = tokens * chosen * hidden
        summed = outputs * (size + FLOAT + self.wide)
        shared = 0
        if config.n_shared_experts:
            shared = self._dense(config.n_shared_experts * width, "mlp.shared_experts") + read
        moments = [self._norm(hidden), read + router, read + order + summed, read + shared]
        for layout in set(expert_layouts(config, self.recipe)):
            if layout is None:  # ops._experts_grouped
                gathered = tokens * chosen * size
                moments.append(read + order + summed + 2 * tokens * hidden * FLOAT)
                moments.append(read + order + gathered * (hidden + 2 * width))
                moments.append(read + order + gathered * max(4 * width, 2 * width + hidden))
            else:  # packed._by_expert, of an expert that every token chose
                up = self._linear(tokens, hidden, 2 * width, [layout.gate_up])
                down = self._linear(tokens, width, hidden, [layout.down])
                run = max(tokens * hidden * size + up, tokens * 4 * width * size + down)
                moments.append(read + order + outputs * size + run)
        return max(moments)

    def _dense(self, width: int, name: str) -> int:
        tokens, hidden = self.tokens, self.config.hidden_size
        up = self._linear(tokens, hidden, 2 * width, self._codecs(f"{name}.gate_proj.weight"))
        down = self._linear(tokens, width, hidden, self._codecs(f"{name}.down_proj.weight"))
        return tokens * hidden * self.size + max(
            self._norm(hidden), up, 4 * tokens * width * self.size, tokens * width * self.size + down
        )

    def _logits(self) -> int:
        config = self.config
        tied = config.tie_word_embeddings
        head = self._codecs("model.embed_tokens.weight" if tied else "lm_head.weight")
        product = self._linear(self.batch, config.hidden_size, config.vocab_size, head)
        return max(product, self.batch * config.vocab_size * (self.size + FLOAT) + config.vocab_size * SAMPLING)


@lru_cache
def _codecs(recipe: Recipe | None, layers: int, name: str) -> frozenset[Codec | None]:
    """Of a matrix, in any layer where its name begins in one."""
    if recipe is None:
        return frozenset([None])
    inside = name.startswith(("self_attn", "mlp"))
    names = [f"model.layers.{layer}.{name}" for layer in range(layers)] if inside else [name]
    return frozenset(map(recipe.codec, names))


def _compiles(codec: Codec | None) -> bool:
    """Whether the compiled kernel understands it: see native.Kernel.takes."""
    return isinstance(codec, Codes | Groups) and codec.bits <= 8 and getattr(codec, "group", 16) % 16 == 0


def _bytes_to_unpack(codec: Codec) -> int:
    """A weight, by codec.unpack_bits: the stream and its words in int64, codes, codes masked; the stream padded."""
    words = gcd(codec.bits, 8)  # bytes a weight, as 8 / gcd codes make a word of 8 bytes
    return codec.bits + words + 2 * LONG + -(-codec.bits // 8)
