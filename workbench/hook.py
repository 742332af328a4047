"""The Hook: a plain function as a probe at one site."""

from collections.abc import Callable, Iterable

import torch

from workbench.config import Config
from workbench.errors import RequestError
from workbench.probe import INSIDE, OFF, Probe, check_fires, known

Function = Callable[[torch.Tensor, int | None], torch.Tensor]


class Hook(Probe):
    """Calls `function(x, layer)` with what passes `site`, and the model goes on with what that returns.

    layers  only these; by default every layer that has the site. Outside the layers `layer` is None

    To look, return x. To change, return another tensor of the same shape and type, and leave x as it is: the cache, the
    residual stream or a recorder may hold it too. RequestError when a pass begins for a site or layers that the model
    does not have, and during a pass for a function that breaks these rules.
    """

    def __init__(self, site: str, function: Function, layers: Iterable[int] | None = None):
        (self.site,) = known([site])
        self.function = function
        self.layers = None if layers is None else frozenset(layers)

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        check_fires([self.site], self.layers, config)
        return self

    def at(self, layer: int) -> Probe:
        return _InLayer(self, layer) if self.layers is None or layer in self.layers else OFF

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return self.pass_through(x, None) if site == self.site else x

    def pass_through(self, x: torch.Tensor, layer: int | None) -> torch.Tensor:
        """What the function makes of x, if it keeps to the rules."""
        before = x.clone() if x.is_inference() else x._version  # under inference_mode writes are not counted
        made = self.function(x, layer)
        written = not torch.equal(before, x) if x.is_inference() else x._version != before
        if written:
            raise RequestError(f"the function at {self.site} wrote into x. Change a copy, x.clone(), and return that.")
        if not isinstance(made, torch.Tensor):
            what = "nothing" if made is None else type(made).__name__
            raise RequestError(f"the function at {self.site} returned {what}. Return x, or what should take its place.")
        if made.shape != x.shape or made.dtype != x.dtype:
            raise RequestError(
                f"the function at {self.site} returned {list(made.shape)} {made.dtype}; "
                f"{list(x.shape)} {x.dtype} is needed, as it was given."
            )
        return made


class _InLayer(Probe):
    def __init__(self, hook: Hook, layer: int):
        self.hook, self.layer = hook, layer

    def opens(self, op: str) -> bool:
        site = self.hook.site
        return site in INSIDE[op] or (op == "route" and site == "moe.router_probs")  # else that one is only read

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return self.hook.pass_through(x, self.layer) if site == self.hook.site else x
