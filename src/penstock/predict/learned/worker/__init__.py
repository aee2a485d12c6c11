"""Collecting and training: needs torch and transformers, and runs in a process of its own."""
