"""Which files of the caller's own are taken into a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from async_ckpt import CheckpointError
from async_ckpt.files import MAX_FILES_BYTES, own_files

TAKEN = ["adapter_model.safetensors", "README.md", "other/adapter_config.json"]


def test_they_are_copies() -> None:
    content = bytearray(b"notes")
    files = own_files({"notes.txt": content, "more/notes.txt": memoryview(b"x")}, TAKEN)
    content[:] = b"later"
    assert files == {"notes.txt": b"notes", "more/notes.txt": b"x"}
    assert own_files(None, TAKEN) == {}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"../out": b""}, "does not name a file inside"),
        ({"/out": b""}, "does not name a file inside"),
        ({"": b""}, "does not name a file inside"),
        ({"async_ckpt.json": b""}, "does not name a file inside"),
        ({"README.md": b""}, "a file of its own"),
        ({"ema.safetensors": b""}, "would be read as weights"),
        ({"extra/ema.safetensors": b""}, "would be read as weights"),
        ({"training_state": b""}, "a file of its own"),
        ({"training_state/mine.json": b""}, "a file of its own"),
        ({"other": b""}, "a file and a folder"),
        ({"README.md/mine": b""}, "a file and a folder"),
        ({"async_ckpt.json/mine": b""}, "a file and a folder"),
        ({"a": b"", "a/b": b""}, "a file and a folder"),
        ({"a": "text"}, "is a str"),
        ({1: b""}, "give text and bytes"),
        ([("a", b"")], "give a dict"),
        ({"a": bytes(MAX_FILES_BYTES), "b": b"x"}, f"{MAX_FILES_BYTES + 1} bytes"),
    ],
)
def test_what_has_no_place_is_refused(files: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        own_files(files, TAKEN)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300
