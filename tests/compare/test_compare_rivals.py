"""The optimizers as data: the default ones, a TOML file, and what is wrong with a file."""

from pathlib import Path

import pytest

from orthoshard.lab.compare.rivals import DEFAULT, choose, load
from orthoshard.lab.train.errors import UserError


def test_the_default_rivals_differ_in_their_rule_alone():
    matrices = [rival.config for rival in DEFAULT if rival.config.name != "adamw"]
    assert len({(config.scale, config.weight_decay, config.momentum, config.scalar_lr) for config in matrices}) == 1
    assert [config.rank_fraction for config in matrices if config.name == "dion"] == [1, 1 / 4, 1 / 16]
    assert [config.rank_fraction for config in matrices if config.name == "dion_tail"] == [1 / 4, 1 / 16]
    assert [config.nesterov for config in matrices if config.name == "muon"] == [True, False]
    assert {rival.config.weight_decay for rival in DEFAULT} == {0.01}


def test_a_toml_file(tmp_path: Path):
    path = tmp_path / "rivals.toml"
    path.write_text(
        '[[rival]]\nlabel = "half"\nname = "dion"\nrank_fraction = 0.5\nlr = 0.04\n\n'
        '[[rival]]\nlabel = "plain"\nname = "adamw"\n'
    )
    half, plain = load(path)
    assert (half.label, half.config.rank_fraction, half.config.lr) == ("half", 0.5, 0.04)
    assert (plain.config.name, plain.config.lr) == ("adamw", 3e-3), "a rate that is left out is the optimizer's own"
    assert (half.at(1).lr, half.at(1).rank_fraction, half.at(1).scalar_lr) == (0.08, 0.5, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no optimizer"),
        ("rival = 3", "names no optimizer"),
        ("rival = [3]", "is a table of settings"),
        ("[[rivals]]\nlabel='x'", "did you mean 'rival'"),
        ("[[rival]]\nname = 'dion'", "give it a label"),
        ("[[rival]]\nlabel = ' '\nname = 'dion'", "give it a label"),
        ("[[rival]]\nlabel = 'x'\nname = 'dio'", "did you mean 'dion'"),
        ("[[rival]]\nlabel = 'x'", "give the optimizer's name"),
        ("[[rival]]\nlabel = 'x'\nname = 'dion'\nrank_fracton = 1", "did you mean 'rank_fraction'"),
        ("[[rival]]\nlabel = 'x'\nname = 'dion'\nlr = 'high'", "has to be of type"),
        ("[[rival", "give a TOML file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text, sentence):
    path = tmp_path / "rivals.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rivals\.toml") as error:
        load(path)
    assert sentence in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "nothing.toml")


def test_choosing_by_label():
    assert [rival.label for rival in choose(DEFAULT, ["dion-1/*", "adamw"])] == ["adamw", "dion-1/4", "dion-1/16"]
    assert choose(DEFAULT, []) == DEFAULT
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        choose(DEFAULT, ["adamm"])
    with pytest.raises(UserError, match="two optimizers are called 'muon'"):
        choose([DEFAULT[1], DEFAULT[1]], [])
