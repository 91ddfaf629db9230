"""Nothing in either package can be made to run code from a file or a message, or a command through a shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code", "codeop",
           "pty", "runpy"}  # fmt: skip
# torch.load is pickle, yaml.load runs constructors, collectives of objects pickle them. `re.compile` makes no code.
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "yaml.load",
         "yaml.unsafe_load", "numpy.load", "np.load", "os.system", "os.popen", "os.execl", "os.execv", "os.execvp",
         "subprocess.getoutput", "subprocess.getstatusoutput", "dist.all_gather_object", "dist.gather_object",
         "dist.broadcast_object_list", "dist.scatter_object_list"}  # fmt: skip
DANGEROUS_FLAGS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}
ALLOWED: set[tuple[str, str]] = set()


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if name in MODULES | CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.removeprefix("builtins.") in CALLS:
                found.append(name)
            for keyword in node.keywords:
                dangerous = DANGEROUS_FLAGS.get(keyword.arg or "")
                harmless = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value) is not dangerous
                if dangerous is not None and not harmless:
                    found.append(f"{name}({keyword.arg}=...)")
    return found


def test_neither_package_runs_what_it_reads() -> None:
    files = [*(ROOT / "async_ckpt").rglob("*.py"), *(ROOT / "service").rglob("*.py")]
    assert len(files) > 60
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in findings(file.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import os, dill as d", "from pickle import loads", "from torch import load", "torch.load(p)",
        "eval(x)", "builtins.exec(x)", "os.system('ls')", "subprocess.run(c, shell=True)", "run(c, shell=flag)",
        "yaml.load(f)", "np.load(f, allow_pickle=True)", "safe(f, weights_only=False)", "m(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_walk_sees_it(source: str) -> None:
    assert findings(source)


def test_the_walk_lets_pass_what_is_harmless() -> None:
    assert (
        findings("import json; json.load(f); re.compile(x); subprocess.run(c, shell=False); f(weights_only=True)") == []
    )
