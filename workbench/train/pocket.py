"""Trains pocket, the embedded model, from nothing: tokenizer, weights, examination, card."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.evals.exam import texts
from workbench.model import Model
from workbench.opening import open_model
from workbench.tokenizer import Tokenizer
from workbench.train.curriculum import conversations, corpus
from workbench.train.loop import Progress, Recipe, rows, train
from workbench.train.vocabulary import train_tokenizer, write

CORPUS = 60_000  # conversations the vocabulary is learned from
RECORD = "training.json"


def train_pocket(
    out: Path,
    recipe: Recipe,
    seed: int = 0,
    start: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    save_every: int = 500,
) -> Model:
    """Writes a checkpoint in the Hugging Face layout to `out`, beside `training.json` with how it was made.

    `start` goes on from an earlier checkpoint, with its vocabulary and a fresh optimizer. The same seed and recipe give
    the same text to train on; weights agree up to floating-point order. Questions of the exam are never trained on.
    """
    config = Config.preset("pocket")
    if start is None:
        history, vocabulary = [], out.with_name(f"{out.name}-vocabulary")
        write(train_tokenizer(corpus(seed, CORPUS), config.vocab_size), vocabulary)
        model = Model(config, Random(config, seed=seed))
    else:
        history, vocabulary = json.loads((start / RECORD).read_text(encoding="utf-8")), start
        model = open_model(start, dtype=torch.float32)
    lessons = rows(conversations(seed, exclude=texts()), Tokenizer(vocabulary), recipe.others)
    for progress in train(model, lessons, recipe):
        if report is not None:
            report(progress)
        if (progress.step + 1) % save_every == 0 or progress.step + 1 == recipe.steps:
            keep(model, out, vocabulary, [*history, stage(progress, recipe, seed)])
    return model


def stage(progress: Progress, recipe: Recipe, seed: int) -> dict:
    """What has to be known to run one stage of training again, and what it cost."""
    settings = vars(recipe) | {"balance": recipe.balance._asdict()}
    made = {"seed": seed, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return made | {"recipe": settings, "reached": progress._asdict()}


def keep(model: Model, path: Path, vocabulary: Path, history: list[dict]) -> None:
    """Saves the weights in bf16, as they ship, and the stages of training that led to them."""
    save(model, path, files_from=vocabulary, dtype=torch.bfloat16)
    (path / RECORD).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
