"""`make compare` gives no argument."""

from orthoshard.lab.compare import cli
from orthoshard.lab.train.presets import load_preset


def test_no_flag_at_all_is_the_default_comparison() -> None:
    assert cli.parse([]).model == load_preset("default").model
    assert cli.parse(["--preset=quick"]).model == load_preset("quick").model
