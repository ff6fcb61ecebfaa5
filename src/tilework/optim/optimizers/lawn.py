"""LAWN: training that is free at first, and then keeps the norms of weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.optim._optimizer import evaluated, flag
from tilework.optim.gradients.tangent_project import unit_and_norm

__all__ = ["LAWN"]

_SAVED = ("free_steps", "project_update", "step_count", "constrained")


@implements("Logit Attenuating Weight Normalization", year=2021, arxiv="2108.05839")
class LAWN(torch.optim.Optimizer):
    r"""Any optimizer, held after some steps on the spheres where its parameters then are.

    The first ``free_steps`` calls of ``step`` are those of ``optimizer``. Then the norm
    :math:`c = \lVert p \rVert` of each constrained parameter :math:`p` is recorded, and every call
    does the following, with its gradient :math:`g`:

    .. math::

        g' = g - \frac{\langle g, p \rangle}{\lVert p \rVert^2}\, p, \qquad
        \Delta = \texttt{optimizer}(g'), \qquad
        \Delta' = \Delta - \frac{\langle \Delta, p \rangle}{\lVert p \rVert^2}\, p, \qquad
        p \leftarrow c\, \frac{p + \Delta'}{\lVert p + \Delta' \rVert}

    ``p.grad`` is left as it is. A parameter that was zero, or has no gradient, goes as
    ``optimizer`` takes it. The moments are kept at the switch; a new warm-up of the learning rate
    is left to the scheduler, which may be given this or ``optimizer``.

    ``step_count`` has the number of calls so far, and ``constrained`` says whether the norms are
    recorded. All else, such as ``param_groups`` and ``state``, is ``optimizer``'s; ``state_dict``
    has an entry ``'lawn'`` besides.

    Args:
        optimizer: An optimizer of PyTorch or of this library, without weight decay.
        free_steps: Calls of ``step`` before the norms are kept, at least 0.
        params: Parameters to constrain; None stands for all of at least 2 dimensions.
        project_update: Whether the update loses its radial part too, so that :math:`\Delta'` is
            not :math:`\Delta`; moments and preconditioners give it one.

    Raises:
        ValueError: ``free_steps`` is below 0, a group of ``optimizer`` has a weight decay,
            ``params`` are not in it, or it steps in the backward pass.
        TypeError: ``optimizer`` or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import LAWN
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LAWN(torch.optim.SGD([weight], lr=0.1), free_steps=0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data, weight.norm()
        (tensor([[2.9840, 4.0120]]), tensor(5., grad_fn=<LinalgVectorNormBackward0>))

    Deviations:
        The paper projects gradients; the projection of updates is a choice of this library.

    Reference:
        Aman Gupta, Rohan Ramanath, Jun Shi, Anika Ramachandran, Sirou Zhou, Mingzhou Zhou, and
        S. Sathiya Keerthi. Logit Attenuating Weight Normalization. 2021. arXiv:2108.05839.
    """

    _step_supports_amp_scaling = False  # a scaler must unscale before the projection

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        free_steps: int,
        params: Iterable[Tensor] | None = None,
        project_update: bool = True,
    ) -> None:
        # The constructor of torch.optim.Optimizer would make groups and states of its own.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise _checks.bad_type("LAWN", "optimizer", "a torch.optim.Optimizer", optimizer)
        if getattr(optimizer, "_in_backward", False):
            raise ValueError("LAWN: optimizer must not step in the backward pass")
        for group in optimizer.param_groups:
            _refuse_decay(group)
        _checks.count("LAWN", "free_steps", free_steps, 0)
        self.optimizer = optimizer
        self.free_steps = int(free_steps)
        self.project_update = flag("LAWN", "project_update", project_update)
        self.step_count = 0
        self.constrained = False
        self._params = None if params is None else list(params)
        self._norms: dict[Tensor, Tensor] = {}
        known = {id(p) for p in self._all()}
        for index, parameter in enumerate(self._params or ()):
            _checks.floating("LAWN", f"params[{index}]", parameter)
            if id(parameter) not in known:
                accepted = "a parameter of the optimizer"
                raise _checks.bad_value("LAWN", f"params[{index}]", accepted, parameter)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # of a copy that is not complete
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "_params", "_norms", *_SAVED)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _all(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the optimizer."""
        _refuse_decay(self.optimizer.defaults | param_group)
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer; ``'lawn'`` has the count of steps and the norms."""
        norms = {i: self._norms[p] for i, p in enumerate(self._all()) if p in self._norms}
        own = {name: getattr(self, name) for name in _SAVED} | {"norms": norms}
        return self.optimizer.state_dict() | {"lawn": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        rest = dict(state_dict)
        own = rest.pop("lawn", None)
        if own is None:
            raise ValueError("LAWN: state_dict must have an entry 'lawn', as of LAWN's state_dict")
        self.optimizer.load_state_dict(rest)
        for name in _SAVED:
            setattr(self, name, own[name])
        parameters = list(self._all())
        self._norms = {
            parameters[i]: norm.to(parameters[i].device, copy=True)
            for i, norm in own["norms"].items()
        }

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step of the optimizer, on the spheres after the free ones.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = evaluated(closure)
        if self.step_count < self.free_steps:
            self.optimizer.step()
        else:
            with torch.no_grad():
                self._constrained_step()
        self.step_count += 1
        return loss

    def _constrained_step(self) -> None:
        chosen = self._params
        if chosen is None:
            chosen = [p for p in self._all() if p.dim() >= 2]
        for p in chosen:
            if p not in self._norms:
                self._norms[p] = unit_and_norm(p)[1]
        self.constrained = True
        moving = [(p, p.grad) for p in chosen if p.grad is not None]
        before = []
        try:
            for p, grad in moving:
                if grad.layout != torch.strided:
                    raise TypeError(f"LAWN: gradients must be dense, got {grad.layout}")
                unit, norm = unit_and_norm(p)
                before.append((unit, norm))
                values = grad.to(unit.dtype)
                tangent = values - (values * unit).sum() * unit
                p.grad = tangent.to(grad.dtype).where(self._norms[p] != 0, grad)
            self.optimizer.step()
        finally:
            for p, grad in moving:
                p.grad = grad
        for (p, _), (unit, norm) in zip(moving, before, strict=True):
            new, fixed = p.to(unit.dtype), self._norms[p]
            if self.project_update:
                new = new - ((new * unit).sum() - norm) * unit  # of the old one nothing but itself
            new = fixed * unit_and_norm(new)[0]
            p.copy_(new.to(p.dtype).where(fixed != 0, p))


def _refuse_decay(group: dict[str, Any]) -> None:
    if group.get("weight_decay"):
        raise _checks.bad_value("LAWN", "weight_decay", "0 in all groups", group["weight_decay"])
