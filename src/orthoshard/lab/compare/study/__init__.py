"""``orthoshard compare STUDY``: several comparisons and the figures drawn from them, as a file."""
