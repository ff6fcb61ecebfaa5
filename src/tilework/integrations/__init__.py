"""Adapters to other frameworks; the only place that knows their classes. Empty so far."""

__all__: list[str] = []
