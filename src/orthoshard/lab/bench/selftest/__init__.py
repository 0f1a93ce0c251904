"""``orthoshard bench --self-test``: whether this device computes what a CPU computes in float64."""
