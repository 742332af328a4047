"""Small packed models, whole in memory and offloaded, over shelves that count, wait and fail."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from workbench.blocks import Layout
from workbench.checkpoint import Random
from workbench.codec import Codes
from workbench.config import Config
from workbench.model import Model
from workbench.offloaded import Offloaded
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.slots import FREE, LOADING
from workbench.transfers import COLUMNS
from workbench.weights import expert_layout

LITE = replace(  # no width is a multiple of a group, a tile or a line of a cache
    Config.preset("pocket"),
    vocab_size=600,
    hidden_size=72,
    intermediate_size=84,
    num_hidden_layers=4,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    moe_intermediate_size=20,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    topk_method="greedy",
    max_position_embeddings=640,
    rope_scaling=None,
)
V2 = replace(
    LITE, q_lora_rank=24, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0
)
CASES = {
    "lite": LITE,
    "v2": V2,
    "tied": replace(LITE, tie_word_embeddings=True, norm_topk_prob=True),
    "every_other": replace(V2, num_hidden_layers=6, moe_layer_freq=2, first_k_dense_replace=0, n_shared_experts=None),
}


def source(config, recipe="int4", dtype=torch.float32):
    """Always the same weights, packed."""
    return Quantising(Random(config, seed=3, dtype=dtype, std=0.15), Recipe.named(recipe))


def resident(config=LITE, recipe="int4", dtype=torch.float32):
    return Model(config, source(config, recipe, dtype))


class Shelf:
    """The blocks of a resident model. What is not read yet is poison; `before` may wait or raise."""

    def __init__(self, model):
        self.blocks = dict(zip(model.store.packed, model.store.slabs, strict=True))
        layer = next(iter(self.blocks))
        self.layout = expert_layout(model.config, layer, lambda name: model.tensors[name].codec)
        self.before = lambda layer, expert: None
        self.reads = []

    def read(self, layer, expert, into):
        into.fill_(0xFF)
        self.before(layer, expert)
        into.copy_(self.blocks[layer][expert])
        self.reads.append((layer, expert))


class Pages(Shelf):
    """Blocks of random bytes, without a model: one page each."""

    def __init__(self, layers, experts):
        self.layout = Layout(24, 16, Codes(8), Codes(8))
        assert self.layout.nbytes == 4096
        self.blocks = {layer: torch.randint(256, (experts, 4096), dtype=torch.uint8) for layer in layers}
        self.before = lambda layer, expert: None
        self.reads = []

    def codes(self, layer, expert):
        """The codes of gate_up and of down."""
        bank = self.layout.bank(self.blocks[layer][expert][None])
        return bank.gate_up[0].parts[0], bank.down[0].parts[0]


def offloaded(model, shelf, recipe="int4", **how):
    """The same model over a shelf."""
    return Model(model.config, source(model.config, recipe, model.dtype), Offloaded(model.config, shelf, **how))


def pages(layers=3, experts=11, chosen=3, ahead=0, **how):
    """A store without a model, whose routers foretell at random: layers 1 to `layers`."""
    config = replace(
        LITE, num_hidden_layers=layers + 1, n_routed_experts=experts, num_experts_per_tok=chosen, hidden_size=24
    )
    shelf = Pages(range(1, layers + 1), experts)
    store = Offloaded(config, shelf, ahead=ahead, **how)
    router = [SimpleNamespace(router=torch.randn(experts, 24)) for _ in range(layers + 1)]
    store.opened(
        SimpleNamespace(layer=layer, mlp_norm=torch.ones(24), mlp=router[layer]) for layer in range(layers + 1)
    )
    return store, shelf


def visit(store, layer, ids):
    """Asks for experts and looks at all that come: how many waves there were. ids [N, K]."""
    return sum(1 for _ in checked(store, layer, ids))


def checked(store, layer, ids, pause=lambda: None):
    """Yields after every wave, whose experts are the ones asked for before and after a pause, each choice once."""
    ids = torch.as_tensor(ids)
    met = torch.zeros_like(ids)
    for bank, slots in store.waves(layer, ids, torch.randn(len(ids), 24)):
        assert slots.shape == ids.shape and (slots >= 0).any()
        for _ in range(2):
            for expert, slot in set(zip(ids[slots >= 0].tolist(), slots[slots >= 0].tolist())):
                gate_up, down = store.shelf.codes(layer, expert)
                assert torch.equal(bank.gate_up[slot].parts[0], gate_up), "another expert is in this slot"
                assert torch.equal(bank.down[slot].parts[0], down)
            pause()
        met += slots >= 0
        yield slots
    assert (met == 1).all(), "a choice was in no wave, or in two"


def tiers(store):
    return [store.near, store.far] if store.far else [store.near]


def check(store):
    """What is true of a store that nobody visits."""
    keys = len(store.layers) * store.experts
    coming = set(store.early)
    for slots in tiers(store):
        held = np.flatnonzero(slots.key_of >= 0)
        assert len(held) <= slots.count and len(slots.slot_of) == keys
        assert (slots.slot_of[slots.key_of[held]] == held).all(), "two slots for one expert"
        assert sorted(np.flatnonzero(slots.slot_of >= 0)) == sorted(slots.key_of[held]), "two experts in one slot"
        assert ((slots.state == FREE) == (slots.key_of < 0)).all()
        assert (slots.used == 0).all(), "still in use"
        loading = set(slots.key_of[slots.state == LOADING].tolist())
        assert loading <= (coming if slots is store.landing else set()), "loading for ever"
        for slot in held[slots.state[held] != LOADING]:
            layer, expert = store.layers[slots.key_of[slot] // store.experts], slots.key_of[slot] % store.experts
            assert torch.equal(slots.slab[slot].cpu(), store.shelf.blocks[layer][expert]), "not what is on the shelf"
    rows = {name: store.transfers.rows[:, column] for column, name in enumerate(COLUMNS)}
    assert (rows["needed"] == rows["near"] + rows["far"] + rows["early"] + rows["disk"]).all()
    assert (store.transfers.rows >= 0).all() and (store.far is not None or not rows["far"].any())
    assert rows["needed"].sum() == store.transfers.asked
    assert store.transfers.hits.sum() == rows["near"].sum()


def total(store, name):
    return int(store.transfers.rows[:, COLUMNS.index(name)].sum())
