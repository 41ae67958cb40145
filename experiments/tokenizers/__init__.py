"""Every trainable tokenizer on the same photographs, with the same steps and decoder: `python -m experiments.tokenizers`."""
