"""An experiment as data: what to run, how often, and what the answer means."""
