#!/usr/bin/env python3
"""Install into `.venv` on first use, then run: nothing is needed but Python 3.10+.

python3 run.py COMMAND ...   the command line of the package (`evabyte COMMAND ...`)
python3 run.py test ...      the tests (arguments go to pytest); `--transformers 5.17.0` tests on that release
python3 run.py lint          ruff check, ruff format --check, mypy
python3 run.py python ...    the virtual environment's Python
python3 run.py install       only install, for development

Without an NVIDIA GPU the CPU build of PyTorch is installed. TORCH_SPEC and TORCH_INDEX choose another one.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
TORCH_PIN = "torch==2.13.0"  # the release the project is tested on
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEV_COMMANDS = ("test", "lint", "python", "install")


def python_of(env: Path) -> str:
    return str(env / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def succeeds(*command: str, timeout: float = 60) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def pip_install(env: Path, *arguments: str) -> int:
    print("run.py: pip install", *arguments, flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [python_of(env), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments]
    return subprocess.call(command, cwd=ROOT)


def create_venv(env: Path) -> None:
    print(f"run.py: creating {env.name}", flush=True)
    try:
        venv.create(env, with_pip=True, clear=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError:  # Debian's Python without python3-venv has no ensurepip
        venv.create(env, with_pip=False, clear=True, symlinks=os.name != "nt")
        if not succeeds(sys.executable, "-m", "pip", "--python", python_of(env), "install", "pip", timeout=300):
            sys.exit("run.py: cannot put pip into a virtual environment; on Debian or Ubuntu install python3-venv")


def install_torch(env: Path) -> None:
    """PyPI's Linux wheel of PyTorch brings gigabytes of CUDA: take the CPU index where there is no GPU for them."""
    if succeeds(python_of(env), "-c", "import importlib.metadata as m; m.version('torch')"):
        return
    if shutil.which("nvidia-smi") and succeeds("nvidia-smi"):
        attempts = [[os.environ.get("TORCH_SPEC", "torch")]]
    else:
        spec = os.environ.get("TORCH_SPEC", TORCH_PIN)
        index = os.environ.get("TORCH_INDEX", TORCH_CPU_INDEX if sys.platform == "linux" else "")
        attempts = [[spec]]
        probe = f"import urllib.request as u; u.urlopen({index.rstrip('/') + '/torch/'!r}, timeout=5)"
        if index and succeeds(sys.executable, "-c", probe, timeout=10):
            attempts.insert(0, [spec, "--index-url", index])
        elif index:
            print(f"run.py: {index} cannot be reached, using pip's default index", flush=True)
    if all(pip_install(env, *attempt) for attempt in attempts):
        sys.exit("run.py: PyTorch was not installed; TORCH_SPEC and TORCH_INDEX choose another build")


def ensure_installed(extras: str) -> None:
    """Install the package, editable, with its extras; again whenever pyproject.toml has changed since."""
    stamp = VENV / f".installed-{extras}"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if any(s.exists() and s.read_text() == wanted for s in (stamp, VENV / ".installed-dev")):  # dev has all the others
        return
    if not succeeds(python_of(VENV), "-m", "pip", "--version"):
        create_venv(VENV)
    install_torch(VENV)
    if pip_install(VENV, "--editable", f".[{extras}]"):
        sys.exit("run.py: the installation failed, see pip's message above")
    stamp.write_text(wanted)


def layered_venv(transformers: str) -> Path:
    """A second environment that holds only another transformers release and sees the rest of `.venv`."""
    env = ROOT / f".venv-{transformers}"
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    if not succeeds(python_of(env), "-c", f"import transformers as t; assert t.__version__ == {transformers!r}"):
        venv.create(env, with_pip=False, clear=True, symlinks=os.name != "nt")
        base, own = (subprocess.check_output([python_of(e), "-c", packages], text=True).strip() for e in (VENV, env))
        Path(own, "base_environment.pth").write_text(f"import site; site.addsitedir({base!r})\n")
        if pip_install(env, f"transformers=={transformers}"):
            sys.exit(f"run.py: transformers {transformers} was not installed")
    return env


def main(command: str, arguments: "list[str]") -> int:
    ensure_installed("dev" if command in DEV_COMMANDS else "cli,image")
    env = VENV
    if command == "test" and "--transformers" in arguments[:-1]:
        at = arguments.index("--transformers")
        env = layered_venv(arguments[at + 1])
        del arguments[at : at + 2]
    python = [python_of(env)]
    jobs = {
        "test": [[*python, "-m", "pytest", *arguments]],
        "lint": [
            [*python, "-m", "ruff", "check"],
            [*python, "-m", "ruff", "format", "--check"],
            [*python, "-m", "mypy"],
        ],
        "python": [[*python, *arguments]],
        "install": [],
    }.get(command, [[*python, "-m", "evabyte", command, *arguments]])
    return max((subprocess.call(job) for job in jobs), key=abs, default=0)


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - this file also runs where the package does not
        sys.exit("run.py: Python 3.10 or newer is needed, this is " + sys.version.split()[0])
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
