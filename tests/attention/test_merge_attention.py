from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import BlockLayout, attention_lse, block_sparse_attention, merge_attention

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name


def parts(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    statistics = torch.promote_types(dtype, torch.float32)
    outputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]
    lses = [(3 * torch.randn(shape[:-1])).to(statistics).requires_grad_() for _ in range(count)]
    return [outputs, lses]


def composed(outputs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    """The merged attention by sums of exponentials, which these sizes do not overflow."""
    masses = [lse.exp() for lse in lses]
    total = torch.stack(masses).sum(0)
    weighted = [
        (mass / total)[..., None].to(output.dtype) * output
        for mass, output in zip(masses, outputs, strict=True)
    ]
    return [torch.stack(weighted).sum(0), total.log()]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (40, 1), (63, 100), (0, 4), (40, 0)])
def test_equals_sums_of_exponentials(
    dtype: torch.dtype, count: int, shape: tuple[int, ...]
) -> None:
    leaves = parts(count, shape, dtype)
    upstream = [torch.randn(shape).to(dtype), torch.randn(shape[:-1])]
    results = []
    same = torch.float32 if dtype == torch.float64 else None
    for function, to in ((merge_attention, None), (composed, same), (composed, torch.float64)):
        outputs, lses = (
            [leaf.detach().to(to or leaf.dtype).requires_grad_() for leaf in part]
            for part in leaves
        )
        output, lse = function(outputs, lses)
        loss = sum((t * g.to(t)).sum() for t, g in zip((output, lse), upstream, strict=True))
        results.append([output, lse, *torch.autograd.grad(loss, [*outputs, *lses])])  # type: ignore[arg-type]
    assert results[0][0].dtype == dtype
    assert results[0][1].dtype == torch.promote_types(dtype, torch.float32)
    for values in zip(*results, strict=True):
        assert_exact(*values, dtype)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 20),
    keys=st.integers(2, 40),
    cut=st.integers(1, 39),
    seed=st.integers(0, 2**20),
)
def test_halves_of_the_keys_make_the_whole(queries: int, keys: int, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 3, n, 5).double() for n in (queries, keys, keys))
    pieces = [slice(0, min(cut, keys - 1)), slice(min(cut, keys - 1), keys)]
    outputs = [
        F.scaled_dot_product_attention(query, key[:, :, piece], value[:, :, piece])
        for piece in pieces
    ]
    lses = [attention_lse(query, key[:, :, piece]) for piece in pieces]
    output, lse = merge_attention(outputs, lses)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(lse, attention_lse(query, key))
    backwards = merge_attention(outputs[::-1], lses[::-1])
    torch.testing.assert_close(backwards, (output, lse))
    again = merge_attention(*([result, torch.zeros_like(result)] for result in (output, lse - 1e4)))
    torch.testing.assert_close(again, (torch.zeros_like(output), torch.zeros_like(lse)))


def test_blocks_of_the_keys_make_the_whole() -> None:
    query, key, value = (torch.randn(1, 2, 48, 8) for _ in range(3))
    mask = torch.rand(1, 2, 3, 3) < 0.5
    mask[:, :, 1] = False
    outputs, lses = zip(
        *(
            block_sparse_attention(
                query, key, value, BlockLayout.from_dense(half, 16), is_causal=True, return_lse=True
            )
            for half in (mask, ~mask)
        ),
        strict=True,
    )
    output, _ = merge_attention(outputs, lses)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output, expected)


def test_parts_that_see_nothing() -> None:
    outputs, lses = parts(3, (2, 4, 5), torch.float32)
    with torch.no_grad():
        lses[1].fill_(-torch.inf)
        for lse in lses:
            lse[:, 2] = -torch.inf
    output, lse = merge_attention(outputs, lses)
    assert not output[:, 2].any()
    assert (lse[:, 2] == -torch.inf).all()
    assert lse.isfinite().sum() == 6
    # Whatever finite output the second part carries.
    changed = [outputs[0], 1e30 * torch.ones(2, 4, 5), outputs[2]]
    assert torch.equal(merge_attention(changed, lses)[0], output)
    without = merge_attention(outputs[::2], lses[::2])
    torch.testing.assert_close(without, (output, lse))
    finite = lse.masked_fill(lse == -torch.inf, 0)
    gradients = torch.autograd.grad(output.sum() + finite.sum(), [*outputs, *lses])
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[:, 2].any()
    assert not gradients[1].any()
    assert not gradients[4].any()


def test_large_log_sum_exps_and_nan() -> None:
    outputs, lses = parts(2, (4, 5), torch.float32)
    shifted = [lse.detach() + 1e4 for lse in lses]
    output, lse = merge_attention(outputs, shifted)
    truth = composed(
        [output.double() for output in outputs], [lse.double() - 1e4 for lse in shifted]
    )
    torch.testing.assert_close(output, truth[0].float())
    torch.testing.assert_close(lse, (truth[1] + 1e4).float())
    with torch.no_grad():
        outputs[0][1, 2] = torch.nan
        lses[1][3] = torch.nan
    output, lse = merge_attention(outputs, lses)
    assert torch.equal(output.isnan().sum(-1), torch.tensor([0, 1, 0, 5]))
    assert torch.equal(lse.isnan(), torch.tensor([False, False, False, True]))


def test_dtypes_may_differ() -> None:
    outputs, lses = parts(2, (4, 5), torch.float32)
    output, lse = merge_attention([outputs[0].half(), outputs[1]], [lses[0], lses[1].double()])
    assert (output.dtype, lse.dtype) == (torch.float16, torch.float64)


def test_arguments_are_not_modified() -> None:
    outputs, lses = parts(2, (4, 5), torch.float32)
    copies = [[tensor.detach().clone() for tensor in part] for part in (outputs, lses)]
    merge_attention(outputs, lses)
    for part, copy in zip((outputs, lses), copies, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(part, copy, strict=True))


def test_gradcheck() -> None:
    outputs, lses = parts(3, (2, 3, 2), torch.float64)

    def flat(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(leaves[:3], leaves[3:])

    assert torch.autograd.gradcheck(flat, [*outputs, *lses], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(flat, [*outputs, *lses])


@pytest.mark.untyped
def test_transforms() -> None:
    outputs, lses = (torch.stack(part).detach() for part in parts(2, (3, 4, 5), torch.float64))

    def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(list(outputs), list(lses))

    expected = merge(outputs, lses)
    torch.testing.assert_close(torch.func.vmap(merge, 1)(outputs, lses), expected)
    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 2):
        arguments = outputs[:, :size], lses[:, :size]
        torch.testing.assert_close(compiled(*arguments), merge(*arguments))


ONE, TWO = torch.zeros(3, 4), torch.zeros(3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "outputs", "lses"),
    [
        ("outputs and lses must be of one length, at least 1, got 0 and 0", ValueError, [], []),
        (
            "outputs and lses must be of one length, at least 1, got 1 and 2",
            ValueError,
            [ONE],
            [TWO, TWO],
        ),
        ("outputs[0] must be of shape (..., L, Ev), got", ValueError, [TWO], [TWO]),
        (
            "outputs[1] must be of shape (3, 4), got float32 of shape (3, 5)",
            ValueError,
            [ONE, torch.zeros(3, 5)],
            [TWO, TWO],
        ),
        (
            "lses[1] must be of shape (3,), got float32 of shape (3, 4)",
            ValueError,
            [ONE, ONE],
            [TWO, ONE],
        ),
        ("outputs[1] must be a floating-point", TypeError, [ONE, ONE.long()], [TWO, TWO]),
        ("lses[0] must be a floating-point", TypeError, [ONE], [TWO.long()]),
        ("lses[0] must lie on the device of outputs[0]", ValueError, [ONE], [TWO.to("meta")]),
    ],
)
def test_bad_input(
    message: str, error: type[Exception], outputs: list[Any], lses: list[Any]
) -> None:
    with pytest.raises(error) as caught:
        merge_attention(outputs, lses)
    assert f"merge_attention: {message}" in str(caught.value)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            merge_attention,
            lambda: {
                "outputs": [draw(3, 7, 4) for _ in range(2)],
                "lses": [draw(3, 7) for _ in range(2)],
            },
            differentiable=("outputs", "lses"),
        ),
    ]
