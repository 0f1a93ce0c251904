"""``orthoshard compare --search``: learning rates, rank fraction, momentum and weight decay, drawn by optuna."""
