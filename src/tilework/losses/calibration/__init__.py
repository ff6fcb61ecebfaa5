"""Calibrated probabilities: how to get them and how to measure them."""
