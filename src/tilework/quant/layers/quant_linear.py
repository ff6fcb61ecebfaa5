"""A linear layer that holds its weights as codes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework import _checks
from tilework._options import unround
from tilework.catalog import without_paper
from tilework.quant.layers import _cpu_product
from tilework.quant.products.packed_linear import packed_linear
from tilework.quant.storage._stored import StoredWeights

__all__ = ["QuantLinear"]


@without_paper("the layer that every algorithm's result goes into")
class QuantLinear(nn.Module):
    r"""A linear layer with quantized weights.

    .. math::

        y = x \hat W^\top + b

    with ``input`` :math:`x`, the weights :math:`\hat W` that ``quantized`` stands for, in the dtype
    of the input, and ``bias`` :math:`b`.

    Everything that ``quantized`` holds is a buffer: ``packed_codes`` as :func:`pack_codes` gives
    them, ``scale``, ``zero_point`` and so on, by the names that the result of each algorithm has
    for its tensors; those of a transform too, and indices in as few bytes as they need. A cast of
    the module leaves grids and codebooks as they are.

    Plain codes in groups of columns are read by :func:`packed_linear`, so that their weights never
    exist all at once. On a CPU, those of 4 bits are read by PyTorch's own product where inputs are
    of bfloat16 and have no gradient; it has the codes in another order, which is kept beside them
    from the first such call on. Other weights, and those for float64, are made in each call.

    Args:
        quantized: What a function of :mod:`tilework.quant` made of weights of shape (out, in).
        bias: A bias of shape (out,), or None; a parameter stays the one that it is.

    Raises:
        ValueError: ``bias`` is of another shape.
        TypeError: ``quantized`` is not quantized weights, or ``bias`` not a floating tensor.

    Example:
        >>> import torch
        >>> from tilework.quant import QuantLinear, rtn_quantize
        >>> quantized = rtn_quantize(torch.tensor([[-1.0, 0.4, 2.0]]), bits=2)
        >>> layer = QuantLinear.from_quantized(quantized)
        >>> layer(torch.tensor([[1.0, 5.0, 1.0]]))
        tensor([[1.]])
        >>> sorted(layer.state_dict())
        ['packed_codes', 'scale', 'zero_point']

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """

    bias: nn.Parameter | None
    packed_codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: StoredWeights, bias: Tensor | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(quantized, StoredWeights):
            accepted = "quantized weights, as functions of tilework.quant return them"
            raise _checks.bad_type(name, "quantized", accepted, quantized)
        self.out_features, self.in_features = quantized.shape
        if bias is not None:
            _checks.floating(name, "bias", bias)
            _checks.shape(name, "bias", bias, (self.out_features,))
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self._prepared: _cpu_product.Prepared | None = None
        buffers, self.form = quantized.taken_apart()
        for key, value in buffers.items():
            self.register_buffer(key, value)

    @classmethod
    def from_quantized(cls, quantized: StoredWeights, bias: Tensor | None = None) -> "QuantLinear":
        """The layer of quantized weights.

        Args:
            quantized: What a function of :mod:`tilework.quant` made of weights.
            bias: A bias of shape (out,), or None.

        Returns:
            The layer.
        """
        return cls(quantized, bias)

    @property
    def quantized(self) -> Any:
        """The quantized weights, which share memory with the buffers where they can."""
        return self.form.put_together(self._buffers)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for, in the dtype that they had before."""
        weight: Tensor = self.quantized.dequantize()
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Bits of all buffers, for each weight."""
        stored: int = sum(buffer.nbytes for buffer in self.buffers())
        return 8 * stored / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Take the inputs of shape (..., in) to outputs of shape (..., out)."""
        if _cpu_product.applies(input, self.form):
            size = self.form.options["group_size"]
            output = _cpu_product.product(input, self._codes(), size)
            return output if self.bias is None else output + self.bias
        if self.form.is_plain and input.dtype != torch.float64:
            options = {name: self.form.options[name] for name in ("bits", "group_size")}
            grids = self.scale, self.zero_point
            return packed_linear(input, self.packed_codes, *grids, self.bias, **options)
        return F.linear(input, self.quantized.dequantize(input.dtype), self.bias)

    def _codes(self) -> _cpu_product.Prepared:
        """The codes in the order of PyTorch's product, made anew if the buffers have changed."""
        sources = tuple(self.buffers())
        if self._prepared is None or not self._prepared.is_of(sources):
            with torch.no_grad():
                self._prepared = _cpu_product.prepared(self.quantized, sources)
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        unround(self, before)
        self._prepared = None
        return self

    def extra_repr(self) -> str:
        """The sizes, and the form of the weights."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.form}"
        )
