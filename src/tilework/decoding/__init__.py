"""Filters of next-token logits."""

from tilework.decoding.typical_p import TypicalP, typical_p

__all__ = ["TypicalP", "typical_p"]
