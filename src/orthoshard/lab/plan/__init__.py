"""``orthoshard plan``: what each optimizer would cost for a model, a mesh and a machine, over a whole run."""
