"""The figures of a step against singular values, differences of weights and Gram matrices taken from outside; and that
watching changes nothing. (That figures do not depend on the layout: tests/layouts/test_figures.py.)"""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from orthoshard import Dion, Muon, RuleOptimizer
from orthoshard.diagnostics import FRACTIONS
from orthoshard.engine import notes
from orthoshard.engine.comm import Comm
from orthoshard.engine.step import Step
from orthoshard.groups import group_rule
from orthoshard.linalg.host_sync import simulating
from orthoshard.linalg.spectrum import spectrum

M, N, STEPS = 12, 20, 4


def gradient(step, shape=(M, N), dtype=torch.float64):
    """Of a few large singular values and many small ones, as gradients have them."""
    generator = torch.Generator().manual_seed(step)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, S, V = torch.linalg.svd(full, full_matrices=False)
    decay = 0.7 ** torch.arange(S.shape[-1], dtype=torch.float64)
    return ((U * decay) @ V).to(dtype)


def start(rule="dion", shape=(M, N), dtype=torch.float64, **options):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))
    return p, RuleOptimizer([("w", p)], rule=rule, lr=0.1, **{"weight_decay": 0.0, **options})


def last_step(p, optimizer, spectra=False):
    """Figures of the last of several steps, the momentum before it, and the weights before and after."""
    for step in range(STEPS):
        p.grad = gradient(step, p.shape, p.dtype)
        before, held = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
        optimizer.record_diagnostics(step == STEPS - 1, spectra=spectra)
        optimizer.step()
    (found,) = optimizer.diagnostics().values()
    return found, held, before


def rms(update):
    return float(update.square().mean().sqrt())


def error(P):
    return float((P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype)).norm() / math.sqrt(P.shape[-1]))


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_dion(side, feedback):
    p, optimizer = start(rank_fraction=0.3, q_side=side, error_feedback=feedback)
    found, held, before = last_step(p, optimizer)
    seen = (held["momentum"] if feedback else 0.95 * held["momentum"]) + p.grad
    X = seen.mT if side == "rows" else seen
    P, _ = torch.linalg.qr(X @ held["Q"])
    R = X.mT @ P
    assert found.matrices == 1
    assert found.rank == found.live == 4
    assert found.captured == pytest.approx(float(R.norm() ** 2 / seen.norm() ** 2), rel=1e-10)
    S = torch.linalg.svdvals(seen)
    assert found.effective_rank == pytest.approx(float(S.square().sum() ** 2 / S.pow(4).sum()), rel=1e-10)
    rest = torch.linalg.svdvals(X - P @ R.mT).square()
    assert found.tail_flatness == pytest.approx(float(rest.sum() ** 2 / rest.square().sum()) / (len(S) - 4), rel=1e-9)
    assert found.orthogonality < 1e-13
    assert found.basis == pytest.approx(error(R / R.norm(dim=0)), rel=1e-6)
    assert found.basis > 1e-3
    assert found.update_rms == pytest.approx(rms(p.detach() - before), rel=1e-10)
    assert found.spectrum is None


@pytest.mark.parametrize("nesterov", [True, False])
def test_dion_tail(nesterov):
    p, optimizer = start("dion_tail", rank_fraction=0.3, nesterov=nesterov)
    found, held, before = last_step(p, optimizer)
    B = 0.95 * held["momentum"] + p.grad
    seen = p.grad + 0.95 * B if nesterov else B
    P, _ = torch.linalg.qr(seen.mT @ held["Q"])
    assert found.captured == pytest.approx(float((seen @ P).norm() ** 2 / seen.norm() ** 2), rel=1e-9)
    assert found.orthogonality < 1e-13
    assert found.basis < 1e-13
    assert found.update_rms == pytest.approx(rms(p.detach() - before), rel=1e-9)


def test_muon():
    p, optimizer = start("muon", polar_dtype="float64")
    found, held, before = last_step(p, optimizer, spectra=True)
    update = (before - p.detach()) / (0.1 * math.sqrt(max(1, M / N)))
    assert found.orthogonality == pytest.approx(error(update.mT), rel=1e-9)
    assert found.orthogonality > 0.05  # Jordan's polynomial leaves singular values around 1
    assert found.rank == M
    assert found.captured is found.live is found.basis is None
    assert found.update_rms == pytest.approx(rms(p.detach() - before), rel=1e-10)
    S = torch.linalg.svdvals(p.grad + 0.95 * (0.95 * held["momentum"] + p.grad)).square()
    for fraction, share in zip(FRACTIONS, found.spectrum, strict=True):
        assert share == pytest.approx(float(S[: math.ceil(fraction * M)].sum() / S.sum()), abs=1e-12)


@pytest.mark.parametrize("rule", ["dion", "dion_tail"])
def test_no_rank_captures_more_than_the_spectrum_allows(rule):
    p, optimizer = start(rule, rank_fraction=0.25)
    found, _, _ = last_step(p, optimizer, spectra=True)
    best = found.spectrum[FRACTIONS.index(0.25)]
    assert 0.8 * best < found.captured <= best + 1e-12


def test_experts_are_means_over_them_and_a_starved_one_counts_in_no_share():
    """Parts of the loss that no token reached have neither energy nor direction."""
    shape = (3, M, N)
    p, optimizer = start(shape=shape, rank_fraction=0.5, error_feedback=False)
    q, alone = start(shape=(M, N), rank_fraction=0.5, error_feedback=False)
    p.grad = torch.stack([gradient(0), torch.zeros(M, N, dtype=torch.float64), 1e-30 * gradient(0)])
    q.grad = gradient(0)
    for each in (optimizer, alone):
        each.initialize_state()
    optimizer.state[p]["Q"].copy_(alone.state[q]["Q"].expand(3, -1, -1))
    for each in (optimizer, alone):
        each.record_diagnostics(spectra=True)
        each.step()
    found, one = optimizer.diagnostics()["w"], alone.diagnostics()["w"]
    assert found.matrices == 3
    assert found.live == pytest.approx(2 / 3 * one.live)
    for key in ("captured", "effective_rank", "tail_flatness", "spectrum"):
        assert getattr(found, key) == pytest.approx(getattr(one, key), rel=1e-9)
    assert found.update_rms == pytest.approx(one.update_rms * math.sqrt(2 / 3), rel=1e-9)


def test_a_zero_matrix_has_no_shares():
    p, optimizer = start(rank_fraction=0.5)
    p.grad = torch.zeros_like(p)
    optimizer.record_diagnostics(spectra=True)
    optimizer.step()
    found = optimizer.diagnostics()["w"]
    assert found.captured is found.effective_rank is found.tail_flatness is found.spectrum is None
    assert found.live == found.update_rms == 0


@pytest.mark.parametrize("size", [1e-36, 1.0, 1e36])
def test_the_size_of_the_gradient_does_not_matter_in_float32(size):
    found = []
    for scale in (1.0, size):
        p, optimizer = start(dtype=torch.float32, rank_fraction=0.5)
        p.grad = scale * gradient(0, dtype=torch.float32)
        optimizer.record_diagnostics(spectra=True)
        optimizer.step()
        found.append(optimizer.diagnostics()["w"])
    for key in ("captured", "effective_rank", "tail_flatness", "spectrum", "update_rms"):
        assert getattr(found[0], key) == pytest.approx(getattr(found[1], key), rel=1e-4)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_bit_and_leaves_no_trace_in_saved_state(rule, dtype):
    runs = []
    for watched in (False, True):
        p, optimizer = start(rule, dtype=dtype)
        optimizer.record_diagnostics(watched, spectra=True)
        for step in range(STEPS):
            p.grad = gradient(step, dtype=dtype)
            optimizer.step()
        runs.append((p, optimizer))
    (p, plain), (q, watched) = runs
    assert torch.equal(p, q)
    mine, theirs = plain.state_dict(), watched.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"][0].keys() == theirs["state"][0].keys()
    assert all(torch.equal(mine["state"][0][key], theirs["state"][0][key]) for key in mine["state"][0])
    for twin in (copy.deepcopy(watched), pickle.loads(pickle.dumps(watched))):
        with pytest.raises(RuntimeError, match=r"call optimizer\.record_diagnostics\(\)"):
            twin.diagnostics()


def test_nothing_is_computed_where_nobody_watches(monkeypatch):
    asked = []
    monkeypatch.setattr(notes, "_gram", lambda P: asked.append(P))
    p, optimizer = start()
    p.grad = gradient(0)
    optimizer.step()
    assert not asked
    optimizer.record_diagnostics()
    with pytest.raises((AttributeError, TypeError)):  # the Gram matrix is None
        optimizer.step()
    assert asked


def test_only_matrices_with_a_gradient_are_shown_and_a_skipped_step_shows_nothing():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.LayerNorm(4))
    optimizer = Muon(model)
    optimizer.record_diagnostics()
    model[0](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    first = optimizer.diagnostics()
    assert list(first) == ["0.weight"]
    model[1].weight.grad = torch.full_like(model[1].weight, math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.diagnostics() == first


def test_reading_later_and_twice():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = Dion([("w", p)])
    optimizer.record_diagnostics()
    p.grad = torch.eye(4, 3)
    optimizer.step()
    optimizer.record_diagnostics(False)
    p.grad = torch.ones(4, 3)
    optimizer.step()
    assert optimizer.diagnostics() == optimizer.diagnostics()
    assert optimizer.diagnostics()["w"].captured == pytest.approx(1 / 3)


def test_effective_rank_counts_equal_singular_values():
    for k in (1, 3, 7):
        X = torch.eye(9, 7)
        X[:, k:] = 0
        energy, effective = spectrum(5 * X[None])[0].tolist()
        assert energy == pytest.approx(25 * k)
        assert effective == pytest.approx(k)


def test_nothing_waits_for_the_device_before_it_is_read():
    """Fake tensors have no values: to ask for one, as a host that waits does, is an error."""
    with FakeTensorMode():
        assert spectrum(torch.empty(2, 6, 9)).shape == (2, 2)
    with FakeTensorMode(), simulating("cuda"), torch.no_grad():
        for rule in ("dion", "dion_tail", "muon"):
            p = nn.Parameter(torch.empty(6, 9))
            optimizer = RuleOptimizer([("w", p)], rule=rule)
            prepared, stores = optimizer._prepare()
            p.grad = torch.empty(6, 9)
            step = Step(prepared.plan, stores, optimizer.param_groups, Comm(), optimizer._lender)
            taken = notes.Notes(notes.FIGURES)
            step.take([group_rule(group) for group in optimizer.param_groups], SimpleNamespace(uneven=[False]), taken)
            with pytest.raises(DataDependentOutputException):
                taken.read()


@pytest.mark.parametrize("rule", ["dion", "dion_tail"])
def test_rounding_is_no_tail(rule):
    p, optimizer = start(rule, dtype=torch.float32, rank_fraction=0.5)
    p.grad = (gradient(0)[:, :2] @ gradient(1)[:2]).float()
    optimizer.record_diagnostics()
    optimizer.step()
    assert optimizer.diagnostics()["w"].tail_flatness is None
