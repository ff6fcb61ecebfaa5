"""Attention whose logits are scaled cosines of query and key."""

import math
from contextlib import nullcontext
from dataclasses import InitVar, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilework import _checks, _operators
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.attention._tensors import check_tensors
from tilework.catalog import implements

__all__ = ["QKNormAttention", "qk_norm_attention"]

_NAME = "qk_norm_attention"
_PAPER = implements("Query-Key Normalization for Transformers", year=2020, arxiv="2010.04245")


@_PAPER
def qk_norm_attention(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    value: Float[Tensor, "batch kv_heads keys values"],
    scale: float | Float[Tensor, ""] | Float[Tensor, " heads"],
    *,
    attn_mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    eps: float = 1e-12,
) -> Float[Tensor, "batch heads queries values"]:
    r"""Attention by the cosine of query and key, times a learned scale.

    With the rows :math:`q_i`, :math:`k_j`, :math:`v_j` of a head's ``query``, ``key`` and
    ``value``, its :math:`g` = ``scale`` and the bias or mask :math:`m` = ``attn_mask``:

    .. math::

        \hat q_i &= \frac{q_i}{\max(\lVert q_i \rVert_2, \epsilon)}, \qquad
        \hat k_j = \frac{k_j}{\max(\lVert k_j \rVert_2, \epsilon)} \\
        o_i &= \sum_j \mathrm{softmax}_j(g\, \hat q_i^\top \hat k_j + m_{ij})\, v_j

    There is no :math:`1 / \sqrt{E}`, so that without a bias no logit exceeds :math:`|g|`. Vectors
    are normalized and scaled in float32 (float64 for float64) and rounded once to ``query``'s
    dtype; ``F.scaled_dot_product_attention`` does the rest. A query that sees no key gives zeros
    and gets no gradient.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        value: Shape ``(B, Hkv, Lk, Ev)``, of ``query``'s dtype.
        scale: The scale :math:`g` of any sign: a number, or a tensor of shape ``()`` or ``(Hq)``,
            which gets a gradient.
        attn_mask: Broadcastable to ``(B, Hq, Lq, Lk)``, with at least two dimensions: bool, True
            where a key is visible, or a bias of ``query``'s dtype or float32.
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0. Not
            together with ``attn_mask``.
        enable_gqa: Query head ``h`` reads key and value head ``h // (Hq // Hkv)``.
        eps: Lower bound of the norms, at least 0. Zero vectors stay zero.

    Returns:
        Shape ``(B, Hq, Lq, Ev)``, of ``query``'s dtype; under autocast, of autocast's.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of one of the dtypes above; under autocast they may differ.

    Example:
        >>> import torch
        >>> from tilework.attention import qk_norm_attention
        >>> query = key = value = torch.randn(2, 4, 10, 8)
        >>> qk_norm_attention(query, key, value, torch.full((4,), 6.5), is_causal=True).shape
        torch.Size([2, 4, 10, 8])

    Deviations:
        The scale may differ between heads; the paper has one. Second derivatives need torch's
        composed attention, ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``: its fused kernels
        have none and raise. Forward mode takes it by itself.

    Reference:
        Alex Henry, Prudhvi Raj Dachapally, Shubham Pawar, Yuxuan Chen. Query-Key Normalization for
        Transformers. 2020. arXiv:2010.04245.
    """
    _checks.at_least(_NAME, "eps", eps, 0)
    check_tensors(_NAME, query, key, value, enable_gqa)
    _check_scale(query, scale)
    _check_mask(query, key, attn_mask, is_causal)

    factor = scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    query = _normalize(query, eps, factor)
    key = _normalize(key, eps, 1.0)

    blind = None
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        blind = (~attn_mask if is_bool else attn_mask == -torch.inf).all(-1, keepdim=True)
        # Blind queries see everything and are cleared after that, so that nothing divides by 0.
        attn_mask = attn_mask.masked_fill(blind, is_bool)
        if query.dtype == torch.float64 and not is_bool:
            attn_mask = attn_mask.double()  # the CPU's kernel would misread float32
    # The fused kernels have no forward mode.
    with sdpa_kernel(SDPBackend.MATH) if _operators.only_reference() else nullcontext():
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=1.0,  # theirs must be a positive number
            enable_gqa=enable_gqa,
        )
    if query.device.type == "cpu":
        # The CPU's kernel may take a row of nan for one that sees nothing.
        output = output.masked_fill(query.isnan().any(-1, keepdim=True), torch.nan)
    return output if blind is None else output.masked_fill(blind, 0)


@_PAPER
class QKNormAttention(OptionsModule):
    """:func:`qk_norm_attention` with its learned scale.

    Args:
        seq_length: Length :math:`L` that sets the initial scale :math:`\\log_2(L^2 - L)`, at least
            2. The paper takes the 97.5th percentile of the training lengths.
        num_heads: Number of query heads, for a scale for each; None for one scale.
        eps: Lower bound of the norms.
        device: Device of the scale.
        dtype: Its dtype.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> from tilework.attention import QKNormAttention
        >>> attention = QKNormAttention(1024)
        >>> attention.scale
        Parameter containing:
        tensor(19.9986, requires_grad=True)
        >>> query = key = value = torch.randn(2, 4, 10, 8)
        >>> attention(query, key, value, is_causal=True).shape
        torch.Size([2, 4, 10, 8])

    Reference:
        As :func:`qk_norm_attention`.
    """

    seq_length: int = field(kw_only=False)
    num_heads: int | None = None
    eps: float = 1e-12
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None

    def __post_init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__post_init__()
        shape = () if self.num_heads is None else (self.num_heads,)
        self.scale = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def _check(self) -> None:
        _checks.integer(_NAME, "seq_length", self.seq_length)
        _checks.at_least(_NAME, "seq_length", self.seq_length, 2)
        if self.num_heads is not None:
            _checks.integer(_NAME, "num_heads", self.num_heads)
            _checks.at_least(_NAME, "num_heads", self.num_heads, 1)
        _checks.at_least(_NAME, "eps", self.eps, 0)

    def reset_parameters(self) -> None:
        """Set the scale to its initial value."""
        nn.init.constant_(self.scale, math.log2(self.seq_length**2 - self.seq_length))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return the attention's output; shapes as in :func:`qk_norm_attention`."""
        return qk_norm_attention(
            query,
            key,
            value,
            self.scale,
            attn_mask=attn_mask,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            eps=self.eps,
        )


def _normalize(input: Tensor, eps: float, factor: float | Tensor) -> Tensor:
    """Unit vectors times a factor, rounded once. Unlike F.normalize's, zeros have derivatives."""
    dtype = computation_dtype(input.dtype)
    vector = input.to(dtype)
    square = vector.square().sum(-1, keepdim=True)
    norm = square.clamp_min(max(eps * eps, torch.finfo(dtype).tiny)).sqrt()
    if isinstance(factor, Tensor):
        factor = factor.to(dtype)
    return (vector / norm * factor).to(input.dtype)


def _check_scale(query: Tensor, scale: float | Tensor) -> None:
    heads = query.shape[1]
    if isinstance(scale, Tensor):
        _checks.floating(_NAME, "scale", scale)
        if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != heads):
            expected = f"a number or of shape () or ({heads},)"
            raise _checks.bad_value(_NAME, "scale", expected, scale)
        _checks.same_device(_NAME, query=query, scale=scale)
    else:
        _checks.number(_NAME, "scale", scale)


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(f"{_NAME}: attn_mask must be None with is_causal=True, got both")
    accepted = (torch.bool, torch.float32, query.dtype)
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in accepted:
        expected = "bool, float32 or of query's dtype"
        raise _checks.bad_type(_NAME, "attn_mask", expected, attn_mask)
    shape = (*query.shape[:3], key.shape[2])
    fits = 2 <= attn_mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(attn_mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        expected = f"broadcastable to {shape}, with at least 2 dimensions"
        raise _checks.bad_value(_NAME, "attn_mask", expected, attn_mask)
    _checks.same_device(_NAME, query=query, attn_mask=attn_mask)
