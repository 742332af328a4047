"""A byte-level BPE vocabulary in DeepSeek's manner, trained on given text and written as Hugging Face files."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from workbench.errors import RequestError
from workbench.tokenizer import BOS, EOS

SPECIAL = (
    BOS,
    EOS,
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜completion｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)  # V2.5's, in V2.5's order: here they are the last ids of the vocabulary

CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
SPLITS = (
    r"[\r\n]",
    rf"\s?[\p{{L}}\p{{M}}&&[^{CJK}]]+",
    r"\s?[\p{P}\p{S}]+",
    r"\s+$",
    rf"[{CJK}]+",
)  # each match is a word of its own: no merge ever crosses its edges
LONGEST = 16  # bytes: five Chinese characters or a long word, so that a sentence pattern cannot become one token

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if loop.previtem is not defined or loop.previtem['role'] != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}"
    "{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.previtem is defined and loop.previtem['role'] == 'tool' %}{{ '\\n' }}"
    "{% else %}{{ '<｜tool▁outputs▁begin｜>' }}{% endif %}"
    "{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}"
    "{% if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}{{ '<｜Assistant｜>' }}{% endif %}"
)  # what workbench.chat renders in the V2.5 style, for programs that only know templates


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train on `texts`; the ids are 256 bytes and the merges first, then SPECIAL, exactly `vocab_size` in all.

    RequestError if the text repeats itself too little to fill the vocabulary. As with the published files, encoding
    with `add_special_tokens=True` (the default of the library) puts one BOS in front.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise RequestError(f"vocab_size {vocab_size} is too small: 256 bytes and the special tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        + [pre_tokenizers.Digits(individual_digits=True)]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if tokenizer.get_vocab_size() != vocab_size:
        raise RequestError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "train on more text, or ask for a smaller vocabulary"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write `tokenizer.json` and the two files from which transformers makes the same tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config = roles | {
        # the published files say LlamaTokenizerFast, which this is not: transformers 5 warns about it
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
