"""The operator's side: rounds, aggregation, checkpoints."""
