"""LlamaCpp: llama.cpp as a rival, in a process of another interpreter, so that this one need not have it."""

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from workbench.errors import RequestError

CHILD = Path(__file__).with_name("llamacpp_child.py")
LAST_WORDS = 5  # lines of the other process that an error repeats


class LlamaCpp:
    """A GGUF file held by llama.cpp through llama-cpp-python. A context manager: leaving it ends the process.

    python: an interpreter with llama-cpp-python. threads: of every pass. length: the longest context in tokens, what
    is timed after it included. Attributes: `version` of llama-cpp-python, `system` (the processor's features that
    llama.cpp was built for), `bytes` and `parameters` of the weights.

    RequestError where the interpreter, the package or the file is missing, and when llama.cpp gives up.
    """

    def __init__(self, python: Path, gguf: Path, threads: int, length: int = 2048):
        if threads < 1 or length < 1:
            raise RequestError(f"threads and length must be at least 1, found {threads} and {length}.")
        if not gguf.is_file():
            raise RequestError(f"{gguf}: no such file; `workbench.benchmarks.gguf.write` makes one.")
        self.length = length
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `close` does
        # -I: what lies beside the child must not shadow modules of the same name
        command = [str(python), "-I", str(CHILD), str(gguf), str(threads), str(length)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        except OSError as error:
            self._log.close()
            raise RequestError(
                f"{python}: {error.strerror.lower()}. Name the Python of an environment with llama-cpp-python."
            ) from None
        about = self._answer()
        self.version: str = about["version"]
        self.system: str = about["system"]
        self.bytes: int = about["bytes"]
        self.parameters: int = about["parameters"]

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def decode(self, context: int, steps: int, rounds: int) -> list[float]:
        """Tokens per second of `steps` single tokens after `context`, for each round; filling the cache is untimed."""
        return self._speeds(context, 1, steps, rounds)

    def prefill(self, tokens: int, rounds: int) -> list[float]:
        """Tokens per second of a prompt in one pass, logits of its last token, for each round."""
        return self._speeds(0, tokens, 1, rounds)

    def close(self) -> None:
        """Ends the process and gives its memory back. Twice is once."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def _speeds(self, context: int, new: int, passes: int, rounds: int) -> list[float]:
        if min(context, new - 1, passes - 1, rounds - 1) < 0:
            raise RequestError("steps, tokens and rounds must be at least 1, and the context not negative.")
        if context + new * passes > self.length:
            raise RequestError(f"{context + new * passes} tokens are more than the length of {self.length}.")
        question = {"context": context, "new": new, "passes": passes, "rounds": rounds}
        with suppress(BrokenPipeError):  # it ended; its last words are in the log
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict | list:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        log = self._log.read()
        self.close()
        if "No module named 'llama_cpp'" in log:
            raise RequestError(
                f"{self._process.args[0]} has no llama-cpp-python; in its environment: "
                "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
            )
        last = "\n".join(log.strip().splitlines()[-LAST_WORDS:])
        raise RequestError(f"llama.cpp ended with code {code}:\n{last}")
