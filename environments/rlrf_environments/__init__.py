"""The environments that come with rlrf, one room per family."""
