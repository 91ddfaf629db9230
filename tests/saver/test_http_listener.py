from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt_saver.http_listener import (
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    Address,
    Answer,
    HttpListener,
    parse_address,
)

LOOPBACK = "127.0.0.1"


async def _hello() -> Answer:
    return Answer(b"hello\n")


async def _broken() -> Answer:
    raise RuntimeError("a fault")


async def _endless() -> Answer:
    async def pieces() -> AsyncIterator[bytes]:
        number = 0
        while True:
            yield f"data: {number}\n\n".encode()
            number += 1
            await asyncio.sleep(0)

    return Answer(pieces(), kind="text/event-stream")


ROUTES = {"/hello": _hello, "/broken": _broken, "/events": _endless}


def served(test: Callable[[HttpListener, Address], Awaitable[None]], host: str = LOOPBACK) -> None:
    async def whole() -> None:
        listener = HttpListener(Address(host, 0), ROUTES)
        address = await listener.start()
        try:
            await test(listener, address)
        finally:
            await listener.close()
        with pytest.raises(OSError):
            await asyncio.open_connection(LOOPBACK, address.port)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


async def ask(address: Address, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def get(path: str, host: str = LOOPBACK, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def test_a_page_comes_whole_with_strict_headers() -> None:
    async def test(_: HttpListener, address: Address) -> None:
        head, _, body = (await ask(address, get("/hello?x=1"))).partition(b"\r\n\r\n")
        assert body == b"hello\n"
        lines = head.decode().split("\r\n")
        assert lines[0] == "HTTP/1.1 200 OK"
        assert "Content-Length: 6" in lines
        assert "X-Content-Type-Options: nosniff" in lines
        assert any(line.startswith("Content-Security-Policy: default-src 'none';") for line in lines)
        head_only = await ask(address, get("/hello", method="HEAD"))
        assert head_only == head + b"\r\n\r\n"

    served(test)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (get("/hello", method="POST"), HTTPStatus.METHOD_NOT_ALLOWED),
        (get("/hello", method="DELETE"), HTTPStatus.METHOD_NOT_ALLOWED),
        (get("/nothing"), HTTPStatus.NOT_FOUND),
        (get("/../etc/passwd"), HTTPStatus.NOT_FOUND),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"GET /hello\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"GET /hello HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST_BYTES * 2, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
        (get("/hello", host="evil.example"), HTTPStatus.FORBIDDEN),
        (get("/hello", host="127.0.0.1.evil.example:80"), HTTPStatus.FORBIDDEN),
        (b"GET /hello HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", HTTPStatus.FORBIDDEN),
        (get("/hello", host="localhost"), HTTPStatus.OK),
        (get("/hello", host="localhost:9471"), HTTPStatus.OK),
        (get("/hello", host="[::1]:9471"), HTTPStatus.OK),
        (get("/hello", host="[::1]"), HTTPStatus.OK),
        (b"GET /hello HTTP/1.0\r\n\r\n", HTTPStatus.OK),
    ],
)
def test_what_is_answered(request_: bytes, expected: HTTPStatus) -> None:
    async def test(_: HttpListener, address: Address) -> None:
        assert status(await ask(address, request_)) == expected.value

    served(test)


def test_any_name_may_ask_where_others_are_let_in() -> None:
    async def test(_: HttpListener, address: Address) -> None:
        assert status(await ask(address, get("/hello", host="saver.jobs.svc:9471"))) == 200

    served(test, host="0.0.0.0")


def test_a_fault_behind_one_path_leaves_the_others() -> None:
    async def test(_: HttpListener, address: Address) -> None:
        assert await ask(address, get("/broken")) == b""
        assert status(await ask(address, get("/hello"))) == 200

    served(test)


def test_a_stream_ends_when_its_reader_leaves() -> None:
    async def test(listener: HttpListener, address: Address) -> None:
        reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
        writer.write(get("/events"))
        await reader.readuntil(b"data: 2\n\n")
        assert listener.readers == 1
        writer.close()
        while listener.readers:
            await asyncio.sleep(0)

    served(test)


def test_silent_readers_do_not_shut_out_more_than_they_may() -> None:
    async def test(listener: HttpListener, address: Address) -> None:
        silent = [await asyncio.open_connection(LOOPBACK, address.port) for _ in range(MAX_CONNECTIONS)]
        while listener.readers < MAX_CONNECTIONS:
            await asyncio.sleep(0)
        assert status(await ask(address, get("/hello"))) == HTTPStatus.SERVICE_UNAVAILABLE.value
        for _, writer in silent:
            writer.close()
        while listener.readers:
            await asyncio.sleep(0)
        assert status(await ask(address, get("/hello"))) == 200

    served(test)


def test_a_taken_port_is_an_error_that_names_it() -> None:
    async def test(_: HttpListener, address: Address) -> None:
        with pytest.raises(CheckpointError, match=rf"127\.0\.0\.1:{address.port}: .*--http"):
            await HttpListener(address, ROUTES).start()

    served(test)


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("9471", Address(LOOPBACK, 9471), True),
        (":9471", Address(LOOPBACK, 9471), True),
        ("127.0.0.2:1", Address("127.0.0.2", 1), True),
        ("localhost:9471", Address("localhost", 9471), True),
        ("[::1]:9471", Address("::1", 9471), True),
        ("0.0.0.0:9471", Address("0.0.0.0", 9471), False),
        ("[::]:0", Address("::", 0), False),
    ],
)
def test_addresses(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert address.loopback is loopback
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["", "x", "70000", "-1", "host.example:80", "1.2.3:80", "1.2.3.4:", "1.2.3.4:٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(CheckpointError, match="give PORT or HOST:PORT"):
        parse_address(text)
