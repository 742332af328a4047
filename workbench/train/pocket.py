"""Trains pocket, the embedded model, from nothing: tokenizer, weights, examination, card."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.evals.exam import texts
from workbench.model import Model
from workbench.tokenizer import Tokenizer
from workbench.train.curriculum import conversations, corpus
from workbench.train.loop import Progress, Recipe, rows, train
from workbench.train.vocabulary import train_tokenizer, write

CORPUS = 60_000  # conversations the vocabulary is learned from


def train_pocket(
    out: Path, recipe: Recipe, seed: int = 0, report: Callable[[Progress], None] | None = None, save_every: int = 500
) -> Model:
    """Writes a checkpoint in the Hugging Face layout to `out`, beside `training.json` with how it was made.

    The same seed, recipe and thread count give the same text to train on; weights agree up to floating-point order.
    Questions of the exam are never trained on: the curriculum leaves them out.
    """
    config = Config.preset("pocket")
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = out / "vocabulary"
    write(train_tokenizer(corpus(seed, CORPUS), config.vocab_size), vocabulary)
    tokenizer = Tokenizer(vocabulary)
    torch.manual_seed(seed)
    model = Model(config, Random(config, seed=seed))
    lessons = rows(conversations(seed, exclude=texts()), tokenizer, recipe.others)
    for progress in train(model, lessons, recipe):
        if report is not None:
            report(progress)
        if progress.step % save_every == save_every - 1 or progress.step == recipe.steps - 1:
            keep(model, out / "checkpoint", vocabulary, progress, recipe, seed)
    return model


def keep(model: Model, path: Path, vocabulary: Path, progress: Progress, recipe: Recipe, seed: int) -> None:
    """Saves the weights in bf16, as they ship, and the record of the run."""
    save(model, path, files_from=vocabulary, dtype=torch.bfloat16)
    record = {"seed": seed, "threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"progress": progress._asdict(), "recipe": vars(recipe) | {"balance": recipe.balance._asdict()}}
    (path / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
