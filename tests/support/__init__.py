"""What tests share: models, strategies, oracles, GPUs that aren't there."""
