"""Saving compressed models so that they load."""
