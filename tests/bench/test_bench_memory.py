"""State bytes and the peak of a step against allocations counted by hand."""

import torch

from orthoshard.lab.bench.memory import peak_bytes, state_bytes

MEGA = 1_000_000
CPU = torch.device("cpu")


def test_the_peak_is_what_is_held_at_once():
    x = torch.ones(1000, 250)  # 1 MB

    def step():
        a = x * 2  # 1 MB
        b = a * 2  # 2 MB
        del a
        c = b * 2  # 2 MB again
        d = torch.cat((b, c))  # 4 MB at once
        assert d.shape == (2000, 250)

    assert abs(peak_bytes(step, CPU) - 4 * MEGA) < 1000


def test_a_step_in_place_needs_nothing():
    x = torch.ones(1000, 250)
    assert peak_bytes(lambda: x.mul_(2), CPU) < 1000


def test_memory_that_is_released_makes_room():
    held = [torch.ones(1000, 250)]

    def step():
        held.clear()
        held.append(torch.ones(1000, 250))

    assert peak_bytes(step, CPU) < 1000


def test_state_of_adamw_is_two_copies_and_a_counter():
    weights = [
        torch.nn.Parameter(torch.zeros(30, 20)),
        torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)),
    ]
    optimizer = torch.optim.AdamW(weights)
    assert state_bytes(optimizer) == 0
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * (600 * 4 + 5 * 2) + 2 * 4
