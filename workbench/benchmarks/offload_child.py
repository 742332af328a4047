"""One measurement of `workbench bench offload`, alone in its process: a question as JSON in, figures as JSON out."""

import json
import statistics
import sys
from pathlib import Path
from time import perf_counter

import torch

from workbench.engine import Engine
from workbench.offloaded import Offloaded
from workbench.plan import CACHE, FAR, SLOTS
from workbench.sampling import Sampling
from workbench.sizes import parse_bytes
from workbench.storages import weigh
from workbench.traffic import Traffic
from workbench.workbench import Workbench, load


def measure(path: str, threads: int, prompt: int, tokens: int, rounds: int, seed: int = 0, **how) -> dict:
    """Opens the checkpoint, reads `prompt` random tokens and generates `tokens`, `rounds` times."""
    torch.set_num_threads(threads)
    on_gpu = str(how.get("device")).startswith("cuda")
    if on_gpu:  # the driver's own memory, which the plan counts too, is outside this fraction
        total = torch.cuda.get_device_properties(how["device"]).total_memory
        torch.cuda.set_per_process_memory_fraction(parse_bytes(how["vram"]) / total, how["device"])
    started = perf_counter()
    bench = load(path, **how)
    opened = perf_counter() - started
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 4000, (prompt,), generator=generator).tolist()
    store, runs = bench.model.store, []
    for number in range(rounds):
        since = store.transfers.visits if isinstance(store, Offloaded) else 0
        answer = _answer(bench.engine, text, tokens, seed + number)
        runs.append({"prompt_seconds": answer.stats.prefill_seconds, "seconds": [s.seconds for s in answer.steps[1:]]})
        if isinstance(store, Offloaded):
            traffic = Traffic.of(store, since)
            runs[-1] |= {"traffic": traffic.to_dict(), "working_set": traffic.working_set().to_dict("index")}
    bare = _bare(bench, text, tokens, generator)
    every = [seconds for run in runs for seconds in run["seconds"]]
    return {
        "plan": bench.model.plan.to_dict() if bench.model.plan else None,
        "open_seconds": opened,
        "tokens_per_second": len(every) / sum(every),
        "bare_tokens_per_second": tokens / bare,
        "median_ms": 1e3 * statistics.median(every),
        "peak_rss": _peak(),
        "peak_vram": torch.cuda.max_memory_reserved(how["device"]) if on_gpu else None,
        "held": held(bench),
        "runs": runs,
    }


def _answer(engine: Engine, text: list[int], tokens: int, seed: int):
    """Of random weights any token may be the end mark, so what ends early is asked again with another seed."""
    longest = None
    for number in range(8):
        sampling = Sampling(max_tokens=tokens, temperature=1.0, top_p=1.0, seed=seed + 1000 * number)
        answer = engine.generate(text, sampling)
        if longest is None or len(answer.steps) > len(longest.steps):
            longest = answer
        if len(answer.steps) == tokens:
            break
    return longest


@torch.inference_mode()
def _bare(bench: Workbench, text: list[int], tokens: int, generator: torch.Generator) -> float:
    """Seconds of `tokens` passes of one random token after the text: what llama.cpp's own benchmark times."""
    bench.engine.generate(text, Sampling(max_tokens=1, seed=0))  # the cache then holds the text
    cache = bench.engine.cache
    drawn = torch.randint(0, 4000, (tokens + 1, 1, 1), generator=generator)
    bench.model(drawn[0], cache, logits="last")
    started = perf_counter()
    for token in drawn[1:]:
        bench.model(token, cache, logits="last")
    seconds = perf_counter() - started
    cache.truncate(len(text))
    return seconds


def held(bench: Workbench) -> dict[str, int]:
    """Bytes that are allocated, by the categories of the plan."""
    found, store = weigh(bench.model), bench.model.store
    experts, cache = found.pop("routed experts"), bench.engine.cache
    if isinstance(store, Offloaded) and store.far:
        found[FAR] = store.far.nbytes
        experts -= store.far.nbytes
    return found | {SLOTS: experts, CACHE: cache.nbytes if cache is not None else 0}


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(**json.load(sys.stdin))) + "\n")
