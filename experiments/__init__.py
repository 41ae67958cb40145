"""One folder a question: README, script, results."""
