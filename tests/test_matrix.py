"""Packed weights: matrices, recipes, blocks, and operations on them against dense float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from offload import LITE, V2

from workbench import native, ops, packed
from workbench.blocks import ALIGNED, PAGE, Bank, Layout, slab
from workbench.checkpoint import Random
from workbench.codec import Codes, Float, Groups, Tiles
from workbench.errors import CheckpointError, RequestError
from workbench.matrix import Matrix, dense
from workbench.quantising import Quantising
from workbench.recipe import FORMAT_OF, PLAIN, WEIGHT_FORMATS, Recipe
from workbench.weights import Inventory, expert_layout, expert_names

CODECS = WEIGHT_FORMATS | {"int5 of 3": Groups(5, 3), "fp8 of 7": Tiles(7), "int12": Codes(12)}
WIDTHS = (1, 24, 72, 129)
CLOSE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}  # the kernel rounds activations to 16 bits


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["compiled", "unpacked"])
def either(request, monkeypatch):
    """With the compiled kernel, where there is one, and without."""
    if request.param == "unpacked":
        monkeypatch.setattr(native, "kernel", lambda: None)
    elif native.kernel() is None:
        pytest.skip(native.missing())


def near(got, wanted, dtype=torch.float32):
    assert got.dtype == dtype and got.shape == wanted.shape
    return (got.double() - wanted).norm() <= CLOSE[dtype] * wanted.norm()


def doubles(matrix):
    """By the codec alone."""
    return matrix.codec.unpack(matrix.parts, matrix.width).double()


# matrices


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_matrix_is_its_rows(name, width):
    codec, numbers = CODECS[name], torch.randn(3, 5, width)
    matrix = Matrix.pack(codec, numbers)
    assert matrix.shape == (3, 5, width) and len(matrix) == 3 and matrix.codec == codec
    values = matrix.dense(torch.float32)
    assert (values - numbers).norm() <= (0.25 if "3" in name else 0.12) * numbers.norm()
    assert torch.equal(values.double(), doubles(matrix))
    for index in (1, slice(1, 3), torch.tensor([2, 0, 2])):
        assert torch.equal(matrix[index].dense(torch.float32), values[index])
    row = matrix[2][3:5]
    assert torch.equal(row.dense(torch.float32), values[2, 3:5])
    assert torch.equal(matrix.dense(torch.bfloat16), values.bfloat16())
    assert matrix.nbytes == sum(part.nbytes for part in matrix.parts)
    assert matrix.bits == 8 * matrix.nbytes / (15 * width)
    assert torch.equal(dense(matrix, torch.float32), values) and torch.equal(
        dense(numbers, torch.bfloat16), numbers.bfloat16()
    )
    assert f"[3, 5, {width}]" in repr(matrix)


@pytest.mark.parametrize("name", CODECS)
def test_views_and_copies(name):
    codec = CODECS[name]
    one, two = (Matrix.pack(codec, torch.randn(rows, 24)) for rows in (4, 3))
    both = Matrix.stacked([one, two])
    assert torch.equal(both.dense(torch.float32), torch.cat([one.dense(torch.float32), two.dense(torch.float32)]))
    room = Matrix.empty(codec, (7, 24))
    assert [part.shape for part in room.parts] == [part.shape for part in both.parts]
    room[:4].copy_(one)
    room[4:].copy_(two)
    assert torch.equal(room.dense(torch.float32), both.dense(torch.float32))
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
               for part, whole in zip(room[4:].parts, room.parts))  # fmt: skip
    with pytest.raises(AssertionError):
        Matrix.stacked([one, Matrix.pack(codec, torch.randn(2, 25))])


def test_plain_numbers_are_not_copied():
    numbers = torch.randn(3, 8)
    assert Matrix.pack(Float(torch.float32), numbers).dense(torch.float32).data_ptr() == numbers.data_ptr()


# recipes


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int6", "int4", "int3"])
def test_presets(name):
    recipe = Recipe.named(name)
    expert, latent = "model.layers.7.mlp.experts.12.up_proj.weight", "model.layers.7.self_attn.kv_b_proj.weight"
    assert recipe.format(expert) == name and recipe.codec(expert) == WEIGHT_FORMATS[name]
    for kept in (
        "model.norm.weight", "model.layers.3.input_layernorm.weight", "model.layers.3.self_attn.kv_a_layernorm.weight",
        "model.layers.3.mlp.gate.weight",
    ):  # fmt: skip
        assert recipe.codec(kept) is None and recipe.format(kept) == PLAIN
    assert recipe.codec("model.layers.3.mlp.gate_proj.weight") is not None, "a dense layer's, no router"
    eight = "int8" if name in ("int8", "int6", "int4", "int3") else name
    assert {recipe.format(one) for one in (latent, "lm_head.weight", "model.embed_tokens.weight")} == {eight}
    other = recipe.format("model.layers.7.mlp.shared_experts.up_proj.weight")
    assert other == ("int4" if name == "int3" else name)
    assert Recipe.named(recipe) is recipe
    again = Recipe.from_list(recipe.name, [list(rule) for rule in recipe.rules])
    assert again == recipe


def test_exceptions_come_first():
    recipe = Recipe.named("int4,*.experts.1.*=int3,*.experts.*=fp8,lm_head.weight=plain,*.mlp.gate.weight=bf16")
    at = "model.layers.2.mlp.experts.{}.up_proj.weight"
    assert [recipe.format(at.format(expert)) for expert in (1, 11, 2)] == ["int3", "fp8", "fp8"]
    assert recipe.codec("lm_head.weight") is None and recipe.format("model.layers.2.mlp.gate.weight") == "bf16"
    assert recipe.format("model.layers.2.self_attn.o_proj.weight") == "int4"


@pytest.mark.parametrize(
    "wrong", ["", "int5", "int4,lm_head.weight", "int4,a=b=c", "int4,*=int5", "lm_head.weight=int4", None, 4]
)
def test_recipes_that_there_are_not(wrong):
    with pytest.raises(RequestError, match="int4"):
        Recipe.named(wrong)


def test_formats_have_one_name():
    assert {FORMAT_OF[codec] for codec in WEIGHT_FORMATS.values()} == set(WEIGHT_FORMATS)


# blocks


@pytest.mark.parametrize("down", CODECS)
@pytest.mark.parametrize("gate_up", CODECS)
def test_a_block_holds_one_expert(gate_up, down):
    hidden, width = random.choice([(72, 20), (33, 7), (130, 65)])
    layout = Layout(hidden, width, CODECS[gate_up], CODECS[down])
    spans = [(place.start, place.start + place.nbytes) for places in layout.places for place in places]
    assert spans[0][0] == 0 and all(start % ALIGNED == 0 for start, _ in spans)
    assert all(end <= start < end + ALIGNED for (_, end), (start, _) in zip(spans, spans[1:])), "gaps, or overlaps"
    assert layout.nbytes % PAGE == 0 and spans[-1][1] <= layout.nbytes < spans[-1][1] + PAGE
    assert layout.bits == layout.nbytes * 8 / (3 * hidden * width)
    room = slab(4, layout.nbytes)
    room.fill_(0xAB)
    numbers = torch.randn(2 * width, hidden), torch.randn(hidden, width)
    pair = Matrix.pack(layout.gate_up, numbers[0]), Matrix.pack(layout.down, numbers[1])
    layout.pack(*pair, room[2])
    assert (room[[0, 1, 3]] == 0xAB).all(), "another block was written"
    bank = layout.bank(room)
    for stacked, one, shape in zip(bank, pair, ((4, 2 * width, hidden), (4, hidden, width))):
        assert stacked.shape == shape
        assert all(map(torch.equal, stacked[2].parts, one.parts))
        assert {part.untyped_storage().data_ptr() for part in stacked.parts} == {room.untyped_storage().data_ptr()}
    covered = torch.zeros(layout.nbytes, dtype=torch.bool)
    for start, end in spans:
        covered[start:end] = True
    assert (room[2][~covered] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_slab_is_on_a_page(count):
    room = slab(count, 2 * PAGE)
    assert room.shape == (count, 2 * PAGE) and room.dtype == torch.uint8 and room.is_contiguous()
    assert room.data_ptr() % PAGE == 0 and room.untyped_storage().nbytes() == 2 * PAGE * count + PAGE
    with torch.inference_mode():
        assert not slab(1, PAGE).is_inference(), "it outlives the mode it was made in"


# packing what another source has


def test_a_source_is_packed_as_it_is_asked():
    recipe = Recipe.named("int4,*.down_proj.weight=fp8")
    plain, packing = Random(LITE, seed=1, std=0.1), Quantising(Random(LITE, seed=1, std=0.1), recipe)
    names, layout = expert_names(2, 5), expert_layout(LITE, 2, packing.codec)
    wide, high = LITE.hidden_size, LITE.moe_intermediate_size
    gate, up, down = (plain.take(name, shape) for name, shape in zip(names, ((high, wide), (high, wide), (wide, high))))
    block = torch.full((layout.nbytes,), 7, dtype=torch.uint8)
    packing.block(2, 5, layout, block)
    bank = layout.bank(block[None])
    wanted = Matrix.pack(Groups(4, 64), torch.cat([gate, up])), Matrix.pack(Tiles(128), down)
    for found, one in zip(bank, wanted):
        assert all(map(torch.equal, found[0].parts, one.parts))
    assert packing.codec("model.norm.weight") is None
    assert torch.equal(packing.take("model.norm.weight", (wide,)), torch.ones(wide))


def test_what_is_read_as_one_matrix_is_packed_alike():
    weights = Inventory(Quantising(Random(V2, seed=1), Recipe.named("int4,*.q_a_proj.weight=int8")))
    names = {"model.layers.1.self_attn.q_a_proj.weight": 24, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": 48}
    with pytest.raises(CheckpointError, match="q_a_proj.*one format"):
        weights.stacked(names, 72)
    alike = Inventory(Quantising(Random(V2, seed=1), Recipe.named("int4")))
    whole = alike.stacked(names, 72)
    start = 0
    for name, rows in names.items():
        alone = Matrix.pack(Groups(4, 64), Random(V2, seed=1).take(name, (rows, 72)))
        assert torch.equal(whole[start : start + rows].dense(torch.float32), alone.dense(torch.float32))
        assert torch.equal(alike.tensors[name].dense(torch.float32), alone.dense(torch.float32))
        start += rows


@pytest.mark.parametrize(
    "recipe",
    [
        "int4,*.experts.3.*=int3",
        "int4,*.gate_proj.weight=int8",
        "int4,*.down_proj.weight=plain",
        "int4,*.up_proj.weight=plain",
    ],
)
def test_experts_of_a_layer_are_packed_alike(recipe):
    with pytest.raises(CheckpointError, match="layer 2.*not packed alike"):
        expert_layout(LITE, 2, Recipe.named(recipe).codec)


def test_plain_experts_have_no_layout():
    assert expert_layout(LITE, 2, Recipe.named("int4,*.experts.*=plain").codec) is None


# multiplying


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear(name, width, dtype, either, monkeypatch):
    matrix = Matrix.pack(CODECS[name], torch.randn(37, width))
    for shape in ((), (1,), (2, packed.FEW // 2), (packed.FEW + 1,), (3, 1, 7)):
        x = torch.randn(*shape, width).to(dtype)
        wanted = x.double() @ doubles(matrix).T
        assert near(ops.linear(x, matrix), wanted, dtype)
        with monkeypatch.context() as pieces:
            pieces.setattr(packed, "UNPACKED", 10 * width + 1)
            assert near(ops.linear(x, matrix), wanted, dtype), "some rows at a time"


@pytest.mark.parametrize("name", CODECS)
def test_linear_of_a_transposed_input(name, either):
    matrix = Matrix.pack(CODECS[name], torch.randn(9, 72))
    x = torch.randn(72, 5).T
    assert near(ops.linear(x, matrix), x.double() @ doubles(matrix).T)
    x = torch.randn(4, 144)[:, ::2]
    assert near(ops.linear(x, matrix), x.double() @ doubles(matrix).T)


@pytest.mark.parametrize("name", CODECS)
def test_gradients_pass_through(name, either):
    matrix = Matrix.pack(CODECS[name], torch.randn(9, 24))
    x = torch.randn(3, 24, requires_grad=True)
    ops.linear(x, matrix).sum().backward()
    assert near(x.grad, doubles(matrix).sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_embed(name, dtype):
    matrix = Matrix.pack(CODECS[name], torch.randn(50, 72))
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(ops.embed(tokens, matrix, dtype), matrix.dense(dtype)[tokens])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_lift_and_lower(name, dtype, either):
    heads, keys, values, latent = 3, 16, 12, 40
    matrix = Matrix.pack(CODECS[name], torch.randn(heads * (keys + values), latent))
    rows = doubles(matrix).view(heads, keys + values, latent)
    for batch, new in ((1, 1), (2, 3), (3, 5)):
        content = torch.randn(batch, new, heads, keys).to(dtype)
        wanted = torch.einsum("bthn,hnc->bthc", content.double(), rows[:, :keys])
        assert near(ops.lift(content, matrix), wanted, dtype)
        read = torch.randn(batch, new, heads, latent).to(dtype)
        wanted = torch.einsum("bthc,hvc->bthv", read.double(), rows[:, keys:])
        assert near(ops.lower(read, matrix, values), wanted, dtype)


def in_waves(bank, ids):
    """The experts of ids in random order, some at a time, each wave in slots of its own."""
    experts = ids.unique()
    experts = experts[torch.randperm(len(experts))]
    for some in experts.split(random.randint(1, len(experts))):
        slots = torch.full_like(ids, -1)
        for slot, expert in enumerate(some):
            slots[ids == expert] = slot
        yield Bank(bank.gate_up[some], bank.down[some]), slots


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("hidden, width", [(72, 24), (72, 12), (72, 7), (60, 24), (37, 5)])
def test_plain_experts_of_any_width(hidden, width, dtype):
    """With and without gradients; the widths that torch's own grouped product refuses, too."""
    experts, chosen, count = 5, 2, random.choice([2, 9])
    gate_up = (torch.randn(experts, 2 * width, hidden) / 8).to(dtype).requires_grad_()
    down = (torch.randn(experts, hidden, width) / 4).to(dtype).requires_grad_()
    x = torch.randn(count, hidden).to(dtype).requires_grad_()
    gates = torch.rand(count, chosen, requires_grad=True)
    ids = torch.stack([torch.randperm(experts - 1)[:chosen] for _ in range(count)])  # nobody asks for the last one
    inputs = (x, gates, gate_up, down)
    exact = [one.detach().double().requires_grad_() for one in inputs]
    made = [
        torch.stack([exact[3][expert] @ ops.swiglu(exact[2][expert] @ token) for expert in own])
        for token, own in zip(exact[0], ids.tolist())
    ]
    wanted = (torch.stack(made) * exact[1][..., None]).sum(1)
    back = torch.randn(count, hidden).to(dtype)
    gradients = torch.autograd.grad(wanted, exact, back.double())
    got = ops.experts(x, gates, [(Bank(gate_up, down), ids)])
    assert near(got, wanted, dtype)
    assert near(ops.expert_outputs(x, [(Bank(gate_up, down), ids)]), torch.stack(made), dtype)
    for mine, its, one in zip(torch.autograd.grad(got, inputs, back), gradients, inputs, strict=True):
        assert mine.dtype == one.dtype and (mine.double() - its).norm() <= CLOSE[dtype] * its.norm()
    with torch.inference_mode():
        assert torch.equal(ops.experts(x, gates, [(Bank(gate_up, down), ids)]), got)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("down", ["int4", "bf16", "int12"])
@pytest.mark.parametrize("name", CODECS)
def test_experts_in_waves(name, down, dtype, either):
    hidden, width, experts, chosen = 72, 20, 9, 3
    bank = Bank(
        Matrix.pack(CODECS[name], torch.randn(experts, 2 * width, hidden) / 8),
        Matrix.pack(CODECS[down], torch.randn(experts, hidden, width) / 4),
    )
    gate_up, below = map(doubles, bank)
    for count in (1, 2, 17):
        x = torch.randn(count, hidden).to(dtype)
        ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(count)])
        if count == 2:
            ids[1] = 0  # an edit may leave slots that all mean the first
        gates = torch.rand(count, chosen)
        gate, up = torch.einsum("nd,nkid->nki", x.double(), gate_up[ids]).chunk(2, -1)
        wanted = torch.einsum("nki,nkdi->nkd", F.silu(gate) * up, below[ids])
        with torch.no_grad():
            assert near(ops.expert_outputs(x, in_waves(bank, ids)), wanted, dtype)
            got = ops.experts(x, gates, in_waves(bank, ids))
            assert near(got, (wanted * gates[..., None].double()).sum(1), dtype)
            whole = ops.experts(x, gates, [(bank, ids)])
        assert torch.equal(got, whole), "how they came decides nothing"
