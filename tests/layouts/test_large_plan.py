"""A plan for a model and a mesh that fit nowhere: Llama-3-405B on 16 x 64 x 8 ranks, as one of them would build it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

SCRIPT = """
import json, resource, time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.groups import all_keys, complete, default_of
from orthoshard.plan import build_plan

REPLICAS, FSDP, TP = 16, 64, 8
WIDTH, HIDDEN, KV, LAYERS = 16384, 53248, 1024, 126  # arXiv 2407.21783, table 3
COLUMN = {"q": (WIDTH, WIDTH), "k": (KV, WIDTH), "v": (KV, WIDTH), "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH)}
ROW = {"o": (WIDTH, WIDTH), "down": (WIDTH, HIDDEN)}

start = time.perf_counter()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=REPLICAS * FSDP * TP)
mesh = init_device_mesh("cpu", (REPLICAS, FSDP, TP), mesh_dim_names=("replicas", "fsdp", "tp"))


def sharded(shape, places, cut):
    local = torch.empty([length // n for length, n in zip(shape, cut)], dtype=torch.bfloat16, device="meta")
    tensor = DTensor.from_local(local, mesh, places, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))
    return torch.nn.Parameter(tensor)


column = (Replicate(), _StridedShard(0, split_factor=TP), Shard(0))
row = (Replicate(), Shard(0), Shard(1))
named = []
for layer in range(LAYERS):
    named += [(f"{layer}.{k}", sharded(s, column, (FSDP * TP, 1))) for k, s in COLUMN.items()]
    named += [(f"{layer}.{k}", sharded(s, row, (FSDP, TP))) for k, s in ROW.items()]
defaults = {"rule": "dion", "rank_fraction": 1 / 16}
defaults = {key: defaults.get(key, default_of(key, defaults)) for key in all_keys()}
group = complete({"params": [p for _, p in named], "param_names": [n for n, _ in named]}, defaults)
plan = build_plan([group])
cost = step_cost(plan, [group])
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "parameters": sum(p.numel() for _, p in named),
    "shared": sum(update.replicas == "split" for bucket in plan.buckets for update in bucket.updates),
    "state": cost.state, "wire": float(cost.wire), "flops": cost.flops, "agreement": float(agreement_bytes(plan)),
}))
"""


def test_the_plan_of_llama_405b_on_8192_ranks():
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    print(facts)
    assert facts["seconds"] < 60
    assert facts["gib"] < 4
    width, hidden, kv, layers, shards = 16384, 53248, 1024, 126, 512
    matrices = {"square": (2, width, width), "kv": (2, kv, width), "in": (2, hidden, width), "out": (1, width, hidden)}
    assert facts["parameters"] == layers * sum(count * m * n for count, m, n in matrices.values())
    # float32 momentum cut 512 ways. Q spans the rows: column-wise weights cut it 512 ways too, row-wise ones only 64.
    momentum = 4 * facts["parameters"] // shards
    q = 4 * layers * ((width * 1024 + 2 * kv * 64 + 2 * hidden * 1024) // 512 + (width * 1024 + width * 1024) // 64)
    assert facts["state"] == momentum + q
    assert facts["wire"] > 0
    assert facts["flops"] > 0
