"""Random access to a source that is read in order: its records, kept on disk by `datasets`."""

import collections
import hashlib

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from isic_vq import __version__
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources.base import Source, read_parts


def cached_dataset(source: Source) -> Dataset:
    """All records of a source with random access: read once, then kept in the cache of `datasets`.

    The cache knows the records by the source's fingerprint and classes and this package's version.

    Raises:
        DataError: as `Source.read`.
    """
    key = hashlib.sha256(f"{__version__} {source.fingerprint()} {source.classes}".encode()).hexdigest()
    arguments = {"source": source, "parts": source.parts()}
    try:
        return Dataset.from_generator(read_parts, gen_kwargs=arguments, features=FEATURES, fingerprint=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            collections.deque(
                source.metadata(), maxlen=0
            )  # names all labels that cannot be used, if it is that
            raise error.__cause__ from None
        raise
