"""What Penstock adds beside a stock vLLM engine. ``penstock_engine`` alone goes on an engine's PYTHONPATH."""
