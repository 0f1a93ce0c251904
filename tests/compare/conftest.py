"""Figures of a study count bytes on simulated ranks, as tests of layouts do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "layouts"))
