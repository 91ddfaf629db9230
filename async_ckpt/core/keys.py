"""CURVE keys in files, as pyzmq's certificates: NAME.key is public, NAME.key_secret is for its owner alone."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq
import zmq.auth

from .errors import CheckpointError
from .transport import SECRET_VARIABLE, SERVER_VARIABLE

_KEY_CHARS = 40  # 32 bytes in Z85


class KeyPair(msgspec.Struct, frozen=True):
    """In Z85, as ZeroMQ wants them."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:  # neither a log nor a traceback may tell the secret
        return f"KeyPair(public={self.public!r})"


class ClientKeys(msgspec.Struct, frozen=True):
    """What a rank needs for tcp: its own pair, and the public key by which it knows the saver."""

    own: KeyPair
    server: bytes


def client_keys(environment: Mapping[str, str]) -> ClientKeys | None:
    """What ASYNC_CKPT_CURVE_SECRET and ASYNC_CKPT_CURVE_SERVER name, None if either is missing. Raises
    CheckpointError."""
    secret, server = environment.get(SECRET_VARIABLE), environment.get(SERVER_VARIABLE)
    if not secret or not server:
        return None
    return ClientKeys(read_secret(Path(secret)), read_public(Path(server)))


def generate(path: Path) -> tuple[Path, Path]:
    """Make a key pair: `path`.key (0644) and `path`.key_secret (0600). Returns the two paths.

    An existing file is never replaced. Raises CheckpointError if one of them exists or cannot be written; then
    neither was made.
    """
    public, secret = Path(f"{path}.key"), Path(f"{path}.key_secret")
    try:
        with tempfile.TemporaryDirectory(prefix=".keygen-", dir=path.parent) as private:  # 0700
            made_public, made_secret = (Path(made) for made in zmq.auth.create_certificates(private, "pair"))
            made_secret.chmod(0o600)
            made_public.chmod(0o644)
            os.link(made_secret, secret)  # unlike a rename it fails where the name is taken
            try:
                os.link(made_public, public)
            except OSError:
                secret.unlink()
                raise
    except FileExistsError as error:
        raise CheckpointError(f"{error.filename2 or path} exists already: keys are never overwritten, choose another "
                              f"name or move it away") from error  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"cannot write keys to {path.parent}: {error.strerror or error}") from error
    return public, secret


def read_secret(path: Path) -> KeyPair:
    """Raises CheckpointError if the file is missing, no key pair, or not for its owner alone."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in (os.geteuid(), 0):
            raise CheckpointError(f"the secret key {path} must be a file of uid {os.geteuid()}, not of {info.st_uid}")
        if info.st_mode & 0o077:
            raise CheckpointError(f"the secret key {path} can be read by others (mode {info.st_mode & 0o777:04o}): "
                                  f"chmod 600 it, and make new keys if it may have been read")  # fmt: skip
        public, secret = _load(path)
    except OSError as error:
        raise CheckpointError(f"the secret key {path} cannot be read: {error.strerror or error}") from error
    if secret is None:
        raise CheckpointError(f"{path} holds no secret key: give the file that ends in .key_secret")
    if zmq.curve_public(secret) != public:
        raise CheckpointError(f"the public and the secret key in {path} do not belong together")
    return KeyPair(public, secret)


def read_public(path: Path) -> bytes:
    """Raises CheckpointError if the file is missing or holds no key."""
    try:
        return _load(path)[0]
    except OSError as error:
        raise CheckpointError(f"the public key {path} cannot be read: {error.strerror or error}") from error


def read_allowed(directory: Path) -> dict[bytes, str]:
    """The public keys in the files DIRECTORY/*.key, and the name of each. Raises CheckpointError if there is none, or
    if somebody else could add to them."""
    try:
        info = directory.stat()
        if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o022:
            raise CheckpointError(f"others may write to {directory} (uid {info.st_uid}, mode "
                                  f"{info.st_mode & 0o777:04o}), and so let anybody in: chmod go-w it")  # fmt: skip
        allowed = {read_public(path): path.stem for path in sorted(directory.glob("*.key"))}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from error
    if not allowed:
        raise CheckpointError(f"there is no *.key file in {directory}, so nobody could connect: put the public keys of "
                              f"the clients there")  # fmt: skip
    return allowed


def _load(path: Path) -> tuple[bytes, bytes | None]:
    if path.stat().st_size > 1 << 16:
        raise CheckpointError(f"{path} is no CURVE certificate: it is too large")
    try:
        public, secret = zmq.auth.load_certificate(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is no CURVE certificate: {error}") from error
    for key in (public, secret):
        if key is not None and len(key) != _KEY_CHARS:
            raise CheckpointError(f"{path} holds a key of {len(key)} characters, expected {_KEY_CHARS}")
    return public, secret
