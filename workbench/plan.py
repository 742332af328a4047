"""The plan: what of a model fits where, in bytes by category, and how fast that will be. Opening goes by it.

near   where experts are computed: VRAM, or main memory on a CPU
host   main memory behind a device; not there on a CPU, unless `vram` makes a part of its memory stand in for a device
disk   the packed checkpoint
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import psutil
import torch

from workbench.bandwidth import Measured, saved
from workbench.cache import BLOCK
from workbench.config import PRESETS, Config
from workbench.errors import BudgetError, RequestError
from workbench.footprint import TABLE, Footprint
from workbench.formats import CACHE_FORMATS, Format, cache_format
from workbench.pack import Pack
from workbench.recipe import Recipe
from workbench.residents import expert_layouts, residents
from workbench.sizes import parse_bytes, show_bytes
from workbench.speed import Bytes, Rates, Speed, published
from workbench.workspace import workspace

SLOTS, FAR, CACHE, WORK, PROCESS = "expert slots", "expert slots (host)", "cache", "workspace", "process"
ROOM = 96 << 20  # what the allocator keeps, telemetry, threads: found by running, see tests/test_budget.py
DRIVER = 600 << 20  # of a CUDA context and PyTorch's kernels; not measured yet
WOBBLE = 4 << 20  # a process takes some hundred KB more or less each time: room for that in what is named as the least
RESERVE = 0.1  # of the free memory is left alone where no limit was given
CHUNKS = (512, 256, 128, 64, 32, 16)  # tokens of a prompt in one pass
WORKSHOP = 0.08  # of the limit: a larger workspace makes the chunks smaller, while that helps
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """`recipe` None: all weights plain, in `dtype`. `process`: bytes before the model is opened. Made by `make`."""

    config: Config
    recipe: Recipe | None
    device: str
    dtype: torch.dtype
    context: int
    batch: int
    format: Format
    chunk: int
    vram: int | None
    ram: int
    process: int
    slots: int
    far: int
    measured: Measured | None = None

    @classmethod
    def make(
        cls,
        config: Config,
        recipe: str | Recipe | None = "int4",
        *,
        device: str | None = None,
        vram: int | str | None = None,
        ram: int | str | None = None,
        context: int | None = None,
        batch: int = 1,
        cache: str | Format = "auto",
        dtype: torch.dtype | str | None = None,
        chunk: int = CHUNKS[0],
        measured: Measured | None = None,
        process: int | None = None,
    ) -> "Plan":
        """Fills what residents, cache and workspace leave of the limits with experts.

        vram, ram: bytes, or such as "16GiB"; what is free where nothing is said. On device "cpu" with `vram` a part of
        main memory stands in for a GPU's. context: 8,192 tokens, or what the model has, where nothing is said. chunk:
        at most; it is made smaller where its workspace would cost many slots. process: what the process takes before
        (this one's, now). BudgetError names the smallest limit that works.
        """
        device = device or ("cuda" if vram is not None else "cpu")
        recipe = None if recipe is None else Recipe.named(recipe)
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
        elif dtype not in (*DTYPES, *DTYPES.values()):
            raise RequestError(f"no dtype called {dtype!r}; use 'fp32' or 'bf16'.")
        dtype = DTYPES.get(dtype, dtype)
        if cache == "auto":
            cache = "fp32" if dtype == torch.float32 else "bf16"
        context = min(8192 if context is None else context, config.max_position_embeddings)
        if context < 1 or batch < 1:
            raise RequestError(f"a context and a batch have at least 1 token and sequence; got {context} and {batch}.")
        process = psutil.Process().memory_info().rss if process is None else process
        ram = _free_ram() + process if ram is None else parse_bytes(ram)
        if vram is not None:
            vram = parse_bytes(vram)
        elif device == "cuda":
            vram = int((1 - RESERVE) * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 16 << 30
        blank = cls(
            config,
            recipe,
            device,
            dtype,
            context,
            batch,
            cache_format(cache),
            chunk,
            vram,
            ram,
            process,
            0,
            0,
            measured,
        )
        return blank._filled(chunk)

    @classmethod
    def of(cls, what: str | Path, recipe: str | Recipe | None = None, **limits) -> "Plan":
        """For a released shape ("v2", "v2-lite" ...), a checkpoint directory, packed or not, or a config.json. The
        recipe of one that is not packed is int4 where none is said; one that is packed has its own. Takes the options
        of `make`.
        """
        path, measured = Path(what), saved()
        if str(what) in PRESETS:
            config = Config.preset(str(what))
        elif path.is_dir() and Pack.is_one(path):
            pack = Pack.open(path)
            if recipe is not None and Recipe.named(recipe).rules != pack.recipe.rules:
                raise RequestError(f"{path} is packed already, by recipe {pack.recipe.name}: give no recipe.")
            config, recipe = pack.config, pack.recipe
        else:
            config = Config.from_json(path / "config.json" if path.is_dir() else path)
        return cls.make(config, recipe or "int4", measured=measured, **limits)

    @property
    def block(self) -> int:
        """Bytes of one expert."""
        layouts = set(expert_layouts(self.config, self.recipe))
        if layouts <= {None}:
            return 3 * self.config.hidden_size * self.config.moe_intermediate_size * self.dtype.itemsize
        return max(layout.nbytes for layout in layouts)

    @property
    def experts(self) -> int:
        """In all layers."""
        return len(expert_layouts(self.config, self.recipe)) * (self.config.n_routed_experts or 0)

    @property
    def whole(self) -> bool:
        """Whether all experts are near."""
        return self.slots >= self.experts

    @property
    def staged(self) -> bool:
        """Whether there is main memory behind a device."""
        return self.vram is not None

    @property
    def cache_bytes(self) -> int:
        """What caches may hold: `batch` sequences of `context` tokens."""
        return self._cache(self.format, self.context)

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Near, without experts."""
        kinds = dict(residents(self.config, self.recipe, self.dtype).kinds)
        table = Footprint(self.config, 0, dtype=self.dtype).table
        cache = self.cache_bytes
        work = self._workspace(self.chunk) + cache // self.config.num_hidden_layers  # a layer is copied when it grows
        kinds |= {TABLE: table, CACHE: cache, WORK: max(work, residents(self.config, self.recipe, self.dtype).largest)}
        if self.device == "cuda":
            return kinds | {PROCESS: DRIVER}
        return kinds if self.staged else kinds | {PROCESS: self.process + ROOM}

    @property
    def near(self) -> dict[str, int]:
        return self.fixed | {SLOTS: self.slots * self.block}

    @property
    def host(self) -> dict[str, int]:
        """Of main memory behind a device; empty on a CPU."""
        return {PROCESS: self.process + ROOM, FAR: self.far * self.block} if self.staged else {}

    @property
    def disk(self) -> dict[str, int]:
        """Of the packed checkpoint."""
        return {
            "residents": residents(self.config, self.recipe, self.dtype).nbytes,
            "experts": self.experts * self.block,
        }

    @property
    def moved(self) -> Bytes:
        """What a token moves."""
        config = self.config
        layers = len(expert_layouts(config, self.recipe))
        read = residents(config, self.recipe, self.dtype).read
        return Bytes(read, layers * config.num_experts_per_tok * self.block, config.num_hidden_layers)

    def context_capacity(self) -> dict[str, int]:
        """For each cache format how many tokens the cache could have with as many slots as now."""
        free = self._limit - sum(self.near.values()) + self.cache_bytes + self.cache_bytes // self._layers
        return {name: self._tokens(format, free) for name, format in CACHE_FORMATS.items()}

    def speed_range(self) -> tuple[Speed, Speed] | None:
        """The least and the most that may be expected, see workbench.speed. None where nothing was measured."""
        if self.measured is None:
            return None
        rates = Rates.of(self.measured, "cuda" if self.device == "cuda" else "cpu")
        share = min(1.0, self.slots / self.experts) if self.experts else 1.0
        behind = min(1.0, self.far / self.experts) if self.experts else 1.0
        low = self.moved.speed(rates, share, behind, overlap=False)
        return low, self.moved.speed(rates, published(share), published(behind), overlap=True)

    def compare(self, held: dict[str, int]) -> pd.DataFrame:
        """Bytes that were really held, by category, beside the plan's."""
        planned = self.near | {name: size for name, size in self.host.items() if name != PROCESS}
        rows = {
            name: (planned[name], size, size / planned[name] - 1) for name, size in held.items() if planned.get(name)
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["planned", "measured", "error"])

    @property
    def _limit(self) -> int:
        return self.vram if self.staged else self.ram

    @property
    def _layers(self) -> int:
        return self.config.num_hidden_layers

    def _workspace(self, chunk: int) -> int:
        args = self.config, self.recipe, self.dtype, self.format, self.context, self.batch, chunk
        return workspace(*args).nbytes

    def _cache(self, format: Format, tokens: int) -> int:
        whole = Footprint(self.config, tokens, self.batch, format, dtype=self.dtype)
        return sum(whole.cache.values())

    def _tokens(self, format: Format, free: int) -> int:
        block = self.batch * BLOCK * self._layers * format.nbytes(Footprint(self.config, 0).row)
        whole = int(free / (1 + 1 / self._layers)) // block * BLOCK
        return max(0, min(whole, self.config.max_position_embeddings))

    def _filled(self, chunk: int) -> "Plan":
        least = min(self.config.num_experts_per_tok, self.experts)
        chunks = [one for one in (chunk, *CHUNKS) if one <= chunk]
        fitting = [plan for one in chunks if (plan := replace(self, chunk=one))._room() >= least * self.block]
        if not fitting:
            smallest = replace(self, chunk=min(chunks))
            self._refuse(smallest, least)
        frugal = [plan for plan in fitting if plan._workspace(plan.chunk) <= WORKSHOP * self._limit]
        every = [plan for plan in fitting if plan._room() >= self.experts * self.block]
        plan = (every or frugal or fitting[-1:])[0]
        if self.recipe is None and not every:
            self._refuse(fitting[0], self.experts)
        slots, far = min(self.experts, plan._room() // self.block) if self.experts else 0, 0
        if self.staged:
            room = self.ram - sum(self.host.values())
            far = 0 if slots == self.experts else min(self.experts, max(0, room) // self.block)
            if slots < self.experts and far < least:
                needed = sum(self.host.values()) + least * self.block + WOBBLE
                raise BudgetError(
                    f"{show_bytes(self.ram)} of main memory are too little: this process has "
                    f"{show_bytes(self.process)}, and experts on their way to the device need room. ram={needed} is "
                    "the least that works."
                )
        return replace(plan, slots=slots, far=far)

    def _room(self) -> int:
        return self._limit - sum(self.fixed.values())

    def _refuse(self, smallest: "Plan", experts: int) -> None:
        name = "vram" if self.staged else "ram"
        least = sum(smallest.fixed.values()) + experts * self.block + (0 if self.staged else WOBBLE)
        hint = "" if self.recipe else " Packed weights take less, and may stay on disk: workbench pack."
        raise BudgetError(
            f"{show_bytes(self._limit)} are too little: {name}={least} ({show_bytes(least)}) is the least that works "
            f"for {self.context:,} tokens of context with the cache in {self.format.name}. A shorter context, a "
            f'smaller cache ("q6") or recipe ("int3") needs less.{hint}'
        )

    def to_frame(self) -> pd.DataFrame:
        tiers = {"near": self.near, "host": self.host, "disk": self.disk}
        rows = [(tier, part, size) for tier, parts in tiers.items() for part, size in parts.items()]
        return pd.DataFrame(rows, columns=["tier", "part", "bytes"]).set_index(["tier", "part"])

    def to_dict(self) -> dict:
        speeds = self.speed_range()
        return {
            "model": self.config.name, "recipe": self.recipe.name if self.recipe else None, "device": self.device,
            "vram": self.vram, "ram": self.ram, "context": self.context, "batch": self.batch,
            "cache": self.format.name, "chunk": self.chunk, "process": self.process, "slots": self.slots,
            "far": self.far,
            "experts": self.experts, "block_bytes": self.block, "near": self.near, "host": self.host,
            "disk": self.disk, "bytes_per_token": self.moved.read, "context_capacity": self.context_capacity(),
            "speed": [speed._asdict() for speed in speeds] if speeds else None,
        }  # fmt: skip

    def __str__(self) -> str:
        name = self.config.name or "this model"
        packed = f"packed by {self.recipe.name}" if self.recipe else f"plain in {str(self.dtype)[6:]}"
        lines = [f"{name}, {packed}; {self.context:,} tokens of context in {self.format.name}, chunks of {self.chunk}"]
        titles = {"near": "VRAM" if self.device == "cuda" else "main memory", "host": "main memory", "disk": "disk"}
        if self.staged and self.device == "cpu":
            titles["near"] = "main memory in place of VRAM"
        limits = {"near": self._limit, "host": self.ram}
        for tier, parts in (("near", self.near), ("host", self.host), ("disk", self.disk)):
            if parts:
                total = sum(parts.values())
                of = f" of {show_bytes(limits[tier])}" if tier in limits else ""
                lines.append(f"{titles[tier]}: {show_bytes(total)}{of}")
                lines += [f"  {part:22}{show_bytes(size):>10}" for part, size in parts.items() if size]
        held = f"{self.slots:,} of {self.experts:,} experts near ({self.slots / max(1, self.experts):.0%})"
        lines.append(held + (f", {self.far:,} behind" if self.staged else ""))
        lines.append(
            "context with as many slots: " + ", ".join(f"{n} {t:,}" for n, t in self.context_capacity().items())
        )
        speeds = self.speed_range()
        if speeds is None:
            lines.append("tokens/s: run `workbench doctor --measure` once, and the plan tells them")
        else:
            low, high = speeds
            lines.append(
                f"tokens/s: {low.tokens_per_second:,.1f} ({low.hit:.0%} hits, nothing overlaps) to "
                f"{high.tokens_per_second:,.1f} ({high.hit:.0%} hits, all overlaps; bound by {high.binds})"
            )
        return "\n".join(lines)


def _free_ram() -> int:
    return int((1 - RESERVE) * psutil.virtual_memory().available)
