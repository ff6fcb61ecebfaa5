"""How the largest stable learning rate of each layer scales with the width."""

from tilework import _checks
from tilework.catalog import implements

__all__ = ["lr_scaling_exponents"]

_NAME = "lr_scaling_exponents"
ALIGNMENTS = {"full": 1.0, "none": 0.5}
OPTIMIZERS = ("sgd", "adam", "adafactor")
PARAMETERIZATIONS = {  # (A, B) of each layer
    "standard": {"embedding": (0.0, 0.0), "hidden": (0.0, 0.5), "readout": (0.0, 0.5)},
    "ntk": {"embedding": (0.0, 0.0), "hidden": (0.5, 0.0), "readout": (0.5, 0.0)},
    "mup": {"embedding": (-0.5, 0.5), "hidden": (0.0, 0.5), "readout": (0.5, 0.5)},
    "mean_field": {"embedding": (0.0, 0.0), "hidden": (0.5, 0.0), "readout": (1.0, 0.0)},
}


@implements(
    "Scaling Exponents Across Parameterizations and Optimizers", year=2024, arxiv="2407.05872"
)
def lr_scaling_exponents(
    parameterization: str, optimizer: str, *, alignment: str = "full"
) -> dict[str, float]:
    r"""The exponents :math:`c` with which learning rates shrink with the width, by layers.

    The largest stable learning rate of a layer is proportional to :math:`n^{-c}`, with the width
    :math:`n`: tuned at a width, it is to be multiplied by :math:`(n' / n)^{-c}` for another. The
    ``parameterization`` makes the effective weight :math:`n^{-A} w` of a trained
    :math:`w \sim \mathcal{N}(0, n^{-2B})`:

    ============== ========================= ====================== =======================
    :math:`A, B`   embedding                 hidden                 readout
    ============== ========================= ====================== =======================
    ``standard``   :math:`0, 0`              :math:`0, \frac12`     :math:`0, \frac12`
    ``ntk``        :math:`0, 0`              :math:`\frac12, 0`     :math:`\frac12, 0`
    ``mup``        :math:`-\frac12, \frac12` :math:`0, \frac12`     :math:`\frac12, \frac12`
    ``mean_field`` :math:`0, 0`              :math:`\frac12, 0`     :math:`1, 0`
    ============== ========================= ====================== =======================

    A step changes the layer's output by a size that does not depend on the width where

    .. math::

        c = \begin{cases}
            \kappa - A & \text{adam} \\
            \kappa - A - B & \text{adafactor} \\
            \kappa - 2A - \gamma & \text{sgd}
        \end{cases}

    Here :math:`\kappa` is 1 for full ``alignment`` of the change of a weight with its input, whose
    products then add up as :math:`n`, and :math:`\frac12` for none, where they do as
    :math:`\sqrt n`; for the embedding, whose input does not grow, it is 0. The gradient at hidden
    layers has the size :math:`n^{-\gamma}`, with :math:`\gamma = A + B` of the readout, and at the
    readout itself :math:`\gamma = 0`.

    Args:
        parameterization: ``"standard"``, ``"ntk"``, ``"mup"`` or ``"mean_field"``.
        optimizer: ``"sgd"``, ``"adam"`` (whose updates have the size of the rate) or
            ``"adafactor"`` (whose updates are scaled by the size of the parameter).
        alignment: ``"full"`` or ``"none"``.

    Returns:
        The exponents of ``"embedding"``, ``"hidden"`` and ``"readout"``.

    Raises:
        ValueError: An argument is not one of those above.

    Example:
        >>> from tilework.optim import lr_scaling_exponents
        >>> lr_scaling_exponents("standard", "adam")
        {'embedding': 0.0, 'hidden': 1.0, 'readout': 1.0}

    Deviations:
        The product of the readout's initial weight with the change of its input is taken as not
        aligned, a random sum, for either ``alignment``: the assumption under which hidden layers
        of the standard parametrization need :math:`n^{-1}` with Adam.

    Reference:
        Katie Everett, Lechao Xiao, Mitchell Wortsman, and others. Scaling Exponents Across
        Parameterizations and Optimizers. 2024. arXiv:2407.05872.
    """
    _checks.one_of(_NAME, "parameterization", parameterization, PARAMETERIZATIONS)
    _checks.one_of(_NAME, "optimizer", optimizer, OPTIMIZERS)
    _checks.one_of(_NAME, "alignment", alignment, ALIGNMENTS)
    layers = PARAMETERIZATIONS[parameterization]
    exponents = {}
    for layer, (a, b) in layers.items():
        kappa = 0.0 if layer == "embedding" else ALIGNMENTS[alignment]
        gamma = 0.0 if layer == "readout" else sum(layers["readout"])
        shrink = {"adam": a, "adafactor": a + b, "sgd": 2 * a + gamma}
        exponents[layer] = kappa - shrink[optimizer]
    return exponents
