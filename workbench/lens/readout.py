"""The vocabulary as a lens: what the stream would say if the model stopped here, and what each expert pushes towards.

T tokens, D hidden, K chosen experts, V vocabulary. `unembed` is model.unembed, final norm and head: [N, D] -> [N, V].
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.lens.tokens import pieces
from workbench.tokenizer import Tokenizer

Unembed = Callable[[Tensor], Tensor]


def logit_lens(
    resid: Mapping[int, Tensor], unembed: Unembed, tokenizer: Tokenizer, count: int = 5, final: Tensor | None = None
) -> pd.DataFrame:
    """One row a layer and token: the stream after each layer, read out as if it were the last (nostalgebraist 2020).

    resid: layer -> resid.post [T, D] of one sequence. final: the model's own logits [T, V]; by default the read-out of
    the highest layer, which are the same if that is the model's last.

    layer, token              token: the position in resid
    top, probability          the likeliest next token and its probability
    tokens, probabilities     the `count` likeliest, in lists
    final                     what the model chooses in the end (its likeliest token)
    final_rank, final_probability  that token's here; rank 1 is the likeliest
    kl                        KL(final || here) in nats: what is lost by reading here
    The final norm and the head were trained for the last layer only: that an early layer reads as nonsense does not
    show that nothing is there (Belrose et al. 2023, arXiv 2303.08112). RequestError for no layers and unequal shapes.
    """
    if not resid or any(x.dim() != 2 or x.shape != next(iter(resid.values())).shape for x in resid.values()):
        shapes = ", ".join(str(tuple(x.shape)) for x in resid.values()) or "nothing"
        raise RequestError(f"resid must have [T, D] of one sequence for each layer, all alike; got {shapes}.")
    if count < 1:
        raise RequestError(f"count must be 1 or more; got {count}.")
    layers = sorted(resid)
    with torch.no_grad():
        last = (unembed(resid[layers[-1]]) if final is None else final).float().log_softmax(-1)
        chosen = last.argmax(-1, keepdim=True)
        names = pieces(tokenizer, chosen[:, 0].tolist())
        frames = []
        for layer in layers:
            here = unembed(resid[layer]).float().log_softmax(-1)
            if here.shape != last.shape:
                raise RequestError(f"final must be {tuple(here.shape)}, as resid is read out; got {tuple(last.shape)}.")
            best = here.topk(min(count, here.shape[1]))
            logprob = here.gather(1, chosen)
            texts = [pieces(tokenizer, row) for row in best.indices.tolist()]
            probabilities = best.values.exp().tolist()
            columns = {
                "layer": layer,
                "token": range(len(here)),
                "top": [row[0] for row in texts],
                "probability": [row[0] for row in probabilities],
                "tokens": texts,
                "probabilities": probabilities,
                "final": names,
                "final_rank": (1 + (here > logprob).sum(1)).tolist(),
                "final_probability": logprob[:, 0].exp().tolist(),
                "kl": (last.exp() * (last - here)).sum(1).clamp(min=0.0).tolist(),
            }
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def expert_lens(
    expert_out: Tensor,
    gates: Tensor,
    ids: Tensor,
    resid_mid: Tensor,
    unembed: Unembed,
    tokenizer: Tokenizer,
    count: int = 5,
    targets: Sequence[int] | None = None,
) -> pd.DataFrame:
    """One row a token and used slot: what each expert alone adds to the logits (direct logit attribution).

    expert_out [T, K, D], gates and ids [T, K] (-1: not used), resid_mid [T, D], the stream the experts are added to;
    targets [T]: a token of the vocabulary for each position.

    The final norm divides by the root mean square of what it is given. It is made linear by keeping that of resid_mid:
    the head, times the norm's weight, times gate x output, over rms(resid_mid), less its mean over the vocabulary
    (which no softmax sees). So the parts of a token add up to that of their sum, as the differences
    logits(resid_mid + part) - logits(resid_mid) would not. What an expert does by way of the norm is left out, and what
    later layers make of it too (the direct path of Elhage et al. 2021, transformer-circuits.pub).

    token, slot, expert, gate
    towards, up      the `count` tokens whose logits it raises most, and by how much, in lists
    away, down       those it lowers most
    target, target_logit  that token and what its logit gains. Only with targets
    """
    shape = tuple(expert_out.shape)
    fits = expert_out.dim() == 3 and tuple(gates.shape) == tuple(ids.shape) == shape[:2]
    if not fits or tuple(resid_mid.shape) != (shape[0], shape[2]):
        raise RequestError(
            f"expert_out must be [T, K, D], gates and ids [T, K], resid_mid [T, D] of one sequence; got {shape}, "
            f"{tuple(gates.shape)}, {tuple(ids.shape)}, {tuple(resid_mid.shape)}."
        )
    if targets is not None and len(targets) != shape[0]:
        raise RequestError(f"targets must be one a token, {shape[0]}; got {len(targets)}.")
    if count < 1:
        raise RequestError(f"count must be 1 or more; got {count}.")
    rows = []
    with torch.no_grad():
        for token in range(shape[0]):  # one at a time: K x V logits are held, not T x K x V
            slots = (ids[token] >= 0).nonzero()[:, 0].tolist()
            parts = expert_out[token, slots].float() * gates[token, slots, None].float()
            added = _linear(parts, resid_mid[token], unembed)
            up, down = (added.topk(min(count, added.shape[1]), largest=largest) for largest in (True, False))
            for n, slot in enumerate(slots):
                row = {
                    "token": token,
                    "slot": slot,
                    "expert": int(ids[token, slot]),
                    "gate": float(gates[token, slot]),
                    "towards": pieces(tokenizer, up.indices[n].tolist()),
                    "up": up.values[n].tolist(),
                    "away": pieces(tokenizer, down.indices[n].tolist()),
                    "down": down.values[n].tolist(),
                }
                if targets is not None:
                    row["target"] = pieces(tokenizer, [int(targets[token])])[0]
                    row["target_logit"] = float(added[n, int(targets[token])])
                rows.append(row)
    return pd.DataFrame(rows)


def _linear(parts: Tensor, base: Tensor, unembed: Unembed) -> Tensor:
    """Logits [..., V] of parts [..., D] with the final norm's divisor kept at that of base [D].

    unembed divides each part by its own root mean square; that is multiplied back. Parts are brought to 1 before, so
    that the norm's epsilon is as small beside them as beside a stream.
    """
    own = parts.square().mean(-1, keepdim=True).sqrt()
    logits = unembed((parts / own.clamp(min=1e-30)).to(base.dtype)).float()
    logits = logits * own / base.float().square().mean().sqrt().clamp(min=1e-30)
    return logits - logits.mean(-1, keepdim=True)
