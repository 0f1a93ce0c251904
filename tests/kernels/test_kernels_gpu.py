"""On a GPU: Triton's form of every pass beside torch's, for all dtypes and layouts and for shapes of real use; without
host syncs; inside a CUDA graph. The other tests of this folder run there too, compiled."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from passes import DTYPES, LAYOUTS, Maker, Shape, close

from orthoshard import Dion, kernels
from orthoshard.linalg import accumulate as sweeps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [
    *(Shape((1, 2), 192, 160, r) for r in (1, 2, 15, 16, 17, 64, 100, 128, 129)),
    Shape((1,) * 5, 1024, 1024, 1024),
    Shape((2,), 2048, 768, 128),
    Shape((1,), 127, 4099, 33),
    Shape((3,), 1, 5000, 1),
    Shape((3,), 5000, 1, 1),
]


def everything(kernel, maker):
    """All that the passes leave behind, by name."""
    maker.generator.manual_seed(0)
    s, left = maker.shape, {}
    with kernels.using(kernel):
        M, G, W = maker.momentum(), maker.blocks(maker.gradient), maker.blocks(maker.weight)
        L, R = maker.factor(s.m) / s.m**0.5, maker.factor(s.n) / s.n**0.5
        rows = maker.random(s.b, s.m, 1, dtype=torch.promote_types(maker.state, torch.float32))
        a = 2.0 ** torch.arange(s.b, device=M.device).view(-1, 1, 1).to(M.dtype)
        left["largest"] = sweeps.accumulate(M, G, 0.9)
        left["M"] = M.clone()
        N, left["N largest"], left["squares"] = sweeps.look_ahead(M, G, 0.9)
        left["N"] = N.clone()
        sweeps.add_product_and_rows(W, L, R, rows, N, -0.1, 0.99)
        sweeps.look_back(list(sweeps.blocks(N, G)), G, 0.9)
        left["copy"] = sweeps.scaled_copy(N, rows, torch.float16)
        left["wide squares"] = sweeps.wide_row_squares(N.mT)
        left["M again"], left["W with rows"] = N.clone(), torch.cat(W)
        sweeps.add_product(W, L, R, -0.1, 0.99)
        sweeps.add_scaled(W, N, -0.1, 0.99)
        left["W"] = torch.cat(W)
        for name, factor in (("right", R), ("left", L)):
            taken = sweeps.Product(L, R, -0.05, a)
            added = sweeps.Product(2 * L, factor, -0.1) if name == "right" else sweeps.Product(factor, 2 * R, -0.1)
            sweeps.add_products(M, taken, W, added, torch.tensor(0.99, device=M.device))
            left["W common " + name], left["M common " + name] = torch.cat(W), M.clone()
    return left


@pytest.mark.parametrize(("shape", "dtypes"), list(product(SHAPES, DTYPES)), ids=str)
def test_all_shapes_and_dtypes(shape, dtypes):
    compare(Maker(shape, dtypes))


@pytest.mark.parametrize(("layout", "dtypes"), list(product(LAYOUTS, DTYPES)), ids=str)
def test_all_layouts_and_dtypes(layout, dtypes):
    compare(Maker(Shape((2, 1), 67, 133, 9), dtypes, layout))


def compare(maker):
    found, wanted = everything("triton", maker), everything("torch", maker)
    narrow = {torch.bfloat16} & {maker.state, maker.weight}
    for name, value in found.items():
        # squares in float64 are those of an N that is off by rounding of its own dtype
        wide = value.dtype == torch.float64 and maker.state != torch.float64
        held = torch.float32 if wide else value.dtype
        dtype = torch.bfloat16 if narrow and held != torch.float64 else held
        # torch's bfloat16 forms round once more a pass; squares and products are sums of up to 5000 terms
        close(value, wanted[name], dtype, roundings=16 if narrow else 400)


def test_a_step_waits_for_nothing_once_its_tables_are_there():
    with kernels.using("triton"):
        weights = [torch.nn.Parameter(torch.randn(96, 64, device="cuda")) for _ in range(3)]
        optimizer = Dion(weights, rank_fraction=0.25)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        M, G = torch.zeros(3, 96, 64, device="cuda"), [weight.grad[None] for weight in weights]
        sweeps.accumulate(M, G)
        torch.cuda.synchronize()
        with torch.cuda.device(0):
            torch.cuda.set_sync_debug_mode("error")
            try:
                sweeps.accumulate(M, G)
                sweeps.accumulate(M, [torch.ones(1, 96, 64, device="cuda") for _ in range(3)])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(M).all()


def test_inside_a_cuda_graph():
    M, G = torch.zeros(2, 64, 48, device="cuda"), [torch.ones(1, 64, 48, device="cuda") for _ in range(2)]
    with kernels.using("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sweeps.accumulate(M, G)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            largest = sweeps.accumulate(M, G)
    for k in range(2, 5):
        graph.replay()
        assert float(largest.max()) == float(M.min()) == k
