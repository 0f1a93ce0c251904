"""``orthoshard bench --self-test``: checks that this device computes the same as a CPU in float64."""
