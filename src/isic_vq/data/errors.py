"""The error of data that cannot be used; apart from the schema, so that naming it loads no library."""


class DataError(ValueError):
    """Data that cannot be used; the message says what was expected and how to mend it."""
