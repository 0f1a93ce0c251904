"""Tests of studies fake their runs as those of comparisons do, and simulate ranks as those of layouts do."""

import sys
from pathlib import Path

for room in ("compare", "layouts"):
    sys.path.append(str(Path(__file__).parents[1] / room))
