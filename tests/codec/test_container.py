import json
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isic_vq.codec.container import (
    END,
    MAGIC,
    Block,
    CodecError,
    Layout,
    Settings,
    block_name,
    read_container,
    write_container,
)

LAYOUT = Layout("p" * 16, 3, 1, "torch.float32", "eager", "2.0", 24, "c" * 16)
SETTINGS = Settings("t" * 16, 8, 4, 2, "s" * 16, LAYOUT)
BLOCKS = [
    Block(["a.jpg", "b/c.png"], "prior", b"0123456789abcdef", 7),
    Block(["d"], "static", b"", 2**32 - 1),
    Block(["e", "ü\n\udc80", "f"], "prior", b"wxyz", 0),
]
NAME = st.text(st.characters(codec=None), max_size=20)


def header_length(content):
    return struct.unpack_from("<I", content, len(MAGIC))[0]


def body_edges(content):
    """Where the blocks of `BLOCKS` begin and where the last one ends."""
    _, entries, _ = read_container(content)
    edges = [len(MAGIC) + 8 + header_length(content)]
    for entry in entries:
        edges.append(edges[-1] + entry.num_bytes)
    return edges


def with_header(header):
    """A file that holds a header with the right checksum, and nothing else."""
    deflated = zlib.compress(json.dumps(header).encode(), wbits=-15)
    frame = struct.pack("<II", len(deflated), zlib.crc32(deflated))
    return MAGIC + frame + deflated + deflated + frame + END


def header_of(content):
    length = header_length(content)
    return json.loads(zlib.decompress(content[len(MAGIC) + 8 : len(MAGIC) + 8 + length], wbits=-15))


@example([Block(["a"], "prior", MAGIC, 0)])
@given(
    st.lists(
        st.builds(
            Block,
            st.lists(NAME, min_size=1, max_size=5),
            st.sampled_from(["prior", "static"]),
            st.binary(max_size=40),
            st.integers(0, 2**32 - 1),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read(blocks):
    layout = replace(LAYOUT, lanes=max(len(block.names) for block in blocks))
    written = replace(SETTINGS, layout=layout)
    settings, entries, found = read_container(write_container(written, blocks))
    assert (settings, found) == (written, blocks)
    assert [entry.num_images for entry in entries] == [len(block.names) for block in blocks]


def test_a_file_without_layout_is_read():
    settings = Settings("t" * 16, 8, 4, 2, "s" * 16, None)
    assert read_container(write_container(settings, BLOCKS[1:2]))[0] == settings


@given(st.data())
def test_one_flipped_bit_costs_one_block_at_most(data):
    content = bytearray(write_container(SETTINGS, BLOCKS))
    edges = body_edges(content)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    settings, _, found = read_container(bytes(content))
    assert settings == SETTINGS
    for index, (block, expected) in enumerate(zip(found, BLOCKS, strict=True)):
        if edges[index] <= place < edges[index + 1]:
            assert isinstance(block, str)
            assert "altered" in block
        else:
            assert block == expected


def test_every_truncation_keeps_the_blocks_before_it():
    content = write_container(SETTINGS, BLOCKS)
    edges = body_edges(content)
    for length in range(len(content)):
        if length < edges[0]:
            with pytest.raises(CodecError, match="damaged|not an .ivq file"):
                read_container(content[:length])
            continue
        _, _, found = read_container(content[:length])
        for index, (block, expected) in enumerate(zip(found, BLOCKS, strict=True)):
            if length >= edges[index + 1]:
                assert block == expected
            else:
                assert block == f"the file ends {edges[index + 1] - length} bytes too early"


def test_a_file_whose_beginning_is_lost_is_read_from_its_end():
    content = write_container(SETTINGS, BLOCKS)
    edges = body_edges(content)
    _, _, found = read_container(content[edges[1] :])
    assert isinstance(found[0], str)
    assert found[1:] == BLOCKS[1:]


@pytest.mark.parametrize("change", [b"", b"several bytes more"], ids=["removed", "inserted"])
def test_bytes_removed_or_inserted_cost_the_block_they_are_in(change):
    content = write_container(SETTINGS, BLOCKS)
    place = body_edges(content)[1] + 2
    _, _, found = read_container(content[:place] + change + content[place + 1 :])
    assert [isinstance(block, str) for block in found] == [False, True, False]
    assert [found[0], found[2]] == [BLOCKS[0], BLOCKS[2]]


def test_a_file_with_both_headers_damaged_says_so():
    content = bytearray(write_container(SETTINGS, BLOCKS))
    content[len(MAGIC) + 9] ^= 1
    content[-len(END) - 9] ^= 1
    with pytest.raises(CodecError, match="both damaged"):
        read_container(bytes(content))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), MAGIC[:5]])
def test_another_file_is_refused(content):
    with pytest.raises(CodecError, match="not an .ivq file"):
        read_container(content)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": [[1, 0, -5, 0, 0]]},
        {"blocks": [[10**9, 0, 5, 0, 0]]},
        {"blocks": [[0, 0, 5, 0, 0]]},
        {"blocks": [[1, 2, 5, 0, 0]]},
        {"blocks": [[1, 0, 5, 0]]},
        {"blocks": [["1", 0, 5, 0, 0]]},
        {"blocks": [[4, 1, 5, 0, 0]]},
        {"blocks": [[6, 1, 5, 0, 0]], "layout": {**vars(LAYOUT), "lanes": 6}},
        {"blocks": []},
        {"blocks": [[1, 0, 5, 0, 0]] * 1000},
        {"blocks": " " * 10**6},
        {"blocks": 3},
        {"blocks": [[1, 1, 5, 0, 0]], "layout": None},
        {"layout": {"lanes": 3}},
        {"layout": {**vars(LAYOUT), "lanes": 10**9}},
        {"layout": {**vars(LAYOUT), "threads": -1}},
        {"tokenizer": 5},
        {"more": 1},
    ],
    ids=lambda change: repr(change)[:40],
)
def test_a_header_that_contradicts_itself_is_refused(change):
    header = header_of(write_container(SETTINGS, BLOCKS))
    with pytest.raises(CodecError, match="not one that isic-vq writes"):
        read_container(with_header(header | change))


def test_a_header_that_is_no_object_is_refused():
    with pytest.raises(CodecError, match="not one that isic-vq writes"):
        read_container(with_header([1, 2]))


def test_a_newer_format_is_named():
    header = header_of(write_container(SETTINGS, BLOCKS))
    with pytest.raises(CodecError, match="newer isic-vq"):
        read_container(with_header(header | {"format": 2}))


def test_joined_files_are_told_apart():
    one, other = (write_container(SETTINGS, BLOCKS[start:]) for start in (0, 1))
    cut = len(other) - len(one) // 2
    for content, place in ((one + other, len(one)), (other[:cut] + one, cut), (one + one, len(one))):
        with pytest.raises(CodecError, match=f"at byte {place} is another"):
            read_container(content)
    with pytest.raises(CodecError, match="at its end is another"):
        read_container(one + other[len(MAGIC) :])


def test_names_that_inflate_without_end_are_refused():
    content = write_container(replace(SETTINGS, layout=None), [Block(["x" * 10**6], "static", b"", 0)])
    _, _, (block,) = read_container(content)
    assert isinstance(block, str)
    assert "not one that isic-vq writes" in block


def test_a_block_is_called_by_its_images():
    _, entries, _ = read_container(write_container(SETTINGS, BLOCKS))
    assert block_name(entries, 2) == "block 3 of 3 (images 4 to 6)"
