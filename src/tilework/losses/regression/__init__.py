"""Losses of real-valued targets."""
