"""Penstock's part inside a vLLM process. Nothing here imports penstock: the engine's environment has none."""
