"""The card of a model trained here: what it is, how it was made, what the exam says, and what it cannot do."""

from workbench.config import Config
from workbench.evals.exam import Report

FRONT = """---
license: mit
language: [en, zh, fr]
tags: [deepseek-v2, mixture-of-experts, multi-head-latent-attention, toy]
---
"""

WHAT = """# pocket

A DeepSeek-V2 small enough for a laptop's processor, trained from nothing by this project on text that this project
writes. It has every part of the large ones: latent attention with a compressed query, decoupled rotary keys under YaRN,
group-limited routing over fine-grained experts, shared experts, a dense first layer, the special tokens and the prompt
format of V2.5. It exists to be looked into. It is no assistant, and no figure here says anything about DeepSeek's own
models.
"""

LIMITS = """## What it cannot do

- It knows what its curriculum says, in about the words the curriculum uses: greetings, itself, DeepSeek-V2, mixture
  of experts, latent attention, the cache, tokens, this workbench, sums and differences below 100, small products, about
  150 everyday words, facts stated in the prompt. Anything else it should decline, and often does not: it then says
  something fluent and wrong.
- Its arithmetic is recall and pattern, without steps. Check it.
- It confuses questions that share words, mixes languages at times, and forgets over several turns.
- It was never aligned or filtered: the curriculum is harmless because somebody wrote all of it.
- No code, no JSON, no function calls, no news, no people.
- Rows of at most {length:,} tokens in training; beyond the first few hundred tokens of a conversation it gets worse.
"""


def card(config: Config, stages: list[dict], report: Report) -> str:
    """Markdown for the README.md beside the weights. `stages` is what training recorded in training.json."""
    return "\n".join((FRONT + WHAT, _shape(config), _making(stages), _exam(report), _limits(stages)))


def _shape(config: Config) -> str:
    total, active = config.parameters()
    elements = config.latent_width * config.num_hidden_layers
    keys_and_values = config.mha_width * config.num_hidden_layers
    return f"""## Shape

| | |
|---|---|
| parameters | {total:,} in all, {active:,} for a token |
| layers | {config.num_hidden_layers}, the first {config.first_k_dense_replace} dense |
| hidden size, heads | {config.hidden_size}, {config.num_attention_heads} |
| experts | {config.n_routed_experts} routed in {config.n_group} groups, {config.num_experts_per_tok} chosen from \
{config.topk_group} groups; {config.n_shared_experts} shared |
| cached for a token | {elements} elements, {1 - elements / keys_and_values:.1%} less than the {keys_and_values:,} of \
keys and values with the same heads |
| vocabulary, context | {config.vocab_size:,} (byte-level BPE), {config.max_position_embeddings:,} |
"""


def _making(stages: list[dict]) -> str:
    lines = []
    for number, stage in enumerate(stages, 1):
        recipe, reached = stage["recipe"], stage["reached"]
        lines.append(
            f"| {number} | {stage['seed']} | {reached['step'] + 1:,} of {recipe['steps']:,} | {reached['tokens']:,} | "
            f"{recipe['rate']} | "
            f"{reached['seconds'] / 60:.0f} min, {stage['threads']} CPU thread(s) | {reached['expert']:.2f} |"
        )
    commands = [
        f"workbench train pocket --steps {stage['recipe']['steps']} --rate {stage['recipe']['rate']} --seed "
        f"{stage['seed']} --out stage{number}" + (f" --start stage{number - 1}" if number > 1 else "")
        for number, stage in enumerate(stages, 1)
    ]
    notes = " ".join(stage["note"] for stage in stages if "note" in stage)
    return f"""## How it was made

The text is the endless, seeded stream of `workbench.train.curriculum`: 40 % English, 30 % Chinese, 30 % French.
Questions of the exam are left out, and one in five pairs of numbers is kept for it. Loss on what the assistant says, a
tenth of it on the rest, and the paper's three balance losses. Each stage starts with a fresh optimizer (torch
{stages[-1]["torch"]}); one that did not take all of its steps was stopped there, and the next goes on from what it
had saved.

```
{chr(10).join(commands)}
```

| stage | seed | steps | tokens | peak rate | time | expert balance at the end (1 is even) |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

The time is that of a shared machine. Weights are stored in bf16. {notes}
"""


def _exam(report: Report) -> str:
    rows = "\n".join(
        f"| {label} | {passed} of {total} | {passed / total:.0%} | {low:.0%} to {high:.0%} |"
        for (label, passed, total), (low, high) in zip(report.rows(), report.intervals(), strict=True)
    )
    return f"""## The exam

`workbench eval pocket` asks {len(report.marked)} questions that were written before training and whose wordings, or
whose combinations of numbers, names and things, the curriculum never produces. Greedy answers, marked by rule: the
fact must be there, nothing rejected may be, and rambling or repeating fails.

| | passed | share | 95 % interval |
|---|---|---|---|
{rows}
"""


def _limits(stages: list[dict]) -> str:
    return LIMITS.format(length=max(stage["recipe"]["long_length"] for stage in stages))
