"""The pure step, the loop around it, and what became of every feature."""
