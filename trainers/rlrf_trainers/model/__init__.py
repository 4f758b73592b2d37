"""A transformers model: how it is called, its head, its sampler, its chat template."""
