"""One token of a conversation, opened by a fresh pass over the text up to it, on the model as it was edited then."""

from dataclasses import replace

import numpy as np
import torch

from workbench.editing import Editing
from workbench.edits import Edit
from workbench.lens.contribution import contributions
from workbench.lens.readout import expert_lens
from workbench.probe import OFF, both, layers_with
from workbench.recorder import Recorder
from workbench.sampling import Alternative as Candidate
from workbench.trace import Trace
from workbench.widgets.inspection import Alternative, Inspection, RoutedLayer, Word, inspect_trace
from workbench.workbench import Workbench

WATCHED = (
    "moe.router_probs", "moe.groups", "moe.experts", "moe.gates", "moe.scores", "moe.expert_out", "moe.routed_out",
    "moe.shared_out", "resid.mid",
)  # fmt: skip
WORDS = 3  # tokens an expert pushes towards


def inspect_model(
    bench: Workbench,
    trace: Trace,
    token: int,
    edits: tuple[Edit, ...] = (),
    candidates: tuple[Candidate, ...] | None = None,
) -> Inspection:
    """What a trace knows of its token, and what a pass over its sequence up to there shows: every router score, groups,
    what shared and routed experts add, and what each expert pushes towards.

    `edits` are those the trace was recorded with, `candidates` what could have stood in the token's place.
    """
    seen = inspect_trace(trace, token)
    if candidates is not None:
        piece = bench.tokenizer.piece
        shown = tuple(Alternative(each.token, piece(each.token), each.before, each.after) for each in candidates)
        seen = replace(seen, alternatives=shown)
    config, sites = bench.config, [site for site in WATCHED if layers_with(site, bench.config)]
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    if not layers:
        return seen
    number = int(trace.tokens["sequence"].iloc[token])
    rows = trace.tokens[trace.tokens["sequence"] == number]
    ids = rows["id"].to_numpy()[: seen.position + 1]
    prompt = trace.header["sequences"][number].get("prompt_tokens", len(ids))
    recorder = Recorder(*sites, layers=layers, positions=[seen.position])
    editing = Editing(edits, config, prompt, bench.model.device) if edits else OFF
    with torch.inference_mode():
        bench.model(torch.tensor(ids[None], dtype=torch.int64), probe=both(editing, recorder), logits="last")
        return replace(seen, layers=tuple(_layer(recorder, layer, bench) for layer in layers))


def _layer(recorder: Recorder, layer: int, bench: Workbench) -> RoutedLayer:
    def at(site: str) -> torch.Tensor:
        return recorder[site, layer][0]

    ids, gates, scores = at("moe.experts")[0], at("moe.gates")[0], at("moe.scores")[0]
    used = ids >= 0
    groups = at("moe.groups")[0]
    parts = {}
    if ("moe.shared_out", layer) in recorder:
        row = contributions(at("moe.routed_out"), at("moe.shared_out")).iloc[0]
        parts = {"routed_norm": row["routed"], "shared_norm": row["shared"], "cosine": row["cosine"]}
    lens = expert_lens(
        at("moe.expert_out"), at("moe.gates"), at("moe.experts"), at("resid.mid"), bench.model.unembed, bench.tokenizer,
        count=WORDS,
    )  # fmt: skip
    words = {
        row.expert: tuple(Word(text, value) for text, value in zip(row.towards, row.up, strict=True))
        for row in lens.itertuples()
    }
    return RoutedLayer(
        layer,
        tuple(ids[used].tolist()),
        tuple(gates[used].tolist()),
        tuple((scores[:-1] - scores[-1])[used].tolist()),
        at("moe.router_probs")[0].cpu().numpy().astype(np.float32),
        tuple(torch.nonzero(groups)[:, 0].tolist()) if len(groups) > 1 else None,
        **{name: float(value) for name, value in parts.items()},
        lens=words,
    )
