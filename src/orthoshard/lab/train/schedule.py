"""The learning rate as a pure function of the step: a factor f by which the loop multiplies the peak of every group.

    f(s) = (s + 1) / (w + 1)                        while s < w         (warm-up)
    f(s) = 1                                        until n - d
    f(s) = e + (1 - e) g((s - (n - d)) / d)         afterwards,         g linear: 1 - x,  cosine: (1 + cos πx) / 2

s counts from 0. n is the number of all steps, w of warm-up, d of decay; e is the final factor.
"""

from __future__ import annotations

import math

from orthoshard.lab.train.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int) -> float:
    """Return f(``step``)."""
    n, w = config.steps, config.warmup
    if step < w:
        return (step + 1) / (w + 1)
    if config.decay == "none":
        return 1.0
    d = max(1, n - w) if config.decay_steps is None else config.decay_steps
    x = (step - (n - d)) / d if d else 0.0
    if x <= 0:
        return 1.0
    g = 1 - x if config.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return config.final_factor + (1 - config.final_factor) * max(g, 0.0)
