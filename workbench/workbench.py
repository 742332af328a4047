"""The Workbench: a model, its tokenizer and its engine, opened from one name."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import psutil
import torch

from workbench.cache import LatentCache
from workbench.checkpoint import resolve, save
from workbench.config import Config
from workbench.engine import Completion, Engine, Stream
from workbench.errors import BudgetError, RequestError
from workbench.explaining import explain
from workbench.formats import cache_format
from workbench.model import Model
from workbench.opening import Size, open_model
from workbench.pack import Pack
from workbench.plan import DTYPES, Plan
from workbench.recipe import Recipe
from workbench.sampling import Sampling
from workbench.tokenizer import Tokenizer
from workbench.trace import Trace
from workbench.traffic import Traffic
from workbench.warming import warm

POCKET = Path(__file__).parent / "pocket"
CONTEXT = 8192  # tokens there is room for under a budget, where nothing is said


class Workbench:
    """What `load` gives. `path` is the checkpoint it came from, `name` what it was asked for as."""

    def __init__(self, model: Model, tokenizer: Tokenizer, path: Path, name: str, cache: str, **limits):
        """`limits` are those of the Engine."""
        self.model, self.tokenizer, self.path, self.name = model, tokenizer, path, name
        self.engine = Engine(model, tokenizer, cache, name, **limits)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def context(self) -> int:
        """Tokens a conversation may have, answer included."""
        return self.engine.context

    @property
    def card(self) -> str:
        """The model card that lies beside the weights; empty where there is none."""
        path = self.path / "README.md"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def stream(self, prompt: str | list[dict] | list[int], sampling: Sampling | None = None, **options) -> Stream:
        """Steps as they are generated; see Engine.stream."""
        return self.engine.stream(prompt, sampling, **options)

    def generate(self, prompt: str | list[dict] | list[int], sampling: Sampling | None = None, **options) -> Completion:
        """One whole answer; see Engine.generate."""
        return self.engine.generate(prompt, sampling, **options)

    def batch(self, prompts: Sequence, sampling: Sampling | None = None, slots: int = 8, **options) -> list[Completion]:
        """Answers to many prompts; see Engine.batch."""
        return self.engine.batch(prompts, sampling, slots, **options)

    def trace(
        self,
        prompts: Sequence,
        sampling: Sampling | None = None,
        *,
        labels: Sequence[str] | None = None,
        slots: int = 8,
        progress: Callable[[Trace], None] = lambda trace: None,
        **options,
    ) -> Trace:
        """Answers to many prompts as one Trace, a sequence each; `labels` say what each is (a language, a subject).

        Takes the options of Engine.batch: edits, scores. `progress` is called with each answer's own Trace as it ends.
        """
        if labels is not None and len(labels) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(labels)} labels: give one label for each.")
        traces = {}
        for number, answer in self.engine.answers(prompts, sampling, slots, **options):
            trace = traces[number] = answer.trace
            about, prompt = trace.header["sequences"][0], prompts[number]
            about["prompt"] = _asked(prompt)
            if labels is not None:
                about["label"] = str(labels[number])
            progress(trace)
        return Trace.join(traces[number] for number in range(len(prompts)))

    @property
    def plan(self) -> Plan | None:
        """What was planned when it was opened; None for plain weights without a budget."""
        return self.model.plan

    def explain(self, new: int = 1, context: int = 64) -> pd.DataFrame:
        """Which body answers each operation in a pass of `new` tokens after `context`, and why; see explaining.py."""
        return explain(self.model, self.engine.cache_format, new, context)

    def warm(self, progress: Callable[[str], None] = lambda stage: None) -> float:
        """Compiles what a first answer would wait for, telling `progress`; the seconds it took."""
        return warm(self.engine, progress)

    def traffic(self, since: int = 0) -> Traffic:
        """What was fetched of the experts that are not in memory, beside what a perfect cache would have fetched; from
        visit `since` of the store on. RequestError where all are in memory.
        """
        return Traffic.of(self.model.store, since)

    def new_cache(self, batch: int = 1, format: str | None = None) -> LatentCache:
        return self.engine.new_cache(batch, format)

    def save(self, path: str | Path, dtype: str = "auto") -> None:
        """Writes the checkpoint, with its tokenizer, in the Hugging Face layout. dtype "auto" is the model's."""
        kind = self.model.dtype if dtype == "auto" else _known(dtype)
        save(self.model, Path(path), files_from=self.path, dtype=kind)

    def __repr__(self) -> str:
        total, active = self.config.parameters()
        where = f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}"
        return f"<Workbench {self.name}: {_count(total)} parameters, {_count(active)} active, {where}>"


def load(
    name: str = "pocket",
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache: str = "auto",
    recipe: str | Recipe | None = None,
    vram: Size | None = None,
    ram: Size | None = None,
    context: int | None = None,
    **how,
) -> Workbench:
    """Opens "pocket", a checkpoint directory, plain or packed, or a hub id.

    device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1". dtype: "auto" (bf16 on a GPU; on a CPU fp32 where
    that takes at most half of the free memory or the weights are packed, else bf16), "fp32", "bf16". cache: "auto" (as
    dtype), or a format of workbench.formats: "bf16", "fp8", "int8", "q6" (93.3 % less than DeepSeek-67B), "int4",
    "q6+128" and so on. recipe: packs plain weights as they are read, "int4" for example. vram, ram: hard budgets such
    as "16GiB"; with one, the caches have room for `context` tokens (at most 8,192 where nothing is said). Further
    options are those of opening.open_model. CheckpointError, RequestError and BudgetError (it does not fit, and this
    is the least that would) say what is wrong and what to do.
    """
    where = _device(device)
    path = place(name)
    packed = Pack.is_one(path)  # first: one that is not finished says so
    config = Config.from_json(path / "config.json")
    kind = _dtype(dtype, where, 0 if packed or recipe else config.parameters().total)
    limited = vram is not None or ram is not None
    if not (packed or limited or recipe):
        _check_fits(name, config, kind, where)
    cache = {torch.float32: "fp32", torch.bfloat16: "bf16"}[kind] if cache == "auto" else cache_format(cache).name
    if limited and context is None:
        context = min(CONTEXT, config.max_position_embeddings)
    tokenizer = Tokenizer(path)  # before the weights, which take longer
    model = open_model(
        path, device=where, dtype=kind, recipe=recipe, vram=vram, ram=ram, context=context, cache=cache, **how
    )
    limits = {"context": context}
    if limited:
        limits |= {"chunk": model.plan.chunk, "cache_bytes": model.plan.cache_bytes}
    marked = f"{name} (random weights)" if packed and Pack.open(path).synthetic else str(name)
    return Workbench(model, tokenizer, path, marked, cache, **limits)


def place(name: str) -> Path:
    """The directory of "pocket", of a checkpoint directory, or of a hub id."""
    return POCKET if name == "pocket" else resolve(name)


def _asked(prompt: str | list[dict] | list[int]) -> str:
    """What a prompt asks, as text; nothing of token ids."""
    if isinstance(prompt, str):
        return prompt
    return prompt[-1]["content"] if isinstance(prompt[0], dict) else ""


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RequestError(f"no device called {name!r}; use 'auto', 'cpu' or 'cuda'.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"{name!r} is not there: torch sees {torch.cuda.device_count()} GPUs. Use device='cpu'.")
    return device


def _dtype(name: str, device: torch.device, plain: int) -> torch.dtype:
    """`plain`: how many numbers would be held in that type."""
    if name != "auto":
        return _known(name)
    return torch.float32 if device.type == "cpu" and 4 * plain <= _free(device) / 2 else torch.bfloat16


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _check_fits(name: str, config: Config, dtype: torch.dtype, device: torch.device) -> None:
    needed, free = config.parameters().total, _free(device)
    if needed * dtype.itemsize > free:
        raise BudgetError(
            f"{name}: {_count(needed)} weights of {dtype.itemsize} bytes take {needed * dtype.itemsize / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free on {device}. Use dtype='bf16', a smaller model or a larger machine, or pack "
            "it (workbench pack): packed experts stay on disk until they are asked for."
        )


def _known(name: str) -> torch.dtype:
    if name in ("fp16", "float16"):
        raise RequestError("fp16 overflows in DeepSeek-V2; use dtype='bf16', or 'fp32'.")
    if name not in DTYPES:
        raise RequestError(f"no dtype called {name!r}; use 'auto', 'bf16' or 'fp32'.")
    return DTYPES[name]


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
