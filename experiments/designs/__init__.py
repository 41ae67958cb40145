"""The published designs, trained on the same documents with the same backbone size and steps, and compared."""
