"""``orthoshard explain``: what an optimizer would do to a model on a mesh, before there are weights or machines."""
