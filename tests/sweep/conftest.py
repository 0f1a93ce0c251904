"""A sweep runs the jobs of a comparison, so its tests share the fakes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "compare"))
