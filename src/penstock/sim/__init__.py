"""The virtual-time world: engines that leap from change to change, links that share, faults that are injected."""
