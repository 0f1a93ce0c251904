"""One small text for the whole session; its tokens are prepared once."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_kit import write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")
