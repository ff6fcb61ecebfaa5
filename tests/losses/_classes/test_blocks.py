"""Which blocks of logits there are, and what goes through them."""

import pytest
import torch
from torch import Tensor

from tilework.losses._classes import blocks

SHAPES = [
    (0, 7),
    (1, 1),
    (7, 63),
    (100, 7),
    (3, 1000),
    (0, 7, 3),
    (3, 7, 0),
    (3, 1, 1),
    (5, 63, 7),
    (63, 7, 1),
    (2, 100, 63),
    (2, 1000, 3),
    (40, 3, 5),
]


@pytest.mark.parametrize("elements", [1, 64, 384, 2**20])
@pytest.mark.parametrize("shape", SHAPES)
def test_places_cover_every_position_once(
    shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS", elements)
    input = torch.zeros(shape)
    seen, logits = torch.zeros(shape[:1] + shape[2:]), torch.zeros(shape)
    sizes = []
    for place, logits_place in blocks.places(input):
        seen[place] += 1
        logits[logits_place] += 1
        assert logits[logits_place].shape[1] == shape[1]
        assert seen[place].shape == logits[logits_place].select(1, 0).shape
        sizes.append(logits[logits_place].numel())
    assert (seen == 1).all()
    assert (logits == 1).all()
    assert all(size <= max(elements, shape[1]) for size in sizes)
    # Only the last ones are small.
    assert sum(2 * size < elements for size in sizes) <= (
        1 if len(shape) == 2 else max(1, shape[0])
    )
    if input.numel() <= elements:
        assert len(sizes) <= 1
    if sizes:
        memory = blocks.scratch(input)
        assert memory.numel() == max(sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scratch_is_of_the_computation_dtype(dtype: torch.dtype) -> None:
    input = torch.zeros(5, 63, dtype=dtype)
    memory = blocks.scratch(input)
    assert memory.dtype == torch.promote_types(dtype, torch.float32)
    part = blocks.block_of(memory, input[:2])
    assert part.shape == (2, 63)
    assert part.data_ptr() == memory.data_ptr()
    assert blocks.scratch(input[:0]).numel() == 0


@pytest.mark.untyped
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    calls = []

    def function(probabilities: Tensor, target: Tensor) -> Tensor:
        calls.append(probabilities.shape)
        return probabilities.add_(1).amax(1) + target

    input = torch.randn(shape).to(dtype)
    before = input.clone()
    target = torch.randint(9, shape[:1] + shape[2:])
    expected = input.float().softmax(1).amax(1) + 1 + target
    result = blocks.of_probabilities(function, input, target)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    assert torch.equal(input, before)
    assert len(calls) == len(list(blocks.places(input)))
    calls.clear()
    if input.numel():
        batched = torch.func.vmap(lambda one: blocks.of_probabilities(function, one, target))
        torch.testing.assert_close(batched(input[None])[0], expected)
        assert len(calls) == 1
        traced = torch.compile(blocks.of_probabilities, fullgraph=True, backend="eager")
        result = traced(lambda one, other: one.amax(1) + other, input, target)
        torch.testing.assert_close(result + 1, expected)


@pytest.mark.untyped
def test_where_blocks_can_be_taken() -> None:
    seen = []

    def look(input: Tensor) -> Tensor:
        seen.append(blocks.is_eager(input))
        return input

    plain = torch.zeros(3, 4)
    look(plain)
    look(torch.nn.Parameter(plain))
    torch.func.vmap(look)(plain)
    look(plain.to("meta"))
    look(plain.as_subclass(type("Other", (Tensor,), {})))
    assert seen == [True, True, False, False, False]


@pytest.mark.parametrize("layout", [(6, 5), (3, 5, 2)])
def test_uniform_class_weights_save_passes_alone(layout: tuple[int, ...]) -> None:
    """One number expanded over the classes gives what a vector of it gives."""
    logits = torch.randn(layout, dtype=torch.float64)
    target = torch.randint(5, layout[:1] + layout[2:])
    one = torch.tensor([0.7], dtype=torch.float64)
    results = []
    for class_weight in (one.expand(5), one.repeat(5)):
        out = torch.empty_like(logits)
        found, block = blocks.measure(logits, out, target, -100, class_weight, True, True)
        grads = found._replace(shift=None, top=None, argmax=None)  # type: ignore[arg-type]
        blocks.differentiate_(block, grads, class_weight)
        results.append((found.class_gap, out))
    torch.testing.assert_close(*results)
    expected = 0.7 * (logits.amax(1, keepdim=True) - logits).sum(1)
    torch.testing.assert_close(results[0][0], expected)


@pytest.mark.parametrize("layout", [(6, 5), (3, 5, 2)])
def test_a_block_may_replace_its_logits(layout: tuple[int, ...]) -> None:
    logits = torch.randn(layout, dtype=torch.float64)
    target = torch.randint(5, layout[:1] + layout[2:])
    target.view(-1)[2] = -100
    weight = torch.rand(5, dtype=torch.float64)
    results = []
    for given in (logits, logits.clone()):
        out = torch.empty_like(logits) if given is logits else given
        found, block = blocks.measure(given, out, target, -100, weight, True, True)
        torch.testing.assert_close(out, logits.softmax(1))
        grads = found._replace(shift=None, top=None, argmax=None)  # type: ignore[arg-type]
        blocks.differentiate_(block, grads, weight)
        results.append([*found, out])
    torch.testing.assert_close(*results)
