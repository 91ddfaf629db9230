"""The command line without a saver: help, usage, exit statuses, what is printed. With one: tests/system/test_cli.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from async_ckpt.core.slots import links_path, shm_root
from async_ckpt_saver import exit_codes
from async_ckpt_saver.cli import build_parser, main
from async_ckpt_saver.commands import VERBS, load
from async_ckpt_saver.commands.status import describe_ranks
from async_ckpt_saver.status import RankStatus
from tests.saver.checkpoints import ADAPTER, adapter, commit_checkpoint

HEAVY = {"asyncio", "zmq", "uvloop", "msgspec", "rich", "numpy", "torch", "xxhash", "dataclasses", "logging", "shtab"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        commit_checkpoint(tmp_path / "run", step, tmp_path, tensors=adapter(step))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "BIND", "ROOT", "SAVER", "KEEP_IMAGE_S", "LOG_LEVEL"):
        monkeypatch.delenv(f"ASYNC_CKPT_{name}", raising=False)


def status_of(*words: object) -> int:
    """Also where argparse ends the program."""
    try:
        return main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else -1


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS), [], ["run", "--no-such-flag"]])
def test_help_and_usage_errors_import_nothing_heavy(words: list[str]) -> None:
    code = ("import sys, atexit; from async_ckpt_saver.cli import main\n"
            "atexit.register(lambda: print('LOADED', *sys.modules)); sys.exit(main(sys.argv[1:]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in words else 2)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "argparse" in loaded
    assert loaded & HEAVY == set()


def test_every_verb_has_its_help_an_example_and_a_place_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(VERBS) == len(set(VERBS)) >= 10
    assert status_of("--help") == 0
    listing = capsys.readouterr().out
    for verb in VERBS:
        command = load(verb)
        assert f"  {verb} " in listing
        assert command.HELP in listing
        assert status_of(verb, "--help") == 0
        shown = capsys.readouterr().out
        assert f"example:\n  {command.EXAMPLE.splitlines()[0]}" in shown
        assert f"async-ckpt-saver {verb}" in command.EXAMPLE
    for code in exit_codes.EXPLAINED:
        assert f"\n  {code}  " in listing


def test_examples_are_accepted() -> None:
    for verb in VERBS:
        words = load(verb).EXAMPLE.splitlines()[0].replace('eval "$(', "").replace(')"', "").split()[1:]
        assert build_parser(VERBS).parse_args(words).verb == verb


def test_the_defaults_units_and_variables_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("run", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--keep-image-s SECONDS keep the newest checkpoint of a dead job in RAM for its restart" in shown
    assert "(default: 900; ASYNC_CKPT_KEEP_IMAGE_S)" in shown
    assert "(required; ASYNC_CKPT_BIND)" in shown


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["run"], 2, "bind and root missing"),
        (["run", "--bind", "ipc:///s", "--root", "/", "--keep-image-s", "soon"], 2, "--keep-image-s: 'soon'"),
        (["run", "--bind", "tcp://x", "--root", "/"], 1, "'tcp://x': give tcp://HOST:PORT"),
        (["config", "--config", "/nonexistent.toml"], 2, "/nonexistent.toml cannot be read"),
        (["status"], 2, "which saver?"),
        (["status", "--bind", "ipc:///nonexistent/s.sock"], 1, "no saver listens"),
        (["ls", "/nonexistent"], 1, "is not a directory"),
        (["show", "/nonexistent"], 1, "is no checkpoint and holds none"),
        (["verify", "/nonexistent"], 1, "is not a directory"),
        (["gc", "/tmp", "--keep-last", "0", "--dry-run"], 2, "keep_last=0 is not allowed"),
        (["gc", "/tmp", "--keep-best", "loss", "--dry-run"], 2, "--keep-best: 'loss' is not accepted"),
        (["gc", "/tmp", "--keep-best", "loss:low:2", "--dry-run"], 2, "keep_best=('loss', 'low', 2) is not allowed"),
        (["doctor", "--root", "/nonexistent"], 5, "make it, or mount its volume"),
        (["completion", "fish"], 2, "invalid choice"),
    ],
)
def test_what_goes_wrong_has_its_status_and_says_why(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    assert status_of(*words) == status
    printed = capsys.readouterr()
    assert said in printed.err + printed.out


def test_config_says_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "saver.toml"
    file.write_text('bind = "ipc:///from/file"\nroot = "/from/file"\nlog_level = "debug"\n')
    monkeypatch.setenv("ASYNC_CKPT_CONFIG", str(file))
    monkeypatch.setenv("ASYNC_CKPT_ROOT", "/from/environment")
    assert status_of("config", "--bind", "ipc:///from/flag", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "bind": {"value": "ipc:///from/flag", "source": "flag", "where": "--bind"},
        "root": {"value": "/from/environment", "source": "environment", "where": "ASYNC_CKPT_ROOT"},
        "curve_secret": {"value": "", "source": "default", "where": ""},
        "curve_allow": {"value": "", "source": "default", "where": ""},
        "http": {"value": "", "source": "default", "where": ""},
        "keep_image_s": {"value": 900.0, "source": "default", "where": ""},
        "grace_s": {"value": 25.0, "source": "default", "where": ""},
        "lease_s": {"value": 30.0, "source": "default", "where": ""},
        "shared_fs": {"value": "relay", "source": "default", "where": ""},
        "log_level": {"value": "debug", "source": "file", "where": str(file)},
    }
    assert status_of("config") == 0
    assert f"file {file}" in capsys.readouterr().out


def test_of_many_ranks_only_those_that_are_gone_are_named() -> None:
    ranks = [RankStatus(rank, 100 + rank, rank not in (3, 900), None) for rank in range(1000)]
    assert describe_ranks(ranks[:4]) == "0 (pid 100), 1 (pid 101), 2 (pid 102), 3 (pid 103, gone)"
    assert describe_ranks(ranks) == "1000, 998 alive; 3 (pid 103, gone); 900 (pid 1000, gone)"
    none_lives = describe_ranks([replace(rank, alive=False) for rank in ranks])
    assert none_lives.startswith("1000, 0 alive; 0 (pid 100, gone); ")
    assert none_lives.endswith("; 7 (pid 107, gone); 992 more")


def test_verify_tells_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("verify", run) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]
    weights = run / "checkpoint-2" / ADAPTER
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert status_of("verify", run) == 4
    printed = capsys.readouterr().out
    assert f"ok       {run}/checkpoint-1" in printed
    assert f"DAMAGED  {run}/checkpoint-2" in printed
    assert f"{ADAPTER}: bytes 0-{len(data)}: not the bytes that were committed" in printed
    assert status_of("verify", run / "checkpoint-1", run / "checkpoint-2", "--json") == 4
    reports = json.loads(capsys.readouterr().out)
    assert [(each["step"], len(each["damage"])) for each in reports] == [(1, 0), (2, 1)]
    (run / "checkpoint-1" / "async_ckpt.json").unlink()
    assert status_of("verify", run / "checkpoint-1") == 4


def test_gc_lists_first_and_removes_then(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("gc", run, "--keep-last", 1, "--dry-run") == 0
    assert "checkpoint-1" in (printed := capsys.readouterr().out)
    assert "1 would be removed" in printed
    assert (run / "checkpoint-1").exists()
    assert status_of("gc", run, "--keep-last", 1) == 0
    assert "1 removed" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "latest"]


def test_ls_show_and_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("ls", run, "--keep-last", 1) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "would go" in first
    assert "loss=0.5" in first
    assert "latest" in second
    assert status_of("ls", run, "--json") == 0
    assert [each["step"] for each in json.loads(capsys.readouterr().out)] == [1, 2]
    assert status_of("show", run, "--tensors") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step 2, ")
    assert ["base_model.model.layer.lora_A.weight", "F32", "[2,", "3]", "24"] in map(str.split, printed.splitlines())
    assert status_of("show", run / "checkpoint-1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1
    assert status_of("diff", run / "checkpoint-1", run) == 5
    printed = capsys.readouterr().out
    assert "~ tensor base_model.model.layer.lora_A.weight: 24 bytes, by at most" in printed
    assert "2 tensors equal, 2 different" in printed
    shutil.copytree(run / "checkpoint-1", run.parent / "same" / "checkpoint-1")
    assert status_of("diff", run / "checkpoint-1", run.parent / "same", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] == []


def test_doctor_examines_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("doctor", "--root", tmp_path, "--bind", f"ipc://{tmp_path}/s.sock", "--json") == 0
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"/dev/shm", "memlock", "nofile", "space", "inodes", "fsync", "O_DIRECT", "endpoint", "clock", "python",
            "msgspec", "pyzmq", "uvloop", "xxhash"} <= found.keys()  # fmt: skip
    assert all(bool(each["advice"]) == (each["verdict"] != "ok") for each in found.values())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s.sock").touch()
    assert status_of("doctor", "--bind", f"ipc://{tmp_path}/s.sock") == 0
    assert "no saver holds it" in capsys.readouterr().out
    assert status_of("doctor", "--bind", "ipc:///" + "x" * 200) == 5
    assert "too long for a Unix socket" in capsys.readouterr().out


def test_doctor_takes_only_runs_for_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a saver of several hosts notes beside them is no memory that somebody left."""
    links, run = links_path(f"ipc://{tmp_path}/s"), shm_root() / f"none-{tmp_path.name}"
    run.mkdir(parents=True, mode=0o700)
    try:
        links.write_bytes(b"{}")
        status_of("doctor", "--json")
        said = [each["found"] for each in json.loads(capsys.readouterr().out) if each["check"] == "slots"]
    finally:
        links.unlink(missing_ok=True)
        run.rmdir()
    assert len([found for found in said if str(run) in found]) == 1
    assert [found for found in said if str(links) in found] == []


def test_completion_knows_verbs_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("completion", "bash") == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        name = script.read_text().splitlines()[-1].split()[-2]
        ask = (f"source {script}; COMP_WORDS=(async-ckpt-saver {' '.join(words)}); COMP_CWORD={len(words)}; {name}; "
               "printf '%s\\n' \"${COMPREPLY[@]}\"")  # fmt: skip
        return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()

    assert set(completed("s")) == {"show", "status"}
    assert completed("run", "--keep") == ["--keep-image-s"]
    assert status_of("completion", "zsh") == 0
    assert "#compdef async-ckpt-saver" in capsys.readouterr().out
