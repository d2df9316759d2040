"""Carrying plans out: modules, blocks, config fields, records, and the checks."""
