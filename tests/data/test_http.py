"""Fetching from a server that fails: exact bytes, and no more requests than it takes."""

import multiprocessing
import os
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest
from fault_server import Answer, FaultServer, changed, etag

from isic_vq.data import http
from isic_vq.data.http import ByteCache, HttpClient, RangeFile, RemoteError, RemoteSettings, Request
from isic_vq.data.schema import DataError
from isic_vq.data.uri import public_path

CONTENT = bytes(range(256)) * 2048  # 512 KiB
PASSING = ["429", "503", "cut", "reset", "slow", "stall"]  # a second request, or patience, gets over them


def settings(**changes):
    return RemoteSettings(**{"retries": 3, "backoff": 0.001, "read_timeout": 0.3, **changes})


@pytest.fixture
def server():
    with FaultServer({"/file": CONTENT, **{f"/{i}": bytes([i]) * 1000 for i in range(50)}}) as server:
        server.stall_seconds = 0.6
        yield server


@pytest.fixture
def fetcher():
    return HttpClient(settings())


@pytest.mark.parametrize("byte_range", [None, (1000, 300_000)])
@pytest.mark.parametrize("kind", PASSING)
def test_a_failure_that_passes_costs_one_request(kind, byte_range, server, fetcher):
    server.fail("/file", kind)
    first, end = byte_range or (0, len(CONTENT))
    assert fetcher.get(Request(f"{server.url}/file", byte_range=byte_range)) == CONTENT[first:end]
    assert len(server.log) == (1 if kind == "slow" else 2)


@pytest.mark.parametrize("byte_range", [None, (1000, 300_000)])
def test_a_file_that_changes_in_the_middle_is_never_a_mixture(byte_range, server, fetcher):
    server.fail("/file", "cut")
    server.fail("/file", "etag")
    first, end = byte_range or (0, len(CONTENT))
    assert fetcher.get(Request(f"{server.url}/file", byte_range=byte_range)) == changed(CONTENT)[first:end]


def test_what_is_not_there_is_an_error_at_once(server, fetcher):
    with pytest.raises(RemoteError, match="/none: the server answered 404. Check the address"):
        fetcher.get(Request(f"{server.url}/none?token=secret"))
    assert len(server.log) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("503", "503"), ("reset", "Connection aborted"), ("stall", "Read timed out"), ("cut", "IncompleteRead")],
)
def test_a_failure_that_stays_is_an_error_that_names_it(kind, reason, server, fetcher):
    server.fail("/file", kind, times=100)
    with pytest.raises(
        RemoteError, match=rf"/file could not be read: .*{reason}.*, with 3 retries. Try again"
    ) as caught:
        fetcher.get(Request(f"{server.url}/file?token=secret", (0, 2)))
    assert len(server.log) == 4
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, DataError)


def test_nobody_listens():
    with pytest.raises(RemoteError, match="/file could not be read: .*Connection refused.*, with 1 retries"):
        HttpClient(settings(retries=1)).get(Request("http://127.0.0.1:9/file"))


@pytest.mark.parametrize("url", ["ftp://localhost/file", "http://", "http://localhost:b/file"])
def test_what_is_no_address_is_an_error_at_once(url, fetcher):
    with pytest.raises(RemoteError, match="is no address: expected http or https, and a host"):
        fetcher.get(Request(url))


def test_failed_answers_take_no_connection_away(server):
    fetcher = HttpClient(settings(connections=1))
    for kind in ("503", "429", "cut", "reset", "stall"):
        server.fail("/file", kind)
        assert fetcher.get(Request(f"{server.url}/file")) == CONTENT
    for _ in range(2):
        with pytest.raises(RemoteError, match="answered 404"):
            fetcher.get(Request(f"{server.url}/none"))
        assert int(fetcher.request("HEAD", f"{server.url}/file").headers["Content-Length"]) == len(CONTENT)


def test_redirects_are_followed_but_not_for_ever(server, fetcher):
    server.routes["/moved"] = lambda _: Answer(b"", 302, {"Location": f"{server.url}/file"})
    server.routes["/round"] = lambda _: Answer(b"", 302, {"Location": f"{server.url}/round"})
    assert fetcher.get(Request(f"{server.url}/moved", byte_range=(5, 9))) == CONTENT[5:9]
    with pytest.raises(RemoteError, match="/round could not be read: too many redirects"):
        fetcher.get(Request(f"{server.url}/round"))
    assert len(server.requests("/round")) == 4


def test_without_an_etag_a_cut_body_starts_over(server, fetcher):
    contents = [changed(CONTENT), CONTENT]
    server.routes["/untagged"] = lambda _: Answer(contents.pop(0))
    server.fail("/untagged", "cut")
    assert fetcher.get(Request(f"{server.url}/untagged")) == CONTENT
    assert [r.byte_range for r in server.log] == [None, None]


@pytest.mark.parametrize("obedient", [True, False])
def test_a_version_that_is_asked_for_is_had_or_is_an_error(obedient, server, fetcher):
    version = etag(server.files["/file"])
    if not obedient:  # a server that knows no If-Match
        server.routes["/file"] = lambda _: Answer(
            server.files["/other"], 200, {"ETag": etag(server.files["/other"])}
        )
        server.files["/other"] = server.files.pop("/file")
    assert fetcher.get(Request(f"{server.url}/file", version=version)) == CONTENT
    server.files["/file" if obedient else "/other"] = changed(CONTENT)
    with pytest.raises(RemoteError, match="/file changed while it was read"):
        fetcher.get(Request(f"{server.url}/file", version=version))


def test_a_version_that_changes_in_the_middle_of_a_body_is_an_error(server, fetcher):
    version = etag(server.files["/file"])
    server.fail("/file", "cut")
    server.fail("/file", "etag")
    with pytest.raises(RemoteError, match="/file changed while it was read"):
        fetcher.get(Request(f"{server.url}/file", byte_range=(0, 300_000), version=version))


def test_retry_after_is_obeyed(server, fetcher):
    answers = [Answer(b"", 429, {"Retry-After": "1"}), Answer(b"ok")]
    server.routes["/busy"] = lambda request: answers.pop(0)
    began = time.monotonic()
    assert fetcher.get(Request(f"{server.url}/busy")) == b"ok"
    assert time.monotonic() - began >= 1


def test_a_range_beyond_the_end_is_an_error(server, fetcher):
    with pytest.raises(RemoteError, match="ends before byte 2000. It may have been replaced"):
        fetcher.get(Request(f"{server.url}/3", byte_range=(500, 2000)))
    with pytest.raises(RemoteError, match="the server answered 416"):
        fetcher.get(Request(f"{server.url}/3", byte_range=(1500, 2000)))


def test_a_server_without_ranges_gives_the_range_all_the_same(server, fetcher):
    server.routes["/plain"] = lambda _: Answer(CONTENT)
    server.fail("/plain", "slow")
    assert fetcher.get(Request(f"{server.url}/plain", byte_range=(1000, 5000))) == CONTENT[1000:5000]
    server.fail("/plain", "cut")
    assert fetcher.get(Request(f"{server.url}/plain", byte_range=(1000, 400_000))) == CONTENT[1000:400_000]


@pytest.mark.parametrize("told", ["bytes 1001-1999/9999", "lines 1000-1999/9999", ""])
def test_another_range_than_the_one_asked_for_is_an_error(told, server, fetcher):
    server.routes["/odd"] = lambda _: Answer(CONTENT[:1000], 206, {"Content-Range": told})
    with pytest.raises(RemoteError, match="/odd: the server answered with the wrong range"):
        fetcher.get(Request(f"{server.url}/odd", byte_range=(1000, 2000)))


def test_a_connection_is_used_again(server, fetcher):
    for byte_range in (None, (0, 10), (5, 9), None):
        fetcher.get(Request(f"{server.url}/file", byte_range=byte_range))
    fetcher.request("HEAD", f"{server.url}/file")
    fetcher.get(Request(f"{server.url}/file"))
    assert server.num_connections <= 2, "asking for the size may end one"


def test_json_that_is_none_is_an_error(server, fetcher):
    server.files["/json"] = b'{"a": [1]}'
    assert fetcher.get_json(f"{server.url}/json") == {"a": [1]}
    with pytest.raises(RemoteError, match="/file did not answer with JSON"):
        fetcher.get_json(f"{server.url}/file")


# --- many files ----------------------------------------------------------------------------------------------------


def test_files_come_in_order_over_few_connections(server):
    fetcher = HttpClient(settings(connections=3))
    server.fail("/", "slow", times=50)
    found = list(fetcher.fetch(Request(f"{server.url}/{i}") for i in range(50)))
    assert found == [bytes([i]) * 1000 for i in range(50)]
    assert 2 <= server.most_connections <= 3


def test_files_come_in_order_whatever_fails(server):
    fetcher = HttpClient(settings(connections=3))
    for number, kind in enumerate(PASSING, start=1):
        server.fail(f"/{number}", kind)
    found = list(fetcher.fetch(Request(f"{server.url}/{i}") for i in range(20)))
    assert found == [bytes([i]) * 1000 for i in range(20)]
    assert len(server.log) == 20 + len(PASSING) - 1, "all but the slow one were asked for twice"


def test_a_file_that_cannot_be_had_is_an_error_in_its_place(server, fetcher):
    found = list(fetcher.fetch(Request(f"{server.url}/{name}") for name in ("1", "none", "2")))
    assert isinstance(found[1], RemoteError)
    assert (found[0], found[2]) == (server.files["/1"], server.files["/2"])


def test_a_slow_reader_bounds_what_is_fetched(server, fetcher):
    before = set(threading.enumerate())
    results = fetcher.fetch(Request(f"{server.url}/{i}") for i in range(50))
    for taken in range(1, 11):
        next(results)
        time.sleep(0.02)
        assert len(server.log) <= taken + http.WINDOW
    results.close()
    assert len(server.log) <= 10 + http.WINDOW
    assert not _clients(before)


def _clients(before):
    """Threads that fetch, after they had time to end; those of the server are others."""
    until = time.monotonic() + 5
    while (
        threads := [t for t in threading.enumerate() if t not in before and t.name == "isic-vq-fetch"]
    ) and (time.monotonic() < until):
        time.sleep(0.01)
    return threads


def test_closing_early_does_not_wait_for_a_server_that_is_busy_for_long(server):
    # After the third attempt it gives up: a fourth would draw from Python's random while another test runs, which Hypothesis refuses.
    fetcher = HttpClient(settings(backoff=30.0, retries=2))
    server.fail("/1", "503", times=100)
    results = fetcher.fetch(Request(f"{server.url}/{i}") for i in range(20))
    assert next(results) == server.files["/0"]
    while len(server.requests("/1")) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5, "the third attempt was half a minute away"
    assert all(t.daemon for t in threading.enumerate() if t.name == "isic-vq-fetch"), (
        "nor does the interpreter's end"
    )


def test_an_error_in_the_requests_ends_the_threads(server, fetcher):
    def requests():
        yield Request(f"{server.url}/0")
        raise ValueError("the list is broken")

    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="the list is broken"):
        list(fetcher.fetch(requests()))
    assert not _clients(before)


def _fetch_in_child(url, queue):
    queue.put(http.client().get(Request(url)) == CONTENT)


def test_a_forked_process_has_connections_of_its_own(server, monkeypatch):
    own = http.client()
    assert own.get(Request(f"{server.url}/file")) == CONTENT
    assert http.client() is own
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_fetch_in_child, args=(f"{server.url}/file", queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=30) for _ in children] == [True, True]
    for child in children:
        child.join()
    monkeypatch.setenv("ISIC_VQ_RETRIES", "1")
    assert http.client() is not own, "settings of the environment count when they change"


# --- files that are read in pieces ---------------------------------------------------------------------------------


@pytest.fixture
def pieces(server, monkeypatch):
    """Settings of this process's client for files that are read in pieces, with little read-ahead."""
    for name, value in (("RETRIES", 3), ("BACKOFF", 0.001), ("READ_TIMEOUT", 0.3)):
        monkeypatch.setenv(f"ISIC_VQ_{name}", str(value))
    monkeypatch.setattr(http, "READ_AHEAD", 1000)
    return server


def test_a_zip_is_read_with_few_requests_and_failures(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "READ_AHEAD", 1 << 20)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(200):
            archive.writestr(f"{i:03}.bin", bytes([i]) * 5000)
    pieces.files["/a.zip"] = path.read_bytes()
    for kind in PASSING:
        pieces.fail("/a.zip", kind)
    with zipfile.ZipFile(RangeFile(f"{pieces.url}/a.zip")) as archive:
        assert all(archive.read(f"{i:03}.bin") == bytes([i]) * 5000 for i in range(200))
    assert len(pieces.requests(method="GET")) <= 5 + len(PASSING)


def test_a_cut_costs_one_piece_again(pieces):
    for after in (1, 4, 9):
        pieces.fail("/file", "cut", after=after)
    with RangeFile(f"{pieces.url}/file") as source:
        assert b"".join(iter(lambda: source.read(50_000), b"")) == CONTENT
    while not all(r.sent for r in pieces.requests()):
        time.sleep(0.01)  # the server counts when it has sent, the client may be done before
    assert sum(r.sent for r in pieces.requests()) <= len(CONTENT) + 3 * 51_000


def test_parquet_is_read_by_column(pieces, tmp_path):
    table = pyarrow.table({"small": list(range(1000)), "large": [os.urandom(2000) for _ in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=500)
    pieces.files["/t.parquet"] = (tmp_path / "t.parquet").read_bytes()
    source = RangeFile(f"{pieces.url}/t.parquet")
    assert pyarrow.parquet.ParquetFile(source).read(["small"]).column(0).to_pylist() == list(range(1000))
    assert sum(r.sent for r in pieces.log) < 100_000


def test_a_file_that_changes_while_it_is_read_is_an_error(pieces):
    source = RangeFile(f"{pieces.url}/file")
    assert source.read(10) == CONTENT[:10]
    pieces.files["/file"] = changed(CONTENT)
    source.seek(100_000)
    with pytest.raises(RemoteError, match="/file changed while it was read. Start again"):
        source.read(10)


def test_a_range_file_reads_as_a_file_does(pieces):
    source = RangeFile(f"{pieces.url}/file")
    assert source.seek(-10, os.SEEK_END) == len(CONTENT) - 10
    assert source.read(100) == CONTENT[-10:]
    assert source.read(1) == b""
    source.seek(5)
    source.seek(7, os.SEEK_CUR)
    assert (source.tell(), source.read(3000)) == (12, CONTENT[12:3012])
    source.seek(1)
    assert (source.read(500), source.read(2000)) == (CONTENT[1:501], CONTENT[501:2501]), "no read is short"
    source.seek(10, os.SEEK_END)
    assert source.read(1) == b""


def test_headers_of_a_zip_may_lie_on_the_border_of_two_blocks(pieces, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(100):
            archive.writestr(f"{i:03}.bin", bytes([i]) * 500)
    pieces.files["/a.zip"] = (tmp_path / "a.zip").read_bytes()
    with zipfile.ZipFile(RangeFile(f"{pieces.url}/a.zip")) as archive:
        assert all(archive.read(f"{i:03}.bin") == bytes([i]) * 500 for i in range(100))


def test_a_server_without_ranges_cannot_be_read_in_pieces(pieces):
    pieces.routes["/plain"] = lambda _: Answer(CONTENT)
    with pytest.raises(RemoteError, match="/plain: the server supports no ranges.*Download it"):
        RangeFile(f"{pieces.url}/plain")


# --- the cache -----------------------------------------------------------------------------------------------------


def test_cached_bytes_make_no_request(server, tmp_path):
    fetcher = HttpClient(settings(cache=tmp_path))
    for _ in range(2):
        assert fetcher.get(Request(f"{server.url}/1")) == server.files["/1"]
        assert fetcher.get(Request(f"{server.url}/1", byte_range=(3, 9))) == server.files["/1"][3:9]
    assert len(server.log) == 2
    for path in tmp_path.glob("??/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert fetcher.get(Request(f"{server.url}/1")) == server.files["/1"]
    assert len(server.log) == 3, "what is damaged is fetched again"


def test_the_cache_keeps_to_its_size_and_drops_what_was_not_used(server, tmp_path):
    fetcher = HttpClient(settings(cache=tmp_path, cache_gib=10_500 / 2**30))
    for i in range(10):
        fetcher.get(Request(f"{server.url}/{i}"))
        os.utime(next(p for p in tmp_path.glob("??/*") if p.read_bytes()[40] == i), (i, i))
    fetcher.get(Request(f"{server.url}/0"))  # used again, just now
    fetcher.get(Request(f"{server.url}/10"))
    files = list(tmp_path.glob("??/*"))
    assert sum(p.stat().st_size for p in files) <= 10_500
    kept = {p.read_bytes()[40] for p in files}
    assert {0, 10} <= kept
    assert 1 not in kept
    assert kept - {0, 10} == set(range(10 - len(kept) + 2, 10)), "the older ones went"


def test_a_cache_that_cannot_be_used_is_an_error(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="the cache 'file' cannot be used .* set ISIC_VQ_CACHE to another"):
        HttpClient(settings(cache=tmp_path / "file")).get(Request(f"{server.url}/1"))
    fetcher = HttpClient(settings(cache=tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for number in range(256):
        (tmp_path / "cache" / f"{number:02x}").write_bytes(b"")
    with pytest.raises(DataError, match="the cache 'cache' cannot be used"):
        fetcher.get(Request(f"{server.url}/1"))
    with pytest.raises(DataError, match="the cache 'cache' cannot be used"):
        list(fetcher.fetch([Request(f"{server.url}/1")]))


def test_threads_may_write_one_entry_at_once(tmp_path):
    cache = ByteCache(tmp_path, 10**9)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.put("one", CONTENT), range(40)))
    assert cache.get("one") == CONTENT
    assert len(list(tmp_path.glob("??/*"))) == 1


def _fill(folder, name):
    cache = ByteCache(folder, 100_000)
    for i in range(100):
        cache.put(f"{name} {i}", bytes(1000))


def test_processes_share_a_limit(tmp_path):
    children = [
        multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path, name)) for name in "abc"
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    size = sum(p.stat().st_size for p in tmp_path.glob("??/*"))
    assert 80_000 < size <= 115_000 + 3 * 1032, "a twentieth more for each process"


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ISIC_VQ_API_URL", "http://localhost/api/")
    monkeypatch.setenv("ISIC_VQ_CACHE", str(tmp_path))
    monkeypatch.setenv("ISIC_VQ_CONNECTIONS", "2")
    found = RemoteSettings.from_environment()
    assert (found.api_url, found.cache, found.connections) == ("http://localhost/api", tmp_path, 2)
    monkeypatch.setenv("ISIC_VQ_RETRIES", "0")
    assert RemoteSettings.from_environment().retries == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CACHE_GIB", "much", "a number above 0"),
        ("CONNECTIONS", "0", "a whole number above 0"),
        ("CONNECTIONS", "2.5", "a whole number above 0"),
        ("BACKOFF", "-1", "a number of at least 0"),
        ("READ_TIMEOUT", "nan", "a number above 0"),
    ],
)
def test_a_setting_that_is_no_number_names_the_variable(name, value, expected, monkeypatch):
    monkeypatch.setenv(f"ISIC_VQ_{name}", value)
    with pytest.raises(DataError, match=f"ISIC_VQ_{name} is '{value}': expected {expected}$"):
        RemoteSettings.from_environment()


def test_messages_name_no_secrets():
    assert public_path("https://me:pass@localhost:1/a/b?token=1#c") == "https://localhost:1/a/b"
