"""What an integration says where its library is not installed. Imports nothing that might be missing itself."""

from __future__ import annotations


def missing(extra: str, error: ImportError) -> ImportError:
    """What to raise for `error`, met while importing the library of an integration."""
    return ImportError(f"async_ckpt.integrations.{extra}: {error}; pip install 'async-ckpt[{extra}]'")
