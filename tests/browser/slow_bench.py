"""The bench without a model at the pace of a large one: thirty tokens a second, each with something to choose."""

import time

from fake_bench import FakeBench

TEXT = """# Experts
A mixture of **experts** routes every token to a *few* of them:

- a router scores all experts
- `top-k` of them run, plus the shared ones

```python
def route(scores, k):
    return scores.topk(k)
```

| model | experts | chosen |
|---|---|---|
| V2 | 160 | 6 |
| V2-Lite | 64 | 6 |

专家混合。 C'est tout, <b>really</b>."""


class Pace:
    """Stands for the gate of the fake engine: lets one token through every so often."""

    def __init__(self, seconds):
        self.seconds, self.next = seconds, 0.0

    def acquire(self, timeout):
        if time.monotonic() < self.next:
            time.sleep(min(timeout, self.seconds))
            return False
        self.next = time.monotonic() + self.seconds
        return True


def slow_bench(seconds=0.03, says=TEXT):
    bench = FakeBench()
    bench.engine.says = [says]
    bench.engine.gate = Pace(seconds)
    return bench
