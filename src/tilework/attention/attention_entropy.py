"""The entropy of each query's attention."""

from jaxtyping import Float
from torch import Tensor

from tilework._implementations import TABLES
from tilework.attention import _attention_map
from tilework.attention._attention_map import operators
from tilework.attention._attention_map.common import Rows
from tilework.catalog import implements

__all__ = ["attention_entropy"]

_NAME = "attention_entropy"
_TABLE = TABLES["attention.attention_entropy"] = _attention_map.IMPLEMENTATIONS


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def attention_entropy(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    lse: Float[Tensor, "batch heads queries"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "batch heads queries"]:
    r"""The entropy of each query's row of the map of attention, in nats.

    With the map :math:`p` of :func:`block_pooled_attention`, :math:`0 \log 0 = 0` and the scores
    :math:`s_{ij}`:

    .. math::

        H_i = -\sum_j p_{ij} \log p_{ij}, \qquad
        \frac{\partial H_i}{\partial s_{ij}}
            = -p_{ij} \left(\log p_{ij} + \frac{H_i}{\sum_l p_{il}}\right)

    The gradient is that of the entropy of a softmax: ``lse`` is a function of ``query`` and
    ``key``, equal to the log-sum-exp of the scores up to a constant, which is 0 for
    :func:`attention_lse`. ``lse`` itself gets no gradient, as that would count twice. Except with
    ``"reference"``, the scores are computed a tile at a time and not stored, in forward and
    backward. Everything is computed in float32 (float64 for float64). Deterministic.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        lse: The log-sum-exp of each query, that of :func:`attention_lse` or of another library;
            shape ``(B, Hq, Lq)``, float32 (float64 for float64). Where it is :math:`-\infty`,
            entropy and gradients are 0.
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key head ``h // (Hq // Hkv)``.
        implementation: ``"triton"`` (CUDA; at most 256 features), ``"tiled"`` or ``"reference"``
            (stores all scores). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, Lq)``, float32 (float64 for float64).

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above.

    Example:
        >>> import torch
        >>> from tilework.attention import attention_entropy, attention_lse
        >>> query, key = torch.zeros(1, 1, 2, 8), torch.randn(1, 1, 100, 8)
        >>> attention_entropy(query, key, attention_lse(query, key)).exp()
        tensor([[[100.0000, 100.0000]]])

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    query, key, scale, chosen = _attention_map.prepare(
        _NAME, _TABLE, query, key, lse, scale, enable_gqa, implementation
    )
    rows = Rows(query, key, lse.detach(), is_causal, scale, chosen)
    return operators.attention_entropy(rows).entropy
