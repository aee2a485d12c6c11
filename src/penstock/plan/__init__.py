"""Planning: how many instances of what, in closed form, checked by simulation; and the cheapest mix of machines."""
