"""``orthoshard explain``: what an optimizer would do to a model on a mesh, without weights or machines."""
