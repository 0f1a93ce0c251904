"""``orthoshard plan``: the cost of each optimizer for a model, a mesh and a machine, over a whole run."""
