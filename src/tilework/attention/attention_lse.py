"""The log-sum-exp of attention's scores."""

from jaxtyping import Float
from torch import Tensor

from tilework._implementations import TABLES
from tilework.attention import _attention_map
from tilework.attention._attention_map import operators
from tilework.attention._attention_map.common import Queries
from tilework.catalog import implements

__all__ = ["attention_lse"]

_NAME = "attention_lse"
_TABLE = TABLES["attention.attention_lse"] = _attention_map.IMPLEMENTATIONS


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def attention_lse(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "batch heads queries"]:
    r"""The log-sum-exp of the scores of each query, as dense attention has it.

    With the rows :math:`q_i`, :math:`k_j` of a head and :math:`\alpha` = ``scale``, over the keys
    that query :math:`i` sees:

    .. math::

        \mathrm{lse}_i = \log \sum_j e^{\alpha q_i^\top k_j}, \qquad
        p_{ij} = e^{\alpha q_i^\top k_j - \mathrm{lse}_i}

    :math:`p` is the map of attention, which :func:`block_pooled_attention`,
    :func:`attention_column_mass` and :func:`attention_entropy` reduce. Except with ``"reference"``,
    the scores are computed a tile at a time and not stored, and tiles in which nothing is seen are
    not computed. Everything is computed in float32 (float64 for float64). Deterministic.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key head ``h // (Hq // Hkv)``.
        implementation: ``"triton"`` (CUDA; at most 256 features), ``"tiled"`` or ``"reference"``
            (stores all scores). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, Lq)``, float32 (float64 for float64); :math:`-\infty` without keys.

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above.

    Example:
        >>> import torch
        >>> from tilework.attention import attention_lse
        >>> query, key = torch.zeros(1, 1, 2, 8), torch.randn(1, 1, 100, 8)
        >>> attention_lse(query, key).exp()
        tensor([[[100.0000, 100.0000]]])

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    query, key, scale, chosen = _attention_map.prepare(
        _NAME, _TABLE, query, key, None, scale, enable_gqa, implementation
    )
    return operators.attention_lse(Queries(query, key, is_causal, scale, chosen)).lse
