"""What things cost: hardware and model catalogues, step models, KV bytes, transfers."""
