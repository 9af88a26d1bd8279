"""Training of both stages on accelerate: recipes, the loop, the tokenizer's and the prior's tasks."""
