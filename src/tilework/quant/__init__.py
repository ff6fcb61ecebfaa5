"""Quantization: grids, rounding algorithms, layers, calibration. Empty so far."""

__all__: list[str] = []
