"""Divergence of the distributions of two linear heads without the logits of either in memory."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import TABLES, Implementation
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import head
from tilework.losses._classes.sharding import VocabShard
from tilework.losses.linear_kl_div import sharding
from tilework.losses.linear_kl_div.common import Heads

__all__ = ["LinearKLDivLoss", "linear_kl_div"]

_NAME = "linear_kl_div"
_DIVERGENCES = ("forward", "reverse", "jsd")

IMPLEMENTATIONS = TABLES["losses.linear_kl_div"] = (
    Implementation.triton("gradients and 64 MiB of logit gradients"),
    Implementation("tiled", "gradients and up to nine tiles of 2048 x 1024 logits"),
    Implementation.reference("the logits of both heads, several times in training"),
)

_PAPER = implements(
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    year=2023,
    arxiv="2306.13649",
)


@_PAPER
def linear_kl_div(
    student_input: Float[Tensor, "*tokens student_features"],
    student_weight: Float[Tensor, "classes student_features"],
    teacher_input: Float[Tensor, "*tokens teacher_features"],
    teacher_weight: Float[Tensor, "classes teacher_features"],
    *,
    student_bias: Float[Tensor, " classes"] | None = None,
    teacher_bias: Float[Tensor, " classes"] | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Bool[Tensor, "*tokens"] | None = None,
    token_weight: Float[Tensor, "*tokens"] | None = None,
    reduction: str = "mean",
    gradient_filter: float | None = None,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    r"""Divergence between a student's and a teacher's linear head, without storing their logits.

    With the rows :math:`h_i` of ``student_input`` and :math:`g_i` of ``teacher_input``, :math:`W` =
    ``student_weight``, :math:`U` = ``teacher_weight``, :math:`b` = ``student_bias``, :math:`a` =
    ``teacher_bias``, :math:`T` = ``temperature``, :math:`\beta` = ``beta`` and :math:`\tau` =
    ``token_weight``:

    .. math::

        p_i &= \mathrm{softmax}((W h_i + b) / T), \qquad
        q_i = \mathrm{softmax}((U g_i + a) / T), \qquad m_i = \beta q_i + (1 - \beta) p_i \\
        \mathrm{KL}(q \| p) &= \sum_v q_v (\log q_v - \log p_v) \\
        D_i &= \mathrm{KL}(q_i \| p_i) \text{ ("forward")}, \quad
            \mathrm{KL}(p_i \| q_i) \text{ ("reverse")}, \quad
            \beta\, \mathrm{KL}(q_i \| m_i) + (1 - \beta)\, \mathrm{KL}(p_i \| m_i)
            \text{ ("jsd")} \\
        L_i &= \tau_i D_i

    A softcap :math:`c` makes :math:`c \tanh(z / c)` of a head's output :math:`z` before the
    temperature divides it. Classes of probability 0 contribute 0. ``"mean"`` is :math:`\sum_i L_i /
    \sum_i \tau_i` over the positions that count. The gradient shrinks with the square of the
    temperature, which distillation therefore multiplies in:
    ``temperature**2 * linear_kl_div(..., temperature=temperature)``.

    The teacher is a constant: no gradient flows to its tensors, also where they require one.
    Products accumulate in float32 or better, everything after them is computed in float32 (float64
    for a float64 student). Deterministic.

    Args:
        student_input: Hidden states, shape ``(..., D)``, any strides.
        student_weight: The student's head, shape ``(V, D)``, of ``student_input``'s dtype.
        teacher_input: Hidden states, shape ``(..., E)``, whose width and floating
            dtype need not be the student's.
        teacher_weight: The teacher's head, shape ``(V, E)``, of ``teacher_input``'s dtype.
        student_bias: Bias of the student's head, shape ``(V)``, of ``student_input``'s dtype.
        teacher_bias: Bias of the teacher's head, shape ``(V)``, of ``teacher_input``'s dtype.
        temperature: What the logits of both heads are divided by, above 0.
        divergence: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: The teacher's share of the mixture, above 0 and below 1; for ``"jsd"`` only.
        student_softcap: Bound of the student's logits, above 0.
        teacher_softcap: Bound of the teacher's logits, above 0.
        mask: Which positions count, bool of shape ``(...)``; None for all. The hidden
            states of others are not read.
        token_weight: A weight for each position, of the same shape, any floating dtype; a
            constant. Not read where ``mask`` is False.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        gradient_filter: What the backward pass may leave out, None or in (0, 1), as in
            :func:`linear_cross_entropy`; nothing is left out so far.
        implementation: ``"triton"`` (CUDA) and ``"tiled"`` compute tiles of logits, twice in
            training and once more for ``"jsd"``; ``"reference"`` stores the logits. None picks by
            device.
        vocab_parallel: The classes that the weights and biases hold of heads spread over processes,
            the same ones of both; the hidden states are the same on all processes, and each gets
            the whole loss and gradient of ``student_input``. Weights that are ``DTensor`` say this
            themselves: sharded on dimension 0 over one dimension of their mesh, with hidden states
            that are ``DTensor`` too, replicated, or sharded over tokens on another one. Under FSDP2
            as in :func:`linear_cross_entropy`. Communication is one gather of six
            numbers for each position and for ``"jsd"`` one of two, and in the backward pass one sum
            of ``student_input``'s gradient. ``"reference"`` takes no such heads.

    Returns:
        A scalar, or for ``"none"`` the shape of the positions with zeros where none is counted;
        float32 for a student in half precision, otherwise of its dtype. ``"mean"`` over nothing is
        nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, the heads differ in
            their positions or classes, or ``token_weight`` requires a gradient.
        TypeError: ``mask`` is not bool, the floating dtypes of a head differ outside autocast, or
            its weight is a ``DTensor`` and its hidden states are none.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_kl_div
        >>> hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> teacher_hidden, teacher_head = torch.randn(4, 16), torch.randn(100, 16)
        >>> mask = torch.tensor([True, True, False, True])
        >>> loss = linear_kl_div(
        ...     hidden, head, teacher_hidden, teacher_head, temperature=2.0, mask=mask
        ... )
        >>> (2.0**2 * loss).backward()
        >>> hidden.grad[2].abs().sum()
        tensor(0.)

    Deviations:
        ``beta`` of 0 and 1 is refused: the divergence is 0 there by its formula, and released code
        takes them for the forward and the reverse one, which are values of ``divergence`` here. The
        divergence is computed over the whole vocabulary; sampling and the mixing of data stay with
        the caller. Heads that are spread over processes have no second derivative.

    Reference:
        Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu
        Geist, Olivier Bachem. On-Policy Distillation of Language Models: Learning from
        Self-Generated Mistakes. 2023. arXiv:2306.13649. The square of the temperature is that of
        Geoffrey Hinton, Oriol Vinyals, Jeff Dean, Distilling the Knowledge in a Neural Network.
        2015. arXiv:1503.02531.
    """
    _check_options(temperature, divergence, beta, student_softcap, teacher_softcap, reduction)
    head.check_filter(_NAME, gradient_filter)
    layout, student, teacher, mask, token_weight = sharding.localize(
        _NAME,
        vocab_parallel,
        (student_input, student_weight, student_bias),
        (teacher_input, teacher_weight, teacher_bias),
        mask,
        token_weight,
    )
    student, teacher = head.cast_under_autocast(*student), head.cast_under_autocast(*teacher)
    _check_tensors(student, teacher, mask, token_weight)
    student_input, student_weight, student_bias = student
    teacher_input, teacher_weight, teacher_bias = teacher
    # The dtypes of the two may differ.
    chosen = _implementations.choose(
        _NAME, IMPLEMENTATIONS, implementation, teacher_input, student_input
    )
    if chosen == "reference" and layout.shard is not None:
        raise ValueError(
            f"{_NAME}: implementation='reference' cannot be used: it takes whole heads, not "
            "classes spread over processes"
        )

    positions = student_input.shape[:-1]
    student_input = student_input.reshape(-1, student_input.shape[-1])
    teacher_input = teacher_input.reshape(-1, teacher_input.shape[-1])
    counted = (
        student_input.new_ones(student_input.shape[0], dtype=torch.bool)
        if mask is None
        else mask.reshape(-1)
    )
    dtype = computation_dtype(student_input.dtype)
    position_weight = counted.to(dtype)
    if token_weight is not None:
        token_weight = token_weight.reshape(-1)
        counted = counted & (token_weight != 0)
        position_weight = token_weight.where(counted, 0).to(dtype)

    heads = Heads(
        student_input,
        student_weight,
        student_bias,
        teacher_input.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        counted,
        student_softcap,
        teacher_softcap,
        temperature,
        divergence,
        beta,
        chosen,
    )
    losses = position_weight * sharding.divergences(layout.shard, heads)
    if reduction == "none":
        return layout.of_tokens(losses.reshape(positions))
    total = layout.add_up(losses.sum())
    return total if reduction == "sum" else total / layout.add_up(position_weight.sum())


@_PAPER
class LinearKLDivLoss(OptionsModule):
    """:func:`linear_kl_div` as a module; the heads belong to the student and the teacher.

    Example:
        >>> import torch
        >>> from tilework.losses import LinearKLDivLoss
        >>> student, teacher = torch.nn.Linear(8, 100), torch.nn.Linear(16, 100, bias=False)
        >>> criterion = LinearKLDivLoss(divergence="jsd", beta=0.1)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> criterion(
        ...     hidden, student.weight, teacher_hidden, teacher.weight, student_bias=student.bias
        ... ).shape
        torch.Size([])
    """

    temperature: float = 1.0
    divergence: str = "forward"
    beta: float = 0.5
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    reduction: str = "mean"
    gradient_filter: float | None = None
    implementation: str | None = None
    vocab_parallel: VocabShard | None = None

    def _check(self) -> None:
        _check_options(
            self.temperature,
            self.divergence,
            self.beta,
            self.student_softcap,
            self.teacher_softcap,
            self.reduction,
        )
        head.check_filter(_NAME, self.gradient_filter)
        _implementations.check_name(_NAME, IMPLEMENTATIONS, self.implementation)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; shapes as in :func:`linear_kl_div`."""
        return linear_kl_div(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=mask,
            token_weight=token_weight,
            **self.options(),
        )


def _check_options(
    temperature: float,
    divergence: str,
    beta: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    reduction: str,
) -> None:
    _checks.positive(_NAME, "temperature", temperature)
    _checks.one_of(_NAME, "divergence", divergence, _DIVERGENCES)
    _checks.open_fraction(_NAME, "beta", beta)
    for name, softcap in (("student", student_softcap), ("teacher", teacher_softcap)):
        if softcap is not None:
            _checks.positive(_NAME, f"{name}_softcap", softcap)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)


def _check_tensors(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    token_weight: Tensor | None,
) -> None:
    head.check(_NAME, *student, prefix="student_")
    head.check(_NAME, *teacher, prefix="teacher_")
    student_input, student_weight, student_bias = student
    teacher_input, teacher_weight, teacher_bias = teacher
    positions, features = student_input.shape[:-1], teacher_input.shape[-1]
    if teacher_input.shape[:-1] != positions:
        accepted = f"of shape {(*positions, features)}, with the positions of student_input"
        raise _checks.bad_value(_NAME, "teacher_input", accepted, teacher_input)
    if teacher_weight.shape[0] != student_weight.shape[0]:
        accepted = f"of shape {(student_weight.shape[0], features)}, with student_weight's classes"
        raise _checks.bad_value(_NAME, "teacher_weight", accepted, teacher_weight)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            accepted = f"bool of shape {tuple(positions)}"
            raise _checks.bad_type(_NAME, "mask", accepted, mask)
        _checks.shape(_NAME, "mask", mask, positions)
    if token_weight is not None:
        _checks.constant(_NAME, "token_weight", token_weight, positions)
    _checks.same_device(
        _NAME,
        student_input=student_input,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_input=teacher_input,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        mask=mask,
        token_weight=token_weight,
    )
