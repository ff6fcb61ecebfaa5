"""Tests of batch sizes, against NumPy and loops."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import (
    AdaptiveBatchSize,
    BatchSizeTest,
    inner_product_test,
    microbatch_norm_test,
    norm_test,
)

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name

SHAPES = ((2, 1), (3,), (7, 5), (4, 2, 3), (6, 1, 1, 2))


def flat(grads: Tensor | list[Tensor]) -> np.ndarray:
    tensors = [grads] if isinstance(grads, Tensor) else grads
    return np.concatenate([t.double().reshape(len(t), -1).numpy() for t in tensors], axis=1)


def quotient(variance: float, square: float) -> float:
    if variance == 0:
        return 0.0
    return variance / square if square else math.inf


def by_norm(grads: Tensor | list[Tensor], eta: float, coordinatewise: bool) -> tuple[float, ...]:
    rows = flat(grads)
    variances, mean = rows.var(axis=0, ddof=1), rows.mean(axis=0)
    square = math.fsum(mean**2)
    proposal = quotient(variances.sum(), eta**2 * square)
    if coordinatewise:
        each = [quotient(v, eta**2 * m**2) for v, m in zip(variances, mean, strict=True)]
        proposal = max(each, default=0.0)
    return variances.sum(), square, proposal


def by_inner_products(grads: Tensor | list[Tensor], theta: float) -> tuple[float, ...]:
    rows = flat(grads)
    mean = rows.mean(axis=0)
    products = np.array([math.fsum(row * mean) for row in rows])
    square = math.fsum(mean**2)
    variance = products.var(ddof=1)
    return variance, square, quotient(variance, theta**2 * square**2)


def assert_found(found: BatchSizeTest, expected: tuple[float, ...], size: int, rtol: float) -> None:
    variance, square, proposal = expected
    assert all(tensor.shape == () for tensor in found)
    assert found.batch_size.dtype == torch.float64
    assert found.variance.item() == pytest.approx(variance, rel=rtol)
    assert found.grad_sq_norm.item() == pytest.approx(square, rel=rtol)
    assert found.batch_size.item() == pytest.approx(proposal, rel=rtol)
    assert found.passed.dtype == torch.bool
    assert found.passed.item() == (proposal <= size)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = (torch.randn(shape, dtype=torch.float64) + 0.7).to(dtype)
    before = grads.clone()
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for option in (0.1, 0.9):
        for coordinatewise in (False, True):
            found = norm_test(grads, eta=option, coordinatewise=coordinatewise)
            assert_found(found, by_norm(grads, option, coordinatewise), shape[0], rtol)
        found = inner_product_test(grads, theta=option)
        assert_found(found, by_inner_products(grads, option), shape[0], rtol)
    assert torch.equal(grads, before)


def test_several_parameters() -> None:
    wide = torch.randn(8, 6, dtype=torch.float64) + 1
    grads = [wide[:, :2], wide[:, 2], wide[:, 3:].reshape(8, 3, 1), wide[:, 6:]]
    for coordinatewise in (False, True):
        expected = by_norm(wide, 0.5, coordinatewise)
        found = norm_test(grads, eta=0.5, coordinatewise=coordinatewise)
        assert_found(found, expected, 8, 1e-10)
    assert_found(inner_product_test(tuple(grads)), by_inner_products(wide, 0.9), 8, 1e-10)
    one, both = norm_test([wide.float(), wide]), norm_test(torch.cat([wide, wide], 1))
    torch.testing.assert_close(one.variance, both.variance)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32))
def test_micro_batches(batches: int, size: int, features: int, seed: int) -> None:
    torch.manual_seed(seed)
    micro = torch.randn(batches, size, features, dtype=torch.float64) + 0.5
    means = micro.mean(1)
    rough = microbatch_norm_test(means, micro_batch_size=size, eta=0.4)
    variance = size * means.numpy().var(axis=0, ddof=1).sum()
    square = (means.numpy().mean(axis=0) ** 2).sum()
    expected = (variance, square, quotient(variance, 0.16 * square))
    assert_found(rough, expected, batches * size, 1e-9)
    variances = micro.var(1).sum(1) if size > 1 else torch.zeros(batches, dtype=torch.float64)
    exact = microbatch_norm_test(means, micro_batch_size=size, variances=variances, eta=0.4)
    assert_found(exact, by_norm(micro.flatten(0, 1), 0.4, False), batches * size, 1e-9)
    split = [means[:, :1], means[:, 1:]]
    again = microbatch_norm_test(split, micro_batch_size=size, variances=variances, eta=0.4)
    torch.testing.assert_close(again.batch_size, exact.batch_size)


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_scales(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    grads = torch.randn(6, 4, dtype=torch.float64) + 0.3
    for coordinatewise in (False, True):
        found, scaled, halved = (
            norm_test(factor * grads, eta=eta, coordinatewise=coordinatewise)
            for factor, eta in ((1, 0.5), (scale, 0.5), (1, 0.25))
        )
        torch.testing.assert_close(scaled.batch_size, found.batch_size)
        torch.testing.assert_close(halved.batch_size, 4 * found.batch_size, rtol=1e-15, atol=0)
        torch.testing.assert_close(scaled.variance, scale**2 * found.variance)
    torch.testing.assert_close(
        inner_product_test(scale * grads).batch_size, inner_product_test(grads).batch_size
    )


def test_without_variance_or_mean() -> None:
    row = torch.randn(7)
    same = row.expand(5, 7)
    for found in (
        norm_test(same),
        norm_test(same, coordinatewise=True),
        microbatch_norm_test(same, micro_batch_size=3),
        microbatch_norm_test(same, micro_batch_size=3, variances=torch.zeros(5)),
        norm_test(torch.zeros(3, 2)),
        inner_product_test(torch.zeros(3, 2)),
        norm_test(torch.zeros(3, 0)),
        norm_test([torch.zeros(3, 0)], coordinatewise=True),
        inner_product_test(torch.zeros(3, 0)),
    ):
        assert found.batch_size == 0
        assert found.passed
    assert inner_product_test(same).passed
    balanced = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    assert norm_test(balanced, coordinatewise=True).batch_size == math.inf
    for found in (
        norm_test(balanced[:, :1]),
        norm_test(balanced[:, :1], coordinatewise=True),
        microbatch_norm_test(balanced[:, :1], micro_batch_size=2),
    ):
        assert found.batch_size == math.inf
        assert not found.passed
    constant = torch.tensor([[0.0, 1.0], [0.0, 3.0]])  # of which one coordinate is always 0
    assert norm_test(constant, eta=1.0, coordinatewise=True).batch_size == 0.5


def test_what_is_not_finite_shows() -> None:
    for bad in (torch.nan, torch.inf):
        grads = torch.randn(3, 2)
        grads[1, 1] = bad
        for found in (
            norm_test(grads),
            norm_test(grads, coordinatewise=True),
            inner_product_test(grads),
            microbatch_norm_test(grads, micro_batch_size=2),
        ):
            assert found.batch_size.isnan()
            assert not found.passed


def test_autocast_lowers_nothing() -> None:
    grads = torch.randn(5, 33) + 1
    with torch.autocast("cpu", torch.bfloat16):
        found = inner_product_test(grads)
    assert torch.equal(found.variance, inner_product_test(grads).variance)


@pytest.mark.untyped
def test_transforms() -> None:
    grads = torch.randn(3, 5, 4, dtype=torch.float64)
    for function, options in (
        (norm_test, {"coordinatewise": True}),
        (inner_product_test, {}),
        (microbatch_norm_test, {"micro_batch_size": 3}),
    ):
        expected = [function(one, **options) for one in grads]
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(tuple(compiled(grads[0], **options)), tuple(expected[0]))
        batched = torch.func.vmap(lambda one, f=function, o=options: f(one, **o))(grads)
        for found, each in zip(batched, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(each))


def proposing(size: float) -> BatchSizeTest:
    one = torch.ones(())
    return BatchSizeTest(one.bool(), one, one, torch.tensor(size, dtype=torch.float64))


@given(
    st.lists(st.floats(0, 1e300) | st.just(math.inf) | st.floats(0, 200), max_size=12),
    st.integers(1, 50),
    st.integers(0, 100),
    st.integers(1, 3),
    st.integers(1, 17),
)
def test_sizes(proposals: list[float], start: int, more: int, every: int, multiple: int) -> None:
    size = AdaptiveBatchSize(start, max_batch_size=start + more, every=every, multiple_of=multiple)
    expected = start
    for call, proposal in enumerate(proposals, 1):
        if call % every == 0:
            wanted = 0
            while wanted < min(proposal, 1000):
                wanted += multiple
            expected = min(max(expected, wanted), start + more)
        assert size.update(proposing(proposal)) == expected
        assert size.batch_size == expected
        assert type(size.batch_size) is int


def test_proposals_on_the_edge() -> None:
    size = AdaptiveBatchSize(4, max_batch_size=100, multiple_of=8)
    assert [size.update(proposing(p)) for p in (4.0, 8.0, 8.001, 15.0, math.nan, 3.0)] == [
        8,
        8,
        16,
        16,
        16,
        16,
    ]
    assert size.update(proposing(97.0)) == 100
    assert AdaptiveBatchSize(4, max_batch_size=4).update(proposing(0.0)) == 4
    large = AdaptiveBatchSize(1, max_batch_size=2**62, multiple_of=3)
    assert large.update(proposing(2.0**60)) == 2**60 + 2


def test_the_state_continues_a_run() -> None:
    proposals = (1.0, 20.0, 30.0, 60.0, 70.0)
    whole = AdaptiveBatchSize(8, max_batch_size=64, every=2)
    expected = [whole.update(proposing(p)) for p in proposals]
    for stop in range(6):
        first = AdaptiveBatchSize(8, max_batch_size=64, every=2)
        for proposal in proposals[:stop]:
            first.update(proposing(proposal))
        second = AdaptiveBatchSize(8, max_batch_size=64, every=2)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert [second.update(proposing(p)) for p in proposals[stop:]] == expected[stop:]


@pytest.mark.untyped
def test_bad_input() -> None:
    grads = torch.ones(3, 2)
    for function, name, option in (
        (norm_test, "per_sample_grads", "eta"),
        (inner_product_test, "per_sample_grads", "theta"),
        (microbatch_norm_test, "means", "eta"),
    ):
        extra = {"micro_batch_size": 2} if name == "means" else {}
        label = f"{function.__name__}: {name}"
        for value in (torch.ones(1, 2), torch.ones(0, 2), torch.ones(())):
            with pytest.raises(ValueError, match=f"{label} must be of at least 2 rows"):
                function(value, **extra)
        with pytest.raises(ValueError, match=rf"{label}\[1\] must be of 3 rows as the first"):
            function([grads, torch.ones(2, 2)], **extra)
        with pytest.raises(ValueError, match=f"{label} must be a tensor or a non-empty sequence"):
            function([], **extra)
        with pytest.raises(TypeError, match=f"{label} must be a floating-point tensor"):
            function(grads.int(), **extra)
        with pytest.raises(TypeError, match=f"{label} must be a tensor or a sequence"):
            function(1.0, **extra)
        with pytest.raises(ValueError, match=rf"{name}\[1\] must lie on the device of"):
            function([grads, torch.ones(3, 2, device="meta")], **extra)
        for value in (0.0, -0.1, math.nan):
            match = f"{function.__name__}: {option} must be a finite number above 0"
            with pytest.raises(ValueError, match=match):
                function(grads, **extra, **{option: value})
    with pytest.raises(
        ValueError, match="microbatch_norm_test: micro_batch_size must be an int of"
    ):
        microbatch_norm_test(grads, micro_batch_size=0)
    with pytest.raises(
        ValueError, match=r"microbatch_norm_test: variances must be of shape \(3,\)"
    ):
        microbatch_norm_test(grads, micro_batch_size=2, variances=torch.ones(2))
    with pytest.raises(TypeError, match="microbatch_norm_test: variances must be a floating-point"):
        microbatch_norm_test(grads, micro_batch_size=2, variances=torch.ones(3).int())


@pytest.mark.untyped
def test_bad_sizes() -> None:
    for name in ("batch_size", "max_batch_size", "every", "multiple_of"):
        options = {"batch_size": 4, "max_batch_size": 8} | {name: 0}
        with pytest.raises(
            ValueError, match=f"AdaptiveBatchSize: {name} must be an int of at leas"
        ):
            AdaptiveBatchSize(**options)
        with pytest.raises(TypeError, match=f"AdaptiveBatchSize: {name} must be an int"):
            AdaptiveBatchSize(**(options | {name: 2.0}))
    with pytest.raises(
        ValueError, match="AdaptiveBatchSize: max_batch_size must be an int of at l"
    ):
        AdaptiveBatchSize(9, max_batch_size=8)
    size = AdaptiveBatchSize(np.int64(4), max_batch_size=np.int64(8))
    assert type(size.update(proposing(6.0))) is int
    with pytest.raises(
        ValueError, match="AdaptiveBatchSize: batch_size must be from 1 to 8 in a s"
    ):
        size.load_state_dict({"batch_size": 9, "calls": 0})


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            norm_test,
            lambda: {"per_sample_grads": draw(5, 3)},
            options=({}, {"coordinatewise": True}),
        ),
        Call(norm_test, lambda: {"per_sample_grads": [draw(5, 3), draw(5)]}),
        Call(inner_product_test, lambda: {"per_sample_grads": draw(5, 3)}),
        Call(
            microbatch_norm_test,
            lambda: {"means": draw(5, 3), "variances": draw(5).abs()},
            options=({"micro_batch_size": 4},),
        ),
    ]
