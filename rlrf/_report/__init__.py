"""What :mod:`rlrf.report` is made of: reading sources, bounding texts; the page's markup beside."""
