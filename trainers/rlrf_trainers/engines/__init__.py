"""What samples completions and scores them (see :mod:`rlrf.policy`)."""
