"""What an object store's error means, and what to do about it. The answers of S3, GCS, Azure and their likes."""

from __future__ import annotations

import errno
import re

from .errors import CheckpointError

# Compiled when something goes wrong: every start of a saver imports this.
_XML = r"(?s)<Code>([^<]*)</Code>(?:.*?<Message>([^<]*)</Message>)?"
_STATUS = r"non-2xx status code: (\d{3})"
_SHOWN_CHARS = 300


class ObjectError(CheckpointError):
    """`passing`: the same request may succeed later. `errno` where a filesystem would have said the same, else None."""

    def __init__(self, text: str, *, passing: bool = False, code: int | None = None) -> None:
        super().__init__(text)
        self.passing = passing
        self.errno = code

    def given_up(self, tries: int, timeout_s: float) -> ObjectError:
        return ObjectError(f"{self} ({tries} attempts within {timeout_s:g} s)", code=self.errno)


def diagnose(what: str, error: Exception) -> ObjectError | None:
    """Why `what` failed ("writing s3://b/k"), for an error that obstore raised. None for what is no error of a store:
    that there is no such object, or a programming error."""
    text = str(error)
    kind = type(error).__name__
    for pattern, meaning, code in _PERMANENT:
        if re.search(pattern, text):
            return ObjectError(f"{what}: {meaning} ({_short(text)})", code=code)
    if isinstance(error, FileNotFoundError):
        return None
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or isinstance(error, PermissionError):
        return ObjectError(f"{what}: {_DENIED} ({_short(text)})", code=errno.EACCES)
    if type(error).__module__.split(".")[0] != "obstore" and not isinstance(error, OSError):
        return None
    status = re.search(_STATUS, text)
    number = int(status[1]) if status is not None else 0
    if re.search(_THROTTLED, text) or number in (429, 503):
        return ObjectError(f"{what}: the store asks for fewer requests ({_short(text)})", passing=True)
    if status is not None and number < 500 and number != 408:
        return ObjectError(f"{what}: refused ({_short(text)})", code=errno.EIO)
    if kind in ("NotSupportedError", "InvalidPathError", "UnknownConfigurationKeyError"):
        return ObjectError(f"{what}: {_short(text)}", code=errno.EINVAL)
    meaning = "the store has failed" if status is not None else "the store cannot be reached"
    return ObjectError(f"{what}: {meaning} ({_short(text)})", passing=True, code=errno.EIO)


_CREDENTIALS = (
    "the credentials are not accepted: see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    "(GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY) in the environment of this process; a daemon has its "
    "own"
)
_MISSING = (
    "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_ACCOUNT_KEY), or give this machine a role"
)
_DENIED = (
    "these credentials may not do that: they need to list, read, write and delete below the prefix, and to list and "
    "abort multipart uploads of the bucket"
)
_THROTTLED = r"SlowDown|TooManyRequests|RequestLimitExceeded|ServerBusy|rateLimitExceeded|Please reduce your"
_PERMANENT: tuple[tuple[str, str, int | None], ...] = (
    (
        r"NoSuchBucket|ContainerNotFound|specified bucket does not exist",
        "there is no such bucket: create it, or see the region, account and endpoint in the environment",
        errno.ENOENT,
    ),
    (
        r"RequestTimeTooSkewed|RequestExpired|difference between the request time",
        "this host's clock differs from the store's by more than 15 minutes: set it (`chronyc makestep`)",
        errno.EINVAL,
    ),
    (
        r"ExpiredToken|TokenRefreshRequired|token included in the request is expired",
        "the session token has expired: give new credentials and start the saver again, or give the machine a role",
        errno.EACCES,
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|AuthenticationFailed|failed to authenticate",
        _CREDENTIALS,
        errno.EACCES,
    ),
    (
        r"169\.254\.1|metadata\.google\.internal|latest/api/token|latest/meta-data|Failed to get cred",
        _MISSING,
        errno.EACCES,
    ),
    (
        r"BadScheme|URL scheme is not allowed",
        "the endpoint is plain http: use https, or set AWS_ALLOW_HTTP=true (AZURE_ALLOW_HTTP, GOOGLE_ALLOW_HTTP)",
        errno.EINVAL,
    ),
    (
        r"InsufficientStorage|StorageFull|QuotaExceeded|status code: 507|[Nn]o (?:writable|free) volumes",
        "the store is full: free some space there, or keep fewer checkpoints (keep_last=)",
        errno.ENOSPC,
    ),
)


_CAUSES = (
    (r"[Cc]onnection ?refused", "connection refused"),
    (r"dns error|failed to lookup address", "the name of its host is not known"),
    (r"TimedOut|timed out|deadline has elapsed", "no answer in time"),
    (r"[Cc]onnection ?reset|IncompleteMessage|connection closed|[Bb]roken ?pipe|UnexpectedEof",
     "the connection was cut"),
)  # fmt: skip
# Which address was asked how often is said already, or is the client's affair.
_REQUEST = r"Error performing \w+ \S+ in \S+(?:, after .*?)?\s+- "


def _short(text: str) -> str:
    """What the server said, or the first line of what the client says; obstore adds pages for its developers."""
    said = re.search(_XML, text)
    if said is not None:
        status = re.search(_STATUS, text)
        message = (said[2] or "").strip().partition("\n")[0]  # Azure adds ids and times
        words = [f"HTTP {status[1]}" if status is not None else "", said[1], message]
        return " ".join(word for word in words if word)[:_SHOWN_CHARS]
    for pattern, meaning in _CAUSES:
        if re.search(pattern, text):
            return meaning
    first = text.partition("\n")[0]
    return re.sub(_REQUEST, "", first).strip()[:_SHOWN_CHARS]
