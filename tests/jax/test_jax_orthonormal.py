"""Orthonormal columns on the table of hard matrices that the torch library's are held to, against the same oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, R, sine, skew

from orthoshard.jax.axes import Thin
from orthoshard.jax.orthonormal import Request, orthonormal

THIN = Thin("kbr", "b", "k")  # (rows, batch, rank), as a parameter might lie
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@jax.jit
def factors(ys):
    return orthonormal([Request(y, THIN, 0.0) for y in ys])


def near_one(y):
    """Over a power of two, as `Scaled` gives it. XLA takes denormal numbers for zero, so the scale comes first."""
    largest = y.double().abs().max()
    return y.double() / 2.0 ** float(torch.ceil(torch.log2(largest))) if largest else y


def test_every_case(dtype):
    """All in one batch of requests, so that a bad one may upset the others."""
    cases = [case for case in CASES if DTYPES[dtype] in case.dtypes]
    given = [near_one(case.y(DTYPES[dtype])).to(DTYPES[dtype]) for case in cases]
    found = factors([jnp.asarray(y.permute(1, 0, 2).numpy()) for y in given])
    for case, y, p in zip(cases, given, found, strict=True):
        expected = case.live(DTYPES[dtype])
        for matrix, columns in zip(torch.tensor(np.asarray(p)).permute(1, 0, 2), y, strict=True):
            kept = (matrix != 0).any(0)
            assert matrix.isfinite().all(), case.name
            assert expected is None or kept.nonzero()[:, 0].tolist() == expected, case.name
            assert skew(matrix) <= (1e-5 if dtype == "float32" else 1e-14), case.name
            live = columns[:, kept] / columns[:, kept].abs().amax(0)
            assert ((matrix[:, kept].mT @ live).diagonal() > -1e-3 * live.norm(dim=0)).all(), case.name
            lapack = sine(torch.linalg.qr(live).Q, live)
            assert sine(matrix[:, kept], live) <= 10 * max(lapack, torch.finfo(matrix.dtype).eps), case.name


def test_what_is_not_finite_ends_and_stays_in_its_matrix():
    y = np.random.default_rng(0).standard_normal((40, 2, R)).astype(np.float32)
    y[3, 0, 5] = np.nan
    (p,) = factors([jnp.asarray(y)])
    assert bool(jnp.isnan(p[:, 0]).any())
    assert np.allclose(np.asarray(p[:, 1]).T @ p[:, 1], np.eye(R), atol=1e-5)


def test_floors_are_shares_of_the_longest_column():
    y = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 4)))[0] * [1, 1e-3, 1e-5, 0.5]
    thin = Thin("kr", "", "k")
    (p,) = orthonormal([Request(jnp.asarray(y, jnp.float32), thin, 1e-4)])
    assert [bool((p[:, j] != 0).any()) for j in range(4)] == [True, True, False, True]


@pytest.mark.parametrize("r", [1, 31, 33, 80])
def test_triangles_of_any_size_are_inverted_by_halves(r):
    from orthoshard.jax.orthonormal import inverse_factor

    y = np.random.default_rng(r).standard_normal((2, 3 * r, r)).astype(np.float32)
    gram = np.swapaxes(y, 1, 2) @ y
    x = np.asarray(inverse_factor(jnp.asarray(gram)))
    assert np.allclose(np.swapaxes(x, 1, 2) @ gram @ x, np.eye(r), atol=1e-4)
    assert (np.tril(x, -1) == 0).all()
    gram[0, r // 2, r // 2] = -1
    x = np.asarray(inverse_factor(jnp.asarray(gram)))
    assert np.isnan(x[0, :, r // 2 :]).any()
    assert np.isfinite(x[1]).all()
