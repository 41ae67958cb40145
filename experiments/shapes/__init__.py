"""The shapes world: how well its scenes can be read, and what models trained on it draw."""
