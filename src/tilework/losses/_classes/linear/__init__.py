"""The statistics of a linear head's logits, which are not stored."""
