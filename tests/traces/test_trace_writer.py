"""Every trace is written exactly once: a resumed folder equals an uninterrupted one after any kill."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import trace_samples as samples
from needs import missing

from distill.files import write_atomic
from distill.records import Sampling, UserError
from distill.traces import folder
from distill.traces import writer as writer_module
from distill.traces.reader import open_traces
from distill.traces.verify import verify
from distill.traces.writer import TraceWriter

HERE = Path(__file__).parent


def run_python(body: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=600, **options,
    )  # fmt: skip


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_shards_do_not_depend_on_how_rows_were_added(tmp_path):
    ways = [samples.write(tmp_path / str(block), 40, block=block) for block in (1, 7, 40)]
    assert files(ways[0]) == files(ways[1]) == files(ways[2])
    assert [s.rows for s in open_traces(ways[0]).shards] == [16, 16, 8]
    assert samples.row_digests(ways[0]) == samples.expected_digests(range(40))


@pytest.mark.fault(5)
def test_a_resumed_folder_gets_exactly_what_is_missing(tmp_path):
    with TraceWriter(tmp_path, samples.metadata(), shard_rows=8) as writer:
        writer.add(samples.traces(range(11)))
    with TraceWriter(tmp_path, samples.metadata(versions={"distill": "9"}), shard_rows=8) as writer:
        assert [n for n in range(20) if f"trace{n:06d}" in writer] == list(range(11))
        assert writer.num_rows == 11
        writer.add(samples.traces(n for n in range(30) if f"trace{n:06d}" not in writer))
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(30))
    assert verify(tmp_path, expected_ids=[f"trace{n:06d}" for n in range(30)]).ok


@pytest.mark.fault(5)
def test_a_trace_is_never_stored_twice(tmp_path):
    with TraceWriter(tmp_path, samples.metadata()) as writer:
        writer.add(samples.traces([1, 2]))
        with pytest.raises(ValueError, match="already stored"):
            writer.add(samples.traces([3, 2]))
        with pytest.raises(ValueError, match="already stored"):
            writer.add(samples.traces([4, 4]))
        writer.add(samples.traces([3, 4]))
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(1, 5))


def test_traces_of_another_kind_are_refused_naming_the_keys(tmp_path):
    samples.write(tmp_path, 3)
    before = files(tmp_path)
    other = samples.metadata(weights="w1", sampling=Sampling(temperature=0.5), engine="vllm")
    with pytest.raises(UserError) as error:
        TraceWriter(tmp_path, other)
    assert "weights: 'w0' != 'w1'" in str(error.value)
    assert "sampling.temperature: 1.0 != 0.5" in str(error.value)
    assert "engine" in str(error.value)
    assert "tokenizer" not in str(error.value)
    assert files(tmp_path) == before


def test_rows_are_written_after_a_while_even_when_a_shard_is_not_full(tmp_path):
    with TraceWriter(tmp_path, samples.metadata(), flush_every=0.2) as writer:
        writer.add(samples.traces([1, 2, 3]))
        deadline = time.monotonic() + 20
        while not (tmp_path / "manifest-0.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert open_traces(tmp_path).num_rows == 3
        writer.add(samples.traces([4]))
    assert open_traces(tmp_path).num_rows == 4


def test_rows_added_before_an_exception_are_kept(tmp_path):
    def interrupted():
        with TraceWriter(tmp_path, samples.metadata()) as writer:
            writer.add(samples.traces([1, 2, 3]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert samples.row_digests(tmp_path) == samples.expected_digests([1, 2, 3])


def test_writers_with_different_names_share_a_folder(tmp_path):
    with (
        TraceWriter(tmp_path, samples.metadata(), writer="a", shard_rows=4) as a,
        TraceWriter(tmp_path, samples.metadata(), writer="b", shard_rows=4) as b,
    ):
        a.add(samples.traces(range(0, 20, 2)))
        b.add(samples.traces(range(1, 20, 2)))
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(20))
    with TraceWriter(tmp_path, samples.metadata(), writer="a") as a:
        assert sum(f"trace{n:06d}" in a for n in range(40)) == 20
    with pytest.raises(UserError, match="letters, digits"):
        TraceWriter(tmp_path, samples.metadata(), writer="../a")


# ------------------------------------------------------------------------------------------------ the lock


@pytest.mark.fault(6)
def test_a_second_writer_is_refused_naming_the_first(tmp_path):
    with TraceWriter(tmp_path, samples.metadata()):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            TraceWriter(tmp_path, samples.metadata())
        body = """
            import sys, trace_samples as samples
            from distill.traces.writer import TraceWriter
            TraceWriter(sys.argv[1], samples.metadata())
        """
        other = run_python(body, tmp_path)
        assert other.returncode != 0
        assert f"process {os.getpid()} on {socket.gethostname()}" in other.stderr
    with TraceWriter(tmp_path, samples.metadata()):
        pass
    assert not list(tmp_path.glob("lock-*"))


def test_a_dead_writers_lock_is_taken_over_and_a_strangers_is_not(tmp_path):
    body = """
        import os, sys, trace_samples as samples
        from distill.traces.writer import TraceWriter
        TraceWriter(sys.argv[1], samples.metadata())
        os.kill(os.getpid(), 9)
    """
    assert run_python(body, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "lock-0").exists()
    with TraceWriter(tmp_path, samples.metadata()):
        pass
    (tmp_path / "lock-0.holder").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere.*remove"):
        TraceWriter(tmp_path, samples.metadata())


# ------------------------------------------------------------------------------------------------- killing

# One process imports everything once and forks a writer for every kill; no Arrow thread runs in it.
KILLER = """
    import os, random, sys, time, traceback
    import pandas  # which Arrow would import again in every child
    import trace_samples as samples
    from distill.traces.writer import TraceWriter
    out, kind, num_kills, num_rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    pause = 0.001 if kind == 'random' else 0
    draw = random.Random(5)
    rows = [samples.traces([n]) for n in range(num_rows)]

    def write():
        with TraceWriter(out, samples.metadata(), shard_rows=8, flush_every=0.03) as writer:
            for row in rows:
                if row.trace_id[0] not in writer:
                    writer.add(row)
                    time.sleep(pause)

    def die_at_step(step):
        # Before or after every system call by which the protocol changes the disk.
        left = [step]
        def counted(call):
            def wrapper(*a, **k):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                result = call(*a, **k)
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                return result
            return wrapper
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))

    killed = 0
    for attempt in range(num_kills + 1):
        last = attempt == num_kills
        child = os.fork()
        if child == 0:
            try:
                if kind == "step" and not last:
                    die_at_step(attempt + 1)
                write()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if kind == "random" and not last:
            time.sleep(draw.uniform(0.0, 0.1))
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            sys.exit("a writer failed")
    print("killed", killed)
"""


@pytest.mark.parametrize(("kind", "num_kills", "num_rows"), [("random", 60, 800), ("step", 24, 100)])
@pytest.mark.fault(3)
def test_killed_again_and_again_the_rows_are_those_of_an_uninterrupted_run(tmp_path, kind, num_kills, num_rows):
    run = run_python(KILLER, tmp_path / "killed", kind, num_kills, num_rows)
    assert run.returncode == 0, run.stderr
    assert int(re.search(r"killed (\d+)", run.stdout)[1]) >= (50 if kind == "random" else 15)
    assert samples.row_digests(tmp_path / "killed") == samples.expected_digests(range(num_rows))
    report = verify(tmp_path / "killed")
    assert report.ok, report
    assert not report.notes, report
    assert not list((tmp_path / "killed").glob(".*"))


# The same with a model: the parent loads it once, every child generates what is missing with the reference engine.
GENERATOR = """
    import json, os, random, sys, time
    import numpy as np, pandas, torch
    torch.set_num_threads(1)
    import trace_samples as samples
    from pathlib import Path
    from distill import engines
    from distill.recipe import EngineConfig
    from distill.records import Ragged, Request, Sampling, Traces
    from distill.traces.writer import TraceWriter
    model, out, num_kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    engine = engines.open_engine(EngineConfig(fn="reference"), model, max_model_len=64, max_top_k=16)
    requests = [Request(f"trace{n:03d}", np.array([1, 5, n + 7]), seed=n) for n in range(60)]
    draw = random.Random(2)

    def write():
        with TraceWriter(out, samples.metadata(), shard_rows=4, flush_every=0.05) as writer:
            missing = [r for r in requests if r.request_id not in writer]
            for c in engine.generate(missing, Sampling(max_tokens=6), top_k=16):
                n = int(c.request_id[5:])
                writer.add(Traces([c.request_id], [f"p{n}"], np.array([0]), [()], [""], [None], [None],
                    Ragged.from_rows([requests[n].prompt_ids], np.int64), Ragged.from_rows([c.ids_T], np.int64),
                    Ragged.from_rows([c.logprob_T], np.float32), c.top.truncate(mass=0.9), [None], {}, [None],
                    [c.finish_reason]))

    killed = 0
    for attempt in range(num_kills + 1):
        child = os.fork()
        if child == 0:
            try:
                write()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if attempt < num_kills:
            time.sleep(draw.uniform(0.0, 0.08))
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            sys.exit("a writer failed")
    print("killed", killed)
"""


@pytest.mark.slow
def test_killed_while_a_model_writes_the_traces_are_those_of_an_uninterrupted_run(tiny_dir, tmp_path):
    whole = run_python(GENERATOR, tiny_dir, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    killed = run_python(GENERATOR, tiny_dir, tmp_path / "killed", 24)
    assert killed.returncode == 0, killed.stderr
    assert int(re.search(r"killed (\d+)", killed.stdout)[1]) >= 5
    assert len(samples.row_digests(tmp_path / "whole")) == 60
    assert samples.row_digests(tmp_path / "killed") == samples.row_digests(tmp_path / "whole")
    assert verify(tmp_path / "killed").ok


def test_leftovers_of_a_killed_writer_are_cleaned_up(tmp_path):
    samples.write(tmp_path, 40)
    manifest = folder.read_manifest(tmp_path / "manifest-0.json")
    folder.Manifest("0", manifest.metadata, manifest.shards[:1]).write(tmp_path)
    whole = tmp_path / manifest.shards[1].file
    cut = tmp_path / manifest.shards[2].file
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / ".shard-0-00003.parquet.tmp").write_bytes(b"half")
    (tmp_path / ".shard-other-00003.parquet.tmp").write_bytes(b"another writer's")
    assert {note.file for note in verify(tmp_path).notes} >= {whole.name, cut.name}
    with TraceWriter(tmp_path, samples.metadata(), shard_rows=16) as writer:
        assert sum(f"trace{n:06d}" in writer for n in range(64)) == 32
        assert not cut.exists()
        writer.add(samples.traces(range(32, 40)))
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".shard-other-00003.parquet.tmp"]
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(40))


# ----------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    """A real full disk if this process may mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode == 0:
        yield tmp_path
        subprocess.run(["umount", str(tmp_path)], check=True)
        return
    # Elsewhere: no file of this process may grow beyond what two shards take together.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.fault(4)
def test_a_full_disk_stops_cleanly_and_what_was_there_stays(small_disk):
    def fill():
        with TraceWriter(small_disk, samples.metadata(), shard_rows=16, flush_every=1e9) as writer:
            for start in range(0, 3000, 16):
                # Ever larger shards, so that a limit on one file's size is met as well as a full disk.
                writer.add(samples.traces(range(start, start + 16), tokens=24 + start))

    with pytest.raises(UserError, match="no room to write"):
        fill()
    assert verify(small_disk).ok
    kept = open_traces(small_disk).num_rows
    assert 0 < kept < 3000
    assert sorted(samples.row_digests(small_disk)) == [f"trace{n:06d}" for n in range(kept)]
    assert not list(small_disk.glob(".*"))


def test_a_writer_does_not_open_on_a_disk_without_a_byte(small_disk):
    if not os.path.ismount(small_disk):
        missing("mount", "this process may not mount a file system of its own")
    samples.write(small_disk, 8)
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(UserError, match="no room to write"):
        TraceWriter(small_disk, samples.metadata())
    (small_disk / "ballast").unlink()
    with TraceWriter(small_disk, samples.metadata()) as writer:
        assert writer.num_rows == 8


def test_after_a_full_disk_there_is_room_again_and_just_the_missing_rows_are_added(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(900_000))

    def fill():
        with TraceWriter(small_disk, samples.metadata(), shard_rows=16) as writer:
            for start in range(0, 320, 16):
                missing = [n for n in range(start, start + 16) if f"trace{n:06d}" not in writer]
                writer.add(samples.traces(missing, tokens=100))

    if os.path.ismount(small_disk):
        with pytest.raises(UserError, match="no room to write"):
            fill()
        assert verify(small_disk).ok
        assert open_traces(small_disk).num_rows < 320
    ballast.unlink()
    fill()
    assert verify(small_disk).ok
    assert samples.row_digests(small_disk) == samples.expected_digests(range(320), tokens=100)


def test_errors_in_the_background_are_raised(tmp_path, monkeypatch):
    def broken(path, data):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer_module, "write_atomic", broken)
    writer = TraceWriter(tmp_path, samples.metadata(), shard_rows=1)

    def add_many():
        for n in range(100):
            writer.add(samples.traces([n]))

    with pytest.raises(OSError, match="Input/output"):
        add_many()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.add(samples.traces([200]))


def test_a_block_that_contradicts_itself_is_refused_and_the_rows_before_it_are_kept(tmp_path):
    bad = samples.traces([4, 5])
    bad.top.tail_T[0] = np.nan

    def write():
        with TraceWriter(tmp_path, samples.metadata()) as writer:
            writer.add(samples.traces([1, 2, 3]))
            writer.add(bad)

    with pytest.raises(ValueError, match="tail's log-mass"):
        write()
    assert samples.row_digests(tmp_path) == samples.expected_digests([1, 2, 3])


def test_adding_waits_for_nothing_but_a_full_queue(tmp_path, monkeypatch):
    slow, written = threading.Event(), []

    def held_up(path, data):
        slow.wait(20)
        written.append(path.name)

    for module in (writer_module, folder):
        monkeypatch.setattr(module, "write_atomic", held_up)
    writer = TraceWriter(tmp_path, samples.metadata(), shard_rows=4, flush_every=1e9)
    for n in range(8):  # two shards: one being written, one ahead
        writer.add(samples.traces([n]))
    assert not written
    threading.Timer(0.3, slow.set).start()
    before = time.monotonic()
    writer.add(samples.traces([8]))
    assert time.monotonic() - before > 0.2
    writer.close()
    assert [name for name in written if "shard" in name] == [f"shard-0-0000{i}.parquet" for i in (0, 0, 0)]


def test_a_shard_ends_at_its_bytes_wherever_the_blocks_did(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 6000)
    ways = [samples.write(tmp_path / str(n), 60, block=n, shard_rows=50) for n in (1, 7, 60)]
    assert files(ways[0]) == files(ways[1]) == files(ways[2])
    rows = [shard.rows for shard in open_traces(ways[0]).shards]
    assert sum(rows) == 60
    assert len(rows) > 5
    sizes = writer_module.row_bytes(samples.traces(range(60)))
    for start, stop in itertools.pairwise(np.cumsum([0, *rows])):
        assert sizes[start : stop - 1].sum() < 6000


SEVERAL = """
    import sys, trace_samples as samples
    from distill.traces.writer import TraceWriter
    name, start = sys.argv[2], int(sys.argv[3])
    with TraceWriter(sys.argv[1], samples.metadata(), writer=name, shard_rows=4) as writer:
        print("open", flush=True)
        sys.stdin.readline()
        for n in range(start, 60, 3):
            writer.add(samples.traces([n]))
"""


def test_several_processes_fill_one_folder_and_the_same_name_twice_is_refused(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}

    def start(name, first):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SEVERAL), str(tmp_path), name, str(first)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    processes = [start(name, first) for first, name in enumerate("abc")]
    assert [p.stdout.readline() for p in processes] == ["open\n"] * 3
    refused = start("b", 0)
    _, said = refused.communicate("\n", timeout=60)
    assert refused.returncode != 0
    assert f"process {processes[1].pid} on" in said
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(60))
    assert verify(tmp_path).ok
    assert len(list(tmp_path.glob("manifest-*.json"))) == 3


def test_a_folder_that_blocks_a_file_is_named(tmp_path):
    (tmp_path / "manifest-0.json").mkdir()
    with pytest.raises(UserError, match=r"manifest-0\.json: a folder has this name"):
        write_atomic(tmp_path / "manifest-0.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest-0.json"]
