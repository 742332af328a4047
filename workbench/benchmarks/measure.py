"""What every measurement needs: a model, a number of threads, a note of where it ran, and a place for results."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from workbench import machine
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.errors import CheckpointError, RequestError
from workbench.model import Model

POCKET = Path(__file__).parent.parent / "pocket"
RESULTS = Path(__file__).parent.parent.parent / "kernels" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUSY = 0.5  # load average before the start beyond which figures are disturbed

SHAPES = {
    "28m": replace(
        Config.preset("pocket"),
        hidden_size=320,
        intermediate_size=832,
        num_hidden_layers=8,
        n_routed_experts=48,
        name="random 28m",
    ),
    "200m": replace(
        Config.preset("pocket"),
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=12,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=64,
        name="random 200m",
    ),
    "v2-lite-slice": replace(Config.preset("v2-lite"), num_hidden_layers=4, name="random v2-lite-slice"),
}
RELEASED = ("v2-lite", "v2")  # shapes too large to be written for a measurement: made where they are computed


@contextmanager
def checkpoint_of(checkpoint: Path | None, shape: str | None) -> Iterator[Path]:
    """The directory to measure: `checkpoint`, random weights of a `shape` for as long as the block lasts, or pocket."""
    if checkpoint is not None and shape is not None:
        raise RequestError("give a checkpoint or a shape, not both.")
    with tempfile.TemporaryDirectory() as folder:
        if shape in RELEASED:
            raise RequestError(f"{shape} is measured by `workbench bench decode`, prefill and batch, on a GPU.")
        if shape is not None:
            checkpoint = Path(folder)
            save(Model(SHAPES[shape], Random(SHAPES[shape], seed=0)), checkpoint)
        elif checkpoint is None and not (POCKET / "config.json").is_file():
            raise CheckpointError("pocket is not here; train it, or measure --shape 28m or --checkpoint DIR.")
        yield checkpoint or POCKET


@contextmanager
def computing_with(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads, or with all cores, for as long as the block lasts."""
    if count is not None and count < 1:
        raise RequestError("rounds and threads must be at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or machine.cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_average() -> float:
    """Of the last minute: processes that ran or waited."""
    return round(psutil.getloadavg()[0], 2)


def about(config: Config, path: Path, shape: str | None) -> dict:
    """When, of which commit, on which model and machine; to be called inside `computing_with`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "model": f"random {shape}" if shape else path.resolve().name,
        "parameters": config.parameters().total,
        "active": config.parameters().active,
        "threads": torch.get_num_threads(),
        "cpu": f"{machine.cpu_name()}, {machine.cores()} cores",
        "torch": torch.__version__,
    }


def scatter(load: float) -> str:
    """A line to print above figures that other programs disturbed, or nothing."""
    if load <= BUSY:
        return ""
    return f"other programs were running (load {load:.1f}): expect scatter, and measure again when idle\n"


def keep(folder: Path, kind: str, result: dict) -> Path:
    """Writes a result under its kind, day, model and, where it was a GPU, device. RequestError outside a checkout."""
    if not folder.parent.is_dir():
        raise RequestError(f"{folder.parent} is not there: results are kept in a checkout of the project.")
    folder.mkdir(exist_ok=True)
    about = result["about"]
    model = about["model"].replace(" ", "-")
    where = about.get("device", "")
    where = where.replace(" ", "-").lower() if where.startswith("NVIDIA") else f"{about['threads']}t"
    path = folder / f"{kind}-{about['date'][:10]}-{model}-{about['dtype']}-{where}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    """Of this checkout, "+" where files have changed since; empty outside one."""
    where = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    if head.returncode:
        return ""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=where, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")
