"""What a trial may draw, and what is refused before any is drawn."""

from __future__ import annotations

import math

import optuna
import pytest

from orthoshard.lab.compare.search.space import Space
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.optimizers import default_lr


def drawn(space: Space, count: int = 200):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    return [space.draw(study.ask()) for _ in range(count)]


def test_draws_stay_in_their_ranges_and_ranks_are_powers_of_two():
    space = Space(("dion",), (0.001, 0.1), (1 / 40, 0.9), (0.8, 0.99), (0.001, 0.1))
    found = drawn(space)
    assert {config.rank_fraction for config in found} == {1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2}
    for key, low, high in (("lr", 0.001, 0.1), ("momentum", 0.8, 0.99), ("weight_decay", 0.001, 0.1)):
        values = [getattr(config, key) for config in found]
        assert low <= min(values) < 1.2 * low
        assert high / 1.2 < max(values) <= high
    below = sum(1 - config.momentum < math.sqrt(0.2 * 0.01) for config in found)
    assert 70 < below < 130  # log-uniform in 1 - momentum: half on either side of the geometric mean


def test_what_an_optimizer_has_not_is_not_drawn():
    found = drawn(Space(("dion", "muon", "adamw")))
    kinds = {config.name: config for config in found}
    assert kinds.keys() == {"dion", "muon", "adamw"}
    assert kinds["muon"].rank_fraction is None
    assert kinds["adamw"].momentum is kinds["adamw"].rank_fraction is None
    for name in kinds:
        rates = [config.lr for config in found if config.name == name]
        assert default_lr(name) / 8 <= min(rates)
        assert max(rates) <= default_lr(name) * 8
        scalars = {config.scalar_lr for config in found if config.name == name}
        assert len(scalars) > 20, "adamw too has a rate of its own for what is no matrix"
        assert 0.0015 <= min(scalars) <= max(scalars) <= 0.048


def test_one_value_is_fixed_and_nothing_is_asked():
    space = Space(("dion",), (0.02,), (0.3,), (0.0,), (0.0,), (0.01,))
    space.check()
    assert space.defaults("dion") == {}
    (config,) = {*drawn(space, 3)}
    assert (config.lr, config.rank_fraction, config.momentum, config.weight_decay) == (0.02, 0.3, 0.0, 0.0)
    assert config.scalar_lr == 0.01


def test_defaults_are_the_rules_own_moved_into_the_ranges():
    assert Space(("dion", "muon")).default("dion").lr == 0.02
    config = Space(("dion",)).default("dion")
    assert (config.rank_fraction, config.momentum, config.weight_decay) == (0.25, 0.95, 0.01)
    moved = Space(("dion",), (0.02, 0.04), (1 / 16, 1 / 8), (0.97, 0.99), (0.05, 0.1)).default("dion")
    assert (moved.lr, moved.rank_fraction, moved.momentum, moved.weight_decay) == (0.02, 1 / 8, 0.97, 0.05)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        (Space(()), "at least one optimizer"),
        (Space(("dion", "dion")), "none twice"),
        (Space(("dino",)), "did you mean 'dion'"),
        (Space(("lion",)), "no optimizer 'lion'"),
        (Space(("dion",), lr=(0.0, 1.0)), "--lr 0 1: give one value"),
        (Space(("dion",), lr=(0.1, 0.01)), "--lr 0.1 0.01"),
        (Space(("dion",), lr=(0.1, 0.2, 0.3)), "--lr 0.1 0.2 0.3"),
        (Space(("dion",), lr=(math.nan,)), "--lr nan"),
        (Space(("dion",), scalar_lr=()), "--scalar-lr"),
        (Space(("dion",), lr=(0.1, math.inf)), "--lr 0.1 inf"),
        (Space(("dion",), rank_fraction=()), "--rank-fraction"),
        (Space(("dion",), rank_fraction=(0.5, 1.5)), "at most 1"),
        (Space(("dion",), rank_fraction=(0.3, 0.4)), "no power of two"),
        (Space(("dion",), momentum=(0.9, 1.0)), "not including, 1"),
        (Space(("dion",), momentum=(-0.1,)), "--momentum -0.1"),
        (Space(("dion",), weight_decay=(0.0, 0.1)), "--weight-decay 0 0.1"),
    ],
)
def test_ranges_that_cannot_be(space, sentence):
    with pytest.raises(UserError, match=sentence):
        space.check()
