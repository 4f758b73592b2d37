"""Programming tasks, graded by running programs in a sandbox."""
