"""Where a measurement was made: versions, hardware, threads, date, commit, command. Never the name of the
host.

May import torch and the standard library.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this code lies in, ``+changes`` if it differs; None outside of one."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside a checkout of something else: only a tracked file belongs to it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain", "-uno") else "")


def load() -> float | None:
    """Processes that wanted to run in the last minute: above the number of cores, timings are disturbed."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Everything a reader needs to repeat or to doubt a measurement."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device and device.type == "cuda" else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["orthoshard", *sys.argv[1:]]),
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
