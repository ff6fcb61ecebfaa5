"""What losses over classes stand on: their layout, linear heads, shards, and statistics."""
