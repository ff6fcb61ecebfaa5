"""What the tests of every loss run on: sample inputs and a definition of each loss."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor

import samples
from calls import Call

Arguments = dict[str, Tensor]


def class_index(
    *positions: int, classes: int = 7, scale: float = 2.0, weight: bool = False
) -> Arguments:
    """Logits in float64 and classes, one in five ignored, for (N, d1, ...) positions or ()."""
    input = scale * torch.randn(*positions[:1], classes, *positions[1:], dtype=torch.float64)
    target = torch.randint(classes, positions).masked_fill(torch.rand(positions) < 0.2, -100)
    tensors = {"input": input, "target": target}
    return tensors | ({"weight": torch.rand(classes).double() + 0.1} if weight else {})


def zeros() -> Arguments:
    """Four positions of three classes."""
    return {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}


@dataclass(frozen=True)
class Loss(samples.Sample):
    """One loss: the function, tensors to call it with, and its definition.

    The definition takes the same tensors and options, and computes in the dtype of the tensors by
    torch's own operations or by loops: the truth in float64, what is compared with elsewhere.
    """

    definition: Callable[..., Tensor]
    module: Callable[..., torch.nn.Module] | None
    tensors: Callable[[], Arguments] = lambda: class_index(13)
    """Draws the tensor arguments, in order; floating ones in float64."""
    _: KW_ONLY
    accepts: dict[str, Any] = field(default_factory=zeros)
    differentiable: tuple[str, ...] = ("input",)
    batched: tuple[str, ...] = ("input", "target")
    """Arguments whose first dimension is that of the positions."""
    owned: tuple[str, ...] = ("weight",)
    """Tensors that the module takes in its constructor."""
    positional: tuple[str, ...] = ()
    """Options that the module takes by position, as the class of torch that it stands in for."""
    checks_owned: bool = False
    """Whether the constructor refuses them, which else the first call does."""
    class_index: bool = True
    """Whether the class-index layout and its rules hold."""
    mean_of_nothing: float = torch.nan
    twice: bool = True
    """Whether a second derivative exists."""
    surrogate: bool = False
    """Whether the gradient is by definition not that of the value: parts are held constant."""
    widens: bool = False
    """Whether half precision gives float32."""

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters
        if self.class_index and "ignore_index" not in parameters:
            raise ValueError(
                f"{self.name} has no ignore_index: its sample must say class_index=False"
            )

    @property
    def reductions(self) -> tuple[dict[str, Any], ...]:
        if "reduction" not in inspect.signature(self.function).parameters:
            return ({},)
        return tuple({"reduction": name} for name in ("none", "sum", "mean"))

    def draw(self, dtype: torch.dtype = torch.float64) -> Arguments:
        """Tensors of a dtype, of which the differentiable ones require gradients."""
        return self.leaves(self.tensors(), dtype)

    def leaves(self, tensors: Arguments, dtype: torch.dtype) -> Arguments:
        """The same tensors in another dtype, as leaves."""
        return {
            name: tensor.detach()
            .to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            .requires_grad_(name in self.differentiable)
            for name, tensor in tensors.items()
        }

    def gradients(
        self, result: Tensor, tensors: Arguments, upstream: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        leaves = [tensors[name] for name in self.differentiable]
        weights = torch.ones_like(result) if upstream is None else upstream.to(result.dtype)
        return torch.autograd.grad(result, leaves, weights)

    def call_module(self, tensors: Arguments, options: dict[str, Any]) -> Tensor:
        assert self.module is not None
        owned = {name: tensors[name] for name in self.owned if name in tensors}
        others = {name: tensor for name, tensor in tensors.items() if name not in owned}
        result: Tensor = self.module(**owned, **options)(**others)
        return result

    def calls(self, change: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
        arguments = self.accepts | change
        yield lambda: self.function(**arguments)
        parameters = inspect.signature(self.function).parameters
        options = {name for name in change if parameters[name].kind is Parameter.KEYWORD_ONLY}
        if self.module is None or not change.keys() <= options.union(self.owned):
            return
        own = {name: arguments.pop(name) for name in [*self.owned, *options] if name in arguments}
        if change.keys() <= options or self.checks_owned:
            yield lambda: self.module(**own)
        else:
            yield lambda: self.module(**own)(**arguments)


@samples.of(Call)
def calls() -> list[Call]:
    """Every loss, its samples by turns with a mean and with single losses."""
    return [
        Call(
            loss.function,
            loss.tensors,
            differentiable=loss.differentiable,
            options=(loss.options[0], loss.options[-1] | loss.reductions[0]),
        )
        for loss in samples.collect(Loss)
    ]
