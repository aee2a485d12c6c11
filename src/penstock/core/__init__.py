"""The vocabulary everything else shares: requests, roles, SLOs, events, actions. No behaviour, no I/O."""
