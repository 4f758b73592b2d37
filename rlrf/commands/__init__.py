"""The commands of the command line, a module each; :mod:`rlrf.cli` puts them together."""
