"""The rules that are timed are those of `orthoshard` itself, whatever other tests have imported."""

import pytest

from orthoshard.lab.bench import contestants
from orthoshard.rules import RULES

OF_COMPAT = ("dion2", "nordion2")


@pytest.fixture(autouse=True)
def own_rules(monkeypatch: pytest.MonkeyPatch):
    own = {name: rule for name, rule in RULES.items() if name not in OF_COMPAT}
    monkeypatch.setattr(contestants, "RULES", own)
