"""The router of a mixture of experts: its gate and its losses."""
