"""models.json: what the calculator has to know of every model of the catalogue, so that a page is made without building
one. Made anew, after a change of the catalogue or of how models are cut, by

    python -m orthoshard.report.models

May import `even` and ``orthoshard.planner``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from orthoshard.plan import Entry, Plan
from orthoshard.planner.subject import subject
from orthoshard.report.even import Kind, Model

FILE = Path(__file__).with_name("models.json")
NAMES = (
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama3.2-1b", "llama3-8b", "llama3-70b", "llama3-405b"),
    *("smollm2-135m", "mistral-7b", "mixtral-8x7b", "mixtral-8x22b", "qwen3-0.6b", "qwen3-8b"),
    *("qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b"),
    *("deepseek-v3", "kimi-k2", "gpt-oss-20b", "gpt-oss-120b", "phi3-mini", "gemma-7b"),
)


def load() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())


def calculator_inputs(name: str) -> dict[str, Any]:
    """What `even.amounts` has to know of a model, as plain values: ``name``, ``source``, ``parameters`` (entries),
    ``active``, and ``model``: the fields of `even.Model`. tp False: the model does not say how tp would cut it."""
    chosen = subject(name)
    tensor_parallel = bool(getattr(chosen.module, "tp_plan", None))
    with chosen.placed({"fsdp": 2, **({"tp": 2} if tensor_parallel else {})}) as placed:
        plan, _ = placed.plan("muon")
        model = plain_numbers(plan)
    return {
        "name": chosen.described.name,
        "source": chosen.described.source,
        "parameters": chosen.parameters,
        "active": chosen.active,
        "tp": tensor_parallel,
        "model": {
            "kinds": [vars(kind) for kind in model.kinds],
            "scalars": list(model.scalars),
            "tensors": model.tensors,
            "parameters": model.parameters,
        },
    }


def plain_numbers(plan: Plan) -> Model:
    """The plan of a matrix rule on a mesh of fsdp and tp, as the calculator sees the model."""
    kinds, scalars, tensors = Counter[tuple[int, int, str, str]](), [0.0, 0.0], 0
    for bucket in plan.buckets:
        first = bucket.entries[0]
        for work in bucket.works:
            kinds[*work.part.matrix, _cut(first, "tp"), _cut(first, "fsdp")] += work.matrices
        if not bucket.works:
            tensors += len(bucket.entries)
            for entry in bucket.entries:
                cut = any(axis.name == "tp" for axes in entry.layout.cuts for axis in axes)
                scalars[0 if cut else 1] += prod(entry.shape)
    return Model(
        tuple(Kind(m, n, count, tp, fsdp) for (m, n, tp, fsdp), count in kinds.items()),
        (scalars[0], scalars[1]),
        tensors,
        len(plan.entries),
    )


def _cut(entry: Entry, name: str) -> str:
    """What an axis cuts of a parameter's matrices: "rows", "columns", the "stack" of them, or "" nothing."""
    reading = entry.reading
    dim = next((dim for dim, axes in enumerate(entry.layout.cuts) if any(axis.name == name for axis in axes)), None)
    if dim is None or reading is None:
        return ""
    return "rows" if dim in reading.dims("rows") else "columns" if dim in reading.dims("columns") else "stack"


def main(argv: Sequence[str] | None = None) -> int:
    """With names: only these are made anew."""
    known = {entry["name"]: entry for entry in load()} if FILE.exists() else {}
    for name in (list(sys.argv[1:]) if argv is None else argv) or NAMES:
        print(name, flush=True)
        known[name] = calculator_inputs(name)
    lines = [json.dumps(known[name]) for name in NAMES if name in known]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
