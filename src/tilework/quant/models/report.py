"""What was done to each layer of a model, as values and as a table."""

from dataclasses import dataclass, field

from tilework.catalog import without_paper

__all__ = ["LayerReport", "QuantizationReport"]


@without_paper("what quantize_ says of a layer")
@dataclass(frozen=True)
class LayerReport:
    r"""How one layer was quantized.

    Losses are :math:`\mathrm{tr}(\Delta H \Delta^\top)` of the errors :math:`\Delta` of its weights
    and the Hessian :math:`H` of its inputs, as of :func:`hessian_loss`; None without statistics.

    Args:
        algorithm: The name of the algorithm.
        bits: Bits of a code, or of the indices of a vector for each of its weights.
        group_size: Weights of a group; None without groups.
        weights: The number of weights.
        bits_per_weight: Bits of everything that the layer stores but its bias, for each weight.
        loss: That of the quantized weights.
        rtn_loss: That of rounding to nearest with as many bits; None where there is no such thing.
        relative_loss: ``loss`` in units of that of weights that are all zero.
        seconds: What it took, with the statistics; layers with the same inputs share these.

    Raises:
        TypeError: A field is missing.

    Example:
        >>> from torch import nn
        >>> from tilework.quant import RTNConfig, quantize_
        >>> report = quantize_(nn.Sequential(nn.Linear(64, 64)), RTNConfig(group_size=32))
        >>> report.quantized["0"].bits_per_weight
        6.0

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """

    algorithm: str
    bits: int | float
    group_size: int | None
    weights: int
    bits_per_weight: float
    loss: float | None
    rtn_loss: float | None
    relative_loss: float | None
    seconds: float


@without_paper("what quantize_ returns")
@dataclass
class QuantizationReport:
    """What was done to each linear layer of a model; as ``str``, a table.

    Args:
        quantized: The layers that were quantized, by name, in the order in which they were.
        skipped: The reason why a layer was not, by its name.

    Raises:
        TypeError: An argument is not known.

    Example:
        >>> from torch import nn
        >>> from tilework.quant import RTNConfig, quantize_
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> report = quantize_(model, RTNConfig(), filter_fn=lambda name, layer: name != "1")
        >>> list(report.quantized), report.skipped
        (['0'], {'1': 'filter_fn'})

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """

    quantized: dict[str, LayerReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Of all quantized layers together; nan if there are none."""
        weights = sum(one.weights for one in self.quantized.values())
        stored = sum(one.bits_per_weight * one.weights for one in self.quantized.values())
        return stored / weights if weights else float("nan")

    def __str__(self) -> str:
        head = "layer", "algorithm", "bits/weight", "loss of RTN", "loss", "relative", "seconds"
        lines: list[tuple[str, ...]] = [head]
        for name, one in self.quantized.items():
            losses = (one.rtn_loss, one.loss, one.relative_loss)
            numbers = ("" if loss is None else f"{loss:.3g}" for loss in losses)
            bits = f"{one.bits_per_weight:.2f}"
            lines.append((name, one.algorithm, bits, *numbers, f"{one.seconds:.2f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        if self.quantized:
            count = sum(one.weights for one in self.quantized.values())
            table.append(f"{count} weights, {self.bits_per_weight:.2f} bits each")
        table += [f"{name}: not quantized: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(table)
