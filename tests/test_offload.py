"""State in host memory: the same steps to the bit; what is copied, when, and how much is on the device at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orthoshard import DionTail, Muon, RuleOptimizer, plan
from orthoshard.budget import step_cost
from orthoshard.engine import offload, step
from orthoshard.engine.run import IN_FLIGHT_BYTES
from orthoshard.groups import group_rule
from orthoshard.linalg.host_sync import no_host_sync
from orthoshard.shield import shielded

SHAPES = {"w": (12, 8), "v": (12, 8), "wide": (6, 40), "experts": (3, 6, 4), "vector": (7,), "table": (300, 250)}
GROUPS = {
    "dion": [{}, {"state_dtype": "int8"}, {"view": "rows:2*(4,2)"}],
    "dion_tail": [{}, {"view": "rows:4,8"}],
    "muon": [{}, {"row_moment": 0.9, "decay": "hyperball"}],
}


def groups(rule, options):
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    matrices = [(name, made[name]) for name in ("w", "v")]
    others = [(name, made[name]) for name in ("wide", "experts")]
    rest = {key: value for key, value in options.items() if key != "view"}
    return made, [
        {"params": matrices, "rule": rule, **options},
        {"params": others, "rule": rule, **rest},
        {"params": [("vector", made["vector"]), ("table", made["table"])], "rule": "adamw"},
    ]


def trained(rule, options, **more):
    made, described = groups(rule, options)
    optimizer = RuleOptimizer(described, lr=0.02, **more)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        for name, p in made.items():
            p.grad = torch.randn(p.shape, generator=generator)
            if (number, name) in ((1, "w"), (2, "table"), (2, "v"), (2, "w")):
                p.grad = None
        optimizer.step()
    return made, optimizer


@pytest.mark.parametrize(("rule", "options"), [(rule, each) for rule, several in GROUPS.items() for each in several])
def test_the_same_steps_to_the_bit(rule, options, monkeypatch):
    monkeypatch.setattr(plan, "BUCKET_BYTES", 500)  # several buckets
    runs = [trained(rule, options, state_offload=offloaded) for offloaded in (False, True)]
    (made, kept), (others, lent) = runs
    for name in SHAPES:
        assert torch.equal(made[name], others[name]), name
        for key, value in kept.state[made[name]].items():
            assert torch.equal(value, lent.state[others[name]][key]), (name, key)
    assert kept.bytes_copied == 0
    assert lent._lender.lent == 0


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_elementwise_rules_in_stretches(rule, monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 100)
    monkeypatch.setattr(step, "LENT_BYTES", 3000)
    runs = []
    for offloaded in (False, True):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, generator=generator)) for n in (300, 20, 200, 400, 50, 500)]
        optimizer = RuleOptimizer(parameters, rule=rule, lr=0.1, state_offload=offloaded)
        for number in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            parameters[number].grad = None
            optimizer.step()
        runs.append((torch.cat([p.detach() for p in parameters]), optimizer))
    assert torch.equal(runs[0][0], runs[1][0])
    assert 0 < runs[1][1]._lender.most <= 2 * 500 * 8 + 8  # two of them, one on its way


def test_the_next_bucket_is_on_its_way_while_one_is_worked_on(monkeypatch):
    monkeypatch.setattr(plan, "BUCKET_BYTES", 500)
    told = []

    class Told(offload.Loan):
        def start(self):
            if self._copies is None:
                self.number = sum(what == "lent" for what, _ in told)
                told.append(("lent", self.number))
            return super().start()

        def _around(self, task, following):
            told.append(("begun", self.number))
            yield from super()._around(task, following)

        def _give_back(self):
            super()._give_back()
            told.append(("back", self.number))

    monkeypatch.setattr(step, "Loan", Told)
    parameters = [nn.Parameter(torch.ones(10, 10)) for _ in range(4)]
    optimizer = RuleOptimizer(parameters, rule="muon", state_offload=True)
    for p in parameters:
        p.grad = torch.eye(10)
    optimizer.step()
    assert len(told) == 12
    for number in range(3):
        assert told.index(("begun", number)) < told.index(("lent", number + 1)) < told.index(("back", number))
    assert optimizer.bytes_copied == 2 * 4 * 400


def llama(layers=16, dtype=torch.bfloat16):
    """The matrices of Llama-3.2-1B."""
    shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    return [nn.Parameter(torch.empty(s, device="meta", dtype=dtype)) for _ in range(layers) for s in shapes]


@pytest.mark.parametrize(("cls", "options"), [(Muon, {}), (DionTail, {}), (Muon, {"state_dtype": "int8"})])
def test_how_much_state_is_on_the_device_at_once(cls, options):
    """Of Llama-3.2-1B on one GPU, on meta tensors: that of what is in flight, and the next bucket's."""
    parameters = llama()
    optimizer = cls([(f"p{i}", p) for i, p in enumerate(parameters)], state_offload=True, **options)
    total = step_cost(optimizer.plan(), optimizer.param_groups).state
    optimizer.initialize_state()
    for p in parameters:
        p.grad = torch.empty_like(p)
    prepared, stores = optimizer._prepare()
    taken = step.Step(prepared.plan, stores, optimizer.param_groups, optimizer._comm, optimizer._lender)
    with shielded(), no_host_sync():
        taken._run([group_rule(group) for group in optimizer.param_groups])
    assert optimizer.bytes_copied == 2 * total
    buckets = [sum(x.numel() * x.element_size() for x in store.stacked.values()) for store in stores]
    assert optimizer._lender.most <= max(IN_FLIGHT_BYTES, max(buckets)) + max(buckets)
    assert optimizer._lender.lent == 0


def test_copies_loads_and_hosts():
    _, optimizer = trained("muon", {}, state_offload=True)
    other = copy.deepcopy(optimizer)
    assert other.bytes_copied == 0
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["state_offload"] is True
    plain_made, plain = trained("muon", {})
    plain.load_state_dict(copy.deepcopy(saved))
    assert plain.param_groups[0]["state_offload"] is False  # where it lives is no property of what is saved
    for p in plain_made.values():
        p.grad = torch.ones_like(p)
    plain.step()
    assert plain.bytes_copied == 0
    with pytest.raises(ValueError, match="capturable=True does not go with state_offload"):
        Muon([nn.Parameter(torch.ones(2, 2))], capturable=True, state_offload=True)
    with pytest.raises(TypeError, match="state_offload=1 must be True or False"):
        Muon([nn.Parameter(torch.ones(2, 2))], state_offload=1)
