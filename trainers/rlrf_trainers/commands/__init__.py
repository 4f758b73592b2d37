"""What `rlrf discover` and `rlrf model` do."""
