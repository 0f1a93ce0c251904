"""Runs examples/accelerate_loop.py with FSDP2 on CPUs.

Accelerate believes in FSDP only where its state finds GPUs or their like; on CPUs it falls back to DDP. Here its state
is told the distributed type after it has looked. Everything after that is Accelerate's own code: `prepare` with the
exchange of parameters, clipping, `save_state`, `load_state`.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_look = AcceleratorState.__init__


def _told(self, *args, fsdp_plugin=None, **kwargs):
    _look(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def believe_in_fsdp_on_cpu():
    AcceleratorState.__init__ = _told


if __name__ == "__main__":
    believe_in_fsdp_on_cpu()
    import accelerate_loop

    accelerate_loop.main()
