"""Transforms, and what the function refuses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilework.attention import BlockLayout, block_sparse_attention

import samples
from attention.tensors import GROUPS, heads
from calls import Call, Tensors, draw

MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)[None, None]
LAYOUT = BlockLayout.from_dense(MASK, 4)
QUERY, KEY, VALUE = torch.zeros(3, 2, 2, 11, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (QUERY, KEY, VALUE):
        tensor.normal_()


def scalar(implementation: str) -> Callable[..., Tensor]:
    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, lse = block_sparse_attention(
            query, key, value, LAYOUT, return_lse=True, implementation=implementation
        )
        return output.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum()

    return loss


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_gradcheck(implementation: str) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
    loss = scalar(implementation)
    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=implementation != "reference")


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            self.size = max(self.size, one.numel() if isinstance(one, Tensor) else 0)
        return results


@pytest.mark.untyped
@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivative_stores_active_blocks_alone(is_causal: bool) -> None:
    mask = torch.eye(32, dtype=torch.bool)
    mask[-1, 3] = True
    layout = BlockLayout.from_dense(mask[None, None], 8)
    active, block = int(mask.sum()), 8 * 8
    leaves = [torch.randn(1, 1, 256, 4).double().requires_grad_() for _ in range(3)]
    results = {}
    for implementation in ("tiled", "reference"):
        output = block_sparse_attention(
            *leaves, layout, is_causal=is_causal, implementation=implementation
        )
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        with Largest() as largest:
            results[implementation] = torch.autograd.grad(
                sum(grad.square().sum() for grad in first), leaves
            )
        assert (largest.size <= 2 * active * block) == (implementation == "tiled")
    torch.testing.assert_close(results["tiled"], results["reference"])


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda loss: torch.func.grad(loss, (0, 1, 2))(QUERY, KEY, VALUE),
    "jvp": lambda loss: torch.func.jvp(loss, (QUERY, KEY, VALUE), (KEY, VALUE, QUERY)),
    "vmap": lambda loss: torch.func.vmap(loss, (0, None, 0))(
        torch.stack([QUERY, KEY]), KEY, torch.stack([VALUE, QUERY])
    ),
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss), (0, None, None))(
        torch.stack([QUERY, KEY]), KEY, VALUE
    ),
}


@pytest.mark.untyped
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(transform: Callable[..., Any]) -> None:
    results = (tree_leaves(transform(scalar(name))) for name in ("tiled", "reference"))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_compiles_as_one_graph_for_every_batch(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(
        block_sparse_attention, layout=LAYOUT, is_causal=True, implementation=implementation
    )
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch in (4, 6, 7):
        leaves = [torch.randn(batch, 2, 11, 5, requires_grad=True) for _ in range(3)]
        results = [
            [output, *torch.autograd.grad(output.sin().sum(), leaves)]
            for output in (compiled(*leaves), function(*leaves))
        ]
        torch.testing.assert_close(*results)
    assert len(graphs) == 1


@pytest.mark.untyped
def test_operators() -> None:
    query, key, value = (torch.randn(2, 2, 11, 5, requires_grad=True) for _ in range(3))
    lists = LAYOUT.kv_num_blocks, LAYOUT.kv_indices, None, None, None, None
    options = ([4, 4], True, 0.4, "tiled")
    operators = torch.ops.tilework
    torch.library.opcheck(operators.block_sparse_attention, (query, key, value, *lists, *options))
    output, lse = operators.block_sparse_attention(query, key, value, *lists, *options)
    saved = [t.detach() for t in (query, key, value, output, lse)]
    for grads in (saved[3:], (None, lse.detach())):
        given = *saved, *lists, *grads, [True, False, True], *options
        torch.library.opcheck(operators.block_sparse_attention_backward, given)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_autocast(implementation: str) -> None:
    tensors = [tensor.float() for tensor in (QUERY, KEY, VALUE)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lse = block_sparse_attention(
            *tensors, LAYOUT, return_lse=True, implementation=implementation
        )
    expected = block_sparse_attention(
        *(tensor.bfloat16() for tensor in tensors), LAYOUT, implementation=implementation
    )
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(output, expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("query must be a floating-point tensor", TypeError, {"query": QUERY.long()}),
        ("key must be of shape", ValueError, {"key": KEY[0]}),
        ("key must be of query's", TypeError, {"key": KEY.float()}),
        (
            f"key must be of query's {QUERY.shape[1]} heads, or with enable_gqa=True",
            ValueError,
            {"key": KEY[:, :1]},
        ),
        ("value must be of shape", ValueError, {"value": VALUE[:, :, :7]}),
        (
            "key must be of a number of heads that divides",
            ValueError,
            {"query": torch.zeros(2, 3, 11, 5).double(), "enable_gqa": True},
        ),
        (
            "layout must be a BlockLayout, which BlockLayout.from_dense makes of a mask",
            TypeError,
            {"layout": MASK},
        ),
        (
            "layout must have (3, 3) blocks, as query and key have (11, 11) positions in blocks of "
            "(4, 4), got (2, 3)",
            ValueError,
            {"layout": BlockLayout.from_dense(MASK[:, :, :2], 4)},
        ),
        (
            "layout must be of the lengths of query and key, (11, 11), got (12, 11)",
            ValueError,
            {"layout": BlockLayout.from_dense(MASK, 4, seq_lengths=(12, 11))},
        ),
        (
            "layout must have 1, 2 or 2 heads, got 3",
            ValueError,
            {"layout": BlockLayout.from_dense(MASK.expand(1, 3, 3, 3), 4)},
        ),
        (
            "layout must have a batch of 1 or 2, got 3",
            ValueError,
            {"layout": BlockLayout.from_dense(MASK.expand(3, 1, 3, 3), 4)},
        ),
        ("layout must lie on", ValueError, {"layout": LAYOUT.to("meta")}),
        (
            "implementation='triton' cannot be used: it takes float16, bfloat16, float32",
            ValueError,
            {"implementation": "triton"},
        ),
        ("scale must be a number", TypeError, {"scale": "large"}),
        (
            "implementation must be one of 'triton', 'tiled', 'reference'",
            ValueError,
            {"implementation": "x"},
        ),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": VALUE, "layout": LAYOUT}
    arguments |= change
    tensors = [arguments.pop(name) for name in ("query", "key", "value", "layout")]
    with pytest.raises(error) as caught:
        block_sparse_attention(*tensors, **arguments)
    assert f"block_sparse_attention: {message}" in str(caught.value)


@pytest.mark.untyped
def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        block_sparse_attention(QUERY, KEY, VALUE, LAYOUT, True)  # type: ignore[misc]


@pytest.mark.untyped
def test_sizes_that_kernels_do_not_take() -> None:
    tensors = [tensor.float() for tensor in (QUERY, KEY, VALUE)]
    with pytest.raises(
        ValueError, match=r"blocks must be powers of 2 from 16 to 128, got \(4, 4\)"
    ):
        block_sparse_attention(*tensors, LAYOUT, implementation="triton")
    layout = BlockLayout.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16)
    wide = [torch.zeros(1, 1, 11, 257) for _ in range(3)]
    with pytest.raises(ValueError, match="it takes 1 to 256 features, got 257 and 257"):
        block_sparse_attention(*wide, layout, implementation="triton")


def windowed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    lengths = (query.shape[2], key.shape[2])
    layout = BlockLayout.from_window(lengths, 16, left=0, num_sink_blocks=1, device=query.device)
    return block_sparse_attention(query, key, value, layout, **options)


def chosen(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, **options: Any) -> Any:
    layout = BlockLayout.from_scores_topk(scores, 2, 16, is_causal=True)
    return block_sparse_attention(query, key, value, layout, **options)


@samples.of(Call)
def calls() -> list[Call]:
    def tensors() -> Tensors:
        return heads("query", "key", "value", queries=33, keys=41)

    return [
        Call(
            block_sparse_attention,
            tensors,
            by=windowed,
            differentiable=("query", "key", "value"),
            options=({"enable_gqa": True}, {"enable_gqa": True, "return_lse": True}),
            sizes=GROUPS,
        ),
        Call(
            block_sparse_attention,
            lambda: tensors() | {"scores": draw(1, 2, 3, 3)},
            by=chosen,
            differentiable=("query", "key", "value"),
            options=({"enable_gqa": True, "is_causal": True},),
            sizes=GROUPS | {1: 1, 3: 5, 33: 67, 41: 79},
        ),
    ]
