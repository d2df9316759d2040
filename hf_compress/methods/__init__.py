"""The compression methods, one file each: its config, and the plan function next to the paper's URL."""
