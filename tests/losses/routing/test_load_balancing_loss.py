"""The load-balancing loss, against loops over tokens, and processes against one."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import GlobalLoadBalancer, expert_counts, load_balancing_loss

import processes
import samples
from calls import Call
from losses.samples import Arguments, Loss

EXPERTS, CHOSEN, TOKENS = 5, 2, 24


def definition(
    router_probs: Tensor,
    expert_index: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    counts: Tensor | None = None,
) -> Tensor:
    experts = router_probs.shape[-1]
    kept = torch.ones(expert_index.shape[:-1], dtype=torch.bool) if mask is None else mask
    share = torch.zeros(experts, dtype=router_probs.dtype)
    if counts is None:
        for choice in expert_index[kept].flatten().tolist():
            share[choice] += 1
    else:
        share += counts
    share = share / share.sum()
    result = experts * sum(share[e] * router_probs[kept][:, e].mean() for e in range(experts))
    return result if normalize else result * expert_index.shape[-1]


def draw(
    *tokens: int, experts: int = EXPERTS, chosen: int = CHOSEN, mask: bool = False, **more: Tensor
) -> Arguments:
    router_probs = torch.randn(*tokens, experts, dtype=torch.float64).softmax(-1)
    tensors = {"router_probs": router_probs, "expert_index": router_probs.topk(chosen).indices}
    return tensors | ({"mask": torch.rand(tokens) < 0.7} if mask else {}) | more


ARGUMENTS: dict[str, Any] = {
    "definition": definition,
    "module": None,
    "options": ({}, {"normalize": False}),
    "differentiable": ("router_probs",),
    "batched": ("router_probs", "expert_index", "mask"),
    "class_index": False,
    "widens": True,
}


def masked() -> Arguments:
    tensors = draw(13, mask=True)
    tensors["mask"][0] = True  # a nan is put there
    return tensors


REFUSED_TOKENS: samples.Refusals = (
    ("expert_index must be int64 of shape", TypeError, {"expert_index": torch.zeros(4, 2)}),
    ("expert_index must be int64 of shape", TypeError, {"expert_index": torch.zeros(4, 2).int()}),
    (r"expert_index must be of shape \(.*k\)", ValueError, {"expert_index": torch.tensor(1)}),
    (
        r"expert_index must lie in \[0, 3\), got 3",
        IndexError,
        {"expert_index": torch.tensor([[0, 1], [3, 0], [-1, 0], [0, 0]])},
    ),
    (
        r"expert_index must lie in \[0, 3\), got -1",
        IndexError,
        {"expert_index": torch.full((4, 2), -1)},
    ),
    ("mask must be bool of shape", TypeError, {"mask": torch.ones(4)}),
    ("mask must be of shape", ValueError, {"mask": torch.ones(4, 2).bool()}),
    ("mask must lie on the device of", ValueError, {"mask": torch.ones(4).bool().to("meta")}),
)
REFUSED: samples.Refusals = (
    *REFUSED_TOKENS,
    (r"router_probs must be of shape \(\.\.\., ", ValueError, {"router_probs": torch.ones(())}),
    (
        r"expert_index must be of shape \(4, k\)",
        ValueError,
        {"expert_index": torch.zeros(3, 2).long()},
    ),
    ("router_probs must be a floating", TypeError, {"router_probs": torch.ones(4, 3).long()}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            load_balancing_loss,
            tensors=lambda: draw(13),
            accepts={
                "router_probs": torch.ones(4, 3) / 3,
                "expert_index": torch.zeros(4, 2, dtype=torch.int64),
            },
            refuses=(
                *REFUSED,
                ("router_probs must be of shape", ValueError, {"router_probs": torch.ones(4, 0)}),
                ("normalize must be a bool", TypeError, {"normalize": 1}),
                ("group must be a process group or None", TypeError, {"group": 0}),
                ("counts must be int64 of shape", TypeError, {"counts": torch.ones(3)}),
                ("counts must be of shape", ValueError, {"counts": torch.ones(4).long()}),
                (
                    "counts must lie on the device of",
                    ValueError,
                    {"counts": torch.ones(3).long().to("meta")},
                ),
            ),
            **ARGUMENTS,
        ),
        Loss(load_balancing_loss, tensors=masked, **ARGUMENTS),
        Loss(
            load_balancing_loss,
            tensors=lambda: draw(7, 3, counts=torch.tensor([5, 0, 2, 1, 40])),
            **ARGUMENTS,
        ),
    ]


@pytest.mark.parametrize("tokens", [(), (1,), (7,), (3, 2, 5)])
@pytest.mark.parametrize("mask", [False, True])
def test_any_leading_shape(tokens: tuple[int, ...], mask: bool) -> None:
    tensors = draw(*tokens, experts=7, chosen=3, mask=mask)
    if mask:
        tensors["mask"].view(-1)[0] = True
    torch.testing.assert_close(load_balancing_loss(**tensors), definition(**tensors))
    counts = expert_counts(tensors["expert_index"], 7, mask=tensors.get("mask"))
    kept = tensors["expert_index"][tensors["mask"]] if mask else tensors["expert_index"]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((kept == expert).sum()) for expert in range(7)]


@given(st.integers(1, 100), st.integers(1, 63), st.integers(0, 10**6))
def test_limits(tokens: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = draw(tokens, experts=experts, chosen=1)
    one = torch.ones((), dtype=torch.float64)
    uniform = torch.full((tokens, experts), 1 / experts, dtype=torch.float64)
    torch.testing.assert_close(load_balancing_loss(uniform, tensors["expert_index"]), one)
    balanced = torch.full((experts,), 3)
    torch.testing.assert_close(load_balancing_loss(**tensors, counts=balanced), one)
    last = torch.full((tokens, 1), experts - 1)
    sure = torch.zeros_like(uniform).scatter(1, last, 1)
    torch.testing.assert_close(load_balancing_loss(sure, last), one * experts)
    assert load_balancing_loss(**tensors) <= experts * (1 + 1e-12)


def test_masked_tokens_are_not_read() -> None:
    tensors = masked()
    dropped = ~tensors["mask"]
    expected = load_balancing_loss(**tensors)
    tensors["router_probs"][dropped] = torch.nan
    tensors["expert_index"][dropped] = -1
    tensors["router_probs"].requires_grad_()
    result = load_balancing_loss(**tensors)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result, tensors["router_probs"])
    assert not gradient[dropped].any()
    assert gradient[~dropped].isfinite().all()
    few = {name: tensor[~dropped] for name, tensor in tensors.items()}
    torch.testing.assert_close(load_balancing_loss(**few), expected)


def test_nothing_kept_or_counted_is_nan() -> None:
    tensors = draw(6)
    nothing = torch.zeros(6, dtype=torch.bool)
    assert load_balancing_loss(**tensors, mask=nothing).isnan()
    counts = torch.ones(EXPERTS, dtype=torch.int64)
    assert load_balancing_loss(**tensors, mask=nothing, counts=counts).isnan()
    assert load_balancing_loss(**tensors, counts=counts - 1).isnan()
    assert not expert_counts(tensors["expert_index"], EXPERTS, mask=nothing).any()


def test_counts_of_any_size() -> None:
    """They are summed as integers: 2**24 + 1 is not a float32."""
    router_probs = torch.tensor([[0.0, 0.0, 1.0]])
    counts = torch.tensor([2**60, 2**60, 2**61])
    assert load_balancing_loss(router_probs, torch.tensor([[0]]), counts=counts) == 1.5
    assert expert_counts(torch.zeros(2**24 + 1, 1, dtype=torch.int64), 1).item() == 2**24 + 1


def test_equals_transformers() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = tuple(torch.randn(12, EXPERTS) for _ in range(3))
    mask = torch.rand(3, 4) < 0.7
    for flat in (None, mask):
        expected = mixtral.load_balancing_loss_func(layers, EXPERTS, CHOSEN, flat)
        probs = torch.cat(layers).softmax(-1)
        actual = load_balancing_loss(
            probs,
            probs.topk(CHOSEN).indices,
            mask=None if flat is None else flat.flatten().repeat(3),
            normalize=False,
        )
        torch.testing.assert_close(actual, expected)


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_shards_with_shared_counts(shards: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = draw(6 * shards)
    counts = expert_counts(tensors["expert_index"], EXPERTS)
    parts = [{name: t[6 * i : 6 * i + 6] for name, t in tensors.items()} for i in range(shards)]
    mean = torch.stack([load_balancing_loss(**part, counts=counts) for part in parts]).mean()
    torch.testing.assert_close(mean, load_balancing_loss(**tensors))


def test_balancer_accumulates_until_reset() -> None:
    balancer = GlobalLoadBalancer(EXPERTS, normalize=False)
    assert balancer.state_dict() == {}
    assert repr(balancer) == f"GlobalLoadBalancer(num_experts={EXPERTS}, normalize=False)"
    for _ in range(2):
        seen: list[Tensor] = []
        for size in (4, 7, 1):
            tensors = draw(size, mask=size == 7)
            mask = tensors.get("mask", torch.ones(size, dtype=torch.bool))
            if size == 7:
                mask[0] = True
            seen.append(tensors["expert_index"][mask])
            counts = torch.bincount(torch.cat(seen).flatten(), minlength=EXPERTS)
            expected = definition(**tensors, normalize=False, counts=counts)
            balancer.eval()
            torch.testing.assert_close(balancer(**tensors), expected)
            torch.testing.assert_close(balancer(*tensors.values()), expected)
            balancer.train()
            torch.testing.assert_close(balancer(**tensors), expected)
            assert torch.equal(balancer.counts, counts)
        balancer.reset()
        assert balancer.counts.tolist() == [0] * EXPERTS


def test_balancer_is_differentiable_after_counting_on() -> None:
    balancer = GlobalLoadBalancer(EXPERTS)
    first, second = draw(6), draw(6)
    leaf = first["router_probs"].requires_grad_()
    loss = balancer(**first)
    share = balancer.counts.double() / balancer.counts.sum()
    balancer(**second)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, (EXPERTS * share / 6).expand(6, -1))


def test_a_recomputed_forward_counts_again() -> None:
    balancer = GlobalLoadBalancer(EXPERTS)
    tensors = draw(6)
    leaf = tensors["router_probs"].requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        balancer, leaf, tensors["expert_index"], use_reentrant=False
    )
    loss.backward()
    assert balancer.counts.sum() == 2 * tensors["expert_index"].numel()


@pytest.mark.untyped
def test_compiles() -> None:
    balancer = GlobalLoadBalancer(EXPERTS)
    compiled = torch.compile(balancer, fullgraph=True, dynamic=True, backend="aot_eager")
    twin = GlobalLoadBalancer(EXPERTS)
    for size in (4, 9):
        tensors = draw(size)
        torch.testing.assert_close(compiled(**tensors), twin(**tensors))
        assert torch.equal(balancer.counts, twin.counts)
    counted = torch.compile(expert_counts, fullgraph=True, dynamic=True, backend="aot_eager")
    index = tensors["expert_index"]
    assert torch.equal(counted(index, EXPERTS), expert_counts(index, EXPERTS))


@pytest.mark.untyped
def test_transformed_code_does_not_accept_unknown_experts() -> None:
    index = torch.tensor([[0], [EXPERTS]])
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.func.vmap(lambda row: expert_counts(row, EXPERTS))(index)


def problem() -> Arguments:
    torch.manual_seed(3)
    tensors = draw(TOKENS, mask=True)
    tensors["mask"][::3] = True
    return tensors


def shard(tensors: Arguments, parts: int, part: int) -> Arguments:
    """Tokens of one part, each of the same number."""
    size = TOKENS // parts
    return {name: t[part * size : part * size + size].clone() for name, t in tensors.items()}


def value_and_gradient(loss: Callable[..., Tensor], tensors: Arguments) -> tuple[Tensor, Tensor]:
    leaf = tensors["router_probs"].requires_grad_()
    value = loss(**tensors)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def among_processes() -> dict[str, Any]:
    """What each process finds of its share, at once and in micro-batches."""
    group = dist.group.WORLD
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = shard(problem(), ranks, rank)
    plain = {name: tensor for name, tensor in mine.items() if name != "mask"}
    loss = functools.partial(load_balancing_loss, group=group)
    found: dict[str, Any] = {
        "plain": value_and_gradient(loss, dict(plain)),
        "masked": value_and_gradient(functools.partial(loss, normalize=False), dict(mine)),
        "local": value_and_gradient(load_balancing_loss, dict(plain)),
    }
    if ranks == 2:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found["compiled"] = value_and_gradient(loss, dict(plain))

    # A group of some of the processes, in which every other one is on its own.
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    found["pair"] = value_and_gradient(
        functools.partial(load_balancing_loss, group=pairs[rank // 2]), dict(plain)
    )

    balancer = GlobalLoadBalancer(EXPERTS, group=group)
    half = TOKENS // ranks // 2
    found["steps"] = []
    for step in range(2):
        part = {name: t[step * half : step * half + half].clone() for name, t in mine.items()}
        found["steps"].append((*value_and_gradient(balancer, part), balancer.counts.clone()))
    return found


def truth(tensors: Arguments, counts: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    loss = functools.partial(definition, counts=counts, normalize=normalize)
    return value_and_gradient(loss, dict(tensors))


@pytest.mark.untyped
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks: int) -> None:
    everything = problem()
    plain = {name: tensor for name, tensor in everything.items() if name != "mask"}
    found = processes.run(among_processes, ranks)

    # Of equally many tokens each, losses and gradients average to those of the whole batch.
    value, gradient = value_and_gradient(definition, dict(plain))
    for name in ("plain", "compiled"):
        values, gradients = zip(*(result[name] for result in found), strict=True)
        torch.testing.assert_close(torch.stack(values).mean(), value)
        torch.testing.assert_close(torch.cat(gradients) / ranks, gradient)
    local = torch.stack([result["local"][0] for result in found]).mean()
    assert abs(local - value) > 1e-3

    def count(tensors: Arguments) -> Tensor:
        index = tensors["expert_index"]
        index = index[tensors["mask"]] if "mask" in tensors else index
        return torch.bincount(index.flatten(), minlength=EXPERTS)

    for rank, result in enumerate(found):
        mine = shard(everything, ranks, rank)
        torch.testing.assert_close(result["masked"], truth(mine, count(everything), False))
        del mine["mask"]
        torch.testing.assert_close(result["plain"], truth(mine, count(plain)))
        torch.testing.assert_close(result["local"], truth(mine, count(mine)))
        pair = shard(plain, ranks // 2, rank // 2)
        torch.testing.assert_close(result["pair"], truth(mine, count(pair)))

        half = TOKENS // ranks // 2
        seen = torch.zeros(EXPERTS, dtype=torch.int64)
        for step in range(2):
            part = slice(step * half, step * half + half)
            for other in range(ranks):
                theirs = shard(everything, ranks, other)
                seen += count({name: tensor[part] for name, tensor in theirs.items()})
            mine = {name: t[part] for name, t in shard(everything, ranks, rank).items()}
            torch.testing.assert_close(result["steps"][step], (*truth(mine, seen), seen))
        assert torch.equal(seen, count(everything))


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.untyped
def test_counts_or_a_group_but_not_both(group: Any) -> None:
    counts = torch.ones(EXPERTS, dtype=torch.int64)
    with pytest.raises(ValueError, match="load_balancing_loss: counts and group must not both"):
        load_balancing_loss(**draw(4), counts=counts, group=group)


@pytest.mark.untyped
def test_a_group_under_vmap(group: Any) -> None:
    router_probs, expert_index = draw(3, 4).values()
    rows = torch.func.vmap(lambda p: load_balancing_loss(p, expert_index[0], group=group))
    expected = [definition(p, expert_index[0]) for p in router_probs]
    torch.testing.assert_close(rows(router_probs), torch.stack(expected))
    with pytest.raises(RuntimeError, match="Batching rule not implemented for c10d::allreduce_"):
        torch.func.vmap(lambda p, i: load_balancing_loss(p, i, group=group))(
            router_probs, expert_index
        )


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        *REFUSED_TOKENS,
        ("num_experts must be an int", TypeError, {"num_experts": 3.0}),
        ("num_experts must be an int of at least 1", ValueError, {"num_experts": 0}),
    ],
)
def test_bad_counts(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"expert_index": torch.zeros(4, 2).long(), "num_experts": 3}
    with pytest.raises(error, match=f"expert_counts: {message}"):
        expert_counts(**(arguments | change))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [*REFUSED, (r"router_probs must be of shape", ValueError, {"router_probs": torch.ones(4, 4)})],
)
def test_bad_balancer(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    balancer = GlobalLoadBalancer(3)
    arguments = {"router_probs": torch.ones(4, 3), "expert_index": torch.zeros(4, 2).long()}
    with pytest.raises(error, match=f"GlobalLoadBalancer: {message}"):
        balancer(**(arguments | change))
    assert not balancer.counts.any()
    options: dict[str, Any]
    for options, kind, name in (
        ({"num_experts": 0}, ValueError, "num_experts must be an int of at least 1"),
        ({"num_experts": 3, "normalize": None}, TypeError, "normalize must be a bool"),
        ({"num_experts": 3, "group": "gloo"}, TypeError, "group must be a process group"),
        ({"num_experts": 3, "groups": None}, TypeError, "unexpected keyword"),
    ):
        with pytest.raises(kind, match=name):
            GlobalLoadBalancer(**options)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            expert_counts,
            lambda: {
                "expert_index": torch.randint(5, (7, 2)),
                "mask": torch.rand(7) < 0.8,
            },
            options=({"num_experts": 5},),
        ),
    ]
