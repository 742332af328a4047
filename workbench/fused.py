"""Fused: a whole forward pass in one call of kernels/fused.c, of a plain model on the CPU that nobody looks into.

B batch, T new tokens, D hidden, W cached row, R rotary width, K chosen, E experts.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import nn

from workbench.cache import BLOCK, LatentCache
from workbench.codec import Codec, Codes, Float, Groups, Tiles
from workbench.compiled import MissingError, library
from workbench.config import Config
from workbench.experts import Resident
from workbench.formats import CACHE_FORMATS, Format, Packed, Plain, Row
from workbench.probe import Probe, Silent

TYPES = {torch.float32: 0, torch.bfloat16: 1}
# hidden size and tokens from which torch's products win in bf16: 1.3x with 128 tokens at 1,024, 2.2x at 2,048
WIDE, MANY = 1024, 32


class _Weight(ctypes.Structure):
    _fields_ = [("at", c_void_p), ("rows", c_int64), ("width", c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "q_norm", "kv_norm", "mlp_norm")),
        *((name, _Weight) for name in "down q_up kv_up out router gate_up shut experts_up experts_down".split()),
    ]


class _Net(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in "bf16 layers hidden heads content rope value latent".split()),
        *((name, c_int64) for name in "experts chosen groups kept normed".split()),
        *((name, c_float) for name in ("eps", "scale", "factor")),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Weight),
    ]


class _Codec(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("kind", "size", "width")]


class _Form(ctypes.Structure):
    _fields_ = [("latent", _Codec), ("rope", _Codec)]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("form", _Form),
        *((name, c_int64) for name in ("in_place", "most", "recent")),
        *((name, ctypes.POINTER(c_int64)) for name in ("before", "table")),
        *((name, ctypes.POINTER(c_void_p)) for name in ("pool", "windows")),
        ("since", ctypes.POINTER(c_int64)),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        ("sequences", c_int64),
        ("new", c_int64),
        ("rotations", c_void_p),
        ("cache", _Cache),
        *((name, c_void_p) for name in ("x", "ids", "gates", "scores")),
        ("every", c_int64),
        ("logits", c_void_p),
    ]


@cache
def _opened() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        found = library("fused")
    except MissingError as error:
        return None, str(error)
    found.fused_room.argtypes, found.fused_room.restype = (c_void_p, c_int64, c_int), c_int64
    found.fused_pass.argtypes, found.fused_pass.restype = (c_void_p, c_void_p, c_void_p, c_int), None
    return found, None


def missing() -> str | None:
    """Why no pass is fused on this machine; None where it can be."""
    return _opened()[1]


class Fused:
    """The weights of one model as the library wants them. `model` is a model.Model; nothing of it is copied."""

    def __init__(self, model: nn.Module):
        config, blocks = model.config, model.blocks
        self._layers = (_Layer * len(blocks))(*(self._layer(config, block, model.store) for block in blocks))
        limited = config.topk_method == "group_limited_greedy"
        self._net = _Net(
            TYPES[model.dtype], len(blocks), config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim,
            config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank, config.n_routed_experts or 0,
            config.num_experts_per_tok or 0, config.n_group if limited else 0, config.topk_group if limited else 0,
            config.norm_topk_prob, config.rms_norm_eps, blocks[0].attention.scale, config.routed_scaling_factor,
            self._layers, model.norm.data_ptr(), _weight(model.head),
        )  # fmt: skip
        self.mixtures = [block.layer for block in blocks if config.is_moe(block.layer)]
        # the dictionaries themselves: what is put into them later is seen. Held, so that no id is given twice
        self._modules = modules = list(model.modules())
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._weights, self._children = [one._parameters for one in modules], [one._modules for one in modules]
        self._seen = self._places()

    def _layer(self, config: Config, block: nn.Module, store: Resident) -> _Layer:
        attention, mlp, moe = block.attention, block.mlp, config.is_moe(block.layer)
        dense = mlp.shared if moe else mlp
        compressed = config.q_lora_rank is not None
        experts = store.bank(block.layer) if moe else None
        return _Layer(
            block.attention_norm.data_ptr(),
            attention.q_norm.data_ptr() if compressed else None,
            attention.kv_norm.data_ptr(),
            block.mlp_norm.data_ptr(),
            _weight(attention.down),
            _weight(attention.q_up) if compressed else _Weight(),
            _weight(attention.kv_up),
            _weight(attention.out),
            _weight(mlp.router) if moe else _Weight(),
            _weight(dense.gate_up) if dense else _Weight(),
            _weight(dense.down) if dense else _Weight(),
            _weight(experts.gate_up) if experts else _Weight(),
            _weight(experts.down) if experts else _Weight(),
        )

    def _places(self) -> list[int]:
        weights = [weight.data_ptr() for held in self._weights for weight in held.values()]
        return weights + [id(child) for held in self._children for child in held.values()]

    @property
    def current(self) -> bool:
        """Whether the weights are where they were, in the modules that there were: any may be moved or replaced."""
        return self._places() == self._seen

    @property
    def hooked(self) -> bool:
        """Whether a module has a forward hook, which a fused pass would not call."""
        return any(self._hooks)

    def forward(
        self, x: torch.Tensor, rotations: torch.Tensor, cache: LatentCache | None, probe: Probe, every: bool
    ) -> torch.Tensor:
        """Embedded tokens [B, T, D] to fp32 logits [B, T, vocab], or [B, 1, vocab] if not of `every` token.

        rotations complex [B, T, R / 2]. The cache has room for the new rows, which are written; it is not advanced.
        """
        found, threads, net = _opened()[0], torch.get_num_threads(), self._net
        batch, new, _ = x.shape
        shape = (len(self.mixtures), batch, new, net.chosen)
        ids, gates = torch.empty(shape, dtype=torch.int64, device="cpu"), _floats(*shape)
        scores = _floats(*shape[:-1], net.chosen + 1)
        logits = _floats(batch, new if every else 1, net.head.rows)
        x, turns = x.float().contiguous(), torch.view_as_real(rotations).contiguous()
        if cache is None:
            each = -(-new // BLOCK)
            rows = _floats(batch * each * BLOCK, net.latent + net.rope)  # one for all layers: no pass comes after
            tables = [list(range(first, first + each)) for first in range(0, batch * each, each)]
            form = _form(CACHE_FORMATS["fp32"], Row(net.latent, net.rope))
            places = _Cache(form, True, each, 0, _whole([0] * batch), _table(tables), _at([rows] * net.layers))
        else:
            places = _places(cache, new, net.bf16)
        asked = _Pass(
            batch, new, turns.data_ptr(), places, x.data_ptr(), ids.data_ptr(), gates.data_ptr(), scores.data_ptr(),
            every, logits.data_ptr(),
        )  # fmt: skip
        room = _floats(found.fused_room(ctypes.byref(net), batch * new, threads))
        found.fused_pass(ctypes.byref(net), ctypes.byref(asked), room.data_ptr(), threads)
        for layer, *routing in zip(self.mixtures, ids.unbind(), gates.unbind(), scores.unbind()):
            probe.at(layer).routed(*routing)
        return logits


def _places(cache: LatentCache, new: int, bf16: int) -> _Cache:
    """Where a pass of `new` tokens finds what a cache holds, and writes. Forgets what falls out of windows."""
    pool, sequences = cache.pool, cache.sequences
    windows = [sequence.window for sequence in sequences if pool.recent]
    for window, sequence in zip(windows, sequences):
        window.start = max(window.start, sequence.length + new - pool.recent)  # as `write`: first, whatever follows
    plain = isinstance(pool.format, Plain) and not pool.recent
    tables = [sequence.table for sequence in sequences]
    return _Cache(
        _form(pool.format, pool.row),
        plain and (pool.format.dtype == torch.bfloat16 or not bf16),  # fp32 is rounded when a model in bf16 reads it
        max(map(len, tables)),
        pool.recent,
        _whole(cache.lengths),
        _table(tables),
        _at([part for parts in pool.layers for part in parts]),
        _at([rows for layer in zip(*(window.layers for window in windows)) for rows in layer]),
        _whole([window.start for window in windows]),
    )


def _form(format: Format, row: Row) -> _Form | None:
    """A format as the library wants it; None where it has no body for it."""
    if type(format) is Plain and format.dtype in TYPES:
        return _Form(_codec(Float(format.dtype), row.width))
    if type(format) is not Packed:
        return None
    latent, rope = _codec(format.latent, row.latent), _codec(format.rope, row.rope)
    return _Form(latent, rope) if latent and rope else None


def _codec(codec: Codec, width: int) -> _Codec | None:
    kind = type(codec)  # itself: what is derived from it may pack otherwise
    if kind is Float and codec.dtype in TYPES:
        return _Codec(TYPES[codec.dtype], 0, width)
    if kind is Tiles and codec.tile % 16 == 0:
        return _Codec(2, codec.tile, width)
    if kind is Codes:
        return _Codec(3, codec.bits, width)
    if kind is Groups and codec.group == 16:
        return _Codec(4, codec.bits, width)
    return None


def _whole(numbers: list[int]) -> ctypes.Array:
    return (c_int64 * len(numbers))(*numbers)


def _table(tables: list[list[int]]) -> ctypes.Array:
    most = max(map(len, tables))
    return _whole([block for one in tables for block in one + [0] * (most - len(one))])


def _at(tensors: list[torch.Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _weight(tensor: torch.Tensor) -> _Weight:
    return _Weight(tensor.data_ptr(), tensor.shape[:-1].numel(), tensor.shape[-1])


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever a user has made the default


def refusal(model: nn.Module, cache: LatentCache | None, probe: Probe, tokens: int) -> str | None:
    """Why a pass of a model.Model over so many tokens goes operation by operation; None where it may be fused."""
    if tokens >= MANY and model.dtype == torch.bfloat16 and model.config.hidden_size >= WIDE:
        return f"torch multiplies {tokens} tokens by wide bf16 layers faster"
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
        return "a gradient is asked for"
    if not isinstance(probe, Silent):
        return "a probe looks inside or changes something"
    if cache is not None and _form(cache.pool.format, cache.pool.row) is None:
        return f"the format of the cache ({cache.format}) is not one of those it knows"
    return None


def unfit(model: nn.Module) -> str | None:
    """Why no pass of a model.Model is fused; None where `Fused` takes it."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if not isinstance(model.store, Resident) or model.store.packed:
        return "experts are packed, or come from elsewhere"
    if any(type(module).__module__.split(".")[0] not in ("workbench", "torch") for module in model.modules()):
        return "a module is not the workbench's own"
    weights = [*model.parameters(), model.norm, model.head]
    if any(not isinstance(weight, torch.Tensor) or weight.dtype != model.dtype for weight in weights):
        return "weights are packed"
    if not all(weight.is_contiguous() for weight in weights):
        return "weights do not lie in a row"
    return missing()
