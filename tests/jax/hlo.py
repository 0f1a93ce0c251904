"""The collectives of a compiled program, and the bytes that a device sends by them.

Of k devices in a group and a result of s bytes a ring sends, from each device,

    all-reduce 2 s (k - 1) / k     all-gather s (k - 1) / k     reduce-scatter s (k - 1)     all-to-all s (k - 1) / k

and a collective-permute s. Bodies of loops count once: a pass of `orthonormal` is such a body.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
SENT = {
    "all-reduce": lambda s, k: 2 * s * (k - 1) / k,
    "all-gather": lambda s, k: s * (k - 1) / k,
    "reduce-scatter": lambda s, k: s * (k - 1),
    "all-to-all": lambda s, k: s * (k - 1) / k,
    "collective-permute": lambda s, k: s,
}
CALL = re.compile(rf"= (?P<result>\(?[^=]*?\)?) (?P<kind>{'|'.join(SENT)})(?:-start)?\(")
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    devices: int  # in a group
    elements: int  # of the largest whole tensor that it moves
    sent: float  # bytes, from each device


def collectives(program: str, devices: int = 8) -> list[Collective]:
    """Those of `jax.jit(f).lower(...).compile().as_text()`."""
    found = []
    for line in program.splitlines():
        call = CALL.search(line)
        if call is None:
            continue
        kind, k = call["kind"], group_size(line, devices)
        tensors = [
            (math.prod(map(int, filter(None, dims.split(",")))), BYTES[t]) for t, dims in SHAPE.findall(call["result"])
        ]
        if k > 1 or kind == "collective-permute":
            whole = max(n for n, _ in tensors) * (k if kind == "reduce-scatter" else 1)
            found.append(Collective(kind, k, whole, sum(SENT[kind](n * size, k) for n, size in tensors)))
    return found


def group_size(line: str, devices: int) -> int:
    """Of ``replica_groups={{0,1},{2,3}}``, ``=[2,4]<=[8]``, or over named axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        lengths = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(lengths[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    return devices
