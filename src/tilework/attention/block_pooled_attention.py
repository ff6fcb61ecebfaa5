"""The map of attention, pooled to a number for each block."""

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework.attention import _attention_map
from tilework.attention._attention_map import operators
from tilework.attention._attention_map.common import Blocks
from tilework.attention.block_layout.checks import BlockSize, block_pair
from tilework.catalog import implements

__all__ = ["block_pooled_attention"]

_NAME = "block_pooled_attention"
_TABLE = TABLES["attention.block_pooled_attention"] = _attention_map.CONSTANT


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def block_pooled_attention(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    lse: Float[Tensor, "batch heads queries"],
    *,
    block_size: BlockSize = (64, 64),
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    pool: str = "max",
    normalize: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "batch heads rows columns"]:
    r"""The map of attention under a log-sum-exp, pooled over blocks of queries and keys.

    With the rows :math:`q_i`, :math:`k_j` of a head, :math:`\alpha` = ``scale`` and
    ``block_size`` :math:`(b_q, b_k)`, block :math:`(I, J)` has the queries :math:`i \in [I b_q,
    (I + 1) b_q)` and the keys :math:`j \in [J b_k, (J + 1) b_k)` that exist:

    .. math::

        p_{ij} = \begin{cases}
            e^{\alpha q_i^\top k_j - \mathrm{lse}_i} & \text{if query } i \text{ sees key } j
                \text{ and } \mathrm{lse}_i > -\infty \\
            0 & \text{otherwise}
        \end{cases} \qquad
        P_{IJ} = \max_{ij} p_{ij}, \quad \sum_{ij} p_{ij} \quad\text{or}\quad
        \frac{1}{|I||J|} \sum_{ij} p_{ij}

    Pairs that causality hides count in the mean's denominator, positions past the ends do not.
    ``normalize`` divides each row of blocks by its sum; a row of zeros stays zero. With ``"max"``
    and the exact log-sum-exp that is the target of :class:`SeerGate`. Except with ``"reference"``,
    the scores are computed a tile at a time and not stored. Everything is computed in float32
    (float64 for float64). The result is a constant, without gradients. Deterministic.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        lse: A log-sum-exp for each query, that of :func:`attention_lse`, of block-sparse attention
            or of another library; shape ``(B, Hq, Lq)``, float32 (float64 for float64).
        block_size: Queries and keys of a block; an int for both.
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key head ``h // (Hq // Hkv)``.
        pool: ``"max"``, ``"mean"`` or ``"sum"``.
        normalize: Whether to divide rows of blocks by their sums.
        implementation: ``"triton"`` (CUDA; at most 256 features), ``"tiled"`` or ``"reference"``
            (stores all scores). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, nq, nk)`` with ``nq = ceil(Lq / bq)``, ``nk = ceil(Lk / bk)``, float32
        (float64 for float64).

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above.

    Example:
        >>> import torch
        >>> from tilework.attention import attention_lse, block_pooled_attention
        >>> query, key = torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
        >>> lse = attention_lse(query, key, is_causal=True)
        >>> block_pooled_attention(query, key, lse, block_size=2, is_causal=True)
        tensor([[[[1.0000, 0.0000],
                  [0.3333, 0.3333]]]])

    Deviations:
        The released kernel rounds the running maxima of rows to bfloat16 before it rescales them,
        which costs percents, needs lengths that are multiples of the block, always takes maxima and
        always normalizes.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    height, width = block_pair(_NAME, block_size)
    _checks.one_of(_NAME, "pool", pool, ("max", "mean", "sum"))
    query, key, scale, chosen = _attention_map.prepare(
        _NAME, _TABLE, query, key, lse, scale, enable_gqa, implementation
    )
    blocks = Blocks(
        query.detach(),
        key.detach(),
        lse.detach(),
        height,
        width,
        pool == "max",
        is_causal,
        scale,
        chosen,
    )
    pooled = operators.block_pooled_attention(blocks).pooled
    if pool == "mean":
        pooled = pooled / _sizes(query, height)[:, None] / _sizes(key, width)
    if normalize:
        total = pooled.sum(-1, keepdim=True)
        pooled = pooled / total.masked_fill(total == 0, 1)
    return pooled


def _sizes(tensor: Tensor, block: int) -> Tensor:
    """How many positions each block has."""
    length = tensor.shape[2]
    return (length - torch.arange(0, length, block, device=tensor.device)).clamp_max(block)
