"""Exercises about latent attention: what the cache keeps of a token, and scores from the latent alone."""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workbench.config import Config
from workbench.exercises.feedback import Feedback

CONFIGS = ("v2-lite", "v2", "pocket")  # pocket last: two mistakes make the same number there


def check_cached_elements(cached_elements: Callable[[Config], int]) -> Feedback:
    """For `cached_elements(config)`: numbers that the latent cache keeps of one token, in all layers together."""
    for done, name in enumerate(CONFIGS):
        config = Config.preset(name)
        answer = cached_elements(config)
        call = f"cached_elements({name})"
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and a whole number.")
        if isinstance(answer, bool) or not isinstance(answer, Integral):
            return Feedback(False, f"{call} returned {answer!r}. A whole number is expected, as 480 would be.")
        right = config.latent_width * config.num_hidden_layers
        if answer != right:
            so_far = f" Right so far: {', '.join(CONFIGS[:done])}." if done else ""
            return Feedback(False, f"{call} returned {answer:,}: {_miscount(int(answer), config)}.{so_far}")
    return Feedback(True, "Right for V2-Lite, V2 and pocket. The cache lays its rows out so, in workbench/cache.py.")


def _miscount(answer: int, config: Config) -> str:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    latent, rotary, row = config.kv_lora_rank, config.qk_rope_head_dim, config.latent_width
    causes = {
        row: "that is one layer; every layer keeps a row of its own",
        latent * layers: "the rotary key is missing; the latent knows nothing of position",
        rotary * layers: "that is the rotary key alone; the latent is kept beside it",
        (latent + heads * rotary) * layers: "one rotary key serves all heads, so it is kept once",
        2 * row * layers: "keys and values come from the same row, so it is kept once, not twice",
        (2 * latent + rotary) * layers: "keys and values come from the same latent, so it is kept once, not twice",
        heads * row * layers: "all heads share the row; that is what makes it small",
        2 * row: "that is one layer, and in bytes of bf16; numbers are asked for, in all layers",
        config.mha_width * layers: "that is what multi-head attention would keep: a key and a value for every head",
        heads * (config.qk_head_dim + config.v_head_dim) * layers: "those are the rebuilt keys and values of every "
        "head; they are thrown away after use, and only what they are rebuilt from is kept",
    }
    causes.setdefault(4 * row * layers, "that is bytes of fp32; numbers are asked for, whatever they are stored in")
    return causes.get(answer, "what the cache keeps of a token in a layer is one latent and one rotary key")


QUERIES, KEYS, HEADS, CONTENT, ROTARY, LATENT = 3, 50, 4, 6, 4, 5
SCALE = 0.37  # not 1 / sqrt(10): the model's own has YaRN in it
AXES = ("heads", "queries", "keys")


def check_absorbed_scores(absorbed_scores: Callable[..., Tensor]) -> Feedback:
    """For `absorbed_scores(content, position, latent, k_rope, up_key, scale)`: scores [H, T, S] before the softmax.

    content [T, H, N] and position [T, H, R] are the two parts of the queries, latent [S, C] and k_rope [S, R] what the
    cache holds, up_key [H, N, C] the weights that would make the content keys of each head.
    """
    draw = torch.Generator().manual_seed(0)
    content, position, latent, k_rope, up_key = given = [
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in (
            (QUERIES, HEADS, CONTENT),
            (QUERIES, HEADS, ROTARY),
            (KEYS, LATENT),
            (KEYS, ROTARY),
            (HEADS, CONTENT, LATENT),
        )
    ]
    with _Largest() as made:
        answer = absorbed_scores(*given, SCALE)
    if answer is None or answer is ...:
        return Feedback(False, "It returned nothing. End the function with `return`, and the tensor of scores.")
    if not isinstance(answer, Tensor):
        return Feedback(False, f"It returned {type(answer).__name__}. A tensor is expected.")
    by_content = torch.einsum("thn,hnc,sc->hts", content, up_key, latent)
    by_position = torch.einsum("thr,sr->hts", position, k_rope)
    right = (by_content + by_position) * SCALE
    if answer.shape != right.shape:
        return Feedback(False, _misshapen(answer.shape, right.shape))
    answer = answer.double()
    if not torch.allclose(answer, right, atol=1e-4):
        return Feedback(False, _misscored(answer, by_content, by_position, right))
    if made.largest >= KEYS * HEADS * CONTENT:
        return Feedback(
            False,
            "The numbers are right, but something as large as the content keys of every head, [keys, heads, content], "
            "was built on the way. That is the expanded form. Move up_key to the queries first: then all heads read "
            "the same latent.",
        )
    return Feedback(True, "Right, and no key of any head was built. Attention.absorbed does the same, in model.py.")


def _misshapen(found: torch.Size, wanted: torch.Size) -> str:
    said = f"The shape is {list(found)}; [heads, queries, keys] is expected, here {list(wanted)}."
    if sorted(found) == sorted(wanted):
        order = ", ".join(AXES[list(wanted).index(size)] for size in found)
        return f"{said} Yours is [{order}]: the right axes in another order."
    return said


def _misscored(answer: Tensor, by_content: Tensor, by_position: Tensor, right: Tensor) -> str:
    causes = [
        (by_content + by_position, "the scale is missing; it multiplies the sum of both parts"),
        (by_content * SCALE, "the rotary part is missing: without it no head knows the order of the tokens"),
        (by_content, "the rotary part and the scale are missing"),
        (by_position * SCALE, "the content part is missing"),
        (by_content * SCALE + by_position, "the scale multiplies the content part alone; it belongs to the sum"),
        (by_content + by_position * SCALE, "the scale multiplies the rotary part alone; it belongs to the sum"),
        ((by_content + by_position) / SCALE, "that divides by the scale; multiply by it"),
        (right.softmax(-1), "these are already probabilities; the scores before the softmax are asked for"),
    ]
    for wrong, cause in causes:
        if torch.allclose(answer, wrong, atol=1e-4):
            return f"The shape is right, the numbers are not: {cause}."
    factor = float((answer * right).sum() / (right * right).sum())
    if torch.allclose(answer, factor * right, atol=1e-4) and factor:
        cause = f"all are {factor:.3g} times too large. Use `scale` as it is given; the model's own has YaRN in it"
        return f"The shape is right, the numbers are not: {cause}."
    return (
        "The shape is right, the numbers are not. Content: each head's query, by its own up_key, becomes as wide as "
        "the latent, and meets every latent there. Rotary: each head's query meets the one rotary key of every token."
    )


class _Largest(TorchFunctionMode):
    """Notes the largest storage that any call gives back, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out
