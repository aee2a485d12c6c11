"""The predictors that the head is compared with, and the head itself in the same form; numpy only."""
