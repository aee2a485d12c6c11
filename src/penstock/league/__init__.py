"""Every policy on every built-in workload, beside a bound that none can pass."""
