"""The trained predictor: remaining tokens from the serving model's last hidden state (STAR/ARES), and its rivals.

Collecting and training need torch and run in ``worker``, in a Python that has it; the rest, inference and evaluation
included, needs numpy only.
"""
