"""Cross-entropy of a linear layer's output without the logits in memory."""

from dataclasses import InitVar, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tilework import _checks, _implementations
from tilework._implementations import TABLES
from tilework._options import OptionsModule, buffer
from tilework.catalog import implements
from tilework.losses._classes import head
from tilework.losses._classes.cross_entropy import cross_entropy
from tilework.losses._classes.linear import IMPLEMENTATIONS
from tilework.losses._classes.positions import of_head
from tilework.losses._classes.sharding import VocabShard

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyLoss", "VocabShard", "linear_cross_entropy"]

_NAME = "linear_cross_entropy"
TABLES[f"losses.{_NAME}"] = IMPLEMENTATIONS
_PAPER = implements(
    "Cut Your Losses in Large-Vocabulary Language Models", year=2024, arxiv="2411.09009"
)


@_PAPER
def linear_cross_entropy(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Float[Tensor, "*tokens"] | None = None,
    shift: int = 0,
    gradient_filter: float | None = None,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy of ``F.linear(input, linear_weight, linear_bias)`` without storing it.

    With the row :math:`h_i` of ``input``, :math:`W` = ``linear_weight``, :math:`b` =
    ``linear_bias``, :math:`y_i` = ``target``, :math:`w` = ``weight``, :math:`s` =
    ``label_smoothing``, :math:`\zeta` = ``z_loss``, :math:`\tau` = ``token_weight``, :math:`c` =
    ``softcap`` and :math:`V` classes:

    .. math::

        z_i &= W h_i + b, \quad\text{or } c \tanh((W h_i + b) / c), \qquad
        \mathrm{lse}_i = \log \sum_v e^{z_{iv}} \\
        \ell_i &= (1 - s)\, w_{y_i} (\mathrm{lse}_i - z_{i y_i})
            + \frac{s}{V} \sum_v w_v (\mathrm{lse}_i - z_{iv}) \\
        L_i &= \tau_i (\ell_i + \zeta\, \mathrm{lse}_i^2)

    ``"mean"`` is :math:`\sum_i L_i / \sum_i \tau_i w_{y_i}` over the kept positions, those with
    :math:`y_i \ne` ``ignore_index``. Without ``softcap``, ``z_loss``, ``token_weight`` and
    ``shift`` this is ``F.cross_entropy`` of the logits. Products accumulate in float32 or better,
    everything after them is computed in float32 (float64 for float64). Deterministic.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Class indices, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        weight: Class weights, shape ``(V)``, any floating dtype; a constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Targets of this value count neither in the loss nor in its mean.
        label_smoothing: The part of the target that is spread evenly over the classes, 0 to 1.
        softcap: Bound of the logits, above 0.
        z_loss: Coefficient of the squared log-sum-exp, at least 0. Class weights do not scale it.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant. Not read at ignored positions.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        gradient_filter: None is exact. With :math:`\varphi` in (0, 1), the backward pass may leave
            out gradients of logits whose absolute values add up, in each position, to at most
            :math:`\varphi` times the coefficients of its probabilities, :math:`|\tau_i| ((1 - s)
            w_{y_i} + \tfrac{s}{V} \sum_v w_v + 2 \zeta |\mathrm{lse}_i|)`; never that of the
            target. ``"triton"`` does so by tiles of logits, ``"tiled"`` on the CPU, where it is the
            default then, by classes; ``"reference"`` leaves nothing out.
        implementation: ``"triton"`` (CUDA) and ``"tiled"`` compute tiles of logits twice;
            ``"chunked"`` computes chunks of tokens once, and the gradients of a mean or sum in the
            forward pass; ``"reference"`` stores the logits. None picks by device, and on the CPU
            ``"chunked"`` where its memory is small beside the gradients.
        vocab_parallel: The classes that ``linear_weight`` and ``linear_bias`` hold of a head spread
            over processes; ``weight`` and ``target`` are those of the whole head, ``input`` is the
            same on all processes, and each gets the whole loss and gradient of ``input``. A
            ``linear_weight`` that is a ``DTensor`` says this itself: sharded on dimension 0 over
            one dimension of its mesh, with an ``input`` that is a ``DTensor`` too, replicated, or
            sharded over tokens on another one. Under FSDP2, call this where the weight is gathered,
            such as in the root's forward.

    Returns:
        A scalar, or for ``"none"`` the shape of the shifted target with zeros at ignored
        positions, placed as a sharded ``input`` is; float32 for half-precision input, otherwise of
        its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or ``weight`` or
            ``token_weight`` requires a gradient.
        TypeError: ``target`` is not int64, the floating dtypes differ outside autocast, or
            ``linear_weight`` is a ``DTensor`` and ``input`` is none.
        IndexError: A kept target lies outside ``[0, V)``, on the CPU. Where reading it would
            synchronize (CUDA, ``torch.compile``, ``vmap``) its loss and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_cross_entropy
        >>> hidden = torch.randn(4, 8, requires_grad=True)
        >>> head = torch.randn(100, 8, requires_grad=True)
        >>> target = torch.tensor([3, 99, -100, 0])
        >>> loss = linear_cross_entropy(hidden, head, target, z_loss=1e-4)
        >>> loss.backward()
        >>> hidden.grad[2].abs().sum()
        tensor(0.)

    Deviations:
        Nothing of the gradient is left out unless ``gradient_filter`` asks for it, and then within
        a bound: the published kernel skips tiles by ``softmax - onehot`` alone, which loses most of
        the gradient of a z-loss. Nothing is accumulated with atomics. A head that is spread over
        processes has no second derivative. ``torch.nn.functional.linear_cross_entropy`` returns
        half precision for half input and takes ``options``, probability targets and K-dimensional
        weights, which are refused here.

    Reference:
        Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp Krähenbühl. Cut
        Your Losses in Large-Vocabulary Language Models. 2024. arXiv:2411.09009. The z-loss is that
        of Mitchell Wortsman et al., Small-scale proxies for large-scale Transformer training
        instabilities. 2023. arXiv:2309.14322.
    """
    _check_options(
        reduction, ignore_index, label_smoothing, softcap, z_loss, shift, gradient_filter
    )
    positions = of_head(
        _NAME,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        weight=weight,
        token_weight=token_weight,
        softcap=softcap,
        shift=shift,
        gradient_filter=gradient_filter,
        vocab_parallel=vocab_parallel,
        is_sum=reduction != "none",
    )
    return cross_entropy(positions, reduction, label_smoothing, z_loss)


@_PAPER
class LinearCrossEntropy(OptionsModule):
    """:func:`linear_cross_entropy` for a head that another module owns, such as a tied embedding.

    Example:
        >>> import torch
        >>> from tilework.losses import LinearCrossEntropy
        >>> embedding = torch.nn.Embedding(100, 8)
        >>> criterion = LinearCrossEntropy(shift=1)
        >>> tokens = torch.randint(100, (2, 5))
        >>> criterion(embedding(tokens), embedding.weight, tokens).shape
        torch.Size([])
    """

    weight: Tensor | None = buffer(default=None, kw_only=False)
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0
    shift: int = 0
    gradient_filter: float | None = None
    implementation: str | None = None
    vocab_parallel: VocabShard | None = None

    def _check(self) -> None:
        _check_options(
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            self.softcap,
            self.z_loss,
            self.shift,
            self.gradient_filter,
        )
        _implementations.check_name(_NAME, IMPLEMENTATIONS, self.implementation)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; shapes as in :func:`linear_cross_entropy`."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            **self.options(),
        )


@_PAPER
class LinearCrossEntropyLoss(LinearCrossEntropy):
    """A linear head, and its loss, in place of ``torch.nn.LinearCrossEntropyLoss``.

    The ``state_dict`` and the initialization are those of torch's layer, the other options those of
    :func:`linear_cross_entropy`.

    Args:
        in_features: Width ``D`` of the hidden states.
        num_classes: Number ``V`` of classes.
        bias: Whether the head has a bias.
        device: Device of the head's parameters.
        dtype: Their dtype.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> from tilework.losses import LinearCrossEntropyLoss
        >>> criterion = LinearCrossEntropyLoss(8, 100)
        >>> criterion(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])).shape
        torch.Size([])

    Deviations:
        torch's ``out_features`` (K-dimensional losses) and ``options`` are not offered. Its
        ``ignore_index`` of None, for classes -100, is -100 here.

    Reference:
        As :func:`linear_cross_entropy`.
    """

    in_features: InitVar[int] = field(kw_only=False)
    num_classes: InitVar[int] = field(kw_only=False)
    bias: InitVar[bool] = False
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None
    weight: Tensor | None = buffer(default=None)
    vocab_parallel: None = field(default=None, init=False)

    def __post_init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__post_init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss; shapes as in :func:`linear_cross_entropy`."""
        return super().forward(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            token_weight=token_weight,
        )


def _check_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    shift: int,
    gradient_filter: float | None,
) -> None:
    head.check_filter(_NAME, gradient_filter)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
    _checks.integer(_NAME, "ignore_index", ignore_index)
    _checks.fraction(_NAME, "label_smoothing", label_smoothing)
    if softcap is not None:
        _checks.positive(_NAME, "softcap", softcap)
    _checks.at_least(_NAME, "z_loss", z_loss, 0)
    _checks.count(_NAME, "shift", shift, 0)
