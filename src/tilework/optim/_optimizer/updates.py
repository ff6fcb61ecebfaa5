"""What one call of an optimizer's rule computes on, and how the result is written.

A rule that acts on each element alone sees flat pieces: large tensors in blocks that stay in the
cache, small ones joined to one, a shard of a distributed parameter as its local part. Any other
rule sees a whole tensor at a time.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilework import _torch
from tilework._checks import is_distributed
from tilework._operators import computation_dtype
from tilework.optim._optimizer import rounding

Numbers = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, dict[str, Tensor], Numbers], Tensor]


class Part(NamedTuple):
    """A parameter, or flat elements of one or several, with what belongs to them."""

    parameter: Tensor
    gradient: Tensor
    states: dict[str, Tensor]
    places: Tensor | None
    """Of each element in its whole parameter, in row-major order; where rounding is stochastic."""
    position: Any
    """Of the parameter in the optimizer, an int or a tensor."""


class Way(NamedTuple):
    """How results are written."""

    maximize: bool
    rounding: str
    seed: Any
    """An int or a tensor."""


class Sizes(NamedTuple):
    """Numbers of elements, by device."""

    small: int
    """Of tensors for which a call takes longer than the arithmetic: they are joined."""
    joined: int
    block: int
    """Of which a parameter, its gradient and its states stay in a core's cache."""


CPU = Sizes(2**14, 2**17, 2**17)
OTHER = Sizes(2**20, 2**24, 2**62)


def rows_of_block(tensor: Tensor) -> int | None:
    """How many rows of a large tensor, along its first dimension, stay in a CPU's cache.

    None where it is not large, or not computed in blocks.
    """
    rows = CPU.block * len(tensor) // tensor.numel() if tensor.dim() and tensor.numel() else 0
    if not 0 < rows < len(tensor) or is_distributed(tensor) or tensor.device.type != "cpu":
        return None
    return None if torch.compiler.is_compiling() else rows


def apply(rule: Rule, part: Part, numbers: Numbers, way: Way) -> None:
    """Compute what a rule makes of a part, and write it into the part's tensors."""
    dtype = computation_dtype(part.parameter.dtype)
    old = part.parameter.to(dtype)
    states = computed_states(part.states, dtype)
    new = rule(old, computed_gradient(part.gradient, dtype, way.maximize), states, numbers)
    keep_states(part.states, states)
    decay = numbers.get("decay")
    if isinstance(decay, float) and old is part.parameter and not is_distributed(old):
        torch.sub(new, old, alpha=decay, out=old)  # which saves a pass
        return
    if decay is not None:
        new = new - decay * old
    new = new.to(dtype)  # tensors without dimensions are as wide as numbers
    _write(part, local(old), local(like(new, part.parameter)), numbers, way)


def computed_gradient(gradient: Tensor, dtype: torch.dtype, maximize: bool) -> Tensor:
    """The gradient of what is minimized, in the dtype of computation."""
    gradient = gradient.to(dtype)
    return -gradient if maximize else gradient


def computed_states(states: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The states that a rule sees and changes, in the dtype of computation."""
    return {
        name: state.to(dtype) if state.is_floating_point() else state
        for name, state in states.items()
        if name != "compensation"
    }


def keep_states(states: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> None:
    """Write the states that a rule has changed elsewhere than in place."""
    for name, state in computed.items():
        if state is not states[name]:
            states[name].copy_(state)


def _write(part: Part, old: Tensor, new: Tensor, numbers: Numbers, way: Way) -> None:
    parameter = local(part.parameter)
    if part.places is not None:
        step = numbers["t"]
        step = step.long() if isinstance(step, Tensor) else int(step)
        parameter.copy_(rounding.stochastic(new, part.places, step, part.position, way.seed))
    elif parameter.dtype != torch.bfloat16 or way.rounding != "kahan":
        parameter.copy_(new)
    else:
        compensation = local(part.states["compensation"])
        stored, lacking = rounding.compensated(old, new, compensation.to(old.dtype))
        parameter.copy_(stored)
        compensation.copy_(lacking)


@functools.cache
def compiled(rule: Rule) -> Callable[..., None]:
    """``apply`` with a rule, through ``torch.compile``: one graph for all sizes."""

    def update(*arguments: Any) -> None:
        *part, numbers, way = arguments
        apply(rule, Part(*part), numbers, Way(*way))

    update.__code__ = update.__code__.replace()  # variants count towards a limit for each code
    return torch.compile(update, dynamic=True, fullgraph=True)


def apply_compiled(rule: Rule, part: Part, numbers: Numbers, way: Way) -> None:
    """The same; numbers are tensors here, so that new ones need no new graph."""
    position, seed = (
        value if isinstance(value, Tensor) else torch.tensor(value, device=part.parameter.device)
        for value in (part.position, way.seed)
    )
    try:
        compiled(rule)(*part[:-1], position, numbers, (*way[:-1], seed))
    except Exception as error:
        if _torch.is_missing_compiler(error):
            raise RuntimeError(
                "compiled=True needs a compiler that torch.compile can use: on a CPU a C++ "
                "compiler such as g++, on a GPU Triton"
            ) from error
        raise


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that lies here."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A distributed tensor placed as its parameter is, or whole where that is a plain one."""
    if not is_distributed(parameter):
        return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    if tensor.placements == parameter.placements:  # type: ignore[attr-defined]
        return tensor
    return tensor.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def whole(part: Part) -> Part:
    """A part as a rule sees it that needs the whole tensor."""
    gradient = like(part.gradient, part.parameter)
    return part._replace(parameter=part.parameter.detach(), gradient=gradient.detach())


def flat(part: Part) -> Part:
    """The same elements in one dimension, in the order in which they lie in memory.

    The part as it is where they do not lie dense, or the states lie otherwise.
    """
    parameter, gradient, states, places, position = part
    if is_distributed(parameter) or parameter.is_complex():
        gradient = _real(local(like(gradient, parameter)).resolve_conj())
        parameter = _real(parameter)
        states = {name: _real(state) for name, state in states.items()}
    if parameter.is_contiguous() and all(state.is_contiguous() for state in states.values()):
        flatten = _row_major
    else:
        order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
        written = parameter, *states.values()
        if not all(tensor.permute(order).is_contiguous() for tensor in written):
            return Part(parameter.detach(), gradient.detach(), states, places, position)

        def flatten(tensor: Tensor) -> Tensor:
            return tensor.permute(order).reshape(-1)

    return Part(
        flatten(parameter),
        flatten(gradient),
        {name: flatten(state) for name, state in states.items()},
        None if places is None else flatten(places),
        position,
    )


def _row_major(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _real(tensor: Tensor) -> Tensor:
    tensor = local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def dense(parts: Sequence[Part]) -> list[Part | None]:
    """Parts of one dtype, each one after another in memory as kernels find it, or else None."""
    if are_dense(parts):
        return list(parts)
    return [part if are_dense([part]) else _made_dense(part) for part in parts]


def _made_dense(part: Part) -> Part | None:
    part = flat(part)
    part = part._replace(gradient=part.gradient.resolve_neg().contiguous())
    return part if are_dense([part]) else None


_PLAIN = {Tensor, torch.nn.Parameter}


def are_dense(parts: Sequence[Part]) -> bool:
    """Whether the elements of each lie one after another, as kernels find them."""
    if parts[0].parameter.is_complex():
        return False
    tensors = list(itertools.chain.from_iterable(columns(parts)))
    gradients = [part.gradient for part in parts]
    return (
        set(map(type, tensors)) <= _PLAIN
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, gradients))
    )


def columns(parts: Sequence[Part]) -> list[Sequence[Tensor]]:
    """The parameters, the gradients, and the states of each name."""
    return [
        [part.parameter for part in parts],
        [part.gradient for part in parts],
        *zip(*(part.states.values() for part in parts), strict=True),
    ]


def addresses(parts: Sequence[Part]) -> list[list[int]]:
    """Of the same."""
    return [list(map(Tensor.data_ptr, column)) for column in columns(parts)]


def blocks(part: Part, size: int) -> Iterator[Part]:
    """A flat part in pieces."""
    elements = part.parameter.numel()
    if elements <= size or part.parameter.dim() != 1:
        yield part
        return
    for start in range(0, elements, size):
        piece = slice(start, start + size)
        yield Part(
            part.parameter[piece],
            part.gradient[piece],
            {name: state[piece] for name, state in part.states.items()},
            None if part.places is None else part.places[piece],
            part.position,
        )


def batches(parts: Sequence[Part], size: int) -> Iterator[list[Part]]:
    """Small parts in lists of at most that many elements."""
    batch: list[Part] = []
    elements = 0
    for part in parts:
        if batch and elements + part.parameter.numel() > size:
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += part.parameter.numel()
    if batch:
        yield batch


def join(parts: Sequence[Part]) -> Part:
    """Flat parts as one, which is a copy."""
    places, position = None, parts[0].position
    if parts[0].places is not None:
        places = torch.cat([part.places for part in parts])  # type: ignore[misc]
        sizes = torch.tensor([part.parameter.numel() for part in parts])
        positions = torch.tensor([part.position for part in parts])
        position = positions.repeat_interleave(sizes).to(places.device)
    return Part(
        torch.cat([part.parameter for part in parts]),
        torch.cat([part.gradient for part in parts]),
        {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        places,
        position,
    )


def scatter(joined: Part, parts: Sequence[Part]) -> None:
    """Write what was joined back."""
    sizes = [part.parameter.numel() for part in parts]
    torch._foreach_copy_([part.parameter for part in parts], torch.split(joined.parameter, sizes))
    for name, state in joined.states.items():
        torch._foreach_copy_([part.states[name] for part in parts], torch.split(state, sizes))


def first_place(parameter: Tensor) -> int | None:
    """The first of these, where the others follow it as the elements lie; otherwise None."""
    here = local(parameter)
    if not here.is_contiguous():
        return None
    if not is_distributed(parameter):
        return 0
    outer = next((dim for dim, size in enumerate(here.shape) if size > 1), here.dim())
    if here.shape[outer + 1 :] != parameter.shape[outer + 1 :]:
        return None
    strides = [math.prod(parameter.shape[dim + 1 :]) for dim in range(parameter.dim())]
    return sum(map(operator.mul, _torch.global_offset(parameter), strides))


def places_of(parameter: Tensor) -> Tensor:
    """The row-major index of each local element in the whole parameter."""
    here = local(parameter)
    offsets = _torch.global_offset(parameter) if is_distributed(parameter) else (0,) * here.dim()
    places = torch.zeros((), dtype=torch.int64, device=here.device)
    sizes = parameter.shape
    for dim, (size, offset) in enumerate(zip(here.shape, offsets, strict=True)):
        row = (torch.arange(size, device=here.device) + offset) * math.prod(sizes[dim + 1 :])
        places = places.unsqueeze(-1) + row
    return places
