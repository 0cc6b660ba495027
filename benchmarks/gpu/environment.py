"""Install this repository beside the machine's PyTorch, without a network.

    python3 -m benchmarks.gpu.environment build/gpu-env

makes a virtual environment in which everything that ``python3`` has can be imported, and installs
the package there. The native library for CPUs is left out where it cannot be compiled, unless
SAGE_CPU_REQUIRED=1.

Needs Python's standard library alone, until it is known that PyTorch is there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
ANOTHER_PYTHON = "or name another Python: make gpu GPU_PYTHON=/path/to/python"


def requirements() -> list[str]:
    """What installing and running the package takes, as pyproject.toml has it, and pip."""
    import tomllib  # since Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return ["pip", *project["build-system"]["requires"], *project["project"]["dependencies"]]


def unmet(needed: Iterable[str], find: Callable[[str], str] = version) -> Iterator[str]:
    """One sentence for each requirement, ``name`` or ``name>=version``, that is not met.

    Args:
        find: the version of an installed distribution.
    """
    for requirement in needed:
        name, _, oldest = requirement.partition(">=")
        try:
            found = find(name)
        except PackageNotFoundError:
            yield f"{sys.executable} has no {name}, and {requirement} is needed; install it there"
            continue
        if _numbers(found) < _numbers(oldest):
            yield f"{sys.executable} has {name} {found}, and {requirement} is needed; upgrade it"


def _numbers(text: str) -> tuple[int, ...]:
    """The release that a version begins with: (2, 11, 0) of "2.11.0a0+git"."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def make(folder: Path) -> Path:
    """A virtual environment that sees what this interpreter sees; its interpreter."""
    links = sys.platform != "win32"  # a copy of a Python may miss the library beside it
    venv.create(folder, system_site_packages=True, clear=True, symlinks=links)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if sys.prefix != sys.base_prefix:
        # This interpreter is a virtual environment itself, and what the new one sees by itself is
        # what lies beneath both.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run(
            [str(python), "-c", code], check=True, capture_output=True, text=True
        )
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (Path(found.stdout.strip()) / "machine.pth").write_text("\n".join(paths) + "\n")
    return python


def install(python: Path) -> int:
    """Install the repository for an interpreter; pip's exit status."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", str(ROOT)]
    return subprocess.run(command, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the environment; what is there is removed")
    folder: Path = parser.parse_args(argv).folder
    if sys.version_info < OLDEST_PYTHON:
        print(f"error: {sys.executable} is older than Python 3.11; {ANOTHER_PYTHON}")
        return 1
    problems = list(unmet(requirements()))
    for problem in problems:
        print(f"error: {problem}, {ANOTHER_PYTHON}")
    if problems:
        return 1
    from benchmarks.gpu.presence import NO_DEVICE, missing  # imports torch

    reason = missing()
    if reason is not None:
        print(f"no CUDA device: {reason}")
        return NO_DEVICE
    print(f"installing into {folder}, beside what {sys.executable} has", flush=True)
    return install(make(folder))


if __name__ == "__main__":
    sys.exit(main())
