"""How large a run on many GPUs is: computed, not run."""
