"""The model: multi-head latent attention and fine-grained experts, written once for training, inference and looking in.

B batch, T new tokens, S tokens so far, D hidden, H heads, Q query latent, C latent, N content width of a query or key
head, R rotary width, V value width, W = C + R the cached row, E experts, K chosen, I expert width.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain

import torch
from torch import nn

from workbench import lean, ops
from workbench.cache import LatentCache
from workbench.config import Config
from workbench.door import present
from workbench.errors import CheckpointError, RequestError
from workbench.experts import Resident, Store
from workbench.fused import Fused, refusal, unfit
from workbench.probe import OFF, Probe
from workbench.rope import Rope, rotate, softmax_scale
from workbench.weights import Inventory, Source

Rows = torch.Tensor | Iterable[torch.Tensor]  # [B, S, W], or chunks of them in order


class Attention(nn.Module):
    """Multi-head latent attention (paper, section 2.1; equations 9-19)."""

    def __init__(self, config: Config, layer: int, weights: Inventory):
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        name = f"model.layers.{layer}.self_attn"
        heads, rank = config.num_attention_heads, config.q_lora_rank
        query = heads * config.qk_head_dim
        down = {f"{name}.kv_a_proj_with_mqa.weight": config.latent_width}
        if rank is None:
            down = {f"{name}.q_proj.weight": query} | down
        else:
            down = {f"{name}.q_a_proj.weight": rank} | down
            self.q_norm = weights.take(f"{name}.q_a_layernorm.weight", rank)
            self.q_up = weights.matrix(f"{name}.q_b_proj.weight", query, rank)
        self.down = weights.stacked(down, config.hidden_size)
        self.kv_norm = weights.take(f"{name}.kv_a_layernorm.weight", config.kv_lora_rank)
        per_head = config.qk_nope_head_dim + config.v_head_dim
        self.kv_up = weights.matrix(f"{name}.kv_b_proj.weight", heads * per_head, config.kv_lora_rank)
        self.out = weights.matrix(f"{name}.o_proj.weight", config.hidden_size, heads * config.v_head_dim)

    def forward(
        self, x: torch.Tensor, rotations: torch.Tensor, cache: LatentCache | None, probe: Probe
    ) -> torch.Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        see = probe.see
        query, compressed = self.projected(x, probe)
        content, position = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        content = see("attn.q_content", content)
        latent, k_rope = compressed.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        turned = rotate(torch.cat([position, k_rope[:, :, None]], 2), rotations[:, :, None])
        position, k_rope = see("attn.q_rope", turned[:, :, :-1]), see("attn.k_rope", turned[:, :, -1])
        latent = see("attn.kv_latent", ops.rms_norm(latent, self.kv_norm, eps))
        rows = torch.cat([latent, k_rope], -1)  # [B, T, W]
        if cache is not None:
            cache.append(self.layer, rows)
        if probe.opens("attend"):
            z = self.opened(content, position, rows, cache, probe)
        elif cache is None:
            z = self.read(content, position, rows)
        else:
            each = [self.recall(content[b : b + 1], position[b : b + 1], cache, b) for b in range(cache.batch)]
            z = torch.cat(each) if len(each) > 1 else each[0]
        return ops.linear(see("attn.z", z).flatten(-2), self.out)

    def projected(self, x: torch.Tensor, probe: Probe = OFF) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, T, H, N + R] and what is to become a row [B, T, W], both before rotation."""
        see = probe.see
        width = self.config.latent_width
        query, compressed = ops.linear(x, self.down).split([self.down.shape[0] - width, width], -1)
        if self.config.q_lora_rank is not None:
            query = see("attn.q_latent", ops.rms_norm(query, self.q_norm, self.config.rms_norm_eps))
            query = ops.linear(query, self.q_up)
        return query.unflatten(-1, (self.config.num_attention_heads, -1)), compressed

    def read(self, content: torch.Tensor, position: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, T, H, N] and [B, T, H, R] against rows [B, S, W]: [B, T, H, V], by the form that multiplies less."""
        form = self.absorbed if absorbing_is_cheaper(self.config, content.shape[1], rows.shape[1]) else self.expanded
        return form(content, position, rows)

    def recall(self, content: torch.Tensor, position: torch.Tensor, cache: LatentCache, sequence: int) -> torch.Tensor:
        """`read` against the rows of one sequence in a cache, which are unpacked some at a time: never all at once."""
        new, length = content.shape[1], cache.sequences[sequence].end
        size = ops.rows_at_once(new, self.config.num_attention_heads)
        chunks = (rows[None] for rows in cache.chunks(self.layer, sequence, content.dtype, size))
        form = self.absorbed if absorbing_is_cheaper(self.config, new, length) else self.expanded
        return form(content, position, chunks, length)

    def absorbed(self, content: torch.Tensor, position: torch.Tensor, rows: Rows, length: int = 0) -> torch.Tensor:
        """kv_up moved to the query and the output side, so one cached row serves every head (section 2.1.2).

        rows [B, S, W], or chunks of them, of `length` together.
        """
        query = torch.cat([ops.lift(content, self.kv_up), position], -1)  # [B, T, H, W]

        def shared(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows[:, :, None], rows[:, :, None, : self.config.kv_lora_rank]

        return ops.lower(self._attend(query, rows, length, shared), self.kv_up, self.config.v_head_dim)

    def expanded(self, content: torch.Tensor, position: torch.Tensor, rows: Rows, length: int = 0) -> torch.Tensor:
        """Keys and values of every head rebuilt from the rows, for this call only. `rows` as in `absorbed`."""

        def own(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            key, k_rope, value = self.rebuilt(rows)
            return torch.cat([key, k_rope[:, :, None].expand(-1, -1, key.shape[2], -1)], -1), value

        return self._attend(torch.cat([content, position], -1), rows, length, own)

    def _attend(self, query: torch.Tensor, rows: Rows, length: int, keys: Callable) -> torch.Tensor:
        if isinstance(rows, torch.Tensor):
            return ops.attend(query, *keys(rows), self.scale)
        first = next(rows := iter(rows))
        if first.shape[1] == length:
            return ops.attend(query, *keys(first), self.scale)
        return ops.attend_in_parts(query, map(keys, chain([first], rows)), length, self.scale)

    def rebuilt(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What rows [B, S, W] stand for: keys [B, S, H, N], the rotary key all share [B, S, R], values [B, S, H, V]."""
        latent, k_rope = rows.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        both = ops.linear(latent, self.kv_up).unflatten(-1, (self.config.num_attention_heads, -1))
        key, value = both.split([self.config.qk_nope_head_dim, self.config.v_head_dim], -1)
        return key, k_rope, value

    def opened(
        self, content: torch.Tensor, position: torch.Tensor, rows: torch.Tensor, cache: LatentCache | None, probe: Probe
    ) -> torch.Tensor:
        """With keys, scores and pattern of every head laid out for a probe, whichever form would be cheaper."""
        ends = [rows.shape[1]] * rows.shape[0]
        if cache is not None:
            each = [cache.rows(self.layer, b, rows.dtype) for b in range(cache.batch)]
            ends = [len(one) for one in each]
            rows = nn.utils.rnn.pad_sequence(each, batch_first=True)
        key, k_rope, value = self.rebuilt(rows)
        where = torch.tensor(ends, device=rows.device)
        return ops.attend_open(content, position, key, k_rope, value, self.scale, where, probe)


def _rows_of(config: Config) -> tuple[int, int, int]:
    return config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim


def absorbing_is_cheaper(config: Config, new: int, length: int) -> bool:
    """Multiplications per head: moving `new` queries and outputs through kv_up, against expanding `length` rows."""
    up = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    absorbed = new * up + new * length * (config.latent_width + config.kv_lora_rank)
    return absorbed <= length * up + new * length * (config.qk_head_dim + config.v_head_dim)


class Dense(nn.Module):
    """SwiGLU feed-forward: the first layers, and the shared experts, which are one wide expert every token passes."""

    def __init__(self, name: str, hidden: int, width: int, weights: Inventory):
        super().__init__()
        self.gate_up = weights.stacked({f"{name}.gate_proj.weight": width, f"{name}.up_proj.weight": width}, hidden)
        self.down = weights.matrix(f"{name}.down_proj.weight", hidden, width)

    def forward(self, x: torch.Tensor, probe: Probe = OFF) -> torch.Tensor:
        return ops.linear(ops.swiglu(ops.linear(x, self.gate_up)), self.down)


class Mixture(nn.Module):
    """Fine-grained experts chosen per token, beside shared ones (paper, section 2.2; equations 20-22)."""

    def __init__(self, config: Config, layer: int, weights: Inventory, store: Store):
        super().__init__()
        self.config, self.layer, self.store = config, layer, store
        name, hidden, width = f"model.layers.{layer}.mlp", config.hidden_size, config.moe_intermediate_size
        self.router = weights.take(f"{name}.gate.weight", config.n_routed_experts, hidden)
        store.take(config, layer, weights)
        self.shared = None
        if config.n_shared_experts:
            self.shared = Dense(f"{name}.shared_experts", hidden, config.n_shared_experts * width, weights)

    def forward(self, x: torch.Tensor, probe: Probe = OFF) -> torch.Tensor:
        ids, gates = self.choose(x, probe)
        return self.mixed(x, ids, gates, probe)

    def mixed(self, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, probe: Probe = OFF) -> torch.Tensor:
        """The chosen experts of x [..., D], weighed by gates [..., K], and the shared ones."""
        see = probe.see
        shape = x.shape[:-1]
        flat, ids, gates = x.flatten(0, -2), ids.flatten(0, -2), gates.flatten(0, -2)
        # closed however it ends: an error that somebody keeps would keep the store's lock with its frames
        with closing(self.store.waves(self.layer, ids, flat)) as waves:
            if probe.opens("experts"):
                outputs = ops.expert_outputs(flat, waves)
                outputs = see("moe.expert_out", outputs.view(*shape, *outputs.shape[1:]))
                routed = ops.weigh_outputs(outputs.flatten(0, -3), gates)
            else:
                routed = ops.experts(flat, gates, waves)
        routed = see("moe.routed_out", routed.view(*shape, -1))
        return routed if self.shared is None else routed + see("moe.shared_out", self.shared(x))

    def choose(self, x: torch.Tensor, probe: Probe) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and gates [..., K] of the experts for x [..., D]."""
        logits = probe("moe.router_logits", ops.router_logits(x, self.router))
        if probe.opens("route"):
            _, ids, gates, _ = ops.route_open(logits, self.config, probe)
            return ids, gates
        probs, ids, gates, scores = ops.route(logits, self.config)
        return ids, probe.routed(ids, gates, scores, probs)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: Config, layer: int, weights: Inventory, store: Store):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        name = f"model.layers.{layer}"
        self.attention_norm = weights.take(f"{name}.input_layernorm.weight", config.hidden_size)
        self.attention = Attention(config, layer, weights)
        self.mlp_norm = weights.take(f"{name}.post_attention_layernorm.weight", config.hidden_size)
        if config.is_moe(layer):
            self.mlp = Mixture(config, layer, weights, store)
        else:
            self.mlp = Dense(f"{name}.mlp", config.hidden_size, config.intermediate_size, weights)

    def forward(
        self, x: torch.Tensor, rotations: torch.Tensor, cache: LatentCache | None, probe: Probe
    ) -> torch.Tensor:
        probe = probe.at(self.layer)
        see = probe.see
        x = see("resid.pre", x)
        attended = self.attention(
            see("attn.in", ops.rms_norm(x, self.attention_norm, self.eps)), rotations, cache, probe
        )
        x = see("resid.mid", x + see("attn.out", attended))
        fed = self.mlp(see("mlp.in", ops.rms_norm(x, self.mlp_norm, self.eps)), probe)
        return see("resid.post", x + see("mlp.out", fed))


class Model(nn.Module):
    """A DeepSeek-V2, complete when constructed. Weights do not ask for gradients until `requires_grad_()`.

    fuse    whether a pass may be one call, see `explain`. Its sums are in another order: without it, looking at a pass
            changes no bit of it
    """

    fuse = True

    def __init__(self, config: Config, source: Source, store: Store | None = None):
        if source.dtype == torch.float16:
            raise CheckpointError(
                "fp16 cannot hold DeepSeek-V2: activations pass 65,504 and become infinite. Use dtype='bf16' or 'fp32'."
            )
        super().__init__()
        self.config, self.dtype, self.device = config, source.dtype, torch.device(source.device)
        self.rope = Rope(config, self.device)
        self.store = Resident() if store is None else store
        weights = Inventory(source)
        self.embedding = weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, layer, weights, self.store) for layer in range(config.num_hidden_layers)
        )
        self.norm = weights.take("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            self.head = self.embedding
        else:
            self.head = weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
        self.tensors, self.checksum, self.plan = weights.tensors, "", None  # the last two of a packed checkpoint
        self._fused: Fused | str | None = None  # or why there is none
        self.store.opened(self.blocks)

    def forward(
        self, tokens: torch.Tensor, cache: LatentCache | None = None, probe: Probe = OFF, logits: str = "all"
    ) -> torch.Tensor:
        """tokens [B, T] int64 to fp32 logits [B, T, vocab], or [B, 1, vocab] with logits="last".

        With a cache the tokens continue its sequences. RequestError for tokens that do not exist, for none, and for
        more than the context holds; the cache is then as it was.
        """
        self.check(tokens, cache)
        new = tokens.shape[1]
        positions = torch.arange(new).expand(tokens.shape)
        if cache is not None:
            positions = positions + torch.tensor(cache.lengths)[:, None]
        probe = probe.begin(self.config, positions, self.dtype)
        if cache is not None:
            cache.reserve(new)
        rotations = self.rope.at(positions.to(self.device))  # [B, T, R/2]
        x = probe("embed", ops.embed(tokens.to(self.device), self.embedding, self.dtype))
        if self.explain(cache, probe, tokens.numel()) is not None:
            x = self._by_operation(x, rotations, cache, probe, logits == "all")
        elif not present(x):
            x = self._fused.forward(x, rotations, cache, probe, logits == "all")
        else:
            x = lean.forward(self, x, rotations, cache, probe, logits == "all")
        probe.end()
        if cache is not None:
            cache.advance(new)
        return x

    def _by_operation(
        self, x: torch.Tensor, rotations: torch.Tensor, cache: LatentCache | None, probe: Probe, every: bool
    ) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, rotations, cache, probe)
        x = x if every else x[:, -1:]
        x = probe("final.norm", ops.rms_norm(x, self.norm, self.config.rms_norm_eps))
        return probe("logits", ops.linear(x, self.head).float())

    def explain(self, cache: LatentCache | None = None, probe: Probe = OFF, tokens: int = 1) -> str | None:
        """Why a pass over so many tokens goes operation by operation; None where it is fused, or lean: see lean.py."""
        if not self.fuse:
            return "model.fuse is False"
        if present(self.norm):
            return lean.refusal(self, cache, probe)
        if self._fused is None or isinstance(self._fused, Fused) and not self._fused.current:
            self._fused = unfit(self) or Fused(self)
        if isinstance(self._fused, str):
            return self._fused
        if self._fused.hooked:
            return "a module has a forward hook"
        return refusal(self, cache, probe, tokens)

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        """The last norm and the head: a residual stream [..., D] as fp32 logits [..., vocab], as a logit lens wants."""
        x = ops.rms_norm(x.to(self.device, self.dtype), self.norm, self.config.rms_norm_eps)
        return ops.linear(x, self.head).float()

    def check(self, tokens: torch.Tensor, cache: LatentCache | None) -> None:
        """RequestError for tokens that `forward` would refuse."""
        config = self.config
        if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise RequestError(
                f"tokens must be a non-empty [batch, length] of integers, not {tuple(tokens.shape)} {tokens.dtype}."
            )
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise RequestError(f"token {high if low >= 0 else low} is outside the vocabulary of {config.vocab_size}.")
        if cache is not None and cache.batch != tokens.shape[0]:
            raise RequestError(f"the cache is for {cache.batch} sequences, the tokens for {tokens.shape[0]}.")
        if cache is not None and _rows_of(cache.config) != _rows_of(config):
            raise RequestError(
                f"the cache was made for another model: {_rows_of(cache.config)} layers, latent and rotary width, "
                f"where this one has {_rows_of(config)}. Make one with bench.new_cache()."
            )
        if cache is None and tokens.shape[1] > config.max_position_embeddings:
            raise RequestError(f"{tokens.shape[1]} tokens exceed the context of {config.max_position_embeddings}.")
