"""Which stage an operation is put down to: flops of products against the papers' counts; nothing large is left over."""

import json
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from orthoshard.directions import Polar
from orthoshard.lab.bench import breakdown, cli
from orthoshard.lab.bench.contestants import NARROW, Workload, all_contestants, choose, rules_alone
from orthoshard.lab.bench.models import find_model
from orthoshard.lab.bench.stages import (
    PREFIX,
    STAGES,
    Watch,
    device_milliseconds,
    labelled,
    observe,
    product_flops,
    stage_of,
)
from orthoshard.lab.bench.timing import Spread

SHAPES = find_model("tiny").matrices
CPU = torch.device("cpu")


def stepping(name: str) -> Callable[[], object]:
    """The step of a contestant that has taken one."""
    (contestant,) = choose(all_contestants(["1/4"], NARROW["bfloat16"]), [name])
    assert contestant.optimizer is not None
    work = Workload(find_model("tiny"), CPU, torch.float32)
    optimizer = contestant.optimizer(work.parameters())
    optimizer.step()
    return optimizer.step


def watched(name: str) -> Watch:
    return observe(stepping(name), CPU)


def thin_matmul(count: int) -> int:
    """Flops of that many products of a matrix with a factor of rank r."""
    return sum(count * 2 * m * n * math.ceil(min(m, n) / 4) for m, n in SHAPES)


@pytest.mark.parametrize("name", ["dion-1/4", "dion-bf16-1/4"])
def test_dion_takes_two_products_one_feedback_and_one_update(name):
    flops = watched(name).flops
    assert (flops["products"], flops["error feedback"], flops["weights"]) == (
        thin_matmul(2),
        thin_matmul(1),
        thin_matmul(1),
    )
    assert flops["accumulate"] == flops["gradients"] == flops["rest"] == 0
    grams = sum(2 * n * math.ceil(min(m, n) / 4) ** 2 for m, n in SHAPES)
    assert flops["orthonormalization"] >= 2 * grams, "a Gram matrix, and the product with its inverse factor"


def test_dion_tail_takes_two_products_and_one_update_and_no_feedback():
    flops = watched("dion-tail-1/4").flops
    assert (flops["products"], flops["error feedback"], flops["weights"]) == (thin_matmul(2), 0, thin_matmul(1))
    assert flops["rest"] == 0


def test_muon_is_its_polar_factor():
    watch = watched("muon")
    polar = sum(Polar().iteration(s, "cpu", torch.float32).flops(s, "cpu") for s in SHAPES)
    assert watch.flops == {**watch.flops, "orthonormalization": polar}
    assert sum(watch.flops.values()) == polar


class Sizes(Watch):
    """Entries of the largest tensor that each stage has computed; views and empty tensors are not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = dict.fromkeys(STAGES, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        written = all(value.alias_info is None or value.alias_info.is_write for value in func._schema.returns)
        if isinstance(result, torch.Tensor) and written and "empty" not in name and name != "set_":
            stage = stage_of(sys._getframe(1))
            self.largest[stage] = max(self.largest[stage], result.numel())
        return result


@pytest.mark.parametrize("name", ["dion-1/4", "dion-tail-1/4", "muon"])
def test_no_pass_over_whole_matrices_is_left_over(name):
    """A function of the library that is renamed would fall into the rest, and with it passes over all entries."""
    step = stepping(name)
    with Sizes() as sizes:
        step()
    largest = max(m * n for m, n in SHAPES)
    # of the two layers' widest Q together
    assert sizes.largest["rest"] <= 2 * max(m * math.ceil(min(m, n) / 4) for m, n in SHAPES)
    assert sizes.largest["weights"] >= largest
    assert sizes.largest["accumulate"] >= largest


def test_watching_changes_no_bit():
    (contestant,) = choose(all_contestants(["1/4"]), ["dion-1/4"])
    assert contestant.optimizer is not None
    work = Workload(find_model("tiny"), CPU, torch.float32)
    plain, seen = work.parameters(), work.parameters()
    first, second = contestant.optimizer(plain), contestant.optimizer(seen)
    for _ in range(2):
        first.step()
        observe(second.step, CPU)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def test_operations_outside_of_the_library_are_the_rest():
    with Watch() as watch:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert watch.flops == {**watch.flops, "rest": 2 * 3 * 4 * 5}
    assert set(watch.milliseconds) == {"rest"}
    assert stage_of(None) == "rest"


def test_on_a_device_kernels_count_once():
    def event(key, device_type, microseconds):
        return SimpleNamespace(key=key, device_type=device_type, device_time_total=microseconds)

    host, device = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("stage: products", host, 1500.0),
        event("stage: products", device, 1800.0),
        event("stage: rest", host, 250.0),
        event("aten::bmm", host, 1500.0),
    ]
    assert device_milliseconds(events) == {"products": 1.5, "rest": 0.25}


def test_operations_are_labelled_for_the_profiler():
    (contestant,) = choose(all_contestants(["1/4"]), ["dion-1/4"])
    assert contestant.optimizer is not None
    optimizer = contestant.optimizer(Workload(find_model("tiny"), CPU, torch.float32).parameters())
    with profile(activities=[ProfilerActivity.CPU]) as record, Watch(labelled) as watch:
        optimizer.step()
    counted = {event.key: event.count for event in record.key_averages() if event.key.startswith(PREFIX)}
    assert counted == {PREFIX + stage: count for stage, count in watch.operations.items()}
    assert not watch.milliseconds
    assert device_milliseconds(record.key_averages()) == dict.fromkeys(watch.operations, 0.0)


def test_flops_of_products():
    a, b, c = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 3, 5)
    assert product_flops("bmm", (a, b)) == 2 * 2 * 3 * 4 * 5
    assert product_flops("baddbmm_", (c, a, b)) == 2 * 2 * 3 * 4 * 5
    assert product_flops("add", (a, a)) == 0


def test_a_row_sums_medians_and_compares_them_with_the_step():
    watches = []
    for products, rest in ((6.0, 1.0), (8.0, 2.0), (7.0, 30.0)):
        watch = Watch()
        watch.milliseconds.update({"products": products, "rest": rest})
        watch.flops["products"] = 14_000_000
        watches.append(watch)
    row = breakdown.row_of(Spread((10.0, 9.0, 11.0)), Spread((12.0, 13.0, 14.0)), watches)
    assert (row["step_median_ms"], row["watched_median_ms"]) == (10, 13)
    assert row["stages"]["products"]["median_ms"] == 7
    assert row["stages"]["products"]["share"] == 0.7
    assert row["stages"]["products"]["gflops_per_second"] == 2
    assert row["sum_ms"] == 9
    assert row["sum_over_step"] == 0.9
    assert breakdown.agrees(row)
    assert not breakdown.agrees({"sum_over_step": 0.89})
    assert not breakdown.agrees({"sum_over_step": 1.11})


def test_the_verb_writes_a_row_for_each_of_our_rules(tmp_path, capsys):
    out = tmp_path / "stages.json"
    assert cli.main(["--model", "tiny", "--stages", "--ranks", "1/4", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["contestants"]) == ["dion-1/4", "dion-tail-1/4", "muon"]
    for row in result["contestants"].values():
        assert list(row["stages"]) == list(STAGES)
        assert row["sum_ms"] == pytest.approx(sum(stage["median_ms"] for stage in row["stages"].values()))
        assert all(len(stage["times_ms"]) == 2 == len(row["step_times_ms"]) for stage in row["stages"].values())
    shown = capsys.readouterr().out
    assert "one optimizer step by stage, tiny" in shown
    assert "dion-tail-1/4" in shown


def test_only_our_rules_have_stages(capsys):
    names = [contestant.name for contestant in rules_alone(all_contestants(["1/4"]))]
    assert names == ["dion-1/4", "dion-tail-1/4", "muon", "normuon", "dion3", "row-norm"]
    assert cli.main(["--model", "tiny", "--stages", "--only", "adamw-fused"]) == 2
    assert "matches no contestant" in capsys.readouterr().err
