"""``orthoshard report``: runs, comparisons, benchmarks, figures and plans as one page that needs nothing but itself."""
