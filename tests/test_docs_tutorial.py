"""The tutorial of docs/sharding.md runs as it is printed, on four processes."""

from __future__ import annotations

import re
from pathlib import Path

from processes import run_processes

PAGE = Path(__file__).parent.parent / "docs/sharding.md"


def tutorial(rank):
    script, _ = PAGE.read_text().split("\n## Replicas\n")
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", script, re.MULTILINE | re.DOTALL)), {})


def test_the_tutorial_runs_and_takes_the_steps_of_one_process():
    for result in run_processes(4, [(tutorial, ())])[0]:
        assert result is None, result
