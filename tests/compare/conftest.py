"""What takes seconds and is not asked for: the check of data and optimizers, and pictures. ``real_check`` and
``real_picture`` are for the tests that do."""

import pytest

from orthoshard.lab.compare import comparison, settings
from orthoshard.lab.compare.search import cli as search

CHECK, PLOT, HEAT_MAP = settings.try_out, comparison.plot, search.heat_map


@pytest.fixture(autouse=True, scope="module")
def _what_takes_long_is_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "try_out", lambda base, optimizers: "d")
        patch.setattr(comparison, "plot", lambda made, found, seed, path: path.write_bytes(b"picture"))
        patch.setattr(search, "heat_map", lambda found, path: path.write_bytes(b"picture"))
        yield


@pytest.fixture
def real_check(monkeypatch):
    monkeypatch.setattr(settings, "try_out", CHECK)


@pytest.fixture
def real_picture(monkeypatch):
    monkeypatch.setattr(comparison, "plot", PLOT)
    monkeypatch.setattr(search, "heat_map", HEAT_MAP)
