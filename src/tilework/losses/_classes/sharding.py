"""Heads whose classes are spread over processes, and tokens that are.

Each process computes the statistics of its own classes; one gather brings them together, and every
process merges them to the same statistics of all classes. The gradient of its own share then needs
no communication, and that of the hidden states one sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.losses._classes.linear import operators
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.statistics import Statistics, masked
from tilework.losses._classes.tiles import merge_exponentials

__all__ = ["VocabShard"]

_NEVER = -1  # no target of a shard has it


@implements(
    "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
    year=2019,
    arxiv="1909.08053",
)
@dataclass(frozen=True)
class VocabShard:
    """The classes ``start`` to ``stop`` of a head that a process group holds together.

    All processes of the group create it at the same time, as it gathers their ranges. Together
    these must cover the classes from 0 on without overlap or gap, in any order.

    Args:
        start: First class of this process.
        stop: The class after its last.
        group: The process group; None for the default one.

    Raises:
        ValueError: The range is empty, or the ranges of the group leave a gap or overlap.
        TypeError: ``start`` or ``stop`` is not an int.

    Example:
        >>> import torch
        >>> from tilework.losses import VocabShard, linear_cross_entropy
        >>> torch.distributed.init_process_group(
        ...     "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
        ... )
        >>> shard = VocabShard(0, 100)
        >>> hidden, head = torch.randn(4, 8), torch.randn(100, 8)
        >>> target = torch.tensor([3, 99, -100, 0])
        >>> linear_cross_entropy(hidden, head, target, vocab_parallel=shard).shape
        torch.Size([])
        >>> torch.distributed.destroy_process_group()

    Reference:
        Mohammad Shoeybi, Mostofa Patwary, Raul Puri, Patrick LeGresley, Jared Casper, Bryan
        Catanzaro. Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
        Parallelism. 2019. arXiv:1909.08053.
    """

    start: int
    stop: int
    group: Any = None
    ranges: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            _checks.integer("VocabShard", name, getattr(self, name))
        if not 0 <= self.start < self.stop:
            raise ValueError(
                f"VocabShard: stop must be above start, start at least 0, got start={self.start} "
                f"and stop={self.stop}"
            )
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, (self.start, self.stop), self.group)
        object.__setattr__(self, "ranges", tuple(gathered))
        end = 0
        for start, stop in sorted(gathered):
            if start != end:
                raise ValueError(
                    "VocabShard: start and stop must cover the classes without gap or overlap, got "
                    f"{sorted(gathered)}"
                )
            end = stop

    @classmethod
    def _of_ranges(
        cls, start: int, stop: int, group: Any, ranges: Sequence[tuple[int, int]]
    ) -> "VocabShard":
        """One whose group's ranges are known, so that nothing is gathered."""
        shard = cls.__new__(cls)
        vars(shard).update(start=start, stop=stop, group=group, ranges=tuple(ranges))
        return shard

    @property
    def classes(self) -> int:
        """The number of classes of the whole head."""
        return max(stop for _, stop in self.ranges)


@dataclass(frozen=True)
class Layout:
    """How the arguments of a call are spread: classes over one group, tokens over others."""

    shard: VocabShard | None = None
    token_groups: tuple[Any, ...] = ()
    splits_sequences: bool = False
    wrap: Any = None  # makes a DTensor of a result for each token

    @property
    def tokens(self) -> tuple[tuple[Any, ...], bool]:
        """How the tokens are spread."""
        return self.token_groups, self.splits_sequences

    def classes(self, linear_weight: Tensor) -> int:
        """The number of classes of the whole head."""
        return linear_weight.shape[0] if self.shard is None else self.shard.classes

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all tokens of what this process has."""
        for group in self.token_groups:
            value = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
        return value

    def of_tokens(self, value: Tensor) -> Tensor:
        """A result for each token as the caller gets it."""
        return value if self.wrap is None else self.wrap(value)


def localize(
    function: str,
    vocab_parallel: VocabShard | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    prefix: str | None = None,
    **of_tokens: Tensor | None,
) -> tuple[Layout, list[Any]]:
    """The layout of the arguments, and what this process has of each, in their order.

    ``prefix`` comes before the names of the arguments of one head among several.
    """
    names = ("input", "linear_weight", "linear_bias")
    if prefix is not None:
        names = (f"{prefix}input", f"{prefix}weight", f"{prefix}bias")
    tensors = [input, linear_weight, linear_bias, *of_tokens.values()]
    if vocab_parallel is not None and not isinstance(vocab_parallel, VocabShard):
        raise _checks.bad_type(function, "vocab_parallel", "a VocabShard", vocab_parallel)
    if not any(map(_checks.is_distributed, tensors)):
        if vocab_parallel is None:
            return Layout(), tensors
        held = vocab_parallel.stop - vocab_parallel.start
        if isinstance(linear_weight, Tensor) and linear_weight.shape[:1] != (held,):
            accepted = f"of the {held} classes of vocab_parallel"
            raise _checks.bad_value(function, names[1], accepted, linear_weight)
        return Layout(vocab_parallel), tensors
    if vocab_parallel is not None:
        raise ValueError(f"{function}: vocab_parallel must be None for DTensors")
    return _localize_distributed(function, names, input, linear_weight, linear_bias, of_tokens)


def _localize_distributed(
    function: str,
    names: tuple[str, str, str],
    input: Tensor,
    linear_weight: Any,
    linear_bias: Any,
    of_tokens: dict[str, Tensor | None],
) -> tuple[Layout, list[Any]]:
    from torch.distributed.tensor import DTensor, Shard

    input_name, weight_name, bias_name = names
    if not isinstance(linear_weight, DTensor):
        raise _checks.bad_type(function, weight_name, "a DTensor beside others", linear_weight)
    mesh = linear_weight.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"{function}: {weight_name} must lie on a mesh with this process")
    placed = linear_weight.placements
    if not isinstance(input, DTensor):
        # The same placement means classes that are spread, or FSDP2, where the tokens are.
        accepted = (
            f"a DTensor beside {weight_name}, which is one of {placed}: for a head whose classes "
            f"are spread, DTensor.from_local({input_name}, mesh, [Replicate()]), or plain shards "
            "with vocab_parallel=VocabShard(...); for a parameter under FSDP2, call this where it "
            "is gathered, in the forward of the module that fully_shard made a unit with the head "
            "in it, such as the root or a LinearCrossEntropyLoss"
        )
        raise _checks.bad_type(function, input_name, accepted, input)
    spread = [dim for dim in range(mesh.ndim) if placed[dim].is_shard(0)]
    whole = [dim for dim in range(mesh.ndim) if placed[dim].is_replicate()]
    if len(spread) > 1 or len(spread) + len(whole) < mesh.ndim:
        raise ValueError(
            f"{function}: {weight_name} must be sharded on dimension 0 over at most one dimension "
            f"of the mesh and replicated over others, got {placed}"
        )
    if linear_bias is not None and not _is_placed(linear_bias, mesh, placed):
        accepted = f"a DTensor placed as {weight_name}, {placed} on its mesh"
        raise ValueError(f"{function}: {bias_name} must be {accepted}, got {_place(linear_bias)}")

    placements = input.placements
    token_dims = [dim for dim in range(mesh.ndim) if not placements[dim].is_replicate()]
    if (
        input.device_mesh != mesh
        or not {placements[dim] for dim in token_dims} <= set(map(Shard, range(input.dim() - 1)))
        or set(token_dims) & set(spread)
    ):
        raise ValueError(
            f"{function}: {input_name} must be replicated, or sharded over tokens on another "
            f"dimension of {weight_name}'s mesh, {mesh}, got {_place(input)}"
        )
    locals_: list[Any] = [input.to_local()]
    token_groups = tuple(mesh.get_group(dim) for dim in token_dims)
    for parameter in (linear_weight, linear_bias):
        # The gradient that comes back is that of all tokens, as placed as the tensor.
        local: Any = None if parameter is None else parameter.to_local()
        for group in token_groups if local is not None else ():
            local = sum_gradient(local, group)
        locals_.append(local)
    for name, tensor in of_tokens.items():
        if isinstance(tensor, DTensor):
            if not _is_placed(tensor, mesh, placements):
                accepted = f"placed as {input_name}, {placements} on its mesh"
                raise ValueError(f"{function}: {name} must be {accepted}, got {_place(tensor)}")
            locals_.append(tensor.to_local())
        elif tensor is not None and token_dims:
            raise _checks.bad_type(function, name, f"a DTensor placed as {input_name}", tensor)
        else:
            locals_.append(tensor)

    def wrap(value: Tensor) -> Tensor:
        # Where tokens are split unevenly, a process cannot tell the whole from its own.
        sizes = zip(input.shape[:-1], value.shape, strict=True)
        shape = torch.Size(
            whole if any(placement.is_shard(dim) for placement in placements) else held
            for dim, (whole, held) in enumerate(sizes)
        )
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    shard = _shard_of(function, weight_name, linear_weight, mesh, spread[0]) if spread else None
    splits_sequences = any(placement.is_shard(input.dim() - 2) for placement in placements)
    return Layout(shard, token_groups, splits_sequences, wrap if token_dims else None), locals_


def _is_placed(tensor: Any, mesh: Any, placements: tuple[Any, ...]) -> bool:
    return (
        _checks.is_distributed(tensor)
        and tensor.device_mesh == mesh
        and tensor.placements == placements
    )


def _place(tensor: Any) -> str:
    """Where a tensor lies, in the words of an error message."""
    if _checks.is_distributed(tensor):
        return f"{tensor.placements} on {tensor.device_mesh}"
    return _checks.describe(tensor)


def _shard_of(function: str, name: str, linear_weight: Any, mesh: Any, dim: int) -> VocabShard:
    """The shard of a DTensor, whose rows are split as ``torch.chunk`` does."""
    classes, processes = linear_weight.shape[0], mesh.size(dim)
    step = -(-classes // processes)
    starts = [min(rank * step, classes) for rank in range(processes)]
    ranges = list(zip(starts, [*starts[1:], classes], strict=True))
    start, stop = ranges[mesh.get_local_rank(dim)]
    if linear_weight.to_local().shape[0] != stop - start or any(a == b for a, b in ranges):
        raise ValueError(
            f"{function}: {name} must give each process the classes of torch.chunk, at "
            f"least one, got {tuple(linear_weight.shape)} over {processes}"
        )
    return VocabShard._of_ranges(start, stop, mesh.get_group(dim), ranges)


def logit_stats(shard: VocabShard | None, given: LinearStats) -> Statistics:
    """``operators.logit_stats`` over the classes of all processes; class weights are of all."""
    if shard is None:
        return operators.logit_stats(given)
    target, class_weight = given.target, given.class_weight
    held = (target >= shard.start) & (target < shard.stop)
    kept = target != given.ignore_index
    # A target of another process is no class here, so that its logit is nan, and the place of it.
    elsewhere = shard.stop - shard.start
    mine = operators.logit_stats(
        given._replace(
            input=sum_gradient(given.input, shard.group),
            target=(target - shard.start).where(held, elsewhere).where(kept, _NEVER),
            class_weight=None if class_weight is None else class_weight[shard.start : shard.stop],
            ignore_index=_NEVER,
        )
    )
    # A class's place within a shard is exact in float32 up to 2**24.
    mine = mine._replace(argmax=mine.argmax.to(mine.shift.dtype))
    names = [name for name, values in mine._asdict().items() if values.numel() or not len(target)]
    gathered = gather(torch.stack([getattr(mine, name) for name in names]), shard)
    parts = mine._replace(**dict(zip(names, gathered.unbind(1), strict=True)))

    # The first of equal maxima is that of the lowest classes.
    ranges = sorted(shard.ranges)
    starts, stops = target.new_tensor(ranges).T[..., None]
    shift, total, gaps, decays = merge_exponentials(parts.shift, parts.total)
    holds = (target >= starts) & (target < stops)
    merged = mine._replace(
        shift=shift,
        total=total,
        target_gap=(parts.target_gap + gaps).where(holds, 0).sum(0).where(holds.any(0), torch.nan),
        class_gap=torch.zeros_like(total),
        argmax=target[:0],
    )
    if class_weight is not None:
        weights = torch.stack([class_weight[slice(*classes)].sum() for classes in ranges])[:, None]
        merged = merged._replace(class_gap=(parts.class_gap + weights * gaps).sum(0))
    if given.squares:
        merged = merged._replace(squares=parts.squares.sum(0))
    if given.moments:
        changes = parts.total * (decays * gaps).where(parts.total != 0, 0)
        top, rank = parts.top.detach().max(0)
        places = parts.argmax.detach().to(torch.int64) + starts
        merged = merged._replace(
            moment=(parts.moment * decays + changes).sum(0),
            top=top,
            argmax=places.gather(0, rank[None])[0],
        )
    return masked(merged, kept)


def gather(value: Tensor, shard: VocabShard) -> Tensor:
    """What the processes of a shard's group have, stacked in the order of their classes."""
    gathered: Tensor = _Gather.apply(value, shard.group)  # type: ignore[no-untyped-call]
    order = sorted(range(len(shard.ranges)), key=lambda rank: shard.ranges[rank])
    return gathered.index_select(0, torch.tensor(order, device=value.device))


def sum_gradient(value: Tensor, group: Any) -> Tensor:
    """The value as it is, with the sum of all processes' gradients."""
    result: Tensor = _SumGradient.apply(value, group)  # type: ignore[no-untyped-call]
    return result


class _Gather(torch.autograd.Function):
    """What all processes have, stacked. As all go on alike, each one's own gradient is whole."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        gathered = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, value.contiguous(), group)
        return torch.stack(gathered)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _Sum(torch.autograd.Function):
    """The sum over processes, each of which has the gradient of the sum already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradient(torch.autograd.Function):
    """See :func:`sum_gradient`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
