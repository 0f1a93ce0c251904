"""``orthoshard sweep``: a search for learning rate, rank fraction, momentum and weight decay, by optuna."""
