from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import attention_entropy, attention_lse

import samples
from attention._attention_map.problem import (
    BUILT,
    IMPLEMENTATIONS,
    LENGTHS,
    check,
    exact_lse,
    scores,
    strided,
    tensors,
)
from attention.tensors import GROUPS, heads, with_lse
from calls import Call

pytestmark = pytest.mark.usefixtures("small_tiles")


def composed(query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """The entropy by way of torch's log-sum-exp, of which a hidden key has no part."""
    values = scores(query, key, is_causal, scale)
    values = values.to(torch.promote_types(query.dtype, torch.float32))
    logs = values - values.logsumexp(-1, keepdim=True)
    return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)


def compare(
    leaves: list[Tensor], implementation: str, is_causal: bool, scale: float | None = None
) -> None:
    lse = exact_lse(*leaves, is_causal, scale)
    check(
        leaves,
        lambda query, key: attention_entropy(
            query,
            key,
            lse,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
            implementation=implementation,
        ),
        lambda query, key: composed(query, key, is_causal, scale),
        differentiable=True,
    )


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool) -> None:
    compare(tensors(dtype=dtype), implementation, is_causal, 0.4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS[1:])
@pytest.mark.parametrize("heads", [(3, 1, 5), (1, 1, 80)])
def test_lengths_heads_and_features(
    implementation: str, is_causal: bool, lengths: tuple[int, int], heads: tuple[int, int, int]
) -> None:
    leaves = tensors(*lengths, heads[2], batch=1, heads=heads[0], kv_heads=heads[1])
    compare(leaves, implementation, is_causal)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5), (1, 1, 1)])
def test_nothing_or_one_key(implementation: str, shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    leaves = tensors(queries, keys, batch=batch)
    lse = attention_lse(*leaves, enable_gqa=True)
    entropy = attention_entropy(*leaves, lse, enable_gqa=True, implementation=implementation)
    assert entropy.shape == (batch, 4, queries)
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), rtol=0, atol=1e-6)
    for gradient in torch.autograd.grad(entropy.sum(), leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_that_see_nothing_and_nan(implementation: str) -> None:
    leaves = tensors()
    lse = exact_lse(*leaves, False, None)
    function = partial(attention_entropy, enable_gqa=True, implementation=implementation)
    rest = torch.autograd.grad(
        function(leaves[0][:, :, 20:], leaves[1], lse[:, :, 20:]).sum(), leaves
    )
    lse[:, :, :20] = -torch.inf
    entropy = function(*leaves, lse)
    assert not entropy[:, :, :20].any()
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), leaves), rest)
    with torch.no_grad():
        leaves[0][1, 2, 30, 3] = torch.nan
    assert torch.equal(function(*leaves, lse).isnan().nonzero(), torch.tensor([[1, 2, 30]]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_that_vanish_add_nothing(implementation: str) -> None:
    query, key = (leaf.detach() for leaf in tensors(batch=1, heads=1, kv_heads=1))
    leaves = [(1e4 * query).requires_grad_(), key.requires_grad_()]
    function = partial(attention_entropy, implementation=implementation)
    entropy = function(*leaves, attention_lse(*leaves, implementation=implementation))
    first, second = scores(*leaves, False, None).topk(2).values.unbind(-1)
    alone = first > second + 100
    assert alone.sum() > 20
    assert entropy.isfinite().all()
    assert (entropy[alone].abs() < 1e-6).all()
    for gradient in torch.autograd.grad(entropy.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_log_sum_exp_is_a_function_of_query_and_key(implementation: str) -> None:
    dtype = torch.float32 if implementation == "triton" else torch.float64
    leaves = tensors(dtype=dtype)
    lse = attention_lse(*leaves, enable_gqa=True)
    assert lse.requires_grad
    function = partial(attention_entropy, enable_gqa=True, implementation=implementation)
    attached, detached = (
        torch.autograd.grad(function(*leaves, given).sin().sum(), leaves, retain_graph=True)
        for given in (lse, lse.detach())
    )
    expected = torch.autograd.grad(composed(*leaves, False, None).sin().sum(), leaves)
    for gradients in (attached, detached):
        torch.testing.assert_close(gradients, expected)
    assert torch.autograd.grad(function(*leaves, lse).sum(), lse, allow_unused=True) == (None,)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_gradient_of_a_shifted_log_sum_exp(implementation: str) -> None:
    """What a log-sum-exp has beyond that of the scores is a constant."""
    leaves = tensors(5, 7, 3, batch=1, heads=2, kv_heads=1, dtype=torch.float64)
    shift = torch.randn(1, 2, 5, dtype=torch.float64)

    def entropy(query: Tensor, key: Tensor) -> Tensor:
        lse = attention_lse(query, key, is_causal=True, enable_gqa=True).detach() + shift
        return attention_entropy(
            query, key, lse, is_causal=True, enable_gqa=True, implementation=implementation
        )

    assert torch.autograd.gradcheck(entropy, leaves)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_keys_after_the_last_query_are_not_read(implementation: str) -> None:
    query, key = tensors(20, 100)
    poisoned = key.detach().clone()
    poisoned[:, :, 36:] = torch.nan
    poisoned.requires_grad_()
    lse = exact_lse(query, key, True, None)
    function = partial(
        attention_entropy, is_causal=True, enable_gqa=True, implementation=implementation
    )
    gradients = torch.autograd.grad(function(query, poisoned, lse).sum(), (query, poisoned))
    expected = torch.autograd.grad(function(query, key, lse).sum(), (query, key))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_strides_and_two_calls(implementation: str) -> None:
    leaves = tensors()
    lse = exact_lse(*leaves, True, None)
    function = partial(
        attention_entropy, is_causal=True, enable_gqa=True, implementation=implementation
    )
    results = []
    for arguments in (leaves, leaves, [strided(leaf) for leaf in leaves]):
        entropy = function(*arguments, lse)
        results.append([entropy.detach(), *torch.autograd.grad(entropy.sin().sum(), arguments)])
    for first, again, moved in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(moved, first)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    is_causal=st.booleans(),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 2**20),
)
def test_properties(queries: int, keys: int, is_causal: bool, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = tensors(queries, keys, dtype=torch.float64)

    def entropy(query: Tensor, key: Tensor) -> Tensor:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
        return attention_entropy(query, key, attention_lse(query, key, **options), **options)  # type: ignore[arg-type]

    visible = torch.arange(1, queries + 1).clamp(max=keys) if is_causal else torch.tensor(keys)
    most = visible.double().log().expand(2, 4, queries)
    values = entropy(query, key)
    assert (values >= -1e-12).all()
    assert (values <= most + 1e-12).all()
    torch.testing.assert_close(entropy(torch.zeros_like(query), key), most)
    # A vector added to all keys moves whole rows of scores.
    step = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(entropy(query, key + step), values)
    # Gradients of a row of scores add up to 0, so that those of keys do.
    (gradient,) = torch.autograd.grad(values.sum(), key)
    torch.testing.assert_close(gradient.sum(2), torch.zeros(2, 2, 12).double(), rtol=0, atol=1e-9)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            attention_entropy,
            lambda: with_lse(heads("query", "key")),
            statistics=("lse",),
            differentiable=("query", "key"),
            options=({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True}),
            sizes=GROUPS,
        ),
    ]
