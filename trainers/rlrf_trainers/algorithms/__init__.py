"""The trainers: each file is its paper's algorithm box."""
