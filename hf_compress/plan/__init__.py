"""Plans: edits and tensors as data, and their algebra."""
