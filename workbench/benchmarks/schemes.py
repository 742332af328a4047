"""What was tried for a cache row of 6 bits on average, and what each choice costs: the 6-bit default among those that
lost.

Latent and rotary key are rounded where they enter the cache, at the sites attn.kv_latent and attn.k_rope, and
everything after is the model's own. Bytes are those of a row of 512 + 64, the published one; quality is pocket's, whose
row is 64 + 16. `NOT_CARRIED` says what that leaves open; the errors on made rows of 512 + 64 say a little of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from workbench.benchmarks.measure import DTYPES, RESULTS, about, checkpoint_of, computing_with, keep, load_average
from workbench.benchmarks.paired import Interval, interval
from workbench.benchmarks.quality import SEED, Summary, compared, held_out, summary
from workbench.benchmarks.quantisers import Exact, Rounded, Rounding, Stored
from workbench.config import Config
from workbench.formats import CACHE_FORMATS, Row
from workbench.hook import Hook
from workbench.lens.baselines import DEEPSEEK_67B
from workbench.model import Model
from workbench.probe import both
from workbench.recorder import Recorder
from workbench.workbench import load

BUDGET = 437  # bytes of a row: at most these give 93.3 % in 60 layers
CHOSEN = "q6"
TEXTS, QUICK, LENGTH = 24, 4, 512
ROW = Row(512, 64)

NOT_CARRIED = (
    "pocket's latent is 64 wide, the published one 512: a single scale spans eight times as many elements there, and "
    "on pocket groups of 64 are the same as one scale. "
    "Where no channel stands out, 6 bits with one scale lose less of the latent than 5 bits in groups; where some do, "
    "more. The errors on made rows show both; only real weights decide.",
    "Which channels of the latent stand out, and how far the norm weights spread, was learned in a few thousand steps. "
    "What folding the weights away or rotating gains or costs here says little about the published weights; public "
    "measurements on V2-Lite find that rotation does not pay (mlx-lm PR 1555).",
    "pocket's rotary key is 16 wide and turns through 2,048 positions; the published one is 64 wide, over 163,840, "
    "with outlying elements that pocket does not have (arXiv 2602.10718). It may want more bits there than here.",
    "pocket answers short questions. In long reasoning small errors add up: 4-bit caches that look harmless on short "
    "text cost DeepSeek-R1 points on AIME and GPQA (SGLang, quantized_kv_cache.md).",
)


class Scheme(NamedTuple):
    """A way to store a row. `asks` is the choice it belongs to; `folded`: the norm weight is divided out before
    rounding."""

    asks: str
    name: str
    latent: Rounding
    rope: Rounding
    folded: bool = False

    def nbytes(self, row: Row) -> int:
        return self.latent.nbytes(row.latent) + self.rope.nbytes(row.rope)


def candidates() -> list[Scheme]:
    """The default, the plain way, and everything in between that was tried."""
    chosen, plain = CACHE_FORMATS[CHOSEN], CACHE_FORMATS["int6"]
    q6, ten, exact = Stored(chosen.latent), Stored(chosen.rope), Exact()
    made = [
        Scheme("shipped", CHOSEN, q6, ten),
        Scheme("shipped", "int6", Stored(plain.latent), Stored(plain.rope)),
    ]
    for group in (None, 64, 32, 16):
        size = "one scale" if group is None else f"groups of {group}"
        made.append(Scheme("scales", f"5 bits, {size}, fp16", Rounded(5, group), ten))
    for group in (64, 32, 16, 8):
        made.append(Scheme("scales", f"5 bits, groups of {group}, 8-bit scales", Rounded(5, group, "8 bit"), ten))
    made += [
        Scheme("scales", "5 bits, groups of 32, fp16, searched", Rounded(5, 32, search=True), ten),
        Scheme("scales", "4 bits, groups of 8, 8-bit scales", Rounded(4, 8, "8 bit"), Rounded(12)),
        Scheme("scales", "6 bits, one scale, searched", Rounded(6, search=True), Rounded(6, search=True)),
    ]
    for levels in ("mid-rise", "asymmetric", "Lloyd-Max"):
        made.append(Scheme("levels", f"6 bits, one scale, {levels}", Rounded(6, levels=levels), Rounded(6)))
    made += [
        Scheme("levels", "5 bits, one scale, Lloyd-Max", Rounded(5, levels="Lloyd-Max"), ten),
        Scheme("levels", "5 bits, groups of 32, Lloyd-Max", Rounded(5, 32, levels="Lloyd-Max"), ten),
        Scheme("levels", "5 bits, groups of 64, asymmetric", Rounded(5, 64, levels="asymmetric"), ten),
        Scheme("channels", "6 bits, one scale, norm weight folded away", Rounded(6), Rounded(6), folded=True),
        Scheme("channels", "q6, norm weight folded away", q6, ten, folded=True),
        Scheme("channels", "6 bits, one scale, rotated", Rounded(6, turned=True), Rounded(6)),
        Scheme("channels", "q6, rotated", Rounded(5, 16, "8 bit", search=True, turned=True), ten),
        Scheme("channels", "5 bits, groups of 64, 8-bit scales, rotated", Rounded(5, 64, "8 bit", turned=True), ten),
    ]
    for bits in (6, 8, 10, 12, 16):
        rope = exact if bits == 16 else Rounded(bits)
        made.append(Scheme("rotary key", f"q6 with a rotary key of {bits} bits", q6, rope))
    for bits in (6, 8, 10, 12):
        made.append(Scheme("one part alone", f"latent exact, rotary key of {bits} bits", exact, Rounded(bits)))
    made += [
        Scheme("one part alone", "latent as in q6, rotary key exact", q6, exact),
        Scheme("one part alone", "latent of 6 bits, one scale, rotary key exact", Rounded(6), exact),
    ]
    return made


class Measured(NamedTuple):
    """A scheme and what it does. Errors are relative: root mean square of what changed over that of what was there.

    over_q6  mean KL less that of the default, with an interval over texts: above 0, it lost
    made     error of the latent on made rows of 512 + 64, by kind of row
    """

    scheme: Scheme
    row: Row
    summary: Summary
    over_q6: Interval
    errors: tuple[float, float]
    made: dict[str, float]

    def to_dict(self) -> dict:
        scheme, nbytes = self.scheme, self.scheme.nbytes(ROW)
        return {
            "asks": scheme.asks,
            "name": scheme.name,
            "bytes": nbytes,
            "bits": 8 * nbytes / ROW.width,
            "within_budget": nbytes <= BUDGET,
            "reduction": {
                DEEPSEEK_67B.name: DEEPSEEK_67B.ratio(nbytes * Config.preset("v2").num_hidden_layers).reduction
            },
            "bytes_here": scheme.nbytes(self.row),
            "kl_mean": self.summary.kl_mean,
            "kl_p99": self.summary.kl_p99,
            "kl_over_q6": self.over_q6._asdict(),
            "nats": self.summary.nats._asdict(),
            "same": self.summary.same,
            "latent_error": self.errors[0],
            "rope_error": self.errors[1],
            "latent_error_on_made_rows": self.made,
        }


@dataclass(frozen=True)
class Result:
    """One run: where, on what, what the rows of each layer look like, and every scheme."""

    about: dict
    layers: tuple[dict, ...]
    rows: tuple[Measured, ...]

    def to_dict(self) -> dict:
        return {
            "about": self.about,
            "not_carried": list(NOT_CARRIED),
            "layers": list(self.layers),
            "schemes": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        about = self.about
        kinds = list(self.rows[0].made)
        lines = [
            f"{about['model']}: {about['texts']} texts of {about['length']} tokens, {about['dtype']}; {about['cpu']}",
            f"bytes of a row of 512 + 64, of which {BUDGET} are allowed; quality on a row of {about['row']}",
            "",
            f"{'':52}{'bytes':>6}{'KL mean':>10}{'KL 99 %':>10}{'over q6, 95 %':>22}{'top 1':>8}"
            + "".join(f"{kind:>12}" for kind in kinds),
        ]
        asks = None
        for row in self.rows:
            if row.scheme.asks != asks:
                asks = row.scheme.asks
                lines.append(asks)
            nbytes = row.scheme.nbytes(ROW)
            over = f"{row.over_q6.low:+.1e} to {row.over_q6.high:+.1e}"
            lines.append(
                f"  {row.scheme.name:50}{nbytes:5}{' ' if nbytes <= BUDGET else '!'}{row.summary.kl_mean:10.2e}"
                f"{row.summary.kl_p99:10.2e}{over:>22}{row.summary.same:8.2%}"
                + "".join(f"{row.made[kind]:12.4f}" if row.made else f"{'':12}" for kind in kinds)
            )
        lines += ["", "Not carried over to the published models:", *(f"- {text}" for text in NOT_CARRIED)]
        return "\n".join(lines)

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, "schemes", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    quick: bool = False,
) -> Result:
    """Every candidate on `checkpoint` or pocket, over some texts; `quick` over few."""
    tried, count = candidates(), QUICK if quick else TEXTS
    average = load_average()
    with computing_with(threads), checkpoint_of(checkpoint, None) as path, torch.inference_mode():
        bench = load(str(path), device="cpu", dtype=str(DTYPES[dtype]).removeprefix("torch."))
        model, config = bench.model, bench.config
        model.fuse = False  # with hooks or without, what changes nothing shall change no bit
        texts = held_out(bench.tokenizer, count, min(LENGTH, bench.context))
        hooked = {scheme.name: _through(model, scheme) for scheme in tried}
        nats, changes = compared(texts, lambda tokens: model(tokens).log_softmax(-1), hooked)
        seen = _rows_of(model, texts.tokens[:2])
        row, made = Row(config.kv_lora_rank, config.qk_rope_head_dim), made_rows()
        chosen = changes[CHOSEN].kl.mean(1)
        rows = [
            Measured(
                scheme,
                row,
                summary(texts, changes[scheme.name]),
                interval((changes[scheme.name].kl.mean(1) - chosen).tolist()),
                _errors(scheme, model, seen),
                {} if scheme.folded else {kind: _error(scheme.latent, x) for kind, x in made.items()},
            )
            for scheme in tried
        ]
        run = {"dtype": dtype, "load": average, "texts": count, "length": texts.tokens.shape[1], "seed": SEED}
        run |= {"row": f"{row.latent} + {row.rope}", "nats": nats}
        return Result(about(config, path, None) | run, tuple(_looks(model, seen)), tuple(rows))


def made_rows(count: int = 2048, seed: int = 0) -> dict[str, torch.Tensor]:
    """Latents [count, 512] that no model made: what a scheme does where rows look like this.

    normal      every element alike
    channels    one channel in 64 is ten times as large as the others, as a norm weight may have it
    tails       Student's t with 4 degrees of freedom: a few large elements anywhere
    """
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, ROW.latent, generator=draw)
    scale = torch.ones(ROW.latent)
    scale[torch.randperm(ROW.latent, generator=draw)[: ROW.latent // 64]] = 10.0
    square = torch.randn(count, ROW.latent, 4, generator=draw).square().mean(-1)
    return {"normal": normal, "channels": normal * scale, "tails": normal / square.sqrt()}


def _fold(scheme: Scheme, model: Model, x: torch.Tensor, layer: int) -> torch.Tensor:
    """The latent of a layer as the scheme gives it back."""
    if not scheme.folded:
        return scheme.latent(x).to(x.dtype)
    weight = model.blocks[layer].attention.kv_norm.float()
    weight = torch.where(weight == 0, 1.0, weight)
    return (scheme.latent(x.float() / weight) * weight).to(x.dtype)


def _through(model: Model, scheme: Scheme) -> Callable[[torch.Tensor], torch.Tensor]:
    probe = both(
        Hook("attn.kv_latent", lambda x, layer: _fold(scheme, model, x, layer)),
        Hook("attn.k_rope", lambda x, layer: scheme.rope(x).to(x.dtype)),
    )
    return lambda tokens: model(tokens, probe=probe).log_softmax(-1)


def _rows_of(model: Model, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and rotary keys of every layer, as the model computes them."""
    look = Recorder("attn.kv_latent", "attn.k_rope")
    model(tokens, probe=look)
    layers = range(model.config.num_hidden_layers)
    return [(look["attn.kv_latent", layer].float(), look["attn.k_rope", layer].float()) for layer in layers]


def _errors(scheme: Scheme, model: Model, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Of latent and rotary key, mean over layers."""
    latent = [_relative(_fold(scheme, model, x, layer), x) for layer, (x, _) in enumerate(seen)]
    rope = [_error(scheme.rope, x) for _, x in seen]
    return sum(latent) / len(seen), sum(rope) / len(seen)


def _error(rounding: Rounding, x: torch.Tensor) -> float:
    return _relative(rounding(x), x)


def _relative(back: torch.Tensor, x: torch.Tensor) -> float:
    return float((back - x).square().mean().sqrt() / x.square().mean().sqrt())


def _looks(model: Model, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterable[dict]:
    """What there is to round in each layer. kurtosis: 3 for a normal distribution, more where few elements stand out.
    weight_spread: standard deviation of the norm weight over its mean."""
    for layer, (latent, rope) in enumerate(seen):
        weight = model.blocks[layer].attention.kv_norm.float()
        looks = {"layer": layer, "weight_spread": float(weight.std() / weight.mean().abs())}
        for name, x in (("latent", latent), ("rope", rope)):
            square = x.square().mean()
            looks |= {
                f"{name}_rms": float(square.sqrt()),
                f"{name}_max": float(x.abs().max()),
                f"{name}_kurtosis": float(x.pow(4).mean() / square.square()),
            }
        yield looks
