"""Tests of hosts start real processes as those of the layouts do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "layouts"))
