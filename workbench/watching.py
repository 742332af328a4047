"""Watching: what is seen of a generation and how it is edited, for one sequence or a batch of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from workbench.checkpoint import fingerprint
from workbench.config import Config
from workbench.editcheck import check
from workbench.editing import Editing
from workbench.edits import Edit, describe, to_dict
from workbench.errors import RequestError
from workbench.model import Model
from workbench.probe import OFF, Probe, both
from workbench.recorder import Recorder
from workbench.reply import Reply, Step
from workbench.ring import Routing, RoutingLog, RoutingRing
from workbench.trace import Trace, new_header


class Watch:
    """What all sequences of a generation share.

    edits   carried out on each of them
    sites   recorded in full, see Recorder; slower, and the prompt is read anew although it may be cached
    cache   the format of the cache, for the record
    scores  keeps every router probability in the trace, not only those of the chosen
    """

    def __init__(
        self,
        model: Model,
        name: str,
        edits: Sequence[Edit] = (),
        sites: Sequence[str] = (),
        scores: bool = False,
        cache: str = "",
    ):
        self.model, self.name, self.config, self.cache = model, name, model.config, cache
        check(edits, self.config)
        self.edits, self.scores = tuple(edits), bool(scores)
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self.editing = Editing(self.edits, self.config, [], model.device) if self.edits else None
        slots = max(self.editing.width.values(), default=None) if self.editing else None
        self.ring = RoutingRing(self.config, model.device, slots)
        if self.scores and not self.ring.layers:
            raise RequestError("scores=True records router probabilities, and this model has no routed experts.")
        self._recorders: list[Recorder] = []

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, once for all sequences."""
        return fingerprint(self.model)

    @property
    def recording(self) -> bool:
        """Whether more is recorded than routing, so that every token must pass."""
        return bool(self.sites or self.scores)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Further arguments of a pass over a prompt: the logits of every token, if these are watched."""
        return ("all",) if {"final.norm", "logits"} & set(self.sites) else ()

    def of(self, reply: Reply, piece: Callable[[int], str]) -> "Watched":
        """The part of one reply; `piece` is the text of a token."""
        recorder = Recorder(*self.sites) if self.sites else None
        scores = Recorder("moe.router_probs") if self.scores else None
        self._recorders += [recorder] if recorder else []  # scores fire in every pass: nothing to check, or to hold
        return Watched(self, reply, piece, self.ring.log(), recorder, scores)

    def probe(self, watched: Sequence["Watched"]) -> Probe:
        """The probe of a pass over these sequences, in the order of the batch."""
        ring = self.ring.to(*[one.log for one in watched]) if self.ring.layers else OFF
        if not (self.edits or self.sites or self.scores):
            return ring
        editing = self.editing.on([one.reply.stats.prompt_tokens for one in watched]) if self.editing else OFF
        if not self.recording:
            return both(editing, ring)
        return both(editing, ring, _Rows([both(*one.recorders) for one in watched]))

    def check(self) -> None:
        """RequestError for an edit or a site that no token has met."""
        silent = self.editing.silent() if self.editing else []
        if silent:
            edits = "; ".join(map(describe, silent))
            raise RequestError(f"no token met {edits}: the text ended before these positions, or the phase never came.")
        for recorder in self._recorders:
            recorder.check()


class Watched:
    """What was seen of one sequence: its routing, and `recorder` with the sites that were asked for."""

    def __init__(
        self,
        watch: Watch,
        reply: Reply,
        piece: Callable[[int], str],
        log: RoutingLog,
        recorder: Recorder | None,
        scores: Recorder | None,
    ):
        self.watch, self.reply, self._piece, self.log = watch, reply, piece, log
        self.recorder, self._scores = recorder, scores

    @property
    def recorders(self) -> list[Recorder]:
        return [each for each in (self.recorder, self._scores) if each]

    def trace(self, steps: Sequence[Step]) -> Trace:
        """All tokens so far, prompt included, with the experts of those that were read."""
        watch, reply = self.watch, self.reply
        stats = reply.stats
        known = {"cache": watch.cache} if watch.cache else {}
        known |= {"prompt_tokens": stats.prompt_tokens, "seed": stats.seed, "finish": stats.finish}
        header = new_header(
            watch.name,
            watch.fingerprint,
            watch.config.to_dict(),
            sampling=asdict(reply.sampling) | {"seed": stats.seed},  # the one that was drawn, if none was given
            edits=[to_dict(edit) for edit in watch.edits],
            sequences=[known],
        )
        tokens = self.tokens(steps)
        routing = Routing(*(part[: len(tokens)] for part in self.routing()))
        return Trace(header, tokens, watch.ring.layers, *routing, scores=self._all_scores(len(tokens)))

    def routing(self, start: int = 0) -> Routing:
        """Of all tokens from position `start` on; the one that was generated last, which no pass has read, has none."""
        rows = self.log.rows(start)
        missing = max(0, len(self.reply.tokens) - start - len(rows.experts))
        filling = ((0, missing), (0, 0), (0, 0))
        return Routing(
            np.pad(rows.experts, filling, constant_values=-1),
            np.pad(rows.gates, filling),
            np.pad(rows.margins, filling, constant_values=np.nan),
        )

    def tokens(self, steps: Sequence[Step], start: int = 0) -> pd.DataFrame:
        """The rows of a trace for the tokens from position `start` on. `steps` may be growing in another thread."""
        steps = list(steps)
        prompt = self.reply.stats.prompt_tokens
        places = range(start, prompt + len(steps))
        own = [steps[place - prompt] if place >= prompt else None for place in places]
        ids = self.reply.tokens[start : places.stop]
        nan = float("nan")
        measured = {
            "logprob": [step.choice.logprob if step else nan for step in own],
            "probability": [step.choice.probability if step else nan for step in own],
            "entropy": [step.choice.entropy if step else nan for step in own],
            "ms": [1000 * step.seconds if step else nan for step in own],
        }
        return pd.DataFrame(
            {
                "sequence": np.zeros(len(places), np.int32),
                "position": np.arange(places.start, places.stop, dtype=np.int32),
                "id": np.array(ids, np.int32),
                "text": [self._piece(token) for token in ids],
                "phase": ["decode" if step else "prefill" for step in own],
                **{name: np.array(values, np.float32) for name, values in measured.items()},
                "cache_bytes": np.array([step.cache_bytes if step else -1 for step in own], np.int64),
            }
        )

    def _all_scores(self, count: int) -> np.ndarray | None:
        if self._scores is None:
            return None
        layers = self._scores.layers_of("moe.router_probs")
        if not layers:
            return None
        each = [self._scores["moe.router_probs", layer][0] for layer in layers]
        read = min(count, *map(len, each))  # a pass may be ending in another thread
        rows = torch.stack([one[:read] for one in each], 1).cpu().numpy()
        return np.pad(rows, ((0, count - len(rows)), (0, 0), (0, 0)), constant_values=np.nan)


class _Rows(Probe):
    """One reading probe for each row of the batch."""

    def __init__(self, probes: Sequence[Probe]):
        self.probes = probes

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        rows = [probe.begin(config, positions[n : n + 1], dtype) for n, probe in enumerate(self.probes)]
        return rows[0] if len(rows) == 1 else _Rows(rows)

    def at(self, layer: int) -> Probe:
        return _Rows([probe.at(layer) for probe in self.probes])

    def opens(self, op: str) -> bool:
        return any(probe.opens(op) for probe in self.probes)

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        for number, probe in enumerate(self.probes):
            probe(site, x[number : number + 1])
        return x

    def end(self) -> None:
        for probe in self.probes:
            probe.end()
