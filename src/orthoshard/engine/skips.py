"""How many steps were skipped: in all, and in a row. The numbers live on the host, or on the device if it decides.

On the device kernels add to them, so that a replayed graph counts too; reading them waits. May import torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Skips:
    def __init__(self, total: int = 0, in_a_row: int = 0) -> None:
        self._numbers: list[int] | Tensor = [total, in_a_row]

    def move(self, device: torch.device) -> None:
        """Keep the numbers on this device from now on. If they are there already, they stay the same tensor."""
        if not isinstance(self._numbers, Tensor) or self._numbers.device != device:
            self._numbers = torch.tensor(self.read(), dtype=torch.int64, device=device)

    def read(self) -> list[int]:
        """Return both numbers. Waits for the device if they live on one."""
        return self._numbers.tolist() if isinstance(self._numbers, Tensor) else self._numbers

    def count(self, skipped: bool | Tensor) -> None:
        """Count one more step: both numbers grow by one if it was skipped, otherwise the second falls to zero."""
        if isinstance(self._numbers, Tensor):
            self._numbers.add_(skipped)
            self._numbers[1].mul_(skipped)
        else:
            total, in_a_row = self._numbers
            self._numbers = [total + bool(skipped), in_a_row + 1 if skipped else 0]
