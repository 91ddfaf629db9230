"""What the saver can be told, by whom, and who wins: flag > `ASYNC_CKPT_*` variable > TOML file > default.

`resolve` is pure; reading the file and the environment is left to the caller, and nothing else reads either.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

PREFIX = "ASYNC_CKPT_"
_LEAST_LEASE_S = 3.0  # a sign of life comes every second
FILE_VARIABLE = "ASYNC_CKPT_CONFIG"

Source = Literal["flag", "environment", "file", "default"]


class SettingsError(ValueError):
    """A setting is wrong: says where it was given, its value, and what is accepted."""


class Setting(NamedTuple):
    """One thing that can be set. `name` is the TOML key; the flag and the variable are made from it.

    `convert` takes the text of a flag or variable, or the TOML value, and raises ValueError for what is not
    `accepted`. A flag that is `repeatable` gives a list, a variable its members with commas between. A setting whose
    `default` is None has to be given where it is needed.
    """

    name: str
    convert: Callable[[object], Any]
    accepted: str
    default: Any
    metavar: str
    help: str
    repeatable: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


class Value(NamedTuple):
    """The effective value of a setting, and where it was given: "--bind", "ASYNC_CKPT_BIND", a path, or ""."""

    value: Any
    source: Source
    where: str = ""


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _texts(value: object) -> str:
    """One, or a list: several are joined by commas, and a comma within one has a backslash before it."""
    if isinstance(value, list) and value:
        return ",".join(_text(each).replace("\\", "\\\\").replace(",", "\\,") for each in value)
    return _text(value)


def texts_of(joined: str) -> list[str]:
    """The inverse of it; empty ones are left out."""
    found = re.findall(r"(?:\\.|[^,\\])+", joined, re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", each, flags=re.DOTALL) for each in found]


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    try:
        seconds = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError
    return seconds


def _lease(value: object) -> float:
    seconds = _seconds(value)
    if seconds < _LEAST_LEASE_S:
        raise ValueError
    return seconds


def _one_of(*words: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return convert


_LEVELS = ("debug", "info", "warning", "error")

BIND = Setting(
    "bind",
    _text,
    "an endpoint, as in ipc:///run/async-ckpt/saver.sock",
    None,
    "ENDPOINT",
    "ipc:// and an absolute path, or tcp://HOST:PORT",
)
ROOT = Setting(
    "root",
    _texts,
    "a directory, as in /data/runs, or s3://BUCKET/PREFIX, gs://... or az://...",
    None,
    "DIR|URL",
    "nothing is ever written outside it; may be given several times",
    repeatable=True,
)
CURVE_SECRET = Setting(
    "curve_secret", _text, "the path of a file made by keygen", "", "FILE", "for tcp: this saver's keys, from keygen"
)
CURVE_ALLOW = Setting(
    "curve_allow",
    _text,
    "the path of a directory",
    "",
    "DIR",
    "for tcp: the *.key files of the clients that may connect",
)
HTTP = Setting(
    "http",
    _text,
    "PORT or HOST:PORT, as in 127.0.0.1:9471",
    "",
    "[HOST:]PORT",
    "show status, metrics and a page there, to whoever can reach it; without a host on 127.0.0.1",
)
KEEP_IMAGE = Setting(
    "keep_image_s",
    _seconds,
    "a number of seconds, at least 0",
    900.0,
    "SECONDS",
    "keep the newest checkpoint of a dead job in RAM for its restart",
)
GRACE = Setting(
    "grace_s",
    _seconds,
    "a number of seconds, at least 0",
    25.0,
    "SECONDS",
    "after SIGTERM, serve ranks that are alive, and upload, so long",
)
LEASE = Setting(
    "lease_s",
    _lease,
    f"a number of seconds, at least {_LEAST_LEASE_S:g}",
    30.0,
    "SECONDS",
    "give up a host, or a rank that this saver can only hear, after so long a silence",
)
SHARED_FS = Setting(
    "shared_fs",
    _one_of("relay", "direct"),
    "relay or direct",
    "relay",
    "HOW",
    "relay: the other hosts of a job hand over what they hold; direct: each writes it itself, on a filesystem that is "
    "safe for ranges of a file that several hosts write (Lustre, GPFS; not NFS)",
)
LOG_LEVEL = Setting(
    "log_level", _one_of(*_LEVELS), f"one of {', '.join(_LEVELS)}", "info", "LEVEL", "say no less than this"
)

SETTINGS = (BIND, ROOT, CURVE_SECRET, CURVE_ALLOW, KEEP_IMAGE, GRACE, LEASE, SHARED_FS, HTTP, LOG_LEVEL)


def resolve(
    settings: Iterable[Setting],
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    document: Mapping[str, object],
    file: str = "",
) -> dict[str, Value]:
    """The effective value of each of `settings`, by name.

    `flags` by name, None where it was not given; `document` is the parsed content of the TOML file at path `file`.
    Every key and value of `document` is checked, also of settings that are not asked for. An empty variable counts as
    not set. Raises SettingsError.
    """
    from_file = _check_document(document, file)
    found = {}
    for setting in settings:
        if (given := flags.get(setting.name)) is not None:
            found[setting.name] = Value(_convert(setting, given, setting.flag), "flag", setting.flag)
        elif given := environ.get(setting.variable):
            found[setting.name] = Value(_convert(setting, given, setting.variable), "environment", setting.variable)
        elif setting.name in from_file:
            found[setting.name] = Value(from_file[setting.name], "file", file)
        else:
            found[setting.name] = Value(setting.default, "default")
    return found


def require(values: Mapping[str, Value], *needed: Setting) -> None:
    """Raises SettingsError naming each of `needed` that has no value, and the ways to give it."""
    missing = [setting for setting in needed if values[setting.name].value is None]
    if missing:
        ways = "; ".join(f"give {each.flag}, {each.variable} or {each.name} in a file" for each in missing)
        raise SettingsError(f"{' and '.join(each.name for each in missing)} missing: {ways}")


def read_file(path: str) -> dict[str, object]:
    """The content of a TOML file. Raises SettingsError naming the file and, where it is no TOML, the line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, encoding="utf-8") as file:
            return tomllib.loads(file.read())
    except OSError as error:
        raise SettingsError(f"the configuration file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of TOML, and of UTF-8
        raise SettingsError(f"the configuration file {path} is not TOML: {error}") from error


def _check_document(document: Mapping[str, object], file: str) -> dict[str, Any]:
    known = {setting.name: setting for setting in SETTINGS}
    found = {}
    for key, value in document.items():
        if key not in known:
            import difflib

            close = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise SettingsError(f"{file}: there is no setting {key!r}: {advice}")
        if known[key].repeatable and isinstance(value, str) and value:
            value = [value]  # a file has lists for several
        found[key] = _convert(known[key], value, f"{file}: {key}")
    return found


def _convert(setting: Setting, value: object, where: str) -> Any:
    try:
        return setting.convert(value)
    except ValueError:
        raise SettingsError(f"{where}: {value!r} is not accepted: give {setting.accepted}") from None
