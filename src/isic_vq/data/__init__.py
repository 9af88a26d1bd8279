"""Data: sources, one schema, splits, augmentation and loading. Import its modules; they need the `data` extra."""
