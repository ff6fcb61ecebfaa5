"""Weights of samples, labels, rows and tasks."""
