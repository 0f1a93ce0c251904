"""What Hugging Face's Trainer, TRL and axolotl call to get an optimizer, as they call it."""

from __future__ import annotations

import pytest
from torch import nn

from orthoshard import Dion, DionTail, Muon
from orthoshard.hosts.huggingface import DionFactory, DionTailFactory, MuonFactory

FACTORIES = {DionFactory: Dion, DionTailFactory: DionTail, MuonFactory: Muon}


def net():
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("before", [(), (object(),)], ids=["the Trainer", "axolotl"])
def test_factories_are_made_without_arguments_and_called_with_the_model(factory, before):
    optimizer = factory()(net(), *before, lr=0.01, weight_decay=0.3)
    assert type(optimizer) is FACTORIES[factory]
    (matrices,) = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    assert (matrices["lr"], matrices["weight_decay"]) == (0.01, 0.3)
    assert {group["rule"] for group in optimizer.param_groups if group["role"] != "matrix"} == {"adamw"}


def test_the_trainer_takes_it_for_a_factory():
    trainer_optimizer = pytest.importorskip(
        "transformers.trainer_optimizer", reason="transformers is not installed: pip install 'orthoshard[hosts]'"
    )
    assert trainer_optimizer.is_optimizer_factory(DionFactory)
    assert not trainer_optimizer.is_optimizer_factory(Dion)


def test_the_class_in_the_factorys_place_is_refused_with_what_to_do():
    """The Trainer gives a class its own groups: decayed and not."""
    model = net()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    with pytest.raises(ValueError, match=r"no matrix.*Dion\(model\)"):
        Dion([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])


def test_an_option_that_nobody_reads_is_refused():
    with pytest.raises(ValueError, match="dion_lr"):
        DionFactory()(net(), object(), dion_lr=0.01)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("option", [("shard_state", "zero1"), ("replica_sync", "factors"), ("replica_sync", "auto")])
def test_state_that_differs_between_replicas_is_refused_under_the_trainer(factory, option):
    """It saves on rank 0 alone, where such an optimizer would wait for the other ranks for ever."""
    with pytest.raises(ValueError, match=rf"{option[0]}=.*Trainer.*state_dict\(\).*leave {option[0]} out"):
        factory()(net(), lr=0.01, **dict([option]))
