"""A packed checkpoint within a hard memory limit: tokens per second, beside the limit of disk and memory, the plan,
and llama.cpp on the same shape, threads and machine in the same run where it is named.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.bandwidth import fastest
from workbench.bandwidth import measure as measure_rates
from workbench.benchmarks.confined import run
from workbench.benchmarks.llamacpp import LlamaCpp
from workbench.benchmarks.measure import RESULTS, about, computing_with, keep, load_average, scatter
from workbench.errors import RequestError
from workbench.pack import Pack
from workbench.plan import CACHE, Plan
from workbench.sizes import parse_bytes

CHILD = "workbench.benchmarks.offload_child"
ROUNDS = 3


@dataclass(frozen=True)
class Result:
    """Figures of every round; `rates` bytes a second, measured just before."""

    about: dict
    rounds: tuple[dict, ...]
    fences: tuple[dict, ...]
    rates: dict
    foretold: tuple[float, float]  # tokens a second, by the plan and the rates
    errors: dict[str, float]  # of the plan's bytes, by category
    llama: dict | None = None

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each round, prompts left out."""
        return [one["tokens_per_second"] for one in self.rounds]

    @property
    def bound(self) -> dict:
        """The least milliseconds a token, were disk, memory and link to a GPU perfect and perfectly overlapped."""
        last = self.rounds[-1]
        traffic = [run["traffic"]["phases"]["answer"] for one in self.rounds for run in one["runs"] if "traffic" in run]
        tokens = sum(one["tokens"] for one in traffic)
        disk = sum(one["disk_bytes"] for one in traffic) / tokens if tokens else 0.0
        read = last["plan"]["bytes_per_token"]
        found = {"disk_bytes": disk, "disk_ms": 1e3 * disk / self.rates["disk"]}
        found |= {"memory_bytes": read, "memory_ms": 1e3 * read / self.rates["memory"], "link_ms": 0.0}
        if self.rates["link"] and tokens:
            found["link_ms"] = 1e3 * sum(one["link_bytes"] for one in traffic) / tokens / self.rates["link"]
        found["ms"] = max(found["disk_ms"], found["memory_ms"], found["link_ms"])
        found["share"] = found["ms"] / (1e3 / statistics.median(self.speeds))
        return found

    @property
    def ratio(self) -> float | None:
        """To llama.cpp, of the medians, without drawing tokens on either side."""
        return statistics.median(self.bare) / statistics.median(self.llama["speeds"]) if self.llama else None

    @property
    def bare(self) -> list[float]:
        """Tokens a second of each round for random tokens, none of which is drawn."""
        return [one["bare_tokens_per_second"] for one in self.rounds]

    def to_dict(self) -> dict:
        own = {"about": self.about, "rounds": self.rounds, "fences": self.fences, "rates": self.rates}
        own |= {"foretold": self.foretold, "errors": self.errors}
        return own | {"bound": self.bound, "llama": self.llama, "ratio": self.ratio}

    def __str__(self) -> str:
        about, bound, median, fence = self.about, self.bound, statistics.median(self.speeds), self.fences[0]
        peak = max(one["peak_rss"] for one in self.rounds)
        lines = [
            f"{about['model']}: {about['parameters'] / 1e9:.1f}B parameters by recipe {about['recipe']}; "
            f"{about['threads']} threads; limit {fence['limit'] / 1e9:,.2f} GB kept by {fence['fence']}",
            f"{about['cpu']}; torch {about['torch']}",
            scatter(about["load"]).rstrip(),
            f"tokens/s            {median:8.2f}   rounds {min(self.speeds):.2f} to {max(self.speeds):.2f}",
            f"without drawing     {statistics.median(self.bare):8.2f}   "
            f"rounds {min(self.bare):.2f} to {max(self.bare):.2f}",
            f"peak RSS            {peak / 1e9:8.2f} GB",
            f"bound               {1e3 / bound['ms']:8.2f} tokens/s: disk {bound['disk_bytes'] / 1e6:,.0f} MB a token "
            f"at {self.rates['disk'] / 1e9:.2f} GB/s, memory {bound['memory_bytes'] / 1e6:,.0f} MB at "
            f"{self.rates['memory'] / 1e9:.0f} GB/s",
            f"share of the bound  {bound['share']:8.0%}",
            f"the plan foretold   {self.foretold[0]:8.2f} to {self.foretold[1]:.2f} tokens/s; its bytes are at most "
            f"{max(map(abs, self.errors.values())):.2%} off those held, of weights, tables and slots",
        ]
        for name in ("hit_rate", "oracle", "lru", "chance"):
            rates = [run["traffic"][name] for one in self.rounds for run in one["runs"] if "traffic" in run]
            if rates:
                lines.append(f"{name.replace('_', ' '):20}{statistics.median(rates):8.1%}")
        if self.llama:
            theirs = self.llama["speeds"]
            lines.append(
                f"llama.cpp           {statistics.median(theirs):8.2f} tokens/s, {min(theirs):.2f} to "
                f"{max(theirs):.2f}; ours is {self.ratio:.2f} times that"
            )
        return "\n".join(line for line in lines if line)

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, f"offload-{self.about['within']}", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int = ROUNDS,
    ram: str = "4GB",
    vram: str | None = None,
    device: str = "cpu",
    context: int = 1024,
    cache: str = "auto",
    prompt: int = 32,
    tokens: int = 48,
    llama: Path | None = None,
    gguf: Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Result:
    """`checkpoint`: a packed one, such as `workbench synth v2-lite` writes. Every round is a process of its own inside
    the limit, `ram` (and `vram`, where the CPU stands in for a GPU). `llama`: a Python with llama-cpp-python, `gguf`
    the same shape for it; its rounds are taken in turns with ours.
    """
    if checkpoint is None or not Pack.is_one(checkpoint):
        raise RequestError("say --checkpoint DIR, a packed one; `workbench synth v2-lite DIR` writes one.")
    if min(rounds, prompt, tokens) < 1 or context < prompt + tokens:
        raise RequestError(
            f"rounds, prompt and tokens are at least 1, and the context holds prompt and tokens; got {rounds} rounds, "
            f"{prompt} and {tokens} of {context}."
        )
    if device not in ("cpu", "cuda"):
        raise RequestError(f"no device called {device!r}: cpu or cuda.")
    if (llama is None) != (gguf is None):
        raise RequestError("--llama PYTHON and --gguf FILE go together.")
    pack = Pack.open(checkpoint)
    limit = parse_bytes(ram) + (parse_bytes(vram) if vram and device == "cpu" else 0)
    how = {
        "ram": ram,
        "context": context,
        "cache": cache,
        "device": device,
        "dtype": {"float32": "fp32", "bfloat16": "bf16"}[dtype],
    }
    how |= {"vram": vram} if vram else {}
    limits = {name: value for name, value in how.items() if value is not None}
    surroundings = {}
    if not Plan.make(pack.config, pack.recipe, **limits).whole:
        surroundings["OMP_WAIT_POLICY"] = "PASSIVE"  # who waits asleep leaves the cores to those that read from disk
    with computing_with(threads):
        where = about(pack.config, checkpoint, None) | {"dtype": dtype, "recipe": pack.recipe.name}
        where |= {
            "load": load_average(),
            "synthetic": pack.synthetic,
            "within": f"{vram}-{ram}" if vram else ram,
            "context": context,
        }
        question = {"path": str(checkpoint), "threads": where["threads"], "prompt": prompt, "tokens": tokens}
        progress("bandwidths")
        rates = measure_rates(checkpoint, block=pack.layout.nbytes)
        disk = fastest(rates.disk)
        near = rates.reading("cuda" if device.startswith("cuda") else "cpu")
        found = {"disk": disk.median if disk else float("inf"), "memory": near.median}
        found["link"] = rates.link.median if rates.link and device.startswith("cuda") else None
        answers, theirs = [], []
        rival = LlamaCpp(llama, gguf, where["threads"], prompt + tokens + 1) if llama else None
        try:
            for number in range(rounds):
                progress(f"round {number + 1} of {rounds}")
                answers.append(run(CHILD, question | {"rounds": 1, "seed": number} | how, limit, **surroundings))
                if rival:
                    theirs += rival.decode(prompt, tokens, 1)
        finally:
            if rival:
                rival.close()
    said = {"speeds": theirs, "version": rival.version, "system": rival.system} if rival else None
    held = {name: size for name, size in answers[0][0]["held"].items() if name != CACHE}  # it grows with the text
    process = answers[0][0]["plan"]["process"]
    plan = Plan.make(pack.config, pack.recipe, measured=rates, process=process, **limits)
    foretold = tuple(speed.tokens_per_second for speed in plan.speed_range())
    errors = plan.compare(held)["error"].to_dict()
    rounds, fences = zip(*answers)
    return Result(where, rounds, fences, found, foretold, errors, said)
