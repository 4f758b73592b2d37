"""What a run leaves: its record, its warnings, its checkpoints, its trackers."""
