"""Losses on the logits of a classification."""
