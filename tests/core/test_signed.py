"""What a store answers when it is asked for unfinished uploads: read as XML, and trusted with nothing else."""

from __future__ import annotations

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.signed import Upload, parse_uploads


def answer(inner: str) -> bytes:
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'{head}<ListMultipartUploadsResult xmlns="{space}">{inner}</ListMultipartUploadsResult>'.encode()


def test_uploads_and_where_to_go_on() -> None:
    uploads = "".join(
        f"<Upload><Key>run/checkpoint-{step}/a&amp;b</Key><UploadId>id{step}</UploadId></Upload>" for step in (1, 2)
    )
    more = "<IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>"
    found, markers = parse_uploads(answer(uploads + more))
    assert found == [Upload("run/checkpoint-1/a&b", "id1"), Upload("run/checkpoint-2/a&b", "id2")]
    assert markers == ("k", "u")
    assert parse_uploads(answer(uploads + "<IsTruncated>false</IsTruncated>")) == (found, None)
    assert parse_uploads(answer("")) == ([], None)
    assert parse_uploads(answer("<IsTruncated>true</IsTruncated>")) == ([], None)  # and no word of where


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"<a>",
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>',
        b'<?xml version="1.0"?><!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>',
    ],
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(CheckpointError, match="the list of unfinished uploads is no"):
        parse_uploads(body)
