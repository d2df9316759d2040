"""What was done to a model and what it cost."""
