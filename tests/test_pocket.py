"""The model that ships: its size, the architecture it claims, the figures on its card, a sensible conversation."""

import json
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.evals.exam import examine, questions
from workbench.recorder import Recorder
from workbench.workbench import POCKET


@pytest.fixture(scope="module")
def bench():
    return wb.load("pocket", device="cpu", dtype="fp32")


def ask(bench, *texts):
    """Answers to a conversation, turn by turn, greedily."""
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = bench.generate(messages, wb.Sampling(temperature=0, max_tokens=120))
        assert answer.stats.finish == "eos", answer.text
        messages.append({"role": "assistant", "content": answer.text, "tokens": answer.tokens})
    return [message["content"] for message in messages[1::2]]


def test_it_is_at_most_32_mb_on_disk_and_readable_by_everybody():
    files = [file for file in POCKET.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_it_has_every_part_of_deepseek_v2(bench):
    config = bench.config
    assert config == wb.Config.preset("pocket")
    assert config.q_lora_rank and config.n_shared_experts and config.rope_scaling and config.is_moe(1)
    assert config.topk_method == "group_limited_greedy" and not config.is_moe(0)


def test_its_card_tells_the_figures_of_the_exam_and_how_it_was_made(bench):
    exam = json.loads((POCKET / "exam.json").read_text())
    assert f"| all | {exam['all']['passed']} of {exam['all']['total']} |" in bench.card
    assert exam["all"]["total"] == len(questions())
    for stage in json.loads((POCKET / "training.json").read_text()):
        assert (
            f"--steps {stage['recipe']['steps']} --rate {stage['recipe']['rate']} --seed {stage['seed']}" in bench.card
        )
    assert f"{bench.config.parameters().total:,}" in bench.card


def test_it_scores_what_its_card_says(bench):
    exam = json.loads((POCKET / "exam.json").read_text())["all"]
    every_third = questions()[::3]
    [_, passed, total] = examine(bench, every_third).rows()[-1]
    low, high = exam["interval"]
    assert low - 0.1 <= passed / total <= high + 0.1


def test_a_conversation_makes_sense(bench):
    hello, who, thanks = ask(bench, "Hello!", "Who are you?", "Thank you!")
    assert "hello" in hello.lower() or "hi" in hello.lower()
    assert "pocket" in who
    assert "welcome" in thanks.lower()


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("What is a mixture of experts?", "experts"),
        ("你好！", "你好"),
        ("Qui es-tu ?", "je suis"),
        ("What is MLA?", "latent"),
    ],
)
def test_it_answers_in_the_language_and_on_the_subject(bench, question, word):
    assert word in ask(bench, question)[0].lower()


def test_no_expert_is_dead(bench):
    recorder = Recorder("moe.experts")
    prompts = [question.messages[-1]["content"] for question in questions()]
    used = {}
    with torch.inference_mode():
        for prompt in prompts:
            bench.model(torch.tensor([[bench.tokenizer.bos, *bench.tokenizer.encode(prompt)]]), probe=recorder)
            for layer in recorder.layers_of("moe.experts"):
                used.setdefault(layer, set()).update(recorder["moe.experts", layer].flatten().tolist())
            recorder.clear()
    assert {layer: len(experts) for layer, experts in used.items()} == dict.fromkeys(range(1, 6), 32)


def test_it_opens_in_transformers_with_the_same_logits(bench):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(POCKET)
    text = "Hello! What is a mixture of experts? 你好，什么是专家？ 17 + 25"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens == bench.tokenizer.encode(text)
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(Path(POCKET), dtype=torch.float32)
    with torch.inference_mode():
        logits = theirs(torch.tensor([tokens])).logits
        assert (bench.model(torch.tensor([tokens])) - logits).abs().max() <= 1e-4
