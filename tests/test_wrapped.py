"""What people wrap around a loss or a layer gives the gradients of the call alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from tilework.attention import BlockLayout, block_sparse_attention, block_sparse_decode

import calls
from calls import Call, Tensors

Scalar = Callable[..., Tensor]


def is_kernel(call: Call) -> bool:
    return call.options[0].get("implementation") == "triton"


# What is tested of these is not in the rooms of implementations, and kernels are interpreted.
every_derivative = calls.marked(
    call for call in calls.of_implementations() if call.differentiable and not is_kernel(call)
)


def leaves(call: Call, tensors: Tensors) -> list[Tensor]:
    wanted = [tensors[name] for name in call.differentiable if name in tensors]
    return [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, Tensor)]


def results(call: Call, tensors: Tensors) -> list[Tensor]:
    """The results that have gradients."""
    found = tree_leaves(call.run(**tensors))
    return [one for one in found if isinstance(one, Tensor) and one.requires_grad]


def total(call: Call, tensors: Tensors) -> Tensor:
    """A number whose upstream gradients differ from one another and from 1."""
    return sum(
        (result * torch.linspace(1, 3, result.numel()).view(result.shape).to(result)).sum()
        for result in results(call, tensors)
    ) * torch.tensor(1.5)


def gradients(call: Call, tensors: Tensors, wrap: Callable[[Scalar], Scalar]) -> list[Any]:
    """Those of a number, where a function of the leaves that makes it is wrapped."""
    names = list(tensors)

    def function(*values: Any) -> Tensor:
        return total(call, dict(zip(names, values, strict=True)))

    wanted = leaves(call, tensors)
    for leaf in wanted:
        leaf.grad = None
    wrap(function)(*tensors.values()).backward()  # autograd.grad is not for reentrant checkpoints
    return [leaf.grad for leaf in wanted]


class Once:
    """What saved-tensor hooks keep of a tensor, which is handed back a single time."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "unpacked twice"
        return tensor


def unpacked_once(function: Scalar) -> Scalar:
    def run(*values: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Once, Once.take):
            return function(*values)

    return run


def offloaded(function: Scalar) -> Scalar:
    def run(*values: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(*values)

    return run


def checkpointed(function: Scalar, **options: Any) -> Scalar:
    return partial(checkpoint, function, **options)


def selected(_: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    is_ours = operator.namespace == "tilework"
    return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE


WRAPS: dict[str, Callable[[Scalar], Scalar]] = {
    "hooks": unpacked_once,
    "offload": offloaded,
    "reentrant": partial(checkpointed, use_reentrant=True),
    "checkpoint": partial(checkpointed, use_reentrant=False),
    "selective": partial(
        checkpointed,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, selected),
    ),
}


@pytest.mark.untyped
@every_derivative
def test_saved_tensors(call: Call) -> None:
    tensors = call.draw()
    torch.manual_seed(0)
    expected = gradients(call, tensors, lambda function: function)
    assert any(grad is not None for grad in expected)
    for name, wrap in WRAPS.items():
        if name == "reentrant" and any(isinstance(one, list) for one in tensors.values()):
            continue  # this kind sees only tensors that are arguments themselves
        torch.manual_seed(0)
        torch.testing.assert_close(
            gradients(call, tensors, wrap), expected, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.untyped
@every_derivative
def test_batched_gradients(call: Call) -> None:
    """Of ``is_grads_batched``, on which ``jacobian(vectorize=True)`` stands."""
    tensors = call.draw()
    wanted = leaves(call, tensors)
    for result in results(call, tensors):
        upstream = torch.randn(2, *result.shape).to(result)
        together, *apart = (
            torch.autograd.grad(
                result, wanted, one, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
            for one, batched in ((upstream, True), (upstream[0], False), (upstream[1], False))
        )
        for both, *each in zip(together, *apart, strict=True):
            if both is None:
                assert each == [None, None]
            else:
                torch.testing.assert_close(both, torch.stack(each))


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, of which memory holds the negated ones."""
    if not tensor.is_floating_point():
        return tensor
    lazy = torch._neg_view(-tensor.detach())  # type: ignore[attr-defined]  # as z.conj().imag
    assert lazy.is_neg()
    return lazy.requires_grad_(tensor.requires_grad)


def one_call_of_each_kernel() -> Iterator[Call]:
    """All other calls; a kernel's once, as the interpreter takes its time."""
    seen = set()
    for call in calls.of_implementations():
        if not is_kernel(call) or call.name not in seen:
            yield call
        if is_kernel(call):
            seen.add(call.name)


@pytest.mark.untyped
@calls.marked(one_call_of_each_kernel())
def test_lazily_negated_tensors(call: Call) -> None:
    def run(tensors: Tensors, seen_as: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(0)
        found = tree_leaves(call.run(**tensors))
        if not call.differentiable:
            return found
        differentiable = [one for one in found if one.requires_grad]
        upstream = [torch.linspace(1, 3, one.numel()).view_as(one).to(one) for one in found]
        upstream = [
            seen_as(up) for up, one in zip(upstream, found, strict=True) if one.requires_grad
        ]
        wanted = leaves(call, tensors)
        return [*found, *torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True)]

    tensors = call.draw(torch.float32 if is_kernel(call) else torch.float64)
    first = next(iter(tensors))  # one alone, as the signs of two can cancel
    lazy = tensors | {first: tree_map_only(Tensor, negated, tensors[first])}
    torch.testing.assert_close(run(lazy, negated), run(tensors, lambda tensor: tensor))


def operations(call: Call) -> tuple[int, int]:
    """What PyTorch counts forward and backward."""
    tensors = call.draw()
    with FlopCounterMode(display=False) as counter:
        number = total(call, tensors) if call.differentiable else call.run(**tensors)
        forward = counter.get_total_flops()
        if call.differentiable:
            number.backward()
        return forward, counter.get_total_flops() - forward


@pytest.mark.untyped
@calls.marked(call for call in calls.all_calls() if call.name.startswith("linear_"))
def test_operations_of_linear_heads(call: Call) -> None:
    """As many in all as the definition has; gradients may be taken in the forward pass."""
    *others, reference = (
        sum(operations(one)) for one in call.of_implementations() if not is_kernel(one)
    )
    assert reference > 0
    assert others == [reference] * len(others)


@pytest.mark.untyped
@calls.marked(
    call
    for call in calls.all_calls()
    if call.name.startswith("attention_") or call.name == "block_pooled_attention"
)
def test_operations_of_attention_maps(call: Call) -> None:
    """Those of the scores, and backward again with a gradient of either factor."""
    tensors = call.draw()
    scores = 2 * tensors["query"].numel() * tensors["key"].shape[2]
    for one in call.of_implementations():
        if one.options[0].get("implementation") not in ("triton", "reference"):
            assert operations(one) == (scores, 3 * scores if call.differentiable else 0)


@pytest.mark.untyped
def test_operations_of_block_sparse_attention() -> None:
    """As PyTorch counts fused attention, over the blocks of the layout; grouped heads too."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 32, features, requires_grad=True)
        for heads, features in ((4, 8), (2, 8), (2, 6))
    )
    keys, values = ((2, 4, *tensor.shape[2:]) for tensor in (key, value))
    forward = flop_counter.sdpa_flop_count(query.shape, keys, values)
    both = forward + flop_counter.sdpa_backward_flop_count((2, 4, 32, 6), query.shape, keys, values)
    for batch, heads in ((1, 1), (2, 2), (2, 4)):
        active = torch.ones(batch, heads, 2, 2, dtype=torch.bool)
        for blocks in (4, 3):
            active[..., 0, 1] = blocks == 4
            layout = BlockLayout.from_dense(active, 16)
            with FlopCounterMode(display=False) as counter:
                block_sparse_attention(query, key, value, layout, enable_gqa=True).sum().backward()
            assert counter.get_total_flops() == both * blocks // 4
            with FlopCounterMode(display=False) as counter:
                block_sparse_attention(
                    query.detach(), key.detach(), value, layout, enable_gqa=True
                ).sum().backward()
            of_value = 2 * 2 * 4 * 32 * 32 * (8 + 6)  # the scores anew, and the gradient
            assert counter.get_total_flops() == (forward + of_value) * blocks // 4
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                block_sparse_decode(
                    query[:, :, :1],
                    key,
                    value,
                    kv_indices=torch.arange(2).expand(2, 2, 2),
                    kv_num_blocks=torch.full((2, 2), blocks // 2),
                    block_size=16,
                )
            assert counter.get_total_flops() == forward // 32 * (blocks // 2) // 2
