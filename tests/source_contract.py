"""What holds for every source of images, whatever it reads: tests call these with a source of their own."""

import pickle
from collections import Counter

from datasets import Image

from isic_vq.data.schema import FEATURES


def rows_of(dataset):
    """Rows with undecoded images: a stored image is its bytes, for a stream drops the name beside them."""
    rows = list(dataset.cast_column("image", Image(decode=False)))
    return [
        {**row, "image": row["image"] and (row["image"]["bytes"] or row["image"]["path"])} for row in rows
    ]


def key_of(row):
    """What tells two rows apart."""
    return tuple(str(value) for value in row.values())


def assert_processes_share_the_rows(source):
    """For 1 to 3 processes, no row is read twice and none is left out; one process reads them in order."""
    rows = rows_of(source.stream())
    for world in (1, 2, 3):
        shares = [rows_of(source.stream(rank, world)) for rank in range(world) if source.parts()[rank::world]]
        assert Counter(key_of(row) for share in shares for row in share) == Counter(map(key_of, rows))


def assert_pickled_source_reads_the_same(source):
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert rows_of(copy.stream()) == rows_of(source.stream())


def assert_metadata_are_the_rows_without_images(source):
    rows = [
        {name: value for name, value in row.items() if name != "image"} for row in rows_of(source.stream())
    ]
    assert list(source.metadata()) == rows
    assert source.describe().num_images == len(rows)


def assert_stream_equals_the_data_set(source):
    dataset, stream = source.dataset(), source.stream()
    assert dataset.features == stream.features == FEATURES
    assert list(dataset.features) == list(stream.features) == list(FEATURES)
    assert rows_of(dataset) == rows_of(stream)


def assert_stream_resumes_exactly(source):
    """Left after any number of rows, a stream goes on with the next one."""
    rows = [row["isic_id"] for row in source.stream()]
    for done in {0, 1, len(rows) // 2, len(rows) - 1}:
        stream = source.stream()
        iterator = iter(stream)
        for _ in range(done):
            next(iterator)
        state = stream.state_dict()
        resumed = source.stream()
        resumed.load_state_dict(state)
        assert [row["isic_id"] for row in resumed] == rows[done:]


CONTRACT = (
    assert_processes_share_the_rows,
    assert_pickled_source_reads_the_same,
    assert_metadata_are_the_rows_without_images,
    assert_stream_equals_the_data_set,
    assert_stream_resumes_exactly,
)
