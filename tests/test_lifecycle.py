"""An optimizer over its life: options handed down, wrappers, freezing, copies, loading what does not fit."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import orthoshard
from orthoshard import Dion, Dion3, DionTail, LoRAMuon, Muon, NorMuon, RowNorm, RuleOptimizer, param_groups
from orthoshard.groups import COMMON, DEPLOYMENT, OF_GROUPS, group_rule
from orthoshard.rules import RULES


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))


def step(net, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()


def group_of(optimizer, role):
    return next(group for group in optimizer.param_groups if group["role"] == role)


def test_groups_without_a_rule_take_the_optimizers():
    group = group_of(Muon(param_groups(model()), lr=0.1, momentum=0.5), "matrix")
    assert (group["rule"], group["lr"], group["momentum"]) == ("muon", 0.1, 0.5)


def test_options_reach_every_group_whose_rule_reads_them():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Dion([{"params": [p], "rule": "muon"}, {"params": [q]}], momentum=0.5, weight_decay=0.3, lr=0.07)
    muon, dion = optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"], muon["lr"]) == (0.5, 0.3, 0.02)
    assert (dion["momentum"], dion["weight_decay"], dion["lr"]) == (0.5, 0.3, 0.07)
    assert group_of(Dion(model(), fused=False), "bias")["fused"] is False


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        Dion(model(), differentiable=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda net, lr: Dion(net, lr=lr),
        lambda net, lr: Muon(net, lr=lr, scalar_lr=lr, capturable=True),
        lambda net, lr: Dion(param_groups(net, matrix="dion", lr=lr, scalar_lr=lr)),
        lambda net, lr: RuleOptimizer([{"params": [p], "lr": lr, "rule": "lion"} for p in net.parameters()]),
    ],
)
def test_schedulers_halve_a_tensor_lr_once_in_every_group(make):
    lr = torch.tensor(0.5)
    optimizer = make(nn.Sequential(nn.Linear(6, 8), nn.MultiheadAttention(8, 2)), lr)
    before = [float(group["lr"]) for group in optimizer.param_groups]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(rate / 2) for rate in before]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]})
    assert float(lr) == 0.5, "what the user gave is not ours to fill"


def test_a_tensor_decay_is_each_groups_own():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    first, second = Muon([{"params": [p]}, {"params": [q]}], weight_decay=torch.tensor(0.5)).param_groups
    first["weight_decay"].mul_(0.5)
    assert float(second["weight_decay"]) == 0.5


@pytest.mark.parametrize("make", [Dion, Muon, lambda net: RuleOptimizer(net, rule="adamw")])
def test_what_is_unfrozen_later_trains_as_if_it_had_not_been_frozen(make):
    """Layer after layer, as Lightning's BaseFinetuning does it. Frozen tables of whole numbers stay out."""
    net, whole = model(), model()
    net.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    optimizer, other = make(net), make(whole)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [group["param_names"] for group in other.param_groups]
    still = [net[0].weight.detach().clone(), net[2].bias.detach().clone()]
    step(net, optimizer)
    assert torch.equal(still[0], net[0].weight)
    assert net[0].weight not in optimizer.state
    loaded = make(net)
    loaded.load_state_dict(optimizer.state_dict())
    net[0].requires_grad_(True)
    net[2].bias.requires_grad_(True)
    step(net, loaded, seed=1)
    step(whole, other, seed=1)
    assert torch.equal(net[0].weight, whole[0].weight), "its first step"
    assert not torch.equal(still[1], net[2].bias)


def test_lora_leaves_the_frozen_model_without_state():
    net = model().requires_grad_(False)
    net.lora_A = nn.Parameter(torch.ones(2, 6))
    optimizer = Dion(net, capturable=True)
    net.lora_A.grad = torch.ones(2, 6)
    optimizer.step()
    assert list(optimizer.state) == [net.lora_A]
    assert len(optimizer.state_dict()["state"]) == 1


def test_groups_without_names_get_names():
    """Beside named ones, before named ones, and after one was taken out; equal names are equal bases."""
    p, q, r = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    optimizer = Muon(model())
    optimizer.add_param_group({"params": q})
    assert optimizer.param_groups[-1]["param_names"] == [f"group {len(optimizer.param_groups) - 1}, parameter 0"]
    optimizer = Dion([p])
    optimizer.add_param_group({"params": [("q", q)]})
    optimizer.add_param_group({"params": [r]})
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["group 0, parameter 0"],
        ["q"],
        ["group 2, parameter 0"],
    ]
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": [q]})
    assert optimizer.param_groups[-1]["param_names"] == ["group 3, parameter 0"]


SIGNED = {
    "dion": Dion,
    "dion_tail": DionTail,
    "muon": Muon,
    "normuon": NorMuon,
    "dion3": Dion3,
    "row_norm": RowNorm,
    "lora_muon": LoRAMuon,
}


@pytest.mark.parametrize("rule", SIGNED)
def test_signatures_and_docstrings_say_the_defaults_of_the_rules(rule):
    shown = inspect.signature(SIGNED[rule]).parameters
    theirs = {**inspect.signature(param_groups).parameters, **inspect.signature(RuleOptimizer).parameters}
    expected = {
        **{key: parameter.default for key, parameter in theirs.items()},
        **{key: value for key, value in COMMON.items() if key not in OF_GROUPS},
        **RULES[rule].options(),
        **{key: inspect.signature(param_groups).parameters[key].default for key in ("scalar", "scalar_weight_decay")},
    }
    unsaid = {"params", "rule", "options", "model", "matrix", "differentiable"}
    assert {key: parameter.default for key, parameter in shown.items() if key != "params"} == {
        key: value for key, value in expected.items() if key not in unsaid
    }
    said = " ".join((SIGNED[rule].__doc__ or "").split())
    for key, parameter in list(shown.items())[1:]:
        assert parameter.annotation != inspect.Parameter.empty
        # The argument, what it means, and its default before the next argument begins.
        assert re.search(rf" {key}: (?:(?! Default: ).)+ Default: {re.escape(repr(parameter.default))}\.", said), key


def test_what_was_not_said_leaves_other_rules_their_defaults():
    """Options reach groups of other rules where they were given, also with the value that is the default here."""
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "rule": "adamw"}]
    assert Dion(copy.deepcopy(groups)).param_groups[1]["weight_decay"] == 0.0
    assert Dion(copy.deepcopy(groups), weight_decay=0.01).param_groups[1]["weight_decay"] == 0.01


@pytest.mark.parametrize("make", [Dion, Muon, lambda net, **k: Dion(param_groups(net, **k))])
def test_options_of_what_is_no_matrix(make):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    optimizer = make(net, scalar_lr=0.3, scalar_weight_decay=0.2, scalar_betas=(0.8, 0.9))
    for role in ("embedding", "bias"):
        group = group_of(optimizer, role)
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.3, 0.2, (0.8, 0.9))
    assert group_of(optimizer, "matrix")["weight_decay"] == 0.01
    assert group_of(make(net), "embedding")["betas"] == (0.95, 0.98)


@pytest.mark.parametrize("make", [Dion, Muon, lambda net, **k: Dion(param_groups(net, **k))])
def test_overrides_of_a_model(make):
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = make(net, overrides={"1.*": {"lr_factor": 2.0}})
    factors = {name: group["lr_factor"] for group in optimizer.param_groups for name in group["param_names"]}
    assert factors == {"0.weight": 1.0, "1.weight": 2.0}
    with pytest.raises(ValueError, match=r"2\.weight"):
        make(net, overrides={"2.weight": {"lr_factor": 2.0}})


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize(("make", "lost"), [(Dion, ""), (Dion, ".Q"), (Muon, ".momentum"), (Muon, "")])
@pytest.mark.parametrize("name", ["1.weight", "2.bias"])
def test_a_hole_in_a_flattened_checkpoint_is_named(make, lost, name):
    net = model()
    optimizer = make(net)
    step(net, optimizer)
    lost = "" if name == "2.bias" else lost
    saved = get_optimizer_state_dict(net, optimizer, options=FLAT)
    holed = {key: value for key, value in saved.items() if not key.startswith(f"state.{name}{lost}")}
    fresh = model()
    with pytest.raises(ValueError, match=f"the state of parameter '{name}' has no '.*freeze it while loading"):
        set_optimizer_state_dict(fresh, make(fresh), holed, options=FLAT)
    fresh.get_parameter(name).requires_grad_(False)
    resumed = make(fresh)
    set_optimizer_state_dict(fresh, resumed, holed, options=FLAT)
    fresh.get_parameter(name).requires_grad_(True)
    step(fresh, resumed)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("make", [Dion, Muon])
def test_a_checkpoint_of_another_grouping_brings_no_names(make, split):
    def grouped(net, apart):
        layers = [[net[0].weight], [net[1].weight]] if apart else [[net[0].weight, net[1].weight]]
        names = {id(p): name for name, p in net.named_parameters()}
        return make([{"params": [(names[id(p)], p) for p in layer]} for layer in layers])

    net, fresh = model().requires_grad_(False), model().requires_grad_(False)
    for each in (net, fresh):
        each[0].weight.requires_grad_(True)
        each[1].weight.requires_grad_(True)
    optimizer, resumed = grouped(net, not split), grouped(fresh, split)
    step(net, optimizer)
    fresh.load_state_dict(net.state_dict())
    ours = [group["param_names"] for group in resumed.param_groups]
    set_optimizer_state_dict(fresh, resumed, get_optimizer_state_dict(net, optimizer, options=FLAT), options=FLAT)
    assert [group["param_names"] for group in resumed.param_groups] == ours
    step(net, optimizer, seed=1)
    step(fresh, resumed, seed=1)
    assert torch.equal(net[0].weight, fresh[0].weight)
    assert torch.equal(net[1].weight, fresh[1].weight)


def layers(order):
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in order})


def grouped(net, *groups):
    members = dict(net.named_parameters())
    return [{"params": [(f"{n}.weight", members[f"{n}.weight"]) for n in names], "name": names} for names in groups]


@pytest.mark.parametrize("make", [Dion, lambda params: RuleOptimizer(params, rule="adamw")])
@pytest.mark.parametrize(
    ("there", "here"),
    [(["abc"], ["cab"]), (["ab", "c"], ["c", "ba"]), (["abc"], ["b", "ca"]), (["a", "b", "c"], ["c", "a", "b"])],
)
def test_state_goes_to_the_parameter_of_its_name(make, there, here):
    """Whatever the order of layers and groups; the options of a group go with its parameters."""
    net, fresh = layers("abc"), layers("cba")
    optimizer, resumed = make(grouped(net, *there)), make(grouped(fresh, *here))
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.1 + number
    step(net, optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    for name, p in net.named_parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[fresh.get_parameter(name)][key]), (name, key)
    for group, names in zip(resumed.param_groups, here, strict=True):
        source = next(other for other in optimizer.param_groups if names[0] in other["name"])
        assert (group["lr"], group["param_names"]) == (source["lr"], [f"{name}.weight" for name in names])


def test_other_names_go_by_position_and_a_group_of_several_is_refused():
    net, fresh = layers("abc"), layers("xyz")
    optimizer, resumed = Dion(net), Dion(fresh)
    step(net, optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], resumed.state[q]["momentum"])
    mixed = Dion(grouped(net, "ac", "b"))
    with pytest.raises(ValueError, match=r"'a.weight' and 'c.weight', which this state has in two groups"):
        mixed.load_state_dict(Dion(grouped(net, "a", "bc")).state_dict())


RAN = [
    {"replica_sync": "factors", "reduce_dtype": "bfloat16", "replica_compute": "repeat", "shard_compute": "in_place"},
    {"shard_state": "zero1", "replica_sync": "gradients", "rounding": "stochastic", "state_offload": True},
    {"capturable": True, "scalar": "adamw", "shard_compute": "dealt"},
]


@pytest.mark.parametrize("here", RAN, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("there", [*RAN, "zzz"], ids=str)
def test_how_a_step_runs_is_as_the_optimizer_was_built(there, here):
    """Whatever the checkpoint says of it; what a step computes comes from the checkpoint."""
    net, fresh = model(), model()
    saved = Dion(net, momentum=0.7, **({} if there == "zzz" else there)).state_dict()
    for group in saved["param_groups"] if there == "zzz" else ():
        group.update(dict.fromkeys(DEPLOYMENT, "zzz"))
    optimizer = Dion(fresh, **here)
    before = [{key: group[key] for key in DEPLOYMENT} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert [{key: group[key] for key in DEPLOYMENT} for group in optimizer.param_groups] == before
    assert group_of(optimizer, "matrix")["momentum"] == 0.7
    step(fresh, optimizer)


@pytest.mark.parametrize("rule", ["dion", "muon", "adamw", "lion"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_tensor_lr_is_a_number_to_every_kernel(rule, strided):
    weights = []
    for lr in (0.1, torch.tensor(0.1)):
        p = nn.Parameter(torch.arange(12.0).view(4, 3).T if strided else torch.arange(12.0).view(3, 4))
        optimizer = RuleOptimizer([p], rule=rule, lr=lr)
        p.grad = torch.ones(3, 4)
        optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_a_compiled_model_has_the_same_names_and_bases():
    plain = Dion(model())
    compiled = Dion(torch.compile(model()))
    names = [[name for group in o.param_groups for name in group["param_names"]] for o in (plain, compiled)]
    assert names[0] == names[1]
    plain.initialize_state()
    compiled.initialize_state()
    p, q = (next(p for p in group_of(o, "matrix")["params"]) for o in (plain, compiled))
    assert torch.equal(plain.state[p]["Q"], compiled.state[q]["Q"])


def test_state_of_frozen_parameters_survives_loading_and_thawing():
    net = model()
    optimizer = Dion(net)
    step(net, optimizer)
    frozen = net[1].weight
    kept = {key: value.clone() for key, value in optimizer.state[frozen].items()}
    bucket = [weakref.ref(value.untyped_storage()) for value in optimizer.state[frozen].values()]
    frozen.requires_grad_(False)
    step(net, optimizer, 1)
    assert all(torch.equal(value, optimizer.state[frozen][key]) for key, value in kept.items())
    assert not any(ref() for ref in bucket), "it keeps a whole bucket alive"
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(value, optimizer.state[frozen][key]) for key, value in kept.items())
    frozen.requires_grad_(True)
    step(net, optimizer, 2)
    assert not torch.equal(optimizer.state[frozen]["momentum"], kept["momentum"])


def move_data(held, key):
    """As `v.data = v.data.to(device)` in prime-rl and others."""
    held[key].data = held[key].data.clone()


def move_edited(held, key):
    held[key].data = held[key].data * 0.5


def replace(held, key):
    """As `state[p][k] = v.to(device)` in verl and others."""
    held[key] = held[key].clone()


def exchange(held, key):
    torch.utils.swap_tensors(held[key], held[key].clone())


def set_elsewhere(held, key):
    held[key].set_(held[key].clone())


def share(held, key):
    held[key].share_memory_()


def move_in_another_dtype(held, key):
    held[key].data = held[key].data.double()


MOVES = [move_data, move_edited, replace, exchange, set_elsewhere, share, move_in_another_dtype]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "adamw", "lion"])
def test_state_that_was_moved_is_what_steps_use_and_what_is_saved(rule, move):
    net, other = model(), model()
    optimizer, resumed = (RuleOptimizer(n, rule=rule, lr=0.02) for n in (net, other))
    step(net, optimizer)
    for held in optimizer.state.values():
        for key in held:
            move(held, key)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(net, optimizer, seed)
        step(other, resumed, seed)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, resumed.state[q][key]) for key, value in optimizer.state[p].items())


@pytest.mark.parametrize("move", [move_data, replace, exchange, set_elsewhere])
def test_state_that_was_moved_away_leaves_no_memory_behind(move):
    net = model()
    optimizer = Dion(net)
    step(net, optimizer)
    memory = [weakref.ref(v.untyped_storage()) for held in optimizer.state.values() for v in held.values()]
    for held in optimizer.state.values():
        for key in held:
            move(held, key)
    assert not any(ref() for ref in memory)


@pytest.mark.parametrize("rule", ["dion", "muon", "adamw"])
def test_a_state_tensor_is_saved_and_copied_in_its_own_size(rule):
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    optimizer = RuleOptimizer(net, rule=rule)
    step(net, optimizer)
    for value in optimizer.state[net[3].weight].values():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        assert len(buffer.getvalue()) < value.nbytes + 4000
        assert copy.deepcopy(value).untyped_storage().nbytes() == value.nbytes


def emptied(net):
    net.to_empty(device="cpu")
    net.load_state_dict(model().state_dict())


def assigned(net):
    net.load_state_dict(model().state_dict(), assign=True)


@pytest.mark.parametrize("materialize", [emptied, assigned])
@pytest.mark.parametrize("options", [{"rule": "dion"}, {"rule": "muon", "capturable": True}, {"rule": "adamw"}])
def test_parameters_left_behind_on_meta_are_named(options, materialize):
    with torch.device("meta"):
        net = model()
    optimizer = RuleOptimizer(net, **options)
    materialize(net)
    net(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' is still on meta"):
        optimizer.step()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_counters_and_take_new_groups(clone):
    net = model()
    optimizer = Dion(net, weight_decay=0.3)
    net[0].weight.grad = torch.full((8, 6), torch.nan)
    optimizer.step()
    other = clone(optimizer)
    assert (other.skipped_steps, other.skipped_in_a_row) == (1, 1)
    other.add_param_group({"params": [("new", nn.Parameter(torch.ones(4, 4)))]})
    assert other.param_groups[-1]["weight_decay"] == 0.3
    assert len(optimizer.param_groups) == len(other.param_groups) - 1


def test_another_rules_state_is_refused():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match="saved under rule 'muon', and is 'dion' here"):
        Dion([p]).load_state_dict(Muon([q]).state_dict())


def test_state_that_is_not_complete_is_refused():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Dion([p])
    optimizer.initialize_state()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["momentum"]
    with pytest.raises(ValueError, match=r"no 'momentum': it is not complete"):
        optimizer.load_state_dict(saved)


def test_names():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match="two parameters are named 'a'"):
        Dion([("a", p), ("a", q)])
    with pytest.raises(ValueError, match="two parameters are named 'a'"):
        Dion([{"params": [("a", p)]}, {"params": [("a", q)]}])
    with pytest.raises(ValueError, match="2 parameters and 1 names"):
        Dion([{"params": [p, q], "param_names": ["a"]}])


def test_roles_that_are_easily_mistaken():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(8, 50, bias=False)
            self.table = nn.Embedding(50, 8)
            self.positions = nn.Embedding(32, 8)
            self.pos_embed = nn.Parameter(torch.zeros(32, 8))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.bags = nn.EmbeddingBag(5, 8)
            self.gate = nn.Linear(8, 1, bias=False)
            self.lstm = nn.LSTM(8, 8)
            self.out = nn.Linear(8, 32, bias=False)

    roles = {name: group["role"] for group in param_groups(Net()) for name in group["param_names"]}
    assert roles["lm_head.weight"] == "head"
    assert roles["cls_token"] == roles["bags.weight"] == "embedding"
    assert roles["pos_embed"] == roles["positions.weight"] == "position"
    assert roles["gate.weight"] == "router"
    assert roles["lstm.bias_ih_l0"] == "bias"
    assert roles["out.weight"] == roles["lstm.weight_ih_l0"] == "matrix"


def test_a_plan_is_made_once_for_what_it_is_made_of(monkeypatch):
    planned, build = [], orthoshard.prepared.build_plan
    monkeypatch.setattr(
        orthoshard.prepared, "build_plan", lambda groups, *rest: planned.append(len(groups)) or build(groups, *rest)
    )
    optimizer = Dion([{"params": [nn.Parameter(torch.ones(4, 4))]} for _ in range(40)])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.eye(4)
    optimizer.step()
    optimizer.explain()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = 0.1, 0.9  # as schedulers do
    optimizer.step()
    assert planned == [40]
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    assert len(optimizer.plan().entries) == 39
    optimizer.step()
    assert planned == [40, 40]
    optimizer.param_groups[1]["replica_compute"] = "repeat"
    optimizer.step()
    optimizer.param_groups[2]["param_names"] = ["other"]
    assert any(entry.name == "other" for entry in optimizer.plan().entries)
    assert len(planned) == 4


def test_a_rule_is_remembered_while_its_group_stays_as_it_is():
    group = Dion(nn.Linear(4, 4)).param_groups[0]
    assert group_rule(group) is group_rule(group)
    assert group_rule({**group, "lr": 0.5}).lr == 0.5
    with pytest.raises(TypeError):
        group_rule({**group, "momentum": True})
    for betas in ([0.9, 0.95], (0.9, 0.95)):
        assert "adamw" in Dion(nn.Linear(4, 4), scalar_betas=betas).explain()
