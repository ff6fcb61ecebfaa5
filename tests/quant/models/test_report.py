"""A report says every number of every layer, and every reason."""

import math

from tilework.quant import LayerReport, QuantizationReport


def layer(**values: object) -> LayerReport:
    given = {
        "algorithm": "GPTQ",
        "bits": 3,
        "group_size": 16,
        "weights": 100,
        "bits_per_weight": 4.5,
        "loss": 0.125,
        "rtn_loss": 0.5,
        "relative_loss": 1e-3,
        "seconds": 1.25,
    }
    return LayerReport(**{**given, **values})  # type: ignore[arg-type]


def test_a_table() -> None:
    report = QuantizationReport(
        quantized={
            "first": layer(),
            "second.of_all": layer(
                weights=300, bits_per_weight=2.5, loss=None, rtn_loss=None, relative_loss=None
            ),
        },
        skipped={"head": "tied"},
    )
    assert report.bits_per_weight == 3.0
    assert str(report).splitlines() == [
        "layer          algorithm  bits/weight  loss of RTN  loss   relative  seconds",
        "first          GPTQ       4.50         0.5          0.125  0.001     1.25",
        "second.of_all  GPTQ       2.50                                       1.25",
        "400 weights, 3.00 bits each",
        "head: not quantized: tied",
    ]


def test_an_empty_report() -> None:
    report = QuantizationReport()
    assert str(report) == "layer  algorithm  bits/weight  loss of RTN  loss  relative  seconds"
    assert math.isnan(report.bits_per_weight)
