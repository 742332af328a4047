"""A Recipe says how each weight of a checkpoint is stored: rules from tensor names to codecs, the first that fits."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from workbench.codec import Codec, Codes, Float, Groups, Tiles
from workbench.errors import RequestError

PLAIN = "plain"  # as the checkpoint has it
# Groups of 64 with 8-bit scales: 4.13 and 3.13 bits a weight, scales included. Two bits would have three levels only.
WEIGHT_FORMATS: dict[str, Codec] = {
    "fp32": Float(torch.float32),
    "bf16": Float(torch.bfloat16),
    "fp8": Tiles(128),
    "int8": Codes(8),
    "int6": Groups(6, 64),
    "int4": Groups(4, 64),
    "int3": Groups(3, 64),
}
FORMAT_OF = {codec: name for name, codec in WEIGHT_FORMATS.items()}

# norms are small, and the router decides by near ties
_KEPT = (("*norm.weight", PLAIN), ("*.mlp.gate.weight", PLAIN))
# 8 bits where a weight is met by every token and is a small part of all: the words, and what rebuilds keys and values
_WORDS = (("*embed_tokens.weight", "int8"), ("lm_head.weight", "int8"), ("*.kv_b_proj.weight", "int8"))
_PRESETS = {
    "bf16": (("*", "bf16"),),
    "fp8": (("*", "fp8"),),
    "int8": (("*", "int8"),),
    "int6": (*_WORDS, ("*", "int6")),
    "int4": (*_WORDS, ("*", "int4")),
    "int3": (*_WORDS, ("*.experts.*", "int3"), ("*", "int4")),
}


@dataclass(frozen=True)
class Recipe:
    """`rules`: (glob, format) pairs in order of precedence; a name that none fits is kept plain."""

    name: str
    rules: tuple[tuple[str, str], ...]

    def __post_init__(self):
        for pattern, format in self.rules:
            if format != PLAIN and format not in WEIGHT_FORMATS:
                raise RequestError(
                    f"recipe {self.name!r}: no weight format called {format!r} (for {pattern!r}); "
                    f"there are {PLAIN}, {', '.join(WEIGHT_FORMATS)}."
                )

    @classmethod
    def named(cls, recipe: "str | Recipe") -> "Recipe":
        """A preset ("bf16", "fp8", "int8", "int6", "int4", "int3"), with exceptions before it if wanted, such as
        "int4,*.experts.*=int3,lm_head.weight=bf16". RequestError lists the presets.
        """
        if isinstance(recipe, Recipe):
            return recipe
        base, *exceptions = str(recipe).split(",")
        if base not in _PRESETS or not all("=" in one for one in exceptions):
            raise RequestError(
                f"no recipe {recipe!r}; there are {', '.join(_PRESETS)}, and such as 'int4,lm_head.weight=bf16', "
                "which adds exceptions by tensor name."
            )
        own = tuple(tuple(one.rsplit("=", 1)) for one in exceptions)
        return cls(str(recipe), (*own, *_KEPT, *_PRESETS[base]))

    @classmethod
    def from_list(cls, name: str, rules: Iterable[Iterable[str]]) -> "Recipe":
        return cls(name, tuple((str(pattern), str(format)) for pattern, format in rules))

    def format(self, tensor: str) -> str:
        """The name of the format of that tensor."""
        return next((format for pattern, format in self.rules if fnmatchcase(tensor, pattern)), PLAIN)

    def codec(self, tensor: str) -> Codec | None:
        """How that tensor is packed; None for plain."""
        return WEIGHT_FORMATS.get(self.format(tensor))
