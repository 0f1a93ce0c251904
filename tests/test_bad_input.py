"""Bad input gets one clear sentence that says what to do, before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import orthoshard
from orthoshard import Dion, DionTail, Muon, RuleOptimizer, param_groups
from orthoshard.compat import torch_muon
from orthoshard.rules import RULES


def fresh_state(optimizer):
    optimizer.initialize_state()
    return optimizer.state_dict()


def matrix(m=6, n=4):
    return nn.Parameter(torch.randn(m, n, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"rank_fraction": 0.0}, ValueError, r"rank_fraction=0.0 is outside \(0, 1\]"),
        ({"rank_fraction": 1.5}, ValueError, r"rank_fraction=1.5 is outside"),
        ({"rank_fraction": float("nan")}, ValueError, r"rank_fraction=nan is outside"),
        ({"rank_fraction": "big"}, TypeError, r"rank_fraction='big' must be a number"),
        ({"lr": float("nan")}, ValueError, r"lr=nan must be a finite number"),
        ({"lr": float("inf")}, ValueError, r"lr=inf must be a finite number"),
        ({"lr": -0.1}, ValueError, r"lr=-0.1 must be a finite number, 0 or larger"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, r"lr=nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be one number"),
        ({"lr": "fast"}, TypeError, r"lr='fast' must be a number, not str"),
        ({"lr": True}, TypeError, r"lr=True must be a number, not bool"),
        ({"weight_decay": -1}, ValueError, r"weight_decay=-1"),
        ({"momentum": 1.0}, ValueError, r"momentum=1.0 is outside \[0, 1\)"),
        ({"rank_multiple_of": 0}, ValueError, r"rank_multiple_of=0 must be a whole number"),
        ({"rank_multiple_of": 2.5}, ValueError, r"rank_multiple_of=2.5 must be a whole number"),
        ({"seed": 1.0}, TypeError, r"seed=1.0 must be a whole number"),
        ({"scale": "unit"}, ValueError, r"scale='unit' is unknown; choose one of 'spectral'"),
        ({"q_side": "left"}, ValueError, r"q_side='left' is unknown"),
        ({"state_dtype": "int4"}, ValueError, r"state_dtype='int4' is unknown"),
        ({"rank_fractoin": 0.5}, ValueError, r"unknown key 'rank_fractoin'; did you mean 'rank_fraction'\?"),
        ({"wire_dtype": "bfloat16"}, ValueError, r"unknown key 'wire_dtype'; did you mean 'reduce_dtype'\?"),
        ({"replica_work": "share"}, ValueError, r"unknown key 'replica_work'; did you mean 'replica_compute'\?"),
        ({"shard_state": "replicas"}, ValueError, r"shard_state='replicas' is unknown; choose one of 'none', 'zero1'"),
        ({"betas": (0.8, 0.9)}, ValueError, r"'betas' means nothing to rule 'dion' \(it belongs to 'adamw', 'lion'\)"),
        (
            {"decay": "hyperball", "weight_decay": 0.1},
            ValueError,
            r"weight_decay=0.1 has no effect: decay='hyperball'",
        ),
        ({"rule": "adan"}, ValueError, r"rule='adan' is unknown; choose one of 'dion', 'dion_tail', 'muon'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_values(options, error, sentence):
    with pytest.raises(error, match=sentence):
        Dion([matrix()], **options)
    optimizer = Dion([matrix()])
    with pytest.raises(error, match=sentence):
        optimizer.add_param_group({"params": [matrix()], **options})
    assert len(optimizer.param_groups) == 1, "a refused group must not stay behind"


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (Dion, {"zzz": 0.5}, "unknown key 'zzz'; 'dion' reads .*rank_fraction"),
        # whatever the value: these are the defaults of the rules that read them
        (Dion, {"betas": (0.9, 0.95)}, "'betas' means nothing to rule 'dion'.*no matrices, set scalar_betas"),
        (Dion, {"eps": 1e-8}, "'eps' means nothing to rule 'dion' .it belongs to 'adamw'"),
        (Dion, {"polar": "jordan"}, "'polar' means nothing to rule 'dion' .it belongs to 'muon'"),
        (DionTail, {"error_feedback": True}, "'error_feedback' means nothing to rule 'dion_tail'"),
        (Muon, {"rank_fraction": 0.25}, "'rank_fraction' means nothing to rule 'muon'"),
        (Muon, {"q_side": "rows"}, "'q_side' means nothing to rule 'muon'"),
        # keys of groups
        (Muon, {"reason": "mine"}, "'reason' is a key of single groups"),
        (Dion, {"role": "matrix"}, "'role' is a key of single groups"),
        # torch.optim's AdamW and Muon, K. Jordan's and Moonlight's Muon, microsoft/dion
        (Dion, {"learning_rate": 0.1}, "did you mean 'lr'"),
        (Dion, {"wd": 0.1}, "did you mean 'weight_decay'"),
        (Dion, {"mu": 0.9}, "did you mean 'momentum'"),
        (Dion, {"rank": 16}, "did you mean 'rank_fraction'"),
        (Muon, {"ns_steps": 5}, "did you mean 'polar'"),
        (Muon, {"adjust_lr_fn": "match_rms_adamw"}, "did you mean 'scale'"),
        (Muon, {"adamw_betas": (0.9, 0.95)}, "did you mean 'scalar_betas'"),
        (Muon, {"adamw_wd": 0.1}, "did you mean 'scalar_weight_decay'"),
        (Dion, {"replicate_mesh": None}, "did you mean 'process_group'"),
        (Dion, {"scalar_lrr": 0.1}, "did you mean 'scalar_lr'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("given", [nn.Linear(4, 4), [matrix()]], ids=["model", "parameters"])
def test_options_that_nothing_reads(make, options, sentence, given):
    with pytest.raises(ValueError, match=sentence):
        make(given, **options)
    if isinstance(given, nn.Module):
        with pytest.raises(ValueError, match=sentence):
            param_groups(given, matrix=make.default_rule, **options)


def test_shares_and_views_of_a_whole_optimizer_are_read_by_nothing():
    with pytest.raises(ValueError, match="'lr_factor' is a key of single groups"):
        Muon(nn.Linear(4, 4), lr_factor=0.5)
    assert Muon([matrix()], view="transposed").param_groups[0]["view"] == "transposed"
    with pytest.raises(ValueError, match=r"'view' is a key of single groups: .* overrides of param_groups"):
        Muon(nn.Linear(4, 4), view="transposed")
    with pytest.raises(ValueError, match="'view' is a key of single groups"):
        param_groups(nn.Linear(4, 4), view="transposed")


HOST_KEYS = {
    "name": "backbone",  # Lightning's LearningRateMonitor
    "group_name": "layer_3",  # mmengine
    "layer_id": 3,
    "initial_lr": 0.1,  # torch's schedulers
    "swa_lr": 0.05,
    "bias_correction": True,  # DeepSpeed
    "is_expert": False,
    "tags": ["vision", "frozen first"],
    "stage": None,
    "zzz": 0.5,
}


@pytest.mark.parametrize("key", HOST_KEYS)
def test_keys_of_hosts_and_users_stay_in_groups(key):
    """Also through a checkpoint that does not know them, and one that does."""
    p = matrix()
    optimizer = Dion([{"params": [p], key: HOST_KEYS[key]}])
    assert optimizer.param_groups[0][key] == HOST_KEYS[key]
    optimizer.load_state_dict(Dion([matrix()]).state_dict())
    assert optimizer.param_groups[0][key] == HOST_KEYS[key]
    other = Dion([matrix()])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][key] == HOST_KEYS[key]


@pytest.mark.parametrize(
    ("key", "meant"),
    {
        "lr_scale": "lr_factor",  # timm
        "lr_mult": "lr_factor",  # Megatron
        "wd_mult": "weight_decay",
        "use_muon": "rule",  # K. Jordan
        "algorithm": "rule",  # microsoft/dion
        "rank": "rank_fraction",  # GaLore
        "weigth_decay": "weight_decay",
        "momentums": "momentum",
        "rankfraction": "rank_fraction",
        "lr_factr": "lr_factor",
    }.items(),
)
@pytest.mark.parametrize("rule", RULES)
def test_slips_and_other_words_in_groups_are_refused(key, meant, rule):
    optimizer = Muon([matrix()])
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        optimizer.add_param_group({"params": [matrix()], "rule": rule, key: 1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("rule", "meant"), [("muon", "momentum"), ("dion", "momentum"), ("adamw", "betas")])
def test_a_word_for_two_things_means_the_one_that_the_rule_reads(rule, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        RuleOptimizer([matrix()], rule=rule, beta1=0.9)
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        RuleOptimizer([{"params": [matrix()], "rule": rule, "mu": 0.9}])


def test_betas_and_eps_of_adamw():
    for options in ({"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RuleOptimizer([matrix()], rule="adamw", **options)


def test_a_vector_in_a_matrix_group_is_refused_with_the_line_that_fixes_it():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'bias' has shape \(4,\), which is no matrix.*Dion\(model\).*rule='adamw'"):
        Dion(model.named_parameters())
    with pytest.raises(ValueError, match=r"group 0, parameter 1"):
        Muon(model.parameters())
    assert Dion(model)


def test_four_dimensions_in_a_matrix_group():
    with pytest.raises(ValueError, match="no matrix"):
        Dion([nn.Parameter(torch.zeros(2, 2, 3, 3))])


def test_integer_and_complex_parameters():
    complex_ = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="only real floating-point parameters"):
        Dion([complex_])
    spectral = nn.Module()  # as in Fourier neural operators
    spectral.linear, spectral.modes = nn.Linear(4, 4), complex_
    with pytest.raises(ValueError, match=r"'modes' is torch.complex64.*leave its group out.*param_groups\(model\)"):
        Muon(spectral)
    rest = [group for group in param_groups(spectral) if not group["params"][0].is_complex()]
    names = [name for group in Dion(rest).param_groups for name in group["param_names"]]
    assert names == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize("rule", [Dion, Muon])
def test_a_weight_that_was_expanded(rule):
    net = nn.Linear(6, 4)
    net.weight = nn.Parameter(torch.randn(1, 6).expand(4, 6))
    with pytest.raises(ValueError, match="'weight' was expanded"):
        rule(net)
    with pytest.raises(ValueError, match=r"'1\.weight' was expanded"):  # another of its shape was not
        rule(nn.Sequential(nn.Linear(6, 4), net))
    net.weight = nn.Parameter(net.weight.detach().clone()[:1].expand(1, 6))
    rule(net)


@pytest.mark.parametrize("rule", RULES)
def test_parameters_of_fewer_than_16_bits(rule):
    net = nn.ModuleDict({"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)})
    net.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"'lora_A.weight' is torch.float8_e4m3fn; only .* of 16 bits or more"):
        RuleOptimizer(net.named_parameters(), rule=rule)
    net.requires_grad_(False)["bias"] = nn.Linear(4, 4)
    assert RuleOptimizer([p for p in net.parameters() if p.ndim == 2], rule=rule if rule != "lora_muon" else "dion")


def test_parameters_in_a_set():
    """Ranks would go through it in different orders."""
    members = {matrix(), matrix()}
    for given in (members, frozenset(members), [{"params": members}]):
        for make in (Dion, torch_muon.Muon):
            with pytest.raises(TypeError, match="in a set, whose order differs between runs and ranks; give a list"):
                make(given)


@pytest.mark.parametrize("make", [Dion, torch_muon.Muon])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_group_stays_behind_whatever_is_raised(make, error, monkeypatch):
    optimizer = make([matrix()])

    def broken(*given):
        raise error

    for wrong in ({"view": None, "rule": "muon"}, {"param_names": [5]}):
        with pytest.raises(TypeError, match=r"must be the name of a view|a name is a str"):
            optimizer.add_param_group({"params": [matrix()], **wrong})
    monkeypatch.setattr(orthoshard.prepared, "build_plan", broken)
    with pytest.raises(error):
        optimizer.add_param_group({"params": [matrix()]})
    assert len(optimizer.param_groups) == 1


def test_what_clipping_is_given():
    net = nn.Linear(2, 2)
    for bound in (-1.0, float("nan"), None):
        with pytest.raises(ValueError, match=f"max_norm={bound} must be a number, 0 or larger; 0 only measures"):
            orthoshard.clip_grad_norm_(net.parameters(), bound)
    for given in (net, nn.Sequential(net), net.named_parameters()):
        with pytest.raises(TypeError, match=r"as model.parameters\(\), not a model"):
            orthoshard.clip_grad_norm_(given, 1.0)
    orthoshard.clip_grad_norm_(net.parameters(), float("inf"))


def test_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Dion(nn.Linear(3, 3).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.ReLU())


def test_the_same_parameter_twice():
    p = matrix()
    with pytest.raises(ValueError, match="twice"):
        Dion([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Dion([{"params": [p]}, {"params": [p]}])


def test_options_of_a_model_without_a_model():
    scalars = ({"scalar": "lion"}, {"scalar_lr": 0.1}, {"scalar_betas": (0.9, 0.9)}, {"scalar_weight_decay": 0.0})
    for option in (*scalars, {"overrides": {"*": {"lr": 0.1}}}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} choose.*give these options to param_groups"):
            Dion([matrix()], **option)
    with pytest.raises(ValueError, match="scalar='muon' is unknown"):
        Dion(nn.Linear(2, 2), scalar="muon")


def test_flattened_parameters_are_refused():
    class FlatParameter(nn.Parameter):
        pass

    flat = nn.Module()
    flat.register_parameter("_flat_param", nn.Parameter(torch.zeros(100)))
    with pytest.raises(ValueError, match=r"FSDP1 flat parameter.*fully_shard"):
        Dion(flat)
    with pytest.raises(ValueError, match=r"FSDP1 flat parameter"):
        Dion([{"params": [FlatParameter(torch.zeros(10))], "rule": "adamw"}])
    zero = nn.Linear(4, 4, bias=False)
    zero.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO.*fully_shard"):
        Dion(zero)


def test_a_sparse_gradient():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = Dion(table)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(before, table.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "make", [Dion, Muon, lambda m: RuleOptimizer(m, rule="adamw"), lambda m: Dion(m, scalar="lion")]
)
def test_a_gradient_that_is_not_finite_skips_the_whole_step(make, bad):
    """As if the batch had not been: weights, momentum and counters of every parameter stay, and the step is counted."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)

    def step(net, its, seed, poison=None):
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn(p.shape, generator=generator)
            if i == poison:
                p.grad.view(-1)[-1] = bad
        its.step()

    for seed in range(2):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for poison in range(4):
        step(model, optimizer, 50, poison)
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (4, 4)
    step(model, optimizer, 2)
    step(twin, other, 2)
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (4, 0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][key])


class TestForeignState:
    def refused(self, optimizer, saved, sentence):
        before = copy.deepcopy(fresh_state(optimizer))
        with pytest.raises(ValueError, match=sentence):
            optimizer.load_state_dict(saved)
        after = optimizer.state_dict()
        assert before["param_groups"] == after["param_groups"]
        for number, held in before["state"].items():
            assert all(torch.equal(value, after["state"][number][key]) for key, value in held.items())
        optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4)
        optimizer.step()

    def test_of_torchs_adamw(self):
        p = matrix()
        theirs = torch.optim.AdamW([p])
        p.grad = torch.ones_like(p)
        theirs.step()
        self.refused(Dion([p]), theirs.state_dict(), "saved by another optimizer")

    def test_of_another_rule(self):
        saved = fresh_state(RuleOptimizer([matrix()], rule="adamw"))
        saved["param_groups"][0]["rule"] = "dion"
        self.refused(Dion([matrix()]), saved, "state 'step', which its rule does not keep")

    def test_of_another_shape(self):
        self.refused(Dion([matrix()]), fresh_state(Dion([matrix(8, 4)])), r"shape \(8, 4\) where \(6, 4\) is needed")

    def test_of_another_rank(self):
        saved = fresh_state(Dion([matrix()], rank_fraction=1.0))
        saved["param_groups"][0]["rank_fraction"] = 0.25
        self.refused(Dion([matrix()]), saved, r"state 'Q'.*shape \(6, 4\) where \(6, 1\) is needed")

    def test_of_another_number_of_groups(self):
        saved = Dion([{"params": [matrix()]}, {"params": [matrix()]}]).state_dict()
        self.refused(Dion([matrix()]), saved, "different number of parameter groups")

    def test_of_a_broken_value(self):
        saved = Dion([matrix()]).state_dict()
        saved["param_groups"][0]["rank_fraction"] = 7.0
        self.refused(Dion([matrix()]), saved, "rank_fraction=7.0 is outside")


@pytest.mark.parametrize("change", [{"rank_fraction": 0.25}, {"rank_multiple_of": 16}], ids=str)
def test_a_rank_changed_behind_the_optimizers_back(change):
    p = matrix(32, 32)
    optimizer = Dion([p], rank_fraction=0.75)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match="state 'Q'"):
        optimizer.step()
    assert torch.equal(before, p)


def test_hyperball_takes_no_weight_that_starts_at_zero():
    reason = r"'w' has a matrix that is zero, and decay='hyperball' keeps \|W\| at \|W_0\| = 0.* torch.nn.init.normal_"
    stack = matrix(12, 4)
    with torch.no_grad():
        stack[6:] = 0
    for zero, view in ((nn.Parameter(torch.zeros(6, 4)), "whole"), (stack, "rows:6,6")):
        group = {"params": [("w", zero)], "view": view, "decay": "hyperball"}
        with pytest.raises(ValueError, match=reason):
            Muon([group])
    Muon([{"params": [("w", stack)], "decay": "hyperball"}], weight_decay=0.1)
    Muon([("w", matrix())], decay="hyperball", weight_decay=Muon([matrix()]).defaults["weight_decay"])
    meta = nn.Parameter(torch.empty(6, 4, device="meta"))
    optimizer = Muon([("w", meta)], decay="hyperball")
    ready = nn.Parameter(torch.zeros(6, 4))
    ready.grad = torch.ones(6, 4)
    optimizer.param_groups[0]["params"] = [ready]
    for _ in range(2):
        with pytest.raises(ValueError, match=reason):
            optimizer.step()
    assert not ready.any()
    assert not optimizer.state[ready]["momentum"].any()
