"""models.json: what the calculator has to know of every model of the catalogue, so that a page is made without building
one. Made anew, after a change of the catalogue or of how models are cut, by

    python -m orthoshard.report.models

May import ``orthoshard.planner``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("models.json")
NAMES = (
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama3.2-1b", "llama3-8b", "llama3-70b", "llama3-405b"),
    *("smollm2-135m", "mistral-7b", "mixtral-8x7b", "mixtral-8x22b", "qwen3-0.6b", "qwen3-8b"),
    *("qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b"),
    *("deepseek-v3", "kimi-k2", "gpt-oss-20b", "gpt-oss-120b", "phi3-mini", "gemma-7b"),
)


def load() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """With names: only these are made anew."""
    from orthoshard.planner.subject import calculator_inputs

    known = {entry["name"]: entry for entry in load()} if FILE.exists() else {}
    for name in (list(sys.argv[1:]) if argv is None else argv) or NAMES:
        print(name, flush=True)
        known[name] = calculator_inputs(name)
    lines = [json.dumps(known[name]) for name in NAMES if name in known]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
