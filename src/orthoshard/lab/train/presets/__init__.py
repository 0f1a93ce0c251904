"""Presets: the TOML files beside this one, or the user's own. Their tables and keys are those of `TrainConfig`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from orthoshard.lab.train.config import TrainConfig, from_dict
from orthoshard.lab.train.errors import UserError, unknown

HERE = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_preset(name: str) -> TrainConfig:
    """Return the preset of that name, or the one in the TOML file of that path. Raises ``UserError``."""
    path = HERE / f"{name}.toml"
    if name not in preset_names():
        path = Path(name).expanduser()
        if path.suffix != ".toml":
            raise unknown("preset", name, preset_names(), also="the path of a .toml file")
        if not path.is_file():
            raise UserError(f"there is no preset at {path}; check the path.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the preset {path} cannot be read ({error}); it has to be TOML.") from error
    return from_dict(TrainConfig(), values, f"the preset {path}")
