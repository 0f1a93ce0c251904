"""``orthoshard report``: runs, comparisons, benchmarks, figures and plans as one self-contained page."""
