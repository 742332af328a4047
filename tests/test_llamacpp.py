"""llama.cpp as a rival: what is asked of the other process, and what is said when it is not there or gives up.

The other interpreter is this one with a stub in the place of llama-cpp-python; WORKBENCH_LLAMA_PYTHON names a real one.
"""

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.benchmarks.gguf import write
from workbench.benchmarks.llamacpp import LlamaCpp
from workbench.config import Config
from workbench.errors import RequestError

STUB = '''
"""Notes every call; a batch takes a millisecond a token. Its cache refuses what llama.cpp's would: holes."""
import atexit, json, os, time
from ctypes import POINTER, c_int32
from types import SimpleNamespace

__version__ = "9.9"
llama_token = c_int32
CALLS, held, logits = [], [], float(os.environ.get("STUB_LOGIT", "0.5"))
atexit.register(lambda: open(os.environ["STUB_CALLS"], "w").write(json.dumps(CALLS)))

def llama_backend_init(): print("loading")  # where answers are expected
def llama_model_default_params(): return None
def llama_model_load_from_file(path, settings): return None if b"broken" in path else path
def llama_context_default_params(): return SimpleNamespace()
def llama_init_from_model(model, settings):
    CALLS.append(["context", settings.n_ctx, settings.n_threads, settings.n_threads_batch])
    return "context"
def llama_get_memory(context): return "memory"
def llama_n_batch(context): return 8
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return 11
def llama_print_system_info(): return b"AVX9 = 1"
def llama_model_size(model): return 123
def llama_model_n_params(model): return 456
def llama_synchronize(context): pass
def llama_get_logits_ith(context, index): return [logits] * 11
def llama_batch_get_one(tokens, count): return tokens[:count]

def llama_memory_seq_rm(memory, sequence, start, end):
    assert (sequence, end) == (0, -1) and start <= len(held)
    del held[start:]
    CALLS.append(["keep", start])
    return True

def llama_decode(context, batch):
    assert all(0 <= token < 11 for token in batch)
    if "STUB_FAILS" in os.environ:
        os.write(2, b"out of everything\\n")
        os._exit(3)
    time.sleep(len(batch) / 1000)
    held.extend(batch)
    CALLS.append(["decode", len(batch)])
    return 0
'''
WRAPPER = """#!{python}
import runpy, sys
assert sys.argv[1] == "-I"
sys.path[:] = [{folder!r}, *(path for path in sys.path if "benchmarks" not in path)]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter that has the stub."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "llama_cpp.py").write_text(STUB)
    wrapper = tmp_path / "python"
    wrapper.write_text(WRAPPER.format(python=sys.executable, folder=str(tmp_path / "stub")))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    return wrapper


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def calls(tmp_path):
    return json.loads((tmp_path / "calls").read_text())


def test_decoding_starts_every_round_after_the_context(python, file, tmp_path):
    with LlamaCpp(python, file, threads=2, length=64) as llama:
        assert (llama.version, llama.system, llama.bytes, llama.parameters) == ("9.9", "AVX9 = 1", 123, 456)
        speeds = llama.decode(context=19, steps=3, rounds=2)
    assert len(speeds) == 2 and all(0 < speed < 1000 for speed in speeds)  # a millisecond a token, at the least
    one = ["decode", 1]
    filling = [["decode", 8], ["decode", 8], ["decode", 3]]
    again = [["keep", 19], one, one, one]
    assert calls(tmp_path) == [["context", 64, 2, 2], *filling, one, *again, *again]


def test_a_prompt_starts_from_nothing_and_a_longer_context_keeps_the_shorter(python, file, tmp_path):
    with LlamaCpp(python, file, threads=1, length=64) as llama:
        llama.decode(context=4, steps=1, rounds=1)
        llama.decode(context=10, steps=1, rounds=1)
        assert len(llama.prefill(tokens=5, rounds=3)) == 3
    _, *made = calls(tmp_path)
    assert made[:5] == [["decode", 4], ["decode", 1], ["keep", 4], ["decode", 1], ["decode", 5]]
    assert made[8:] == [["keep", 0], ["decode", 5], *[["keep", 0], ["decode", 5]] * 3]


def test_leaving_ends_the_process(python, file):
    with LlamaCpp(python, file, threads=1) as llama:
        process = llama._process
        assert process.poll() is None
    assert process.returncode == 0
    llama.close()


@pytest.mark.parametrize(
    "wrong", [("decode", -1, 1, 1), ("decode", 0, 0, 1), ("decode", 60, 5, 1), ("prefill", 65, 1), ("prefill", 8, 0)]
)
def test_what_cannot_be_timed_is_refused_and_the_next_question_answered(python, file, wrong):
    name, *numbers = wrong
    with LlamaCpp(python, file, threads=1, length=64) as llama:
        with pytest.raises(RequestError):
            getattr(llama, name)(*numbers)
        assert len(llama.prefill(64, 1)) == 1


def test_it_says_what_to_install(file):
    with pytest.raises(RequestError, match="has no llama-cpp-python.*pip install"):
        LlamaCpp(Path(sys.executable), file, threads=1)


def test_it_says_what_is_not_there(python, file, tmp_path):
    with pytest.raises(RequestError, match="no-such-python: no such file"):
        LlamaCpp(tmp_path / "no-such-python", file, threads=1)
    with pytest.raises(RequestError, match="no-such.gguf: no such file"):
        LlamaCpp(python, tmp_path / "no-such.gguf", threads=1)
    with pytest.raises(RequestError, match="at least 1"):
        LlamaCpp(python, file, threads=0)


def test_a_file_that_does_not_load_is_named(python, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"")
    with pytest.raises(RequestError, match="broken.gguf: llama.cpp could not load it"):
        LlamaCpp(python, tmp_path / "broken.gguf", threads=1)


def test_its_last_words_are_repeated(python, file, monkeypatch):
    monkeypatch.setenv("STUB_FAILS", "1")
    llama = LlamaCpp(python, file, threads=1)
    with pytest.raises(RequestError, match="code 3:(.|\n)*out of everything"):
        llama.prefill(4, 1)
    assert llama._process.returncode == 3


def test_an_end_between_two_questions_is_noticed(python, file):
    with LlamaCpp(python, file, threads=1) as llama:
        llama._process.kill()
        llama._process.wait()
        with pytest.raises(RequestError, match="code -9"):
            llama.prefill(4, 1)


@pytest.mark.parametrize("logit", ["nan", "inf"])
def test_speeds_of_a_net_that_blew_up_are_withheld(python, file, monkeypatch, logit):
    monkeypatch.setenv("STUB_LOGIT", logit)
    with LlamaCpp(python, file, threads=1) as llama, pytest.raises(RequestError, match="not finite"):
        llama.prefill(4, 1)


def test_the_process_does_not_outlive_its_parent(python, file):
    code = (
        "import os, sys; from pathlib import Path; from workbench.benchmarks.llamacpp import LlamaCpp\n"
        "print(LlamaCpp(Path(sys.argv[1]), Path(sys.argv[2]), 1)._process.pid, flush=True); os._exit(0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(python), str(file)], capture_output=True, text=True, check=True
    )
    child = Path("/proc") / run.stdout.strip() / "cmdline"
    for _ in range(50):
        if not child.exists() or not child.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


REAL = os.environ.get("WORKBENCH_LLAMA_PYTHON")


@pytest.mark.skipif(not REAL, reason="WORKBENCH_LLAMA_PYTHON names no interpreter with llama-cpp-python")
@pytest.mark.parametrize(
    "change", [{}, {"q_lora_rank": None}, {"n_routed_experts": None}, {"tie_word_embeddings": True}]
)
def test_llama_cpp_loads_and_runs_what_is_written(change, tmp_path):
    config = replace(Config.preset("pocket"), **change)
    with LlamaCpp(Path(REAL), write(config, tmp_path / "pocket.gguf"), threads=1, length=128) as llama:
        assert llama.parameters == config.parameters().total
        assert min(llama.decode(64, 4, 2) + llama.prefill(100, 2)) > 0
