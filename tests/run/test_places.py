"""Files in the place of folders, folders in the place of files, links, folders of others, a copied run: one message, the right exit status."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import missing
from project import REFERENCE, SUMS, Project

from distill import errors
from distill.errors import DataError, MachineError, UserError, of_system
from distill.files import whole_folder, write_atomic

TRACES = {
    "kind": "generate", "model": "base", "task": "sums", "problems": 4, "sampling": {"max_tokens": 4}, "top_logprobs": 4, "engine": REFERENCE,
}  # fmt: skip


def project(folder: Path, tiny_dir: Path) -> Project:
    clean = {"kind": "filter", "data": "traces", "keep": [{"fn": "length", "min_tokens": 1}]}
    stages = {"traces": TRACES, "clean": clean}
    return Project(
        folder, {"name": "places", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS}, "stages": stages}
    )


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory) -> Project:
    made = project(tmp_path_factory.mktemp("places"), tiny_dir)
    done = made.run()
    assert done.returncode == 0, done.stderr
    return made


def one_message(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The message that a command ended with, by this exit status and without a traceback."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr[done.stderr.index("error: ") :]


def as_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")


def as_loop(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path)


@pytest.mark.parametrize("place", ["runs", "runs/places", "runs/places/traces", "runs/places/traces/traces"])
@pytest.mark.parametrize("blocked", [as_file, as_loop])
def test_something_is_in_the_place_of_a_folder(tmp_path, tiny_dir, place, blocked):
    made = project(tmp_path, tiny_dir)
    blocked(tmp_path / place)
    assert Path(place).name in one_message(made.run(), 3)


@pytest.mark.parametrize("place", ["stage.json", "recipe.yaml", "resolved.yaml", "environment.json", ".lock"])
def test_a_folder_is_in_the_place_of_a_file(tmp_path, tiny_dir, place):
    made = project(tmp_path, tiny_dir)
    folder = made.run_dir / ("traces" if place == "stage.json" else "")
    (folder / place).mkdir(parents=True)
    assert place in one_message(made.run(), 3)


def test_a_run_in_a_folder_that_this_user_may_not_write(tmp_path, tiny_dir):
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        missing("setpriv", "needs root and setpriv, to become another user")
    made = project(tmp_path, tiny_dir)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    command = ["setpriv", "--reuid", "65534", "--clear-groups", *made.command("run", made.recipe.name)]
    probe = subprocess.run(
        [*command[:4], sys.executable, "-c", "import distill"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("another user cannot read this checkout")
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    said = one_message(done, 3)
    assert "runs" in said
    assert "may not use it" in said


def test_a_copied_run_goes_on_where_it_lies(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "copy")
    shutil.move(finished.folder / "runs", finished.folder / "away")
    try:
        copied = Project(tmp_path / "copy", finished.tree)
        done = copied.run()
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done already") == 2
        assert copied.distill("show", "runs/places").returncode == 0
        shutil.rmtree(copied.run_dir / "clean")
        again = copied.run()
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("done already") == 1
    finally:
        shutil.move(finished.folder / "away", finished.folder / "runs")


def test_what_a_link_leads_to_is_never_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    final = tmp_path / "model"
    (tmp_path / ".building-model").symlink_to(victim)
    with whole_folder(final) as building:
        (building / "weights").write_text("new")
    assert sorted(path.name for path in victim.iterdir()) == ["kept"]
    assert (final / "weights").read_text() == "new"
    file = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(victim / "kept")
    write_atomic(file, "written")
    assert file.read_text() == "written"
    assert (victim / "kept").read_text() == "kept"


def test_every_error_of_the_file_system_is_a_line_with_its_remedy():
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOSPC, errno.EIO):
        said = of_system(OSError(number, os.strerror(number), "/a/path"))
        assert said is not None
        assert said.exit_status == 3
        assert str(said).startswith(f"/a/path: {os.strerror(number)}. ")
        assert len(str(said)) > len(f"/a/path: {os.strerror(number)}. ")
    assert of_system(ValueError("no")) is None
    assert of_system(OSError(errno.ECONNREFUSED, "refused")) is None


def test_exit_statuses_and_kinds():
    assert dict(errors.STATUSES.items()) == {2: UserError, 3: MachineError, 4: DataError}
    within = DataError("a").within("b: a")
    assert type(within) is DataError
    assert str(within) == "b: a"


def test_a_fault_of_ours_is_one_line_and_its_traceback_is_for_the_asking(finished, tmp_path):
    """A file of one's own that raises while the recipe is checked."""
    tree = {**finished.tree, "name": "broken"}
    tree["tasks"] = {"sums": {"fn": "mine_broken:task"}}
    made = Project(tmp_path, tree)
    (tmp_path / "mine_broken.py").write_text("def task(name):\n    raise ZeroDivisionError('in my task')\n")
    plain, debug = made.run(), made.run("--debug")
    for done in (plain, debug):
        assert done.returncode == 1
        assert "ZeroDivisionError: in my task" in done.stderr
    assert "Traceback" not in plain.stderr
    assert "--debug" in plain.stderr
    assert "Traceback" in debug.stderr
