"""Cross-entropy plus the mean square of the wrong classes' logits."""

from jaxtyping import Float, Int64
from torch import Tensor

from tilework._implementations import TABLES
from tilework._options import OptionsModule, buffer
from tilework.catalog import implements
from tilework.losses._classes import class_index, linear, logits
from tilework.losses._classes.positions import of_head, of_logits
from tilework.losses._classes.sharding import VocabShard
from tilework.losses._classes.statistics import Rows, Statistics, formula

__all__ = ["SquentropyLoss", "linear_squentropy", "squentropy"]

_NAME = "squentropy"
_LINEAR = "linear_squentropy"
TABLES |= {f"losses.{_NAME}": logits.IMPLEMENTATIONS, f"losses.{_LINEAR}": linear.IMPLEMENTATIONS}
_PAPER = implements("Cut your Losses with Squentropy", year=2023, arxiv="2302.03952")


@_PAPER
def squentropy(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy plus the mean square of the wrong classes' logits.

    With the logits :math:`z_i` of a position of ``input``, its class :math:`y_i` in ``target``,
    :math:`C` classes and :math:`w` = ``weight``:

    .. math::

        \ell_i = w_{y_i} \Big( -\log \mathrm{softmax}(z_i)_{y_i}
            + \frac{1}{C - 1} \sum_{j \ne y_i} z_{ij}^2 \Big)

    ``"mean"`` is :math:`\sum_i \ell_i / \sum_i w_{y_i}` over the kept positions. The square pulls
    the logits themselves to 0: the loss is not invariant to a shift of them.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, ``C >= 2``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        weight: A weight for each class, shape ``(C)``; a constant.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above, or ``weight`` requires a gradient.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import squentropy
        >>> input = torch.tensor([[0.0, 2.0, -2.0]])
        >>> squentropy(input, torch.tensor([0]))  # log(1 + 2 * cosh(2)) + (2**2 + 2**2) / 2
        tensor(6.1429)

    Deviations:
        ``weight`` and ``ignore_index`` are those of ``F.cross_entropy``; the paper has neither.

    Reference:
        Like Hui, Mikhail Belkin, Stephen Wright. Cut your Losses with Squentropy. 2023.
        arXiv:2302.03952.
    """
    class_index.check_options(_NAME, ignore_index, reduction)
    positions = of_logits(_NAME, input, target, ignore_index, weight=weight, min_classes=2)
    return positions.loss(_NAME, (), reduction)


@formula(_NAME, squares=True)
def _squentropy(statistics: Statistics, rows: Rows) -> Tensor:
    return rows.target_weight * (statistics.nll + statistics.squares / (rows.classes - 1))


@_PAPER
class SquentropyLoss(OptionsModule):
    """:func:`squentropy` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import SquentropyLoss
        >>> criterion = SquentropyLoss(reduction="sum")
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(9.2103)
    """

    weight: Tensor | None = buffer(default=None, kw_only=False)
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        class_index.check_options(_NAME, **self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`squentropy`."""
        return squentropy(input, target, self.weight, **self.options())


@_PAPER
def linear_squentropy(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Float[Tensor, "*tokens"] | None = None,
    shift: int = 0,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    """:func:`squentropy` of ``F.linear(input, linear_weight, linear_bias)`` without storing it.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype, ``V >= 2``.
        target: Classes, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        weight: A weight for each class, shape ``(V)``; a constant.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        implementation: As in :func:`linear_cross_entropy`.
        vocab_parallel: The classes that this process holds of a head spread over processes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; float32 for
        half-precision input, otherwise of its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or ``weight``
            requires a gradient.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_squentropy
        >>> hidden, head = torch.tensor([[2.0]]), torch.tensor([[0.0], [1.0], [-1.0]])
        >>> linear_squentropy(hidden, head, torch.tensor([0]))
        tensor(6.1429)

    Deviations:
        As :func:`squentropy`. The squares are those of the logits, and not the quadratic form of
        the head's Gram matrix: where hidden states are nearly orthogonal to what the classes have
        in common, that loses twice the digits that the logits lose.

    Reference:
        As :func:`squentropy`.
    """
    class_index.check_options(_LINEAR, ignore_index, reduction)
    positions = of_head(
        _LINEAR,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        weight=weight,
        token_weight=token_weight,
        shift=shift,
        vocab_parallel=vocab_parallel,
        min_classes=2,
        is_sum=reduction != "none",
    )
    return positions.loss(_NAME, (), reduction)
