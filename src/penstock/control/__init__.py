"""The controller: events in, actions out. Pure, deterministic, the same object in simulation and live."""
