"""Rules that work entry by entry make as many calls for 30 parameters as for 3, and read no number off a device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orthoshard import RuleOptimizer
from orthoshard.elementwise import Entries
from orthoshard.engine.dryrun import dry_entries
from orthoshard.linalg.rounding import TOGETHER
from orthoshard.rules import RULES

# The calls of a step without decay: of AdamW the kernel and the count of steps.
KERNELS = {"adamw": {"_fused_adamw_": 1, "_foreach_add_": 1}, "lion": {"_foreach_": 5}}


class Calls(TorchDispatchMode):
    """How often each operation is called on tensors of the parameters' sizes."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def batch_of(rule, count, dtype, device, **options):
    """A rule, and a batch of parameters of several shapes."""
    made = RULES[rule](**options)
    shapes = [((3 + i % 4, 5) if i % 3 else (7,)) for i in range(count)]
    weights, gradients = ([torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(2))
    state = {
        name: [torch.zeros(() if slot.dims == () else s, dtype=slot.dtype, device=device) for s in shapes]
        for name, slot in made.slots((), dtype).items()
    }
    return made, Entries(weights, gradients, state)


def calls(rule, count, dtype=torch.float32, **options):
    made, batch = batch_of(rule, count, dtype, "cpu", **options)
    with Calls() as seen:
        made.step(batch)
    return seen.counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", KERNELS)
def test_calls_do_not_grow_with_the_number_of_parameters(rule, dtype):
    few, many = calls(rule, 3, dtype), calls(rule, 30, dtype)
    assert few == many
    for start, expected in KERNELS[rule].items():
        assert sum(n for name, n in many.items() if name.startswith(start)) == expected
    assert sum(many.values()) == sum(KERNELS[rule].values()), many


def test_a_loop_would_be_seen():
    few, many = (calls("adamw", count, fused=False, foreach=False) for count in (3, 30))
    assert sum(many.values()) == 10 * sum(few.values())


@pytest.mark.parametrize("rule", KERNELS)
def test_a_group_is_one_batch_whatever_the_shapes(rule):
    """One for each dtype, as the kernels want it."""
    shapes = [(4, 4), (3,), (2, 3, 5), ()]
    weights = [nn.Parameter(torch.zeros(s, dtype=t)) for t in (torch.float32, torch.bfloat16) for s in shapes]
    optimizer = RuleOptimizer(weights, rule=rule)
    assert [len(bucket.entries) for bucket in optimizer.plan().buckets] == [4, 4]
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Calls() as seen:
        optimizer.step()
    for start, expected in KERNELS[rule].items():
        inside = {name: n for name, n in seen.counted.items() if name.startswith(start) and name != "_foreach_norm"}
        assert sum(inside.values()) == 2 * expected, inside


class HostReads(TorchDispatchMode):
    """Fails where a number is read from the device. A fused kernel has no form without one: it is let go."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.startswith("_fused"):
            return None
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "item", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("rule", KERNELS)
def test_rates_on_the_device_are_not_read(rule, fused):
    """On a device that is none: what would wait for it fails, as there is no number to read."""
    with FakeTensorMode(), HostReads():
        options = {"fused": fused} if rule == "adamw" else {}
        lr, decay = (torch.full((), value, device="cuda") for value in (1e-3, 0.1))
        made, batch = batch_of(rule, 3, torch.float32, "cuda", lr=lr, weight_decay=decay, **options)
        made.step(batch)


@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    [
        ("adamw", torch.bfloat16, {}),
        ("adamw", torch.float32, {"fused": False}),
        ("lion", torch.bfloat16, {}),
        ("lion", torch.float32, {}),
    ],
)
def test_temporaries_do_not_grow_with_an_embedding(rule, dtype, options):
    assert dry_entries(RULES[rule](**options), dtype, 16 * TOGETHER).peak <= 5 * 4 * TOGETHER
