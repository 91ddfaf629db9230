"""What a store's error means, and whether it may pass."""

from __future__ import annotations

import pytest

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.object_errors import ObjectError, diagnose

obstore = pytest.importorskip("obstore")
from obstore.exceptions import GenericError, PermissionDeniedError  # noqa: E402


def answer(status: str, code: str, message: str = "Words.") -> str:
    return (
        f"Generic S3 error: Error performing PUT http://h/b/k in 1.2ms, after 3 retries, max_retries: 3, "
        f"retry_timeout: 10s  - Server returned non-2xx status code: {status}: <Error><Code>{code}</Code>"
        f"<Message>{message}</Message></Error>\n\nDebug source:\nGeneric {{ pages }}"
    )


@pytest.mark.parametrize(
    ("error", "passing", "meaning"),
    [
        (GenericError(answer("503 Slow Down", "SlowDown")), True, "asks for fewer requests (HTTP 503 SlowDown Words.)"),
        (GenericError(answer("429 Too Many", "TooManyRequests")), True, "asks for fewer requests"),
        (GenericError(answer("500 Internal", "InternalError")), True, "the store has failed (HTTP 500 InternalError"),
        (GenericError("Generic S3 error: Connection refused\nx"), True, "cannot be reached (connection refused)"),
        (GenericError("x dns error: failed to lookup address"), True, "(the name of its host is not known)"),
        (GenericError("operation timed out"), True, "(no answer in time)"),
        (GenericError(answer("400 Bad", "InvalidRequest")), False, "refused (HTTP 400 InvalidRequest"),
        (GenericError(answer("400 Bad", "ExpiredToken")), False, "the session token has expired"),
        (GenericError(answer("507 Insufficient Storage", "X")), False, "the store is full"),
        (GenericError(answer("400 Bad", "QuotaExceeded")), False, "the store is full"),
        (PermissionDeniedError(answer("403 Forbidden", "AccessDenied")), False, "these credentials may not do that"),
        (FileNotFoundError(answer("404 Not Found", "NoSuchBucket")), False, "there is no such bucket"),
    ],
)
def test_meanings(error: Exception, passing: bool, meaning: str) -> None:
    found = diagnose("writing s3://b/k", error)
    assert found is not None
    assert found.passing is passing
    assert str(found).startswith("writing s3://b/k: ")
    assert meaning in str(found)
    assert "Debug source" not in str(found)
    assert len(str(found)) < 700


@pytest.mark.parametrize("error", [FileNotFoundError("no such key"), KeyError("a mistake of ours"), TypeError("x")])
def test_what_is_no_error_of_a_store(error: Exception) -> None:
    assert diagnose("reading", error) is None


def test_only_what_may_pass_is_tried_again() -> None:
    calls = []

    def fail_twice() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise GenericError(answer("503 Slow Down", "SlowDown"))
        return "done"

    attempts = Attempts(30.0)
    assert attempts.run("writing", fail_twice) == "done"
    assert (len(calls), attempts.retries) == (3, 2)
    for error, raised in (
        (PermissionDeniedError(answer("403", "AccessDenied")), ObjectError),
        (FileNotFoundError("x"), FileNotFoundError),
        (FileExistsError("x"), FileExistsError),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ):
        calls.clear()

        def fail(error: Exception = error) -> None:
            calls.append(1)
            raise error

        with pytest.raises(raised):
            attempts.run("writing", fail)
        assert len(calls) == 1


def test_they_end_when_the_time_is_over() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise GenericError(answer("503 Slow Down", "SlowDown"))

    with pytest.raises(ObjectError, match=r"asks for fewer requests .* \(\d+ attempts within 1 s\)"):
        Attempts(1.0).run("writing", fail)
    assert len(calls) > 1
    calls.clear()
    with pytest.raises(ObjectError, match=r"\(1 attempts within 0 s\)"):
        Attempts(0.0).run("writing", fail)
    assert len(calls) == 1
