"""A virtual environment that holds the wheel of distill and the packages that it requires, and no others.

The packages are links into this environment's, so it takes a second. What distill imports but does not declare is missing there.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(folder: Path) -> Path:
    """Build this checkout's wheel into a folder."""
    build = (
        "import sys, hatchling.builders.wheel as wheel\n"
        "print(next(wheel.WheelBuilder(sys.argv[1]).build(directory=sys.argv[2], versions=['standard'])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, ROOT, folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def names(requirements: Iterable[str]) -> list[str]:
    """The canonical names of the packages in requirements."""
    return [canonicalize_name(Requirement(text).name) for text in requirements]


def closure(requirements: Iterable[str], extras: Iterable[str] = ()) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that requirements (with their markers) lead to, by canonical name.

    extras: of the package whose requirements they are. A requirement that is not installed here is left out.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(Requirement(text), ("", *extras)) for text in requirements]
    while todo:
        requirement, wanted = todo.pop()
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in wanted):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[key[0]] = distribution
        todo += [(Requirement(text), ("", *requirement.extras)) for text in distribution.requires or ()]
    return found


def make(folder: Path, wheel: Path) -> Path:
    """Create the environment in a folder and return the path of its `distill` command."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (metadata,) = site.glob("distill-*.dist-info")
    required = importlib.metadata.PathDistribution(metadata).requires or ()
    for distribution in closure(required).values():
        for name in {Path(file).parts[0] for file in distribution.files or ()}:
            source = Path(str(distribution.locate_file(name)))
            if name not in ("..", "__pycache__") and source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
    command = folder / "bin" / "distill"
    command.write_text(f"#!{folder / 'bin' / 'python'}\nfrom distill.cli import main\nmain()\n")
    command.chmod(0o755)
    return command


def environment() -> dict[str, str]:
    """Variables for a process of such an environment: this one's, without the paths of this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
