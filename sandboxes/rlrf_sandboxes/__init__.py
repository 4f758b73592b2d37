"""Sandbox backends: where programs run that nobody trusts."""
