"""The claims ledger: what is said of DeepSeek-V2, and of each claim whether it holds, with the evidence.

PAPER is the technical report (arXiv 2405.04434). What can be computed from a configuration, or measured without the
published weights, is computed and measured each time the ledger is asked for; nothing else is claimed.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from workbench.benchmarks.cache import held
from workbench.config import Config
from workbench.errors import RequestError
from workbench.lens.baselines import BF16, DEEPSEEK_67B
from workbench.plan import Plan

V2, LITE = Config.preset("v2"), Config.preset("v2-lite")
TOKENS = 1024  # for which caches are allocated
KI = 1024
PROCESS = 1 << 29  # bytes of Python with PyTorch, on the machine that is planned for


class Verdict(StrEnum):
    MEASURED = "measured here"
    COMPUTED = "computed"
    NEEDS_WEIGHTS = "needs real weights"
    REFUTED = "refuted by the primary source"


class Finding(NamedTuple):
    """What came out for a claim. `figures` are by name, units in the names; `text` says them in a sentence."""

    holds: bool
    text: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Claim:
    """`said`, and `where`; `evidence` cites the primary source; `find` computes or measures what can be.

    RequestError without a verdict, without evidence, or where it says measured or computed and nothing does so.
    """

    key: str
    said: str
    where: str
    verdict: Verdict
    evidence: str
    find: Callable[[], Finding] | None = None

    def __post_init__(self):
        if not isinstance(self.verdict, Verdict):
            raise RequestError(f"claim {self.key!r} needs a verdict: {', '.join(Verdict)}.")
        if not self.evidence.strip() or not self.where.strip():
            raise RequestError(f"claim {self.key!r} needs evidence, and where it is made.")
        if self.verdict in (Verdict.MEASURED, Verdict.COMPUTED) and self.find is None:
            raise RequestError(f"claim {self.key!r} is said to be {self.verdict}, and nothing computes it.")


class Entry(NamedTuple):
    """A claim with what was found just now; None where there is nothing to compute."""

    claim: Claim
    finding: Finding | None

    def to_dict(self) -> dict:
        claim = self.claim
        data = {"key": claim.key, "said": claim.said, "where": claim.where, "verdict": str(claim.verdict)}
        return data | {"evidence": claim.evidence, "finding": self.finding and self.finding._asdict()}


def rounds_to(value: float, published: str) -> bool:
    """Whether a value gives the published number when it is rounded as that one is: 93.28 gives "93.3"."""
    return f"{value:.{len(published.partition('.')[2])}f}" == published


def _count(published: str, config: Config, which: str) -> Finding:
    total, active = config.parameters()
    found = {"total": total, "active": active}[which]
    text = f"{found:,} weights ({which}) counted from the shapes of {config.name}."
    return Finding(rounds_to(found / 1e9, published), text, {"total": total, "active": active})


def _reduction(format: str) -> tuple[float, float]:
    """Bytes of a token of V2 in an allocated cache, and the percentage less than DeepSeek-67B."""
    per_token = held(V2, format, TOKENS).per_token
    return per_token, 100 * DEEPSEEK_67B.ratio(per_token).reduction


def _cache_at_6_bits() -> Finding:
    nbytes, less = _reduction("q6")
    row = nbytes / V2.num_hidden_layers
    text = (
        f"A LatentCache of the 236B shape with {TOKENS:,} tokens in the format q6 holds {nbytes:,.0f} B a token "
        f"({row:,.0f} B a layer, {8 * row / V2.latent_width:.2f} bits an element, scales included): {less:.2f} % less "
        f"than the {DEEPSEEK_67B.nbytes:,} B of {DEEPSEEK_67B.name}."
    )
    return Finding(rounds_to(less, "93.3"), text, {"bytes a token": nbytes, "percent less": less})


def _cache_without_quantisation() -> Finding:
    (bf16, less), (int8, less8) = _reduction("bf16"), _reduction("int8")
    text = (
        f"Allocated in bf16 it is {bf16:,.0f} B a token, {less:.1f} % less than {DEEPSEEK_67B.name}; in 8 bits "
        f"{int8:,.0f} B, {less8:.1f} % less. Latent attention alone does not give 93.3 %."
    )
    return Finding(rounds_to(less, "93.3"), text, {"bf16, percent less": less, "int8, percent less": less8})


def _groups() -> Finding:
    groups = V2.latent_width / (2 * V2.v_head_dim)
    text = (
        f"{V2.latent_width} elements in a layer are those of {groups:g} groups of a key and a value of {V2.v_head_dim}."
    )
    return Finding(rounds_to(groups, "2.25"), text, {"groups": groups})


def _context() -> Finding:
    context, row = V2.max_position_embeddings, V2.latent_width * V2.num_hidden_layers * BF16
    yarn = V2.rope_scaling
    sizes = {name: nbytes * 128 * KI / 2**30 for name, nbytes in (("bf16", row), ("q6", _reduction("q6")[0]))}
    text = (
        f"The configuration has {context:,} positions (YaRN, {yarn.factor:g} x "
        f"{yarn.original_max_position_embeddings:,}), room for 128K = {128 * KI:,}. "
        f"A cache of that length takes {sizes['bf16']:.2f} GiB in bf16 and "
        f"{sizes['q6']:.2f} GiB in q6."
    )
    figures = {"positions": context} | {f"GiB at 128K, {name}": size for name, size in sizes.items()}
    return Finding(context >= 128 * KI, text, figures)


def _weights(bits: float, count: int) -> float:
    """Gigabytes."""
    return count * bits / 8 / 1e9


def _outside_experts(config: Config) -> int:
    """Weights that are in no routed expert."""
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return config.parameters().total - layers * config.n_routed_experts * expert


def _fits_16() -> Finding:
    total = V2.parameters().total
    sizes = {bits: _weights(bits, total) for bits in (16, 8, 4, 2)}
    text = (
        "The weights take "
        + ", ".join(f"{size:,.1f} GB at {bits} bits" for bits, size in sizes.items())
        + f". Without the routed experts, kept elsewhere, {_weights(8, _outside_experts(V2)):.1f} GB are left at 8 "
        "bits: the next claim."
    )
    figures = {f"GB at {bits} bits": size for bits, size in sizes.items()}
    return Finding(min(sizes.values()) <= 16, text, figures)


def _offloaded_16() -> Finding:
    """By the plan of this project; see notebook 14 and kernels/results for what was run."""
    plan = Plan.make(V2, "int4", device="cuda", vram="16GiB", ram="96GiB", cache="q6", process=PROCESS)
    near, expert = sum(plan.near.values()) / 2**30, plan.moved.experts / 1e9
    text = (
        f"By plan {near:.2f} GiB with a context of {plan.context:,} tokens in q6 and weights at 4.13 bits: "
        f"{plan.slots:,} of {plan.experts:,} experts on the GPU, the others in 96 GiB of main memory and on disk. A "
        f"token reads {expert:.2f} GB of experts, so at 55 GB/s (PCIe 5) and half of them on the GPU it is "
        f"at most {55 / (expert / 2):.0f} tokens a second. The code ran this shape with random weights, a CPU standing "
        "in for the GPU; a GPU and the published weights were not at hand."
    )
    figures = {"GiB on the GPU": near, "experts on the GPU": plan.slots, "GB of experts a token": expert}
    return Finding(near <= 16, text, figures)


def _sixty_a_second() -> Finding:
    total, read = V2.parameters().total, _weights(16, LITE.parameters().active - LITE.vocab_size * LITE.hidden_size)
    four = _weights(4, total)
    text = (
        f"At 4 bits the weights of the 236B take {four:,.1f} GB, more than the 80 GB of that card. V2-Lite fits, and "
        f"reads {read:.1f} GB of weights a token in bf16: 60 tokens are {60 * read:,.0f} GB a second, which "
        "has to be measured."
    )
    return Finding(four <= 80, text, {"GB at 4 bits": four, "V2-Lite, GB read a token": read})


def _training_cost() -> Finding:
    saved = 100 * (1 - 172.8 / 300.6)
    text = (
        f"172.8K against 300.6K GPU hours for a trillion tokens are {saved:.1f} % less. The hours are the paper's own."
    )
    return Finding(rounds_to(saved, "42.5"), text, {"percent less": saved})


ABSTRACT = "PAPER, abstract"
ARTICLES = "articles about the model"

CLAIMS = (
    Claim(
        "total", "236B parameters", ABSTRACT, Verdict.COMPUTED,
        "PAPER, section 3.1.2, gives the shapes; they are counted.", lambda: _count("236", V2, "total"),
    ),
    Claim(
        "active", "21B activated for each token", ABSTRACT, Verdict.COMPUTED,
        "PAPER, section 3.1.2; counted with embedding and head.", lambda: _count("21", V2, "active"),
    ),
    Claim(
        "lite", "V2-Lite has 15.7B parameters", "PAPER, appendix B", Verdict.COMPUTED,
        "The published config.json gives the shapes; they are counted.", lambda: _count("15.7", LITE, "total"),
    ),
    Claim(
        "cache", "reduces the KV cache by 93.3 %", ABSTRACT, Verdict.MEASURED,
        "PAPER, section 3.2.3: cached elements are quantised to 6 bits on average, and figure 1(b) compares with "
        "DeepSeek-67B (its bars measure 25.89 and 389.1 KB a token). DeepSeek did not publish its 6-bit scheme; q6 "
        "is this project's own, and its price in quality is in `workbench bench cache`.",
        _cache_at_6_bits,
    ),
    Claim(
        "cache-mla", "latent attention by itself reduces the KV cache by 93.3 %", ARTICLES, Verdict.REFUTED,
        "PAPER, section 3.2.3: the figure is that of the deployed service, with the cache quantised to 6 bits on "
        "average.",
        _cache_without_quantisation,
    ),
    Claim(
        "groups", "caches as much as GQA with 2.25 groups", "PAPER, table 1", Verdict.COMPUTED,
        "PAPER, section 2.1.4: (d_c + d_h^R) l elements, with d_c = 4 d_h and d_h^R = d_h / 2.", _groups,
    ),
    Claim(
        "throughput", "boosts the maximum generation throughput to 5.76 times", ABSTRACT, Verdict.NEEDS_WEIGHTS,
        "PAPER, section 3.2.3: on one node with 8 H800, over 50K tokens a second, with FP8 weights and the 6-bit "
        "cache, on the lengths of DeepSeek's own service; the bars of figure 1(b) measure 55.4K and 9.6K. It is a "
        "throughput of very many conversations at once, not the speed of one, and takes that node and both models.",
    ),
    Claim(
        "cost", "saves 42.5 % of training costs", ABSTRACT, Verdict.COMPUTED,
        "PAPER, section 3.2.3: 172.8K and 300.6K H800 hours for a trillion tokens.", _training_cost,
    ),
    Claim(
        "context", "supports a context length of 128K tokens", ABSTRACT, Verdict.COMPUTED,
        "PAPER, section 3.1.4, and config.json; computed is the room for them, see the next claim.", _context,
    ),
    Claim(
        "needles", "finds what stands anywhere in 128K tokens", "PAPER, figure 4", Verdict.NEEDS_WEIGHTS,
        "PAPER, section 3.1.4: needles in a haystack, at all lengths up to 128K. `workbench bench cache` measures "
        "how far pocket finds them, which says nothing of the published weights.",
    ),
    Claim(
        "vram", "the 236B model runs on 16 GB of GPU memory", ARTICLES, Verdict.REFUTED,
        "README of deepseek-ai/DeepSeek-V2, section 'How to run locally': 80GB*8 GPUs are required in BF16.", _fits_16,
    ),
    Claim(
        "offloaded", "the 236B model runs on 16 GB of GPU memory, most experts in main memory and on disk",
        "this project", Verdict.COMPUTED,
        "The shapes of config.json, the packed formats and the workspace of this code: `workbench plan v2 --vram 16GiB "
        "--ram 96GiB --cache q6`. What was run of it is in kernels/results, offload-*.json.",
        _offloaded_16,
    ),
    Claim(
        "speed", "60 tokens a second on one A100 of 80 GB, at a context of 2,048", ARTICLES, Verdict.REFUTED,
        "In no primary source; README of deepseek-ai/DeepSeek-V2, section 'How to run locally': 80GB*8 GPUs are "
        "required.",
        _sixty_a_second,
    ),
    Claim(
        "scores", "GSM8K 92.2, MATH 53.9, C-Eval 78.0 (V2-Chat, RL)", "PAPER, section 4.3", Verdict.NEEDS_WEIGHTS,
        "PAPER, section 4.3. An evaluation runs the published weights; pocket's exam says nothing about them.",
    ),
    Claim(
        "gsm8k", "GSM8K 88.5", ARTICLES, Verdict.REFUTED,
        "PAPER, sections 3.2.2 and 4.3: 79.2 (base), 90.8 (SFT), 92.2 (RL). 88.5 is the MMLU of another model, "
        "DeepSeek-V3.",
    ),
    Claim(
        "math", "MATH 76.6", ARTICLES, Verdict.REFUTED,
        "PAPER, sections 3.2.2 and 4.3: 43.6 (base), 52.7 (SFT), 53.9 (RL). 76.6 is GPT-4o in the paper of Coder-V2 "
        "(arXiv 2406.11931), whose own model has 75.7.",
    ),
    Claim(
        "c-eval", "C-Eval above 90", ARTICLES, Verdict.REFUTED,
        "PAPER, sections 3.2.2 and 4.3: 81.7 (base), 80.9 (SFT), 78.0 (RL). 90.1 is DeepSeek-V3's base model.",
    ),
    Claim(
        "licence", "MIT licence", ARTICLES, Verdict.REFUTED,
        "README of deepseek-ai/DeepSeek-V2, section 'License': the code is under MIT (LICENSE-CODE), the weights "
        "under the DeepSeek License Agreement (LICENSE-MODEL): commercial use is allowed, restrictions on use are to "
        "be passed on. The code of this project is its own, under MIT.",
    ),
    Claim(
        "tools", "function calling and JSON output", ARTICLES, Verdict.NEEDS_WEIGHTS,
        "The model card of V2.5 documents the formats of both; those of V2-Chat and V2-Lite-Chat do not mention "
        "them. How well it works needs the weights of V2.5.",
    ),
    Claim(
        "languages", "English, Chinese and French", ARTICLES, Verdict.REFUTED,
        "PAPER, section 5: the data are primarily Chinese and English, and beyond the two it should be used with "
        "caution. (pocket was taught three languages here; it is another model.)",
    ),
)  # fmt: skip


def ledger(claims: Iterable[Claim] = CLAIMS) -> list[Entry]:
    """Every claim with what is found for it now: some seconds, and a few tens of megabytes for the caches."""
    return [Entry(claim, claim.find and claim.find()) for claim in claims]


def as_text(entries: Iterable[Entry]) -> str:
    """A paragraph a claim: the verdict, what is said and where, what was found, the evidence."""
    lines = []
    for claim, finding in entries:
        lines.append(f'{claim.verdict.upper()}: "{claim.said}" ({claim.where})')
        for text in (finding.text if finding else "", claim.evidence):
            lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    return "\n".join(lines).rstrip()
