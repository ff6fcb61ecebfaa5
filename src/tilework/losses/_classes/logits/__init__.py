"""The statistics of logits that exist, and sums of losses with their gradients."""
