"""Cross-entropy of a linear layer's output without the logits in memory."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tilework import _checks, _implementations
from tilework._implementations import TABLES
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses._classes import class_index, head, sharding
from tilework.losses._classes.sharding import VocabShard
from tilework.losses.linear_cross_entropy import operators, schedule

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyLoss", "VocabShard", "linear_cross_entropy"]

_NAME = "linear_cross_entropy"
_triton, _tiled, _chunked, _reference = head.IMPLEMENTATIONS
IMPLEMENTATIONS = TABLES["losses.linear_cross_entropy"] = (
    _triton,
    replace(
        _chunked,
        memory="gradients and the logits of 512 tokens (CPU) or 4096 (CUDA)",
        backward="of sums and means, in the forward pass; others, and float16, as tiled or triton",
        prefers=schedule.prefers_chunks,
        when=schedule.PREFERRED,
    ),
    _tiled,
    _reference,
)
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
        input: Hidden states, shape ``(N, D)`` or ``(B, T, D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Class indices, int64 of shape ``(N)`` or ``(B, T)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        weight: Class weights, shape ``(V)``, any floating dtype; a constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Targets of this value count neither in the loss nor in its mean.
        label_smoothing: The part of the target that is spread evenly over the classes, 0 to 1.
        softcap: Bound of the logits, above 0.
        z_loss: Coefficient of the squared log-sum-exp, at least 0. Class weights do not scale it.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant. Not read at ignored positions.
        shift: With ``k`` above 0, position ``t`` predicts ``target[:, t + k]``; needs 3-D input.
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
            one dimension of its mesh, with ``input`` replicated, or sharded over tokens on another
            one.

    Returns:
        A scalar, or for ``"none"`` the shape of the shifted target with zeros at ignored
        positions; float32 for half-precision input, otherwise of its dtype. ``"mean"`` over
        nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or ``weight`` or
            ``token_weight`` requires a gradient.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
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
        half precision for half input and takes ``options``, unbatched input, probability targets
        and K-dimensional weights, which are refused here.

    Reference:
        Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp Krähenbühl. Cut
        Your Losses in Large-Vocabulary Language Models. 2024. arXiv:2411.09009. The z-loss is that
        of Mitchell Wortsman et al., Small-scale proxies for large-scale Transformer training
        instabilities. 2023. arXiv:2309.14322.
    """
    _check_options(
        reduction, ignore_index, label_smoothing, softcap, z_loss, shift, gradient_filter
    )
    layout, (input, linear_weight, linear_bias, target, token_weight) = sharding.localize(
        _NAME,
        vocab_parallel,
        input,
        linear_weight,
        linear_bias,
        target=target,
        token_weight=token_weight,
    )
    input, linear_weight, linear_bias = head.cast_under_autocast(input, linear_weight, linear_bias)
    head.check(_NAME, input, linear_weight, linear_bias)
    class_index.check_target(_NAME, "target", target, tuple(input.shape[:-1]))
    classes = layout.classes(linear_weight)
    _check_constants(input, classes, weight, token_weight)
    if shift and (input.dim() != 3 or shift >= input.shape[1] or layout.splits_sequences):
        raise ValueError(
            f"{_NAME}: shift above 0 must come with input of shape (B, T, D), whole sequences, and "
            f"be below T, got shift={shift} and input {_checks.describe(input)}"
        )
    _checks.same_device(
        _NAME,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
    )
    is_sum = reduction != "none" and gradient_filter is None and layout == sharding.Layout()
    chosen = _implementations.choose(
        _NAME,
        IMPLEMENTATIONS,
        implementation,
        input,
        linear_weight=linear_weight,
        linear_bias=linear_bias,
        is_sum=is_sum,
    )

    shape = (*target.shape[:-1], target.shape[-1] - shift)
    if shift:
        # Positions without a target are ignored, so that the input needs no copy.
        target = F.pad(target[:, shift:], (0, shift), value=ignore_index)
        if token_weight is not None:
            token_weight = F.pad(token_weight[:, shift:], (0, shift))
    padded_shape = target.shape
    input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    kept = target != ignore_index
    inside = class_index.inside(_NAME, target, ignore_index, classes)

    dtype = computation_dtype(input.dtype)
    # Outside the classes, a kept target makes its own position nan, in value and gradient.
    position_weight = kept.to(dtype).where(inside | ~kept, torch.nan)
    if token_weight is not None:
        token_weight = token_weight.reshape(-1)
        kept = kept & (token_weight != 0)
        position_weight = (position_weight * token_weight).where(kept, 0).to(dtype)
    class_weight = None if weight is None else weight.to(dtype)
    target_weight = position_weight
    if class_weight is not None:
        target_weight = (position_weight * class_weight[target.where(inside, 0)]).where(kept, 0)
    spread_weight = None
    if label_smoothing:
        spread_weight = linear_weight.new_ones(classes, dtype=dtype)
        spread_weight = spread_weight if class_weight is None else class_weight
    scales = (
        (1 - label_smoothing) * target_weight,
        label_smoothing / classes * position_weight if label_smoothing else None,
        z_loss * position_weight if z_loss else None,
    )
    tensors = (
        input,
        linear_weight,
        target.where(kept, ignore_index),
        linear_bias,
        spread_weight,
    )

    heads = input, linear_weight, linear_bias
    if chosen == "chunked" and is_sum and operators.takes_gradients_early(*heads):
        if reduction == "sum":
            return operators.summed_loss(*tensors, *scales, softcap, ignore_index)
        total_weight = target_weight.sum()
        counted = total_weight != 0
        share = 1 / total_weight.where(counted, 1)
        shares = (None if scale is None else scale * share for scale in scales)
        loss = operators.summed_loss(*tensors, *shares, softcap, ignore_index)
        return loss.where(counted, torch.nan)

    statistics = sharding.logit_stats(
        layout.shard, *tensors, softcap, 1.0, ignore_index, False, gradient_filter, chosen
    )
    losses = operators.position_losses(statistics, spread_weight, *scales)
    if reduction == "none":
        return layout.of_tokens(losses.reshape(padded_shape)[..., : shape[-1]])
    total = layout.add_up(losses.sum())
    return total if reduction == "sum" else total / layout.add_up(target_weight.sum())


@_PAPER
class LinearCrossEntropy(nn.Module):
    """:func:`linear_cross_entropy` for a head that another module owns, such as a tied embedding.

    Args:
        weight: Class weights, shape ``(V)``; a buffer, absent from the ``state_dict`` when None.
        reduction: As in the function, like every option below.
        ignore_index: Targets of this value do not count.
        label_smoothing: The part of the target that is spread evenly over the classes.
        softcap: Bound of the logits.
        z_loss: Coefficient of the squared log-sum-exp.
        shift: Position ``t`` predicts ``target[:, t + shift]``.
        gradient_filter: What the gradients of logits may lose; None for nothing.
        implementation: ``"triton"``, ``"tiled"``, ``"chunked"``, ``"reference"``, or None for the
            best one.
        vocab_parallel: The classes that the weight given to ``forward`` holds.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> from tilework.losses import LinearCrossEntropy
        >>> embedding = torch.nn.Embedding(100, 8)
        >>> criterion = LinearCrossEntropy(shift=1)
        >>> tokens = torch.randint(100, (2, 5))
        >>> criterion(embedding(tokens), embedding.weight, tokens).shape
        torch.Size([])

    Reference:
        As :func:`linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        shift: int = 0,
        gradient_filter: float | None = None,
        implementation: str | None = None,
        vocab_parallel: VocabShard | None = None,
    ) -> None:
        super().__init__()
        _check_options(
            reduction, ignore_index, label_smoothing, softcap, z_loss, shift, gradient_filter
        )
        _implementations.check_name(_NAME, IMPLEMENTATIONS, implementation)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.z_loss = z_loss
        self.shift = shift
        self.gradient_filter = gradient_filter
        self.implementation = implementation
        self.vocab_parallel = vocab_parallel

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
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            token_weight=token_weight,
            shift=self.shift,
            gradient_filter=self.gradient_filter,
            implementation=self.implementation,
            vocab_parallel=self.vocab_parallel,
        )

    def extra_repr(self) -> str:
        """Return the options that are not the defaults of the function."""
        return ", ".join(
            f"{name}={value!r}"
            for name in (
                "reduction",
                "ignore_index",
                "label_smoothing",
                "softcap",
                "z_loss",
                "shift",
                "gradient_filter",
                "implementation",
            )
            if (value := getattr(self, name)) != _DEFAULTS[name]
        )


@_PAPER
class LinearCrossEntropyLoss(LinearCrossEntropy):
    """A linear head and its :func:`linear_cross_entropy`, in place of torch's layer of this name.

    The ``state_dict`` and the initialization are those of ``torch.nn.LinearCrossEntropyLoss``.

    Args:
        in_features: Width ``D`` of the hidden states.
        num_classes: Number ``V`` of classes.
        bias: Whether the head has a bias.
        device: Device of the head's parameters.
        dtype: Their dtype.
        reduction: As in the function, like every option below.
        weight: Class weights, shape ``(V)``; a buffer, absent from the ``state_dict`` when None.
        ignore_index: Targets of this value do not count.
        label_smoothing: The part of the target that is spread evenly over the classes.
        softcap: Bound of the logits.
        z_loss: Coefficient of the squared log-sum-exp.
        shift: Position ``t`` predicts ``target[:, t + shift]``.
        gradient_filter: What the gradients of logits may lose; None for nothing.
        implementation: ``"triton"``, ``"tiled"``, ``"chunked"``, ``"reference"``, or None for the
            best one.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> from tilework.losses import LinearCrossEntropyLoss
        >>> criterion = LinearCrossEntropyLoss(8, 100)
        >>> criterion(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])).shape
        torch.Size([])

    Deviations:
        torch's ``out_features`` (K-dimensional losses) and ``options`` are not offered.

    Reference:
        As :func:`linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        shift: int = 0,
        gradient_filter: float | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            shift=shift,
            gradient_filter=gradient_filter,
            implementation=implementation,
        )
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


_DEFAULTS = {
    "reduction": "mean",
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "softcap": None,
    "z_loss": 0.0,
    "shift": 0,
    "gradient_filter": None,
    "implementation": None,
}


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


def _check_constants(
    input: Tensor,
    classes: int,
    weight: Tensor | None,
    token_weight: Tensor | None,
) -> None:
    for name, constant, shape in (
        ("weight", weight, (classes,)),
        ("token_weight", token_weight, input.shape[:-1]),
    ):
        if constant is not None:
            _checks.constant(_NAME, name, constant, shape)
