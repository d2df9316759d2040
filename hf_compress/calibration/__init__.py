"""Calibration data: into padded, masked batches, and through the model block by block."""
