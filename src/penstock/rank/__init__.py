"""Every arrangement of a GPU budget, its goodput by simulation, and the order of the answers."""
