"""`capturable=True`: a step that reads nothing from the device, and takes the steps of the plain one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import orthoshard
import orthoshard.optimizer as home
from orthoshard import Dion, RuleOptimizer
from orthoshard.graphs import Bound
from unattended import Recorder, everything, fill_gradients, net, no_reads

RULE_NAMES = ["dion", "dion_tail", "muon", "adamw", "lion"]
OPTIONS = {
    "dion": [{}, {"error_feedback": False}, {"q_side": "columns"}],
    "dion_tail": [{}, {"nesterov": False}],
    "muon": [{}, {"nesterov": False}],
    "adamw": [{"weight_decay": 0.1}],
    "lion": [{"weight_decay": 0.1}],
}
CASES = [(rule, options) for rule in RULE_NAMES for options in OPTIONS[rule]]
# Of the largest entry of a weight, after 20 steps of 0.02. Each step rounds differently in a few places.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-5}
DTYPES = [*CLOSE, torch.bfloat16]
RATE = 2.0**-6
BAD = {0: float("nan"), 4: float("inf"), 5: -float("inf"), 19: float("nan")}


def pair(rule, dtype=torch.float32, **options):
    """A plain and a capturable optimizer of equal models."""
    models = [net(dtype) for _ in range(2)]
    return models, [RuleOptimizer(models[c], rule=rule, lr=0.02, capturable=bool(c), **options) for c in range(2)]


def trained(model, optimizer):
    """After 20 steps, four of them with a bad gradient."""
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        fill_gradients(model, generator, BAD.get(number))
        optimizer.step()
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (4, 1)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_the_same_steps_as_the_plain_one(rule, options, dtype):
    plain, captured = (trained(*both) for both in zip(*pair(rule, dtype, **options), strict=True))
    assert (plain - captured).abs().max() <= CLOSE[dtype] * plain.abs().max()


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_bfloat16_is_no_coarser_than_in_the_plain_step(rule, options):
    exact = net().double()
    for parameter, rounded in zip(exact.parameters(), net(torch.bfloat16).parameters(), strict=True):
        parameter.data.copy_(rounded)
    reference = trained(exact, RuleOptimizer(exact, rule=rule, lr=0.02, **options))
    errors = [(trained(*both) - reference).norm() for both in zip(*pair(rule, torch.bfloat16, **options), strict=True)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(rule, options, dtype, bad):
    model = net(dtype)
    optimizer = RuleOptimizer(model, rule=rule, lr=0.02, capturable=True, **options)
    generator = torch.Generator().manual_seed(1)
    for entry in (None, None, bad):
        before = everything(model, optimizer)
        fill_gradients(model, generator, entry)
        optimizer.step()
    after = everything(model, optimizer)
    assert len(after) == len(before) > 10
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    fill_gradients(model, generator)
    optimizer.warmup_step()
    assert all(torch.equal(x, y) for x, y in zip(before, everything(model, optimizer), strict=True))
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 1)
    optimizer.step()
    weights = list(model.parameters())
    assert not any(torch.equal(x, y) for x, y in zip(before, weights, strict=False))
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_no_number_is_read(rule, options):
    model = net()
    tensors = {"weight_decay": torch.tensor(0.1)} if rule != "lion" else {}
    optimizer = RuleOptimizer(model, rule=rule, lr=torch.tensor(0.02), capturable=True, **{**options, **tensors})
    generator = torch.Generator().manual_seed(1)
    optimizer.initialize_state()
    for entry in (None, float("nan")):
        fill_gradients(model, generator, entry)
        with no_reads() as seen:
            optimizer.step()
    assert seen.calls.total() > 50
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_plain_step_does_read(rule):
    """The guard itself: it finds `largest_gradients` in every plain step, and what else the matrix rules look at."""
    model = net()
    optimizer = RuleOptimizer(model, rule=rule)
    optimizer.initialize_state()
    fill_gradients(model, torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError, match="tolist or numpy"), no_reads():
        optimizer.step()
    if rule in ("dion", "dion_tail"):
        with pytest.raises(AssertionError, match="reads the device"), Recorder():
            optimizer.step()


@pytest.mark.parametrize(
    ("rule", "options", "dtype"),
    [(*case, torch.float32) for case in CASES]
    + [(rule, {"rounding": how}, torch.bfloat16) for rule in RULE_NAMES for how in ("nearest", "stochastic")],
)
def test_no_number_is_read_on_a_device(rule, options, dtype):
    """The paths that every device but the CPU takes, on tensors without values: these cannot be read at all, and the
    guard refuses copies between host and device. (Fake CUDA tensors cannot be indexed where torch has no CUDA.)"""
    model = net(dtype).to("meta")
    optimizer = RuleOptimizer(model, rule=rule, capturable=True, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.initialize_state()
    with Recorder(refuse=False):
        optimizer.step()
    with Recorder() as seen:
        optimizer.step()
    assert seen.calls["_fused_sgd_"] or rule == "adamw" or dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="meta"):
        _ = optimizer.skipped_steps


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
@pytest.mark.parametrize(
    ("view", "shape"),
    [
        ("rows:4*(2,4)", (24, 5)),  # GPT-NeoX, BLOOM, Falcon: head by head
        ("transposed rows:3*(2,2)", (5, 12)),
        ("columns:2*(3,2)", (4, 10)),
        ("stack rows:3*(2,1)", (2, 2, 9, 4)),
        ("rows:7*(1,1)", (14, 6)),
    ],
)
def test_interleaved_blocks_are_found_without_the_host(rule, view, shape):
    blocks = nn.Parameter(torch.ones(shape, device="meta"))
    optimizer = RuleOptimizer([{"params": [blocks], "view": view}], rule=rule, capturable=True)
    blocks.grad = torch.zeros_like(blocks)
    optimizer.initialize_state()
    with Recorder() as seen:
        optimizer.step()
    assert seen.computing > 50


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_learning_rate_and_decay_are_read_when_the_step_is_taken(rule):
    """What a replayed graph would do: the same tensors, with other values in them."""
    model, reference = net(), net()
    rate, decay = torch.tensor(0.5), torch.tensor(0.3)
    optimizer = RuleOptimizer(model, rule=rule, lr=rate, weight_decay=decay, capturable=True)
    plain = RuleOptimizer(reference, rule=rule, lr=0.01, weight_decay=0.2)
    assert optimizer.param_groups[0]["lr"] is not rate, "every group has a tensor of its own"
    for mine, theirs in zip(optimizer.param_groups, plain.param_groups, strict=True):
        mine["lr"].fill_(theirs["lr"])
        if isinstance(mine["weight_decay"], torch.Tensor):
            mine["weight_decay"].fill_(theirs["weight_decay"])
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3):
        fill_gradients(model, generators[0])
        fill_gradients(reference, generators[1])
        optimizer.step()
        plain.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_schedulers_fill_the_rate_in_place():
    model = net()
    optimizer = Dion(model, lr=0.02, capturable=True)
    rate = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    fill_gradients(model, torch.Generator().manual_seed(1))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.01


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("out_of", [False, True])
def test_what_is_saved_does_not_know_how_it_was_stepped(rule, out_of, into):
    models, optimizers = pair(rule)
    first, second = models[out_of], copy.deepcopy(models[into])
    source = optimizers[out_of]
    target = RuleOptimizer(second, rule=rule, lr=0.3, capturable=into)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        fill_gradients(first, generator)
        source.step()
    source.param_groups[0]["lr"] = torch.tensor(0.011) if out_of else 0.011
    second.load_state_dict(first.state_dict())
    target.load_state_dict(saved(source))
    assert target.capturable is into
    lr = target.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor) is into
    assert float(lr) == pytest.approx(0.011)
    twins = [(first, source), (second, target), *copies(second, target)]
    start = generator.get_state()
    for model, optimizer in twins:
        generator.set_state(start)
        for entry in (None, float("nan"), None):
            fill_gradients(model, generator, entry)
            optimizer.step()
        assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 0)
        for mine, theirs in zip(first.parameters(), model.parameters(), strict=True):
            assert (mine - theirs).abs().max() <= 2e-5 * mine.abs().max()


def copies(model, optimizer):
    """A deep copy of both together."""
    return [tuple(copy.deepcopy([model, optimizer]))]


def test_a_first_step_of_zeros_at_rate_zero_leaves_no_trace():
    """As torch.distributed.checkpoint makes state."""
    model = net()
    optimizer = RuleOptimizer(model, rule="adamw", lr=0.0, scalar_lr=0.0, capturable=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.state
    assert all(held["step"] == 0 for held in optimizer.state.values())


def test_gradients_may_be_missing():
    """Which are there is the host's to know, each time that it launches a step."""
    models, optimizers = pair("dion")
    for model, optimizer in zip(models, optimizers, strict=True):
        generator = torch.Generator().manual_seed(1)
        for absent in ("1.weight", "0.bias"):
            fill_gradients(model, generator)
            model.get_parameter(absent).grad = None
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    for plain, captured in zip(*(model.parameters() for model in models), strict=True):
        assert (plain - captured).abs().max() <= 2e-5 * plain.abs().max()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"drift_check": 5}, "drift_check, which compares replicas on the host"),
        ({"lr": torch.tensor(-1.0)}, "must be a finite number"),
        ({"lr": torch.tensor(0.1, device="meta")}, "make it with device='cpu'"),
        ({"weight_decay": torch.tensor(0.1, device="meta")}, "make it with device='cpu'"),
    ],
)
def test_what_needs_the_host_is_refused_at_construction(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dion(net(), capturable=True, **options)


def test_one_group_alone_is_not_captured():
    groups = [{"params": [nn.Parameter(torch.ones(4, 4))], "capturable": True}]
    with pytest.raises(ValueError, match="give capturable=True to the optimizer"):
        Dion(groups)


def test_parameters_of_two_devices_are_refused():
    members = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4, device="meta"))]
    with pytest.raises(ValueError, match="on one device, but these are on cpu, meta"):
        Dion([{"params": [member]} for member in members], capturable=True)


def test_closures_and_watching_are_refused():
    optimizer = Dion(net(), capturable=True)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="does not go with record_diagnostics"):
        optimizer.record_diagnostics()
    optimizer.record_diagnostics(False)
    assert not optimizer.state


def test_warmup_step_is_for_capturable_steps():
    with pytest.raises(ValueError, match="capturable=True"):
        Dion(net()).warmup_step()


@pytest.fixture
def capture(monkeypatch):
    """As if a graph were being captured."""
    return lambda: monkeypatch.setattr(home, "capturing", lambda: True)


def test_a_plain_step_is_not_captured(capture):
    model = net()
    optimizer = Dion(model)
    fill_gradients(model, torch.Generator().manual_seed(1))
    optimizer.step()
    before = everything(model, optimizer)
    capture()
    with pytest.raises(RuntimeError, match="build the optimizer with capturable=True"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, everything(model, optimizer), strict=True))


def test_a_step_that_is_not_prepared_is_not_captured(capture):
    model = net()
    optimizer = Dion(model, capturable=True)
    fill_gradients(model, torch.Generator().manual_seed(1))
    capture()
    with pytest.raises(RuntimeError, match=r"optimizer.warmup_step\(\) before the step is captured"):
        optimizer.step()
    assert not optimizer.state


def test_a_rate_that_is_a_number_again_is_not_captured(capture):
    model = net()
    optimizer = Dion(model, capturable=True)
    fill_gradients(model, torch.Generator().manual_seed(1))
    optimizer.warmup_step()
    optimizer.param_groups[0]["lr"] = 0.5
    capture()
    with pytest.raises(RuntimeError, match="fill group\\['lr'\\] in place"):
        optimizer.step()


def _move(tensor):
    tensor.data = tensor.data.clone()


CHANGES = {
    "gradient of .* has appeared": lambda model, _: setattr(model.strided, "grad", torch.zeros_like(model.strided)),
    "gradient of .* has disappeared": lambda model, _: setattr(model[0].weight, "grad", None),
    "gradient of .* was replaced": lambda model, _: setattr(model[0].weight, "grad", model[0].weight.grad.clone()),
    "has moved": lambda model, _: setattr(model[1].weight, "data", model[1].weight.data.clone()),
    "'lr' of group 0 was replaced": lambda _, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.1)),
    "'momentum' of group 0 was": lambda _, optimizer: optimizer.param_groups[0].update(momentum=0.5),
    "state was replaced": lambda _, optimizer: optimizer.load_state_dict(
        {**optimizer.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]}
    ),
    "state was moved": lambda model, optimizer: _move(optimizer.state[model[0].weight]["momentum"]),
    "parameters were added": lambda _, optimizer: optimizer.add_param_group(
        {"params": [("new", nn.Parameter(torch.ones(4, 4)))]}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_sees_that_it_is_out_of_date(change):
    model = net()
    optimizer = Dion(model, capturable=True)
    fill_gradients(model, torch.Generator().manual_seed(1))
    model.strided.grad = None
    optimizer.step()
    bound = Bound(optimizer)
    optimizer.zero_grad(set_to_none=False)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    bound.check()
    CHANGES[change](model, optimizer)
    with pytest.raises(RuntimeError, match="state was replaced or moved" if "state" in change else change):
        bound.check()


def test_graphs_are_of_cuda_and_of_capturable_steps():
    with pytest.raises(ValueError, match="graphs need CUDA"):
        orthoshard.graphed(Dion(net(), capturable=True))
    with pytest.raises(ValueError, match="build it with capturable=True"):
        orthoshard.graphed(Dion(net()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_replayed_graph_takes_the_steps_of_the_plain_one(rule, options, dtype):
    models, optimizers = [net(dtype).cuda() for _ in range(2)], []
    for model, capturable in zip(models, (False, True), strict=True):
        optimizers.append(RuleOptimizer(model, rule=rule, lr=RATE, capturable=capturable, **options))
    generators = [torch.Generator().manual_seed(1) for _ in models]
    fill_gradients(models[1], torch.Generator().manual_seed(2))
    before = [parameter.detach().clone() for parameter in models[1].parameters()]
    with orthoshard.graphed(optimizers[1]) as replayed:
        assert all(torch.equal(x, y) for x, y in zip(before, models[1].parameters(), strict=True))
        for number in range(20):
            for model, step, generator in zip(models, (optimizers[0].step, replayed), generators, strict=True):
                fill_gradients(model, generator, BAD.get(number))
                step()
            # On CUDA torch's fused kernels read a rate that is a tensor in float32, which has all of these to the bit.
            for group in optimizers[0].param_groups:
                group["lr"] = RATE * (1 - number / 32)
            for group in optimizers[1].param_groups:
                group["lr"].fill_(RATE * (1 - number / 32))
        assert [(o.skipped_steps, o.skipped_in_a_row) for o in optimizers] == [(4, 1), (4, 1)]
    # on CUDA torch's fused AdamW multiplies a rate that is a tensor with the decay in float32
    close = 1e-9 if (rule, dtype) == ("adamw", torch.float64) else CLOSE[dtype]
    for plain, captured in zip(*(model.parameters() for model in models), strict=True):
        assert (plain - captured).abs().max() <= 10 * close * plain.abs().max()
    with pytest.raises(RuntimeError, match="released"):
        replayed()
    optimizers[1].step()


def test_clipping_reads_nothing_from_the_device():
    """Of tensors without values, so that a look would fail."""
    model = net().to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with Recorder():
        norm = orthoshard.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.device.type == "meta"
    assert norm.shape == ()


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
def test_a_skipped_step_leaves_momentum_in_8_bits_to_the_bit(rule):
    model = net()
    optimizer = RuleOptimizer(model, rule=rule, lr=0.02, capturable=True, state_dtype="int8")
    generator = torch.Generator().manual_seed(1)
    for bad in (None, None, float("nan"), float("inf")):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        fill_gradients(model, generator, bad)
        optimizer.step()
        after = optimizer.state_dict()["state"]
        same = [torch.equal(x, after[p][k]) for p, held in before.items() for k, x in held.items()]
        assert all(same) if bad else not any(same)
