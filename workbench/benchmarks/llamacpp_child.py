"""Runs in the interpreter that has llama-cpp-python, and needs nothing else: `llamacpp.py` starts it and asks.

Arguments: GGUF THREADS LENGTH. Questions come in and answers go out as JSON, one to a line: first, unasked, what runs;
then the tokens per second of every round. Whatever is printed by others goes to the second output.
"""

import ctypes
import json
import math
import os
import random
import sys
import time
from importlib import import_module

llama = import_module("llama_cpp")  # a requirement of that interpreter, not of the package this file lies in


class Runner:
    """One model and one context of `length` tokens. The token at a position is always the same."""

    def __init__(self, path, threads, length):
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(path + ": llama.cpp could not load it")
        settings = llama.llama_context_default_params()
        settings.n_ctx = length
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp could not make a context of {length} tokens")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_n_batch(self.context)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        draw = random.Random(0)
        self.tokens = (llama.llama_token * length)(*(draw.randrange(self.vocabulary) for _ in range(length)))
        self.held = 0

    def about(self):
        return {
            "version": llama.__version__,
            "system": llama.llama_print_system_info().decode(),
            "bytes": llama.llama_model_size(self.model),
            "parameters": llama.llama_model_n_params(self.model),
        }

    def speeds(self, context, new, passes, rounds):
        """Tokens per second of `passes` times `new` tokens after `context`, once for each of the rounds."""
        self.rewind(context)
        self.advance(new)  # warm
        speeds = []
        for _ in range(rounds):
            self.rewind(context)
            start = time.perf_counter()
            for _ in range(passes):
                self.advance(new)
            speeds.append(new * passes / (time.perf_counter() - start))
        logits = llama.llama_get_logits_ith(self.context, -1)
        if not all(map(math.isfinite, logits[: self.vocabulary])):
            raise SystemExit("the logits are not finite: nothing that was timed means anything")
        return speeds

    def rewind(self, length):
        if self.held > length:
            if not llama.llama_memory_seq_rm(self.memory, 0, length, -1):
                raise SystemExit("llama.cpp could not shorten its cache")
            self.held = length
        if self.held < length:
            self.advance(length - self.held)

    def advance(self, count):
        """The next tokens, and the logits of the last one."""
        end = self.held + count
        while self.held < end:
            some = min(self.batch, end - self.held)
            at = ctypes.byref(self.tokens, self.held * ctypes.sizeof(llama.llama_token))
            pointer = ctypes.cast(at, ctypes.POINTER(llama.llama_token))
            if code := llama.llama_decode(self.context, llama.llama_batch_get_one(pointer, some)):
                raise SystemExit(f"llama_decode answered {code}")
            self.held += some
        llama.llama_synchronize(self.context)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, threads, length = sys.argv[1:]
    runner = Runner(path, int(threads), int(length))
    answer = runner.about()
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        question = sys.stdin.readline()
        if not question:
            return
        answer = runner.speeds(**json.loads(question))


main()
