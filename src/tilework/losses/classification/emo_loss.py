"""Likelihood together with a bound of the earth mover's distance between tokens."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks, _operators
from tilework._options import OptionsModule, buffer
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["EMOLoss", "emo_loss"]

_NAME = "emo_loss"
_PAPER = implements(
    "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling",
    year=2023,
    arxiv="2310.04691",
)
_SMALLEST_NORM = 1e-12


@_PAPER
def emo_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    cost_embedding: Float[Tensor, "classes features"],
    *,
    eps: float = 1e-10,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy whose gradient is shared with that of a transport cost between tokens.

    With the logits :math:`z_i` of a position of ``input``, :math:`Q_i = \mathrm{softmax}(z_i)`, its
    class :math:`y_i` in ``target``, the rows :math:`\hat e_v = e_v / \max(\|e_v\|, 10^{-12})` of
    ``cost_embedding`` and :math:`\epsilon` = ``eps``:

    .. math::

        D_i &= \sum_v Q_{iv} (1 - \hat e_{y_i} \cdot \hat e_v), \qquad
            \mathrm{nll}_i = -\log Q_{iy_i} \\
        \ell_i &= \frac{1}{2} \Big( \mathrm{nll}_i
            + \Big[\frac{\mathrm{nll}_i}{D_i + \epsilon}\Big] D_i \Big)

    :math:`D_i` is the expected cosine distance between the target's embedding and that of a sampled
    token, which bounds the earth mover's distance. No gradient flows through the bracket: the value
    is the cross-entropy up to :math:`\epsilon`, its gradient

    .. math::

        \frac{1}{2} \Big( \nabla \mathrm{nll}_i
            + \frac{\mathrm{nll}_i}{D_i + \epsilon} \nabla D_i \Big)

    The product of embeddings, one number for each target and class, takes most of the time.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        cost_embedding: One row for each class, shape ``(C, features)``, such as the head of a
            pretrained model. It gets no gradient.
        eps: Added to the distance that the likelihood is divided by, above 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` or ``cost_embedding`` is not of a floating dtype, or ``target`` is not
            int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import emo_loss
        >>> cost_embedding = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> emo_loss(torch.zeros(1, 3), torch.tensor([0]), cost_embedding)  # log(3)
        tensor(1.0986)

    Deviations:
        The released code gives 0 for a batch of which everything is ignored and has no guard for
        rows of zeros. It takes :math:`D` from 1, which leaves only rounding where the target is
        sure; here from what is not on the target. Both make it negative at times: here it is then
        0, and so is its gradient.

    Reference:
        Siyu Ren, Zhiyong Wu, Kenny Q. Zhu. EMO: Earth Mover Distance Optimization for
        Auto-Regressive Language Modeling. 2023. arXiv:2310.04691.
    """
    _check_options(eps, ignore_index, reduction)
    positions = class_index.positions(_NAME, input, target, ignore_index)
    dim, classes = positions.dim, input.shape[positions.dim]
    _check_embedding(cost_embedding)
    if cost_embedding.shape[0] != classes:
        accepted = f"of shape ({classes}, features)"
        raise _checks.bad_value(_NAME, "cost_embedding", accepted, cost_embedding)
    _checks.same_device(_NAME, input=input, target=target, cost_embedding=cost_embedding)

    nll = positions.nll()
    similarity = _similarity(cost_embedding.detach(), positions.target, nll.dtype)
    similarity = (positions.logits.softmax(dim) * similarity.movedim(-1, dim)).sum(dim)
    # What is not on the target, less what lies in its direction: small where the target is sure.
    distance = (-torch.expm1(-nll) - similarity).clamp(min=0)
    ratio = (nll / (distance + eps)).detach()
    return positions.reduce((nll + ratio * distance) / 2, reduction)


@_operators.without_autocast
def _similarity(cost_embedding: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The cosine between each target and each class, classes last; a constant.

    At the target itself it is less by 1, which is 0 unless the row is too small to have norm 1.
    """
    embedding = cost_embedding.to(dtype)
    norms = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
    rows = embedding / norms.clamp(min=_SMALLEST_NORM)
    own = ((norms[:, 0] / _SMALLEST_NORM).square() - 1).clamp(max=0)
    similarity: Tensor = rows[target] @ rows.T
    return similarity.scatter(-1, target.unsqueeze(-1), own[target].unsqueeze(-1))


@_PAPER
class EMOLoss(OptionsModule):
    """:func:`emo_loss` as a module, with a copy of ``cost_embedding`` in a buffer.

    Example:
        >>> import torch
        >>> from tilework.losses import EMOLoss
        >>> embedding = torch.nn.Embedding(10, 16)
        >>> criterion = EMOLoss(embedding.weight)
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(2.3026)
    """

    cost_embedding: Tensor = buffer(kw_only=False)
    eps: float = 1e-10
    ignore_index: int = -100
    reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost_embedding = self.cost_embedding.detach().clone()

    def _check(self) -> None:
        _check_options(**self.options())
        _check_embedding(self.cost_embedding)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`emo_loss`."""
        return emo_loss(input, target, self.cost_embedding, **self.options())


def _check_options(eps: float, ignore_index: int, reduction: str) -> None:
    _checks.positive(_NAME, "eps", eps)
    class_index.check_options(_NAME, ignore_index, reduction)


def _check_embedding(cost_embedding: Tensor) -> None:
    _checks.floating(_NAME, "cost_embedding", cost_embedding)
    if cost_embedding.dim() != 2:
        accepted = "of shape (classes, features)"
        raise _checks.bad_value(_NAME, "cost_embedding", accepted, cost_embedding)
