"""Puzzles with written-out solutions: what the bundled model has learnt, and the load of live experiments.

Solutions are 10 to about 3,000 tokens long with a heavy tail, and how long is not readable off the prompt but follows
from it: the property of reasoning models that length prediction is about. One character is one token of the bundled
model. Numbers in solutions are written last digit first and in fixed width, so that every character follows from a few
earlier ones; numbers in prompts are written as people write them.
"""

from penstock.workload.problems.families import FAMILIES, Family, Problem, draw, problem_of

__all__ = ["FAMILIES", "Family", "Problem", "draw", "problem_of"]
