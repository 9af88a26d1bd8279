"""Images as files of a few hundred bytes each: the tokenizer's codes, entropy-coded under the prior."""
