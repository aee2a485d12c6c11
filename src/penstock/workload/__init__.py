"""Traces in, synthetic traffic, arrival processes: everything that says which requests come when."""
