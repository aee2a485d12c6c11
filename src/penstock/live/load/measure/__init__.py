"""Measuring a running engine from outside: step times, KV capacity, KV transfer (``penstock profile``)."""
