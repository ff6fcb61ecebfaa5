"""A step of many tensors in one launch: the kernel, the rules, and its launcher.

The kernel finds its tensors by addresses, of which a table in the device's memory has a column for
each tensor. A rule is the ``_update`` of an optimizer on tiles.
"""

import array
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Tuned
from tilework.optim._optimizer import updates
from tilework.optim._optimizer.updates import Numbers, Part, Way


class Tile(NamedTuple):
    """How a tensor is cut.

    Attributes:
        block: Elements that a program computes at a time.
        blocks: How many of these it computes at most, one after another.
        num_warps: Its warps.
    """

    block: int
    blocks: int
    num_warps: int


# Loads and stores of 16 bytes of float32 in each thread; more would pass through shared memory
# where half precision is beside it.
TILES = Tuned(
    {
        "sm_80": Tile(512, 32, 4),
        "gfx942": Tile(1024, 16, 4),
        "interpreter": Tile(64, 4, 1),
    },
    otherwise="sm_80",
)
PROGRAMS = 64  # of a multiprocessor, at least, before a program computes several blocks
INTERPRETED = tl.constexpr(_triton.INTERPRETED)
UNCUT = tl.constexpr(16)  # elements that a mask takes or leaves together, or it would cut loads

_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _lerp(old, new, weight):
    """As ``torch.lerp``."""
    change = new - old
    return tl.where(weight < 0.5, old + weight * change, new - change * (1 - weight))


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)  # the other takes what is subnormal for 0
    else:
        return tl.sqrt(x)


@triton.jit
def adamw(p, g, states, numbers):
    """As ``AdamW._update``."""
    weight1, weight2, step_size, floor = numbers
    m = _lerp(states[0], g, weight1)
    v = _lerp(states[1], g * g, weight2)
    if len(states) == 3:
        largest = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)
        new = p - step_size * (m / (_sqrt(largest) + floor))
        states = m, v, largest
    else:
        new = p - step_size * (m / (_sqrt(v) + floor))
        states = m, v
    return new, states


@triton.jit
def adabelief(p, g, states, numbers):
    """As ``AdaBelief._update``; the last number is the decay that is part of the gradient."""
    weight1, weight2, step_size, root, eps, adapts, decay = numbers
    g += tl.where(decay == 0, 0.0, decay * p)
    m = _lerp(states[0], g, weight1)
    surprise = g - m
    s = _lerp(states[1], surprise * surprise, weight2) + eps
    scale = tl.where(adapts == 1, _sqrt(s) / root + eps, 1.0)
    return p - step_size * (m / scale), (m, s)


@triton.jit
def lion(p, g, states, numbers):
    """As ``Lion._update``."""
    weight1, weight2, lr = numbers
    c = _lerp(states[0], g, weight1)
    sign = (c > 0).to(c.dtype) - (c < 0).to(c.dtype)
    return p - lr * sign, (_lerp(states[0], g, weight2),)


@triton.jit
def _column(table_ptr, tensors, program):
    """The last tensor whose first program is not after this one."""
    low = program * 0
    high = low + tensors
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle) <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _pointers(addresses_ptr, tensors, DTYPES):
    """To tensors of some dtypes, the same as multiples of 16, and whether they are that."""
    pointers = ()
    multiples = ()
    bits = tl.load(addresses_ptr)
    for index in tl.static_range(len(DTYPES)):
        address = tl.load(addresses_ptr + index * tensors)
        bits |= address
        pointer = address.to(tl.pointer_type(DTYPES[index]))
        pointers += (pointer,)
        multiple = address.to(tl.pointer_type(DTYPES[index]))
        multiples += (tl.multiple_of(multiple, 16),)
    return pointers, multiples, bits % 16 == 0


@triton.jit
def _numbers(numbers, row_ptr, dtype):
    """Of these, and from memory where there is None."""
    found = ()
    for index in tl.static_range(len(numbers)):
        if numbers[index] is None:
            found += (tl.load(row_ptr).to(dtype),)
            row_ptr += 1
        else:
            found += (tl.full((), numbers[index], dtype),)
    return found


@triton.jit
def _load(pointers, offsets, mask, dtype):
    values = ()
    for index in tl.static_range(len(pointers)):
        values += (tl.load(pointers[index] + offsets, mask=mask, other=0.0).to(dtype),)
    return values


@triton.jit
def _nearest(value, dtype):
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the bits off
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _stochastic(value, places, step, position, seed):
    """As ``rounding.stochastic``, with the same bits."""
    low = places.to(tl.uint32)
    high = (places >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(
        seed, low, high, zero + step.to(tl.uint32), zero + position.to(tl.uint32)
    )
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + (word & 0xFFFF).to(tl.int32)) & -0x10000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def _tile(
    pointers,
    numbers,
    first,
    end,
    counter,
    RULE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements from the first to the end, at most a block.

    ``counter`` has what random numbers depend on: the place of the tensor's first element, the
    step, the
    position and the seed.
    """
    first = tl.full((), first, tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = first + lanes < end
    dtype: tl.constexpr = numbers[0].dtype
    COMPENSATION: tl.constexpr = len(pointers) - (ROUNDING == "kahan")
    values = _load(pointers, first + lanes, mask, dtype)
    old, g = values[0], values[1]
    if MAXIMIZE:
        g = -g
    new, states = RULE(old, g, values[2:COMPENSATION], numbers[: len(numbers) - 1])
    if DECAYS:
        new -= numbers[len(numbers) - 1] * old
    for index in tl.static_range(2, COMPENSATION):
        state = _nearest(states[index - 2], pointers[index].dtype.element_ty)
        tl.store(pointers[index] + first + lanes, state, mask=mask)
    if ROUNDING == "stochastic":
        place, step, position, seed = counter
        new = _stochastic(new, place + first + lanes, step, position, seed)
    if ROUNDING == "kahan":
        change = (new - old) + values[COMPENSATION]
        new = old + change
        lacking = change - (_nearest(new, tl.bfloat16).to(dtype) - old)
        lacking = _nearest(lacking, tl.bfloat16)
        tl.store(pointers[COMPENSATION] + first + lanes, lacking, mask=mask)
    new = _nearest(new, pointers[0].dtype.element_ty)
    tl.store(pointers[0] + first + lanes, new, mask=mask)


@triton.jit(do_not_specialize=["tensors", "blocks", "step", "seed"])
def step_kernel(
    table_ptr,
    numbers,
    memory_ptr,
    tensors,
    blocks,
    step,
    seed,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    COUNT: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """At most so many blocks of one tensor.

    The table has a column for each tensor: its first program, the number of its elements, the place
    of the first of these in the whole parameter, the parameter's position, and the addresses of
    parameter, gradient and states, which are of ``DTYPES``.

    ``numbers`` are those of the rule and the decay. One that is None, and likewise the step, has a
    place in memory, in which each tensor has a row of ``COUNT``, in the same order.

    Where all addresses are multiples of 16, loads and stores are of 16 bytes, which a mask may not
    cut: what is then left of a tensor, fewer than ``UNCUT`` elements, is a tile of its own.
    """
    program = tl.program_id(0)
    row = _column(table_ptr, tensors, program)
    column_ptr = table_ptr + row
    start = (program - tl.load(column_ptr)) * (blocks * BLOCK)
    end = tl.minimum(start + blocks * BLOCK, tl.load(column_ptr + tensors))
    pointers, multiples, are_multiples = _pointers(column_ptr + 4 * tensors, tensors, DTYPES)
    dtype: tl.constexpr = tl.float64 if DTYPES[0] == tl.float64 else tl.float32
    row_ptr = None if memory_ptr is None else memory_ptr + row * COUNT
    computed = _numbers(numbers, row_ptr, dtype)
    if step is None:
        step = tl.load(row_ptr + COUNT - 1).to(tl.int64)
    place = tl.load(column_ptr + 2 * tensors)
    counter = place, step, tl.load(column_ptr + 3 * tensors), seed
    if are_multiples:
        whole = end // UNCUT * UNCUT
        for first in range(start, whole, BLOCK):
            _tile(
                multiples,
                computed,
                first,
                whole,
                counter,
                RULE,
                DECAYS,
                MAXIMIZE,
                ROUNDING,
                BLOCK,
            )
        start = tl.maximum(start, whole)
    REST: tl.constexpr = BLOCK // 4  # an element of each thread
    for first in range(start, end, REST):
        _tile(
            pointers,
            computed,
            first,
            end,
            counter,
            RULE,
            DECAYS,
            MAXIMIZE,
            ROUNDING,
            REST,
        )


class Rule(NamedTuple):
    """A rule on tiles, and the numbers that it takes of a group's."""

    function: Any
    numbers: Callable[[Numbers], tuple[Any, ...]]


def _weights(group: Numbers) -> tuple[float, float]:
    """What the running means take of what is new."""
    beta1, beta2 = group["betas"]
    return 1 - beta1, 1 - beta2


RULES = {
    "adamw": Rule(adamw, lambda group: (*_weights(group), group["step_size"], group["floor"])),
    "adabelief": Rule(
        adabelief,
        lambda group: (
            *_weights(group),
            group["step_size"],
            group["root"],
            group["eps"],
            group["adapts"],
            0.0 if group["weight_decouple"] else group["weight_decay"],
        ),
    ),
    "lion": Rule(lion, lambda group: (*_weights(group), group["lr"])),
}


def launch(
    name: str, parts: Sequence[Part], places: Sequence[int], numbers: Numbers, way: Way
) -> None:
    """Update dense parts of the same dtypes, on one device, by a rule.

    ``places`` are those of their first elements in the whole parameters.
    """
    rule = RULES[name]
    parameter, gradient, states, _, _ = parts[0]
    device, dtype = parameter.device, parameter.dtype
    tile = TILES.choose(_triton.architecture(device))
    sizes = [part.parameter.numel() for part in parts]
    share = sum(sizes) // (tile.block * PROGRAMS * _triton.multiprocessors(device))
    blocks = max(1, min(tile.blocks, share))
    ends = list(itertools.accumulate(-(-size // (blocks * tile.block)) for size in sizes))
    if not ends[-1]:
        return
    rows = (
        [0, *ends[:-1]],
        sizes,
        places,
        [part.position for part in parts],
        *updates.addresses(parts),
    )
    decay = numbers["decay"]
    values = *rule.numbers(numbers), 0.0 if decay is None else decay, numbers["t"]
    # Kernels take numbers of 32 bits.
    in_memory = [isinstance(value, Tensor) or dtype == torch.float64 for value in values]
    *given, step = (
        None if there else value for value, there in zip(values, in_memory, strict=True)
    )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        step_kernel[(ends[-1],)](
            _table(device, tuple(itertools.chain.from_iterable(rows))),
            tuple(given),
            _in_memory(list(itertools.compress(values, in_memory)), len(parts), device),
            len(parts),
            blocks,
            step,
            way.seed,
            RULE=rule.function,
            DTYPES=tuple(_DTYPES[one.dtype] for one in (parameter, gradient, *states.values())),
            COUNT=sum(in_memory),
            DECAYS=decay is not None,
            MAXIMIZE=way.maximize,
            ROUNDING=way.rounding if dtype == torch.bfloat16 else "nearest",
            BLOCK=tile.block,
            num_warps=tile.num_warps,
        )
    torch.autograd.graph.increment_version([part.parameter for part in parts])


def _in_memory(numbers: Sequence[Any], tensors: int, device: torch.device) -> Tensor | None:
    """A row of float64 for each tensor; made there, so that a CUDA graph makes it again."""
    if not numbers:
        return None
    columns = [
        number.to(torch.float64).expand(tensors)
        if isinstance(number, Tensor)
        else torch.full((tensors,), number, dtype=torch.float64, device=device)
        for number in numbers
    ]
    return torch.stack(columns, 1)


_captured: list[Tensor] = []
"""Tables on the host, from which CUDA graphs copy whenever they run."""


def _table(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Whole numbers in the device's memory, where the host does not wait for them."""
    if device.type != "cuda":
        return torch.tensor(numbers)
    if not torch.cuda.is_current_stream_capturing():
        return _kept(device, torch.cuda.current_stream(device).cuda_stream, numbers)
    pinned = _pinned(numbers)
    _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def _kept(device: torch.device, stream: int, numbers: tuple[int, ...]) -> Tensor:
    """A table that the next steps find again if their tensors stay where they are."""
    return _pinned(numbers).to(device, non_blocking=True)


def _pinned(numbers: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(array.array("q", numbers), dtype=torch.int64).pin_memory()
