"""The engine plugin, without an engine."""
