"""The server that other tests rely on, looked at through the standard library's client."""

import http.client
import time
from urllib.parse import urlsplit

import pytest
from fault_server import FAULTS, Answer, FaultServer, changed, etag

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server():
    with FaultServer({"/file": CONTENT}) as server:
        server.stall_seconds = 0.05
        yield server


def ask(server, path="/file", method="GET", **headers):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=5)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        ("bytes=10-19", 206, CONTENT[10:20], f"bytes 10-19/{len(CONTENT)}"),
        ("bytes=10000-", 206, CONTENT[10000:], f"bytes 10000-{len(CONTENT) - 1}/{len(CONTENT)}"),
        ("bytes=-7", 206, CONTENT[-7:], f"bytes {len(CONTENT) - 7}-{len(CONTENT) - 1}/{len(CONTENT)}"),
        ("bytes=10000-99999", 206, CONTENT[10000:], f"bytes 10000-{len(CONTENT) - 1}/{len(CONTENT)}"),
        ("bytes=99999-", 416, b"", f"bytes */{len(CONTENT)}"),
        ("lines=1-2", 200, CONTENT, None),
    ],
)
def test_ranges_are_answered_as_the_standard_says(asked, status, content, told, server):
    found, headers, body = ask(server, Range=asked)
    assert (found, body, headers["Content-Range"]) == (status, content, told)
    assert headers["Content-Length"] == str(len(content))


def test_conditions_are_obeyed(server):
    version = ask(server)[1]["ETag"]
    assert version == etag(CONTENT) != etag(changed(CONTENT))
    assert ask(server, Range="bytes=1-2", If_Range=version)[0] == 206
    assert ask(server, Range="bytes=1-2", If_Range='"other"')[::2] == (200, CONTENT)
    assert ask(server, If_Match=version)[0] == 200
    assert ask(server, If_Match='"other"')[0] == 412


def test_head_tells_size_and_version_without_a_body(server):
    status, headers, body = ask(server, method="HEAD")
    assert (status, body, headers["ETag"]) == (200, b"", etag(CONTENT))
    assert headers["Content-Length"] == str(len(CONTENT))
    assert headers["Accept-Ranges"] == "bytes"


def test_the_longest_route_answers_and_a_file_comes_first(server):
    server.routes["/"] = lambda request: Answer.of({"q": request.query.get("q")})
    server.routes["/api/"] = lambda request: Answer(request.path.encode(), 201)
    assert ask(server, "/any?q=1")[2] == b'{"q": ["1"]}'
    assert ask(server, "/api/x")[::2] == (201, b"/api/x")
    assert ask(server)[2] == CONTENT


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_happens_as_often_as_said_and_then_no_more(kind, server):
    def healthy():
        return ask(server)[::2] == (200, CONTENT)

    server.fail("/file", kind, times=2, after=1)
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(healthy())
        except (http.client.IncompleteRead, ConnectionResetError, http.client.RemoteDisconnected):
            outcomes.append(False)
    # Pieces that come slowly are as good as others, and content that changed twice is the old one.
    expected = {"slow": [True] * 4, "etag": [True, False, True, True]}
    assert outcomes == expected.get(kind, [True, False, False, True])


def test_faults_look_like_the_real_ones(server):
    for kind in ("429", "503", "truncated", "cut", "reset"):
        server.fail("/file", kind)
    status, headers, _ = ask(server)
    assert (status, headers["Retry-After"]) == (429, "0")
    assert ask(server)[0] == 503
    assert ask(server)[::2] == (200, CONTENT[: len(CONTENT) // 2]), "the answer is whole, its content is not"
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(server)
    assert caught.value.partial == CONTENT[: len(CONTENT) // 2]
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(server)
    with pytest.raises(ValueError, match="'fire' is none of 429"):
        server.fail("/file", "fire")


def test_what_was_asked_and_sent_is_on_record(server):
    ask(server, Range="bytes=0-9")
    ask(server, "/none?a=1", method="HEAD")
    while server.log[0].sent != 10:
        time.sleep(0.01)
    assert [(r.method, r.path, r.byte_range, r.status) for r in server.log] == [
        ("GET", "/file", "bytes=0-9", 206),
        ("HEAD", "/none", None, 404),
    ]
    assert server.log[1].query == {"a": ["1"]}
    assert server.requests("/file") == server.log[:1]
    assert server.most_connections >= 1
