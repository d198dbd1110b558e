"""Graph to graph: one rewrite a file, and `pipeline.py`, the one ordered list."""
