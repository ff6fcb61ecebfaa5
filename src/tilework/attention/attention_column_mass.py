"""How much attention each key gets."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework.attention import _attention_map
from tilework.attention._attention_map import operators
from tilework.attention._attention_map.common import Columns
from tilework.catalog import implements

__all__ = ["attention_column_mass"]

_NAME = "attention_column_mass"
_TABLE = TABLES["attention.attention_column_mass"] = _attention_map.CONSTANT


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def attention_column_mass(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    lse: Float[Tensor, "batch heads queries"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_window: int | None = None,
    reduce_groups: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "batch any_heads keys"]:
    r"""The attention that each key gets, summed over queries.

    With the map :math:`p` of :func:`block_pooled_attention` and :math:`w` = ``query_window``:

    .. math::

        m_j = \sum_{i = \max(0, L_q - w)}^{L_q - 1} p_{ij}

    These are the scores by which key-value caches are reduced: of all queries, the accumulated one;
    of the last queries, that of an observation window. Except with ``"reference"``, the scores are
    computed a tile at a time and not stored. Everything is computed in float32 (float64 for
    float64). The result is a constant, without gradients. Deterministic.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        lse: A log-sum-exp for each query, that of :func:`attention_lse`, of block-sparse attention
            or of another library; shape ``(B, Hq, Lq)``, float32 (float64 for float64).
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key head ``h // (Hq // Hkv)``.
        query_window: The number of last queries that count, at least 1; None is all.
        reduce_groups: Whether to average the query heads that share a key head.
        implementation: ``"triton"`` (CUDA; at most 256 features), ``"tiled"`` or ``"reference"``
            (stores all scores). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, Lk)``, or ``(B, Hkv, Lk)`` with ``reduce_groups``; float32 (float64 for
        float64).

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above, or ``query_window`` is no int.

    Example:
        >>> import torch
        >>> from tilework.attention import attention_column_mass, attention_lse
        >>> query, key = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
        >>> lse = attention_lse(query, key, is_causal=True)
        >>> attention_column_mass(query, key, lse, is_causal=True)
        tensor([[[1.8333, 0.8333, 0.3333]]])

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    if query_window is not None:
        _checks.count(_NAME, "query_window", query_window)
    query, key, scale, chosen = _attention_map.prepare(
        _NAME, _TABLE, query, key, lse, scale, enable_gqa, implementation
    )
    first = 0 if query_window is None else max(0, query.shape[2] - query_window)
    columns = Columns(query.detach(), key.detach(), lse.detach(), first, is_causal, scale, chosen)
    mass = operators.attention_column_mass(columns).mass
    if not reduce_groups:
        return mass
    heads, kv_heads = query.shape[1], key.shape[1]
    return mass.view(mass.shape[0], kv_heads, heads // max(1, kv_heads), mass.shape[2]).mean(2)
