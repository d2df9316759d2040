"""Models for the engines that people run them in: exported, loaded there at once, and compared."""
