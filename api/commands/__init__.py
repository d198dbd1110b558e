"""The commands of `llmopt`, one a file, and what they share."""
