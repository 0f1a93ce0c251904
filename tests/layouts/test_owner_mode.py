"""Owner mode: each replica keeps the state of its own matrices, all take the same step as without.

The layout table checks weights and state against one process, and bytes sent and state held against `cost`.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from blocks import Block, learn, whole
from table import (
    EXPERT_LAYOUTS,
    EXPERT_SHAPES,
    LAYOUTS,
    RULES,
    S0,
    SHAPES,
    Case,
    R,
    errors,
    in_turn,
    local,
    one_process,
    place,
    tensors,
)
from test_gradients import pattern
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from view_table import CHOSEN, VIEWS, expected, view_errors

from orthoshard import Dion, Muon, RuleOptimizer
from orthoshard.budget import agreement_bytes, step_cost
from processes import run_processes
from simulate import simulate

OWNERS = {"shard_state": "zero1"}
CASES = {name: case for name, case in LAYOUTS.items() if R in case.places or not case.places} | {
    "ddp x4, three matrices": Case((4,), (), ()),
    "two axes of replicas": Case((2, 3), (R, R), ()),
    "replicas on both sides of a cut": Case((2, 2, 2), (R, S0, R), ((1, 0),)),
}
EXPERTS = {name: EXPERT_LAYOUTS[name] for name in ("replicas 2, experts 2", "ddp x2")}


def check(case, options, shape, dtype=torch.float64):
    one_process({**options, "shard_state": "none"}, shape, 3, dtype)  # once, and not by every rank at once
    wrong = simulate(case.world, errors, case, {**options, **OWNERS}, shape, 3, dtype)
    assert not any(wrong), "\n".join(line for lines in wrong for line in lines)


FOUR = {rule: RULES[rule] for rule in ("dion 1/2", "dion columns", "dion_tail 1/4", "muon")}


@pytest.mark.parametrize(("options", "case"), in_turn(FOUR, CASES, 2))
def test_matrices(options, case):
    check(case, options, SHAPES["prime"])


@pytest.mark.parametrize("shape", ["tiny", "fewer rows than shards", "tall"])
@pytest.mark.parametrize("rule", ["dion full", "muon"])
def test_other_shapes_in_float32(rule, shape):
    check(CASES["hsdp 3x2"], RULES[rule], SHAPES[shape], torch.float32)


@pytest.mark.parametrize("case", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("rule", ["dion 1/2", "muon"])
def test_experts(rule, case):
    check(case, RULES[rule], EXPERT_SHAPES["experts"])


OF_VIEWS = {name: VIEWS[name] for name in ("heads", "heads and less", "interleaved", "fused Conv1D", "conv 2-D")}
ON = {name: LAYOUTS[name] for name in ("ddp x3", "hsdp 2x2", "replicas 2, fsdp 2 within tp 2")}


@pytest.mark.parametrize(("row", "case"), in_turn(OF_VIEWS, ON, 2))
def test_views(row, case):
    expected(row, torch.float64, CHOSEN)
    wrong = simulate(case.world, view_errors, case, row, torch.float64, ("dion 1/2", "dion columns", "normuon"))
    assert not any(wrong), wrong


# Buckets of several sizes, frozen and added parameters, and one that no rule but AdamW treats.
MIXED = [(8, 6), (8, 6), (5, 9), (8, 6), (3, 4, 6), (5, 9), (8, 6), (7,)]
EVERY = range(len(MIXED))


def start(placed=torch.clone):
    return [nn.Parameter(placed(tensors(shape, 1, torch.float64, seed=i)[0][0])) for i, shape in enumerate(MIXED)]


def grouped(parameters, numbers, rule="dion", **options):
    named = [(f"w{i}", parameters[i]) for i in numbers if parameters[i].ndim > 1]
    vectors = [(f"w{i}", parameters[i]) for i in numbers if parameters[i].ndim == 1]
    groups = [{"params": named, "rule": rule, "lr": 0.05, **options}]
    return groups + ([{"params": vectors, "rule": "adamw"}] if vectors else [])


def give(parameters, step, placed=torch.clone, absent=()):
    """Fixed gradients; none where ``absent`` says so."""
    for i, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        drawn = torch.randn(MIXED[i], generator=generator, dtype=torch.float64)
        p.grad = placed(drawn) if p.requires_grad and i not in absent else None


class World:
    """Parameters in owner mode on this rank, and their twins in one process."""

    def __init__(self, case, rule="dion", numbers=EVERY, **options):
        self.case = case
        self.mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
        self.parameters, self.twins = start(self.placed), start()
        group = None if case.places else self.mesh.get_group()
        self.optimizer = RuleOptimizer(
            grouped(self.parameters, numbers, rule, **OWNERS, **options), process_group=group
        )
        self.reference = RuleOptimizer(grouped(self.twins, numbers, rule))

    def placed(self, whole):
        return place(whole, self.mesh, self.case)

    def steps(self, first, last, absent=()):
        for step in range(first, last):
            give(self.parameters, step, self.placed, absent)
            give(self.twins, step, absent=absent)
            self.optimizer.step()
            self.reference.step()

    def check(self):
        for i, (p, twin) in enumerate(zip(self.parameters, self.twins, strict=True)):
            assert torch.allclose(local(p), local(self.placed(twin.detach())), rtol=0, atol=1e-9), f"w{i}"

    def saved(self):
        """The state dict, which is that of one process."""
        saved, expected = self.optimizer.state_dict(), self.reference.state_dict()
        assert saved["state"].keys() == expected["state"].keys()
        for number, held in expected["state"].items():
            assert saved["state"][number].keys() == held.keys()
            for name, value in held.items():
                got = saved["state"][number][name]
                whole = got.full_tensor() if hasattr(got, "full_tensor") else got
                assert torch.allclose(whole, value, rtol=0, atol=1e-9), (number, name)
        return saved

    def kept(self):
        """The numbers of the matrices whose state is here."""
        return [i for i, p in enumerate(self.parameters) if p.ndim > 1 and self.optimizer.state[p]]


DDP, HSDP = Case((3,), (), ()), Case((2, 2), (R, S0), ((1, 0),))
WORLDS = {"ddp x3": DDP, "hsdp 2x2": HSDP}


def frozen_and_added(rank, case):
    """Which matrices are whose, before and after; all ranks freeze and add alike."""
    world = World(case, numbers=range(5))
    world.steps(0, 2)
    before = world.kept()
    for p in (world.parameters[1], world.twins[1]):
        p.requires_grad_(False)
    world.steps(2, 3)
    world.optimizer.add_param_group(grouped(world.parameters, range(5, 8), **OWNERS)[0])
    world.reference.add_param_group(grouped(world.twins, range(5, 8))[0])
    for p in (world.parameters[1], world.twins[1]):
        p.requires_grad_(True)
    world.steps(3, 6)
    world.check()
    assert [i for i in world.kept() if i < 5] == before
    return world.kept()


@pytest.mark.parametrize("case", WORLDS.values(), ids=WORLDS)
def test_no_state_changes_hands_where_parameters_are_frozen_and_added(case):
    kept = simulate(case.world, frozen_and_added, case)
    rows = [kept[0], kept[2]] if case is HSDP else kept
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 4, 5, 6]


def gaps(rank, case, rule):
    """Gradients absent everywhere split a bucket between and within the shares of its owners; a closure; one bad
    gradient."""
    world = World(case, rule)
    world.steps(0, 1)
    for step, absent in enumerate([(0,), (1, 3), (0, 1, 3), (6,), (0, 1, 2, 3, 4, 5, 6)], 1):
        world.steps(step, step + 1, absent)
    kept = [local(p).clone() for p in world.parameters]
    give(world.parameters, 9, world.placed)
    if rank == 0:
        local(world.parameters[2].grad).view(-1)[0] = torch.nan
    assert world.optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert world.optimizer.skipped_steps == 1
    assert all(torch.equal(local(p), k) for p, k in zip(world.parameters, kept, strict=True))
    world.steps(6, 8)
    world.check()


@pytest.mark.parametrize("rule", ["dion", "muon"])
@pytest.mark.parametrize("case", WORLDS.values(), ids=WORLDS)
def test_missing_and_bad_gradients(case, rule):
    simulate(case.world, gaps, case, rule)


def patterns(rank, seeds):
    """Gradients absent or bad on some replicas: all go on with the mean, to the bit alike."""
    results = []
    for seed in seeds:
        world = World(DDP)
        for step, (absent, bad) in enumerate(pattern(seed, 3)):
            give(world.parameters, step)
            give(world.twins, step)
            for i, (p, twin) in enumerate(zip(world.parameters[:6], world.twins[:6], strict=True)):
                there = int((~absent[i]).sum())
                twin.grad = twin.grad * (torch.nan if bad[i].any() else there / 3) if there else None
                p.grad = None if absent[i, rank] else p.grad
                if bad[i, rank]:
                    p.grad.view(-1)[0] = torch.inf
            world.optimizer.step()
            world.reference.step()
        assert world.optimizer.skipped_steps == world.reference.skipped_steps
        world.check()
        results.append(torch.cat([p.detach().flatten() for p in world.parameters]))
    return torch.cat(results)


def test_random_patterns_of_missing_gradients():
    first, *others = simulate(3, patterns, range(8))
    assert all(torch.equal(first, other) for other in others)


def averaging(rank):
    """Each replica brings its own gradients, and the optimizer averages them."""
    world = World(DDP, replica_sync="gradients")
    for step in range(4):
        every = []
        for replica in range(3):
            give(world.parameters, 10 * step + replica)
            every.append([p.grad for p in world.parameters])
        for i, (p, twin) in enumerate(zip(world.parameters, world.twins, strict=True)):
            twin.grad = torch.stack([gradients[i] for gradients in every]).mean(0)
            p.grad = every[rank][i] if i < 7 else twin.grad
        world.optimizer.step()
        world.reference.step()
    world.check()


def test_gradients_that_the_optimizer_averages():
    simulate(3, averaging)


def one_for_many(rank):
    """One matrix, many replicas: those without any state count steps as the others do, from the first on."""
    mesh = init_device_mesh("cpu", (3,))
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = Dion([("w", p)], process_group=mesh.get_group(), drift_check=2, **OWNERS)
    p.grad, optimizer.param_groups[0]["lr"] = torch.zeros(4, 3), 0.0
    optimizer.step()  # as torch.distributed.checkpoint makes state
    optimizer.param_groups[0]["lr"] = 0.02
    for step in range(5):
        p.grad = torch.full((4, 3), float(step))
        optimizer.step()
    return p.detach(), step_cost(optimizer.plan(), optimizer.param_groups).state, optimizer._steps


def test_a_replica_without_any_state_goes_on_with_the_others():
    (first, held, steps), *others = simulate(3, one_for_many)
    assert (held, steps) == (4 * (12 + 4), 5)
    for weight, state, count in others:
        assert torch.equal(first, weight)
        assert (state, count) == (0, 5)


def saving(rank, case, rule):
    """What is saved is what one process would save; it goes on to the bit, and each keeps its own share."""
    world = World(case, rule)
    world.steps(0, 3)
    live = [dict(world.optimizer.state[p]) for p in world.parameters]
    saved = world.saved()
    now = [world.optimizer.state[p] for p in world.parameters]
    assert all(a[k] is b[k] for a, b in zip(live, now, strict=True) for k in a), "the live state is untouched"

    file = io.BytesIO()
    if not case.places:
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    twin = World(case, rule)
    with torch.no_grad():
        for p, q in zip(twin.parameters, world.parameters, strict=True):
            p.copy_(q)
    twin.optimizer.load_state_dict(saved)
    assert twin.kept() == world.kept(), "the share of others is not kept until the next step"
    copied = copy.deepcopy(world.optimizer)
    for step in range(3, 6):
        for each in (world, twin):
            give(each.parameters, step, each.placed)
            each.optimizer.step()
    for p, q in zip(twin.parameters, world.parameters, strict=True):
        assert torch.equal(local(p), local(q))
    originals = [p for group in copied.param_groups for p in group["params"]]
    for step in range(3, 6):
        give(originals, step, world.placed)
        copied.step()
    for p, q in zip(originals, world.parameters, strict=True):
        assert torch.equal(local(p), local(q))
    alone = start()
    single = RuleOptimizer(grouped(alone, EVERY, rule))
    if not case.places:
        single.load_state_dict(saved)
        single.initialize_state()
        for i, p in enumerate(alone):
            for name, value in single.state[p].items():
                assert torch.equal(value, saved["state"][i][name])


@pytest.mark.parametrize("rule", ["dion", "muon"])
@pytest.mark.parametrize("case", WORLDS.values(), ids=WORLDS)
def test_state_is_saved_as_without_the_mode_and_resumes_to_the_bit(case, rule):
    simulate(case.world, saving, case, rule)


def frozen_and_saved(rank, case):
    """Gradual unfreezing: saved, resumed and converted while two matrices are frozen, each with another owner."""
    world = World(case)
    world.steps(0, 3)
    kept, copied = world.kept(), World(case)

    def train(*worlds, on):
        for each in worlds:
            for i in (0, 1):
                each.parameters[i].requires_grad_(on)
                each.twins[i].requires_grad_(on)

    train(world, copied, on=False)
    saved = world.saved()
    assert not world.parameters[0].requires_grad
    with torch.no_grad():
        for p, q in zip(copied.parameters, world.parameters, strict=True):
            p.copy_(q)
    copied.optimizer.load_state_dict(saved)
    train(world, copied, on=True)
    for each in (world, copied):
        give(each.parameters, 3, each.placed)
        each.optimizer.step()
    assert all(torch.equal(local(p), local(q)) for p, q in zip(copied.parameters, world.parameters, strict=True))
    assert world.kept() == copied.kept() == kept
    give(world.twins, 3)
    world.reference.step()
    train(world, on=False)
    for optimizer in (world.optimizer, world.reference):
        optimizer.convert_state("int8")
    train(world, on=True)
    world.steps(4, 6)
    world.check()


@pytest.mark.parametrize("case", WORLDS.values(), ids=WORLDS)
def test_state_of_frozen_matrices_is_saved_and_converted_too(case):
    simulate(case.world, frozen_and_saved, case)


def other_way(rank):
    """A state dict of a run without the mode, into one with it: the mode is how it was built, not what it reads."""
    world = World(DDP)
    world.steps(0, 2)
    saved = world.reference.state_dict()
    for group in saved["param_groups"]:
        group.update(replica_sync="factors", reduce_dtype="bfloat16", replica_compute="repeat")
    world.optimizer.load_state_dict(saved)
    assert world.optimizer.param_groups[0]["shard_state"] == "zero1"
    world.steps(2, 5)
    world.check()
    return world.kept()


def test_state_of_a_run_without_the_mode_is_shared_out():
    assert sorted(i for kept in simulate(3, other_way) for i in kept) == list(range(7))


def switched_off(rank, numbers):
    """With one matrix its owner has all it needs, and is told as the others are."""
    world = World(DDP, numbers=numbers)
    world.steps(0, 1)
    before = [p.detach().clone() for p in world.parameters]
    world.optimizer.param_groups[0]["shard_state"] = "none"
    give(world.parameters, 1)
    with pytest.raises(ValueError, match="'w0' is at one replica"):
        world.optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(world.parameters, before, strict=True))
    world.optimizer.param_groups[0]["shard_state"] = "zero1"
    world.steps(1, 3)
    for i in numbers:
        assert torch.allclose(world.parameters[i], world.twins[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("numbers", [(0,), EVERY], ids=str)
def test_the_mode_does_not_end_in_the_midst_of_a_run(numbers):
    simulate(3, switched_off, numbers)


def pickled(rank):
    world = World(DDP)
    world.steps(0, 1)
    with pytest.raises(TypeError, match="called on all ranks together"):
        pickle.dumps(world.optimizer)
    return world.optimizer.explain()


def test_a_share_is_not_pickled_and_what_travels_is_explained():
    for text in simulate(3, pickled):
        assert "published by owners over replicas=3" in text


def bytes_and_state(rank, options):
    mesh = init_device_mesh("cpu", (4,))
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for _ in range(12) for shape in shapes]
    optimizer = Dion(parameters, process_group=mesh.get_group(), replica_compute="split", **options)
    cost = step_cost(optimizer.plan(), optimizer.param_groups)
    return cost.state, float(cost.wire), cost.flops, cost.memory


def test_a_quarter_of_the_state_of_gpt2_small_over_four_replicas():
    """Momenta and bases of 12 layers, written down; what is sent is P and the new Q, without the norms."""
    everything = simulate(4, bytes_and_state, {})[0]
    share = simulate(4, bytes_and_state, OWNERS)
    matrices = 12 * (2304 * 768 + 768 * 768 + 2 * 3072 * 768)
    bases = 12 * 192 * (2304 + 768 + 3072 + 768)
    sent = 3 * 3 * 4 * 192 * ((2304 + 768) + 2 * 768 + 2 * (3072 + 768))  # 3 matrices of each shape, to 3 others
    for state, wire, flops, memory in share:
        assert state == matrices + bases  # a quarter, at 4 bytes
        assert wire == sent
        # error feedback at the owner alone, weights at every replica
        assert flops == everything[2] - 3 / 4 * 2 * 192 * matrices
        assert memory < everything[3]
    assert everything[0] == 4 * (matrices + bases)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replica_sync": "factors"}, "keep the momentum of their own gradients"),
        ({"replica_sync": "auto"}, "keep the momentum of their own gradients"),
        ({"replica_compute": "repeat"}, "no state to repeat the work of others"),
        ({"shard_state": "all"}, "shard_state='all' is unknown; choose one of 'none', 'zero1'"),
        ({"process_group": None}, "say which ranks hold the same plain tensors"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, sentence):
    def refused(rank):
        group = init_device_mesh("cpu", (2,)).get_group()
        with pytest.raises(ValueError, match=sentence):
            RuleOptimizer(start()[:2], **{"process_group": group, **OWNERS, **options})
        assert RuleOptimizer(start()[7:], rule="adamw", **OWNERS)  # every replica keeps this

    simulate(2, refused)


def trained(rank, shape, rule):
    """A model under DDP or HSDP with and without the mode: weights, bytes of momenta and bases, bytes sent a step."""
    results = []
    for mode in ("none", "zero1"):
        model = nn.Sequential(Block(), Block())
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "fsdp")[: len(shape)])
        held = nn.parallel.DistributedDataParallel(model) if len(shape) == 1 else fully_shard(model, mesh=mesh)
        optimizer = rule(held, lr=0.05, shard_state=mode)
        learn([held], optimizer, 0, 4)
        before = optimizer.bytes_sent
        learn([held], optimizer, 4, 5)
        sent = optimizer.bytes_sent - before
        plan = optimizer.plan()
        assert sent == step_cost(plan, optimizer.param_groups).wire + agreement_bytes(plan)
        state = [v for p, held in optimizer.state.items() if p.ndim == 2 for v in held.values()]
        results.append(({n: p.tolist() for n, p in whole(model).items()}, sum(local(v).nbytes for v in state)))
    return results


def test_on_gloo_with_models_that_torch_itself_replicates():
    """Four matrices on four processes: each keeps one under DDP, under HSDP half of two."""
    table = (errors, (CASES["hsdp 2x2"], {**RULES["dion 1/2"], **OWNERS}, SHAPES["prime"], 3, torch.float64))
    meshes = [(shape, rule) for rule in (Dion, Muon) for shape in ((4,), (2, 2))]
    tabled, *found = run_processes(4, [table, *((trained, mesh) for mesh in meshes)])
    assert tabled == [[]] * 4, tabled
    for results, (shape, _) in zip(found, meshes, strict=True):
        share = shape[0]
        assert all(isinstance(result, list) for result in results), results
        assert share * sum(own for _, (_, own) in results) == sum(everything for (_, everything), _ in results)
        for result in results:
            (weights, everything), (others, own) = result
            assert own <= 1.1 * everything / share  # bases of (20, 8) and (8, 20) differ in size
            for name, value in weights.items():
                assert torch.allclose(torch.tensor(value), torch.tensor(others[name]), rtol=0, atol=1e-9), name
