"""Train, generate and score a small unified model on real images."""
