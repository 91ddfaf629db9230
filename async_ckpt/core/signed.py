"""Requests of the S3 protocol that obstore has no verb for: unfinished multipart uploads, listed and aborted.

They are signed by obstore itself, so its credentials serve, wherever they come from (a role of the machine included):
a store whose endpoint is the address of the wanted resource, with its query, signs that.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from datetime import timedelta
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import msgspec

from .errors import CheckpointError
from .location import Url

_MAX_BYTES = 64 << 20
_VALID_S = 300
_TIMEOUT_S = 30.0
_IGNORED = "x-async-ckpt"  # takes in the path that the client appends


class Upload(msgspec.Struct, frozen=True):
    """A multipart upload that is neither complete nor aborted."""

    key: str
    upload_id: str


def send(url: Url, method: str, key: str, query: dict[str, str]) -> bytes:
    """Raises what `diagnose` understands: OSError with the server's words in it."""
    signed = _signed(url, method, key, query)
    request = urllib.request.Request(signed, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            body: bytes = answer.read(_MAX_BYTES)
            return body
    except urllib.error.HTTPError as error:
        said = error.read(4096).decode(errors="replace")
        raise OSError(f"Server returned non-2xx status code: {error.code} {error.reason}: {said}") from error


def _signed(url: Url, method: str, key: str, query: dict[str, str]) -> str:
    import obstore

    from .objects import store_of

    plain = obstore.sign(store_of(url.scheme, url.bucket, _TIMEOUT_S), "GET", "x", timedelta(seconds=_VALID_S))
    address = urlsplit(plain)
    base = f"{address.scheme}://{address.netloc}{address.path.removesuffix('/x')}"
    wanted = "&".join(f"{name}={quote(value, safe='')}" if value else name for name, value in query.items())
    resource = f"{base}/{quote(key)}" if key else base
    store = store_of(
        url.scheme,
        url.bucket,
        _TIMEOUT_S,
        endpoint=f"{resource}?{wanted}&{_IGNORED}=",
        virtual_hosted_style_request="true",
    )
    found: str = obstore.sign(store, method, "x", timedelta(seconds=_VALID_S))
    return found


def parse_uploads(body: bytes) -> tuple[list[Upload], tuple[str, str] | None]:
    """The uploads of an answer, and the markers with which the next ones are asked for."""
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise CheckpointError("the list of unfinished uploads is no answer of S3: it declares entities")
    try:
        root = ElementTree.fromstring(re.sub(rb' xmlns="[^"]*"', b"", body, count=1))
    except ElementTree.ParseError as error:
        raise CheckpointError(f"the list of unfinished uploads is no XML: {error}") from error
    found = [Upload(each.findtext("Key", ""), each.findtext("UploadId", "")) for each in root.iter("Upload")]
    more = root.findtext("IsTruncated", "false").strip() == "true"
    markers = root.findtext("NextKeyMarker", ""), root.findtext("NextUploadIdMarker", "")
    return found, markers if more and markers[0] else None
