"""What the tests of every optimizer run on: its options, and its rule as a readable definition."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

import samples
from helpers import assert_exact

Options = Mapping[str, Any]
LOSS = 0.7
"""What ``step`` is given where it takes a loss."""
SHAPES = ((7,), (3, 5), (), (0,), (4, 3, 2))


@dataclass(frozen=True)
class Optimized(samples.Sample):
    """One optimizer, and the definition of its rule in plain operations on one tensor.

    ``definition(p, g, state, options, t)`` returns the new parameter without standard decay, and
    sets ``state[name]``; a state that was never set is missing. It computes in the dtype of its
    tensors: the truth in float64, in the parameter's dtype what errors are compared with.
    """

    definition: Callable[[Tensor, Tensor, dict[str, Tensor], Options, int], Tensor]
    _: KW_ONLY
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    is_complex: bool = False
    standard_decay: bool = True
    elementwise: bool = True
    together: bool = False
    """Whether the step needs all gradients: ``definition`` takes and returns lists."""
    rounds_alike: bool = True
    """Whether the result of an element does not depend on where it lies among others."""
    takes_groups: bool = True
    """Whether any parameters make a group."""
    takes_loss: bool = False
    """Whether ``step`` needs the loss."""

    def parameters(
        self, dtype: torch.dtype = torch.float32, shapes: Iterable[tuple[int, ...]] | None = None
    ) -> list[torch.nn.Parameter]:
        return [
            torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))
            for shape in (self.shapes if shapes is None else shapes)
        ]

    def step(self, optimizer: Any) -> None:
        optimizer.step(
            **({"loss": torch.tensor(LOSS, dtype=torch.float64)} if self.takes_loss else {})
        )

    def succeed(self) -> None:
        self.function(self.parameters(), **self.accepts)

    def calls(self, change: Mapping[str, Any]) -> Iterable[Callable[[], Any]]:
        """A bad option is refused for the whole optimizer, and for a group."""
        changed = self.accepts | dict(change)
        params = changed.pop("params", None)
        yield lambda: self.function(self.parameters() if params is None else params, **changed)
        if "params" not in change:
            group = {"params": self.parameters()} | dict(change)
            yield lambda: self.function([group], **self.accepts)


def draw_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype)


def wide(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A copy of the states that the definition knows, in a dtype."""
    return {
        name: value.detach().to(dtype).clone()
        for name, value in state.items()
        if name not in ("step", "compensation")
    }


def decay(options: Options) -> float:
    scale = options.get("reference_lr") if options.get("decouple_lr") else 1.0
    return float(options["lr"]) / scale * options["weight_decay"]


def defined(
    sample: Optimized,
    before: Sequence[tuple[Tensor, Tensor, dict[str, Tensor], int]],
    options: Options,
    dtype: torch.dtype,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The parameters and states after a step, computed by the definition in a dtype."""
    sign = -1 if options.get("maximize") else 1
    states = [wide(state, dtype) for _, _, state, _ in before]
    olds = [old.to(dtype) for old, *_ in before]
    grads = [sign * grad.to(dtype) for _, grad, *_ in before]
    steps = [t for *_, t in before]
    if sample.together:
        news = sample.definition(olds, grads, states, options, steps)  # type: ignore[arg-type]
    else:
        news = [
            sample.definition(old, grad, state, options, t)
            for old, grad, state, t in zip(olds, grads, states, steps, strict=True)
        ]
    if sample.standard_decay:
        news = [new - decay(options) * old for new, old in zip(news, olds, strict=True)]
    return list(zip(news, states, strict=True))


def assert_step_is_defined(sample: Optimized, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, and hold parameters and states to the definition from what they were before."""
    before = [as_before(optimizer, group) for group in optimizer.param_groups]
    sample.step(optimizer)
    for group, (options, given) in zip(optimizer.param_groups, before, strict=True):
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            assert_are_defined(sample, optimizer, parameters, options, given)


def as_before(
    optimizer: torch.optim.Optimizer, group: Options
) -> tuple[Options, list[tuple[Tensor, Tensor, dict[str, Tensor], int]]]:
    """The options of a group, and what the definition needs of its parameters, as copies."""
    options = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()
    }
    return options, [
        (
            p.detach().clone(),
            p.grad.clone(),
            {name: value.clone() for name, value in optimizer.state.get(p, {}).items()},
            int(optimizer.state[p]["step"]) + 1 if p in optimizer.state else 1,
        )
        for p in options.pop("params")
        if p.grad is not None
    ]


def assert_are_defined(
    sample: Optimized,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    options: Options,
    before: Sequence[tuple[Tensor, Tensor, dict[str, Tensor], int]],
) -> None:
    truths = defined(sample, before, options, torch.float64)
    compositions = defined(sample, before, options, torch.float32)
    names = sorted({name for _, state in truths for name in state})
    computed = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    for p, (_, state) in zip(parameters, truths, strict=True):
        assert optimizer.state[p].keys() - {"step", "compensation"} == state.keys()
        for name in state:
            own = getattr(sample.function, "_dtypes", {}).get(name)
            dtype = own or options["state_dtype"] or computed
            assert optimizer.state[p][name].dtype == dtype
    compare(
        [p.detach() for p in parameters],
        [new for new, _ in compositions],
        [new for new, _ in truths],
    )
    for name in names:
        compare(
            [optimizer.state[p][name] for p in parameters if name in optimizer.state[p]],
            [state[name] for _, state in compositions if name in state],
            [state[name] for _, state in truths if name in state],
        )


def compare(actual: list[Tensor], composition: list[Tensor], truth: list[Tensor]) -> None:
    """Hold all tensors of one kind to the error rule, as one."""
    dtype = actual[0].dtype
    narrow = torch.float32 if dtype == torch.float64 else dtype
    assert [t.shape for t in actual] == [t.shape for t in truth]
    joined = [
        torch.cat([t.reshape(-1) for t in tensors]) for tensors in (actual, composition, truth)
    ]
    assert_exact(joined[0], joined[1].to(narrow), joined[2])
