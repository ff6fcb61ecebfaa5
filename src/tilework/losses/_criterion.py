"""What the modules of losses share."""

import inspect

from torch import Tensor, nn


class Criterion(nn.Module):
    """A loss as a module, whose options are attributes of the constructor's argument names."""

    def extra_repr(self) -> str:
        """Return the options that are not the defaults of the constructor."""
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if not isinstance(value, Tensor | nn.Module) and value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
