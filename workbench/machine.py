"""The machine under us, as far as its own files tell: processor, vector extensions, the cores we may use."""

import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """Those this process may use: its affinity, and a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, max(1, round(int(limit) / int(period))))
    return count


def cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction set extensions in the kernel's spelling ("avx512_bf16", "amx_bf16"); empty where it does not say."""
    return set((_cpu_info("flags") or _cpu_info("Features")).split())


def _cpu_info(key: str) -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return ""
    line = re.search(rf"^{key}\s*:\s*(.*)$", info.read_text(errors="replace"), re.MULTILINE)
    return line[1] if line else ""
