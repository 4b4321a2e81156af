"""The sandbox: hostile programs get no reward and do no harm, honest ones pass, at every level of this machine."""

import errno
import math
import os
import platform
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import missing, slowness

from distill.records import UserError
from distill.tasks import sandbox
from distill.tasks.code import code_verdict
from distill.tasks.sandbox import (
    FaultError,
    Isolation,
    Limits,
    RaisedError,
    Session,
    isolation,
    wire,
)

PATIENT = Limits(test_s=30, problem_s=60, memory_mb=192)
QUICK = Limits(test_s=0.8, problem_s=1.2)
HONEST = {
    "entry_point": "solve",
    "tests": [{"args": [n], "expected": [n * n, {"n": str(n)}]} for n in range(3)],
}
HONEST_ANSWER = "```python\ndef solve(n):\n    return n * n, {'n': str(n)}\n```"


def level_2() -> Isolation:
    try:
        return isolation.bubblewrap()
    except isolation.UnavailableError as error:
        missing("bwrap", f"level 2 is not available here: {error}")


@pytest.fixture(params=["bubblewrap", "limits_only"])
def held(request) -> Isolation:
    return level_2() if request.param == "bubblewrap" else isolation.limits_only()


def ours() -> list[str]:
    """Running processes of the sandbox, by user id or mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            uid = int(status.partition("\nUid:\t")[2].split()[0])
            marked = b"DISTILL_SANDBOX=" in (folder / "environ").read_bytes()
        except OSError:
            continue
        if (marked or uid >= isolation.FIRST_UID) and "\nState:\tZ" not in status:
            found.append(status.partition("\n")[0])
    return found


def none_left() -> bool:
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not ours()


@pytest.fixture
def places(tmp_path):
    """The places that hostile programs read and attack; checks afterwards that nothing changed and no process is left."""
    expected = [secrets.token_hex(16) for _ in range(2)]
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "kept").write_text("kept")
    secret_file = tmp_path / "secret.json"
    secret_file.write_text(str(expected))
    server = socket.create_server(("127.0.0.1", 0))

    def tell():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(expected[0].encode())
            connection.close()

    threading.Thread(target=tell, daemon=True).start()
    open_files = len(os.listdir("/proc/self/fd"))
    yield {
        "expected": expected,
        "canary": str(canary),
        "secret_file": str(secret_file),
        "port": server.getsockname()[1],
        "judge": os.getpid(),
    }
    assert (canary / "kept").read_text() == "kept"
    assert canary.stat().st_mode & 0o777 == 0o755
    assert none_left(), ours()
    assert len(os.listdir("/proc/self/fd")) <= open_files + 4
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def verdicts(programs, slow, payload, held, places):
    def judge(item):
        name, source = item
        filled = hostile.filled(source, **{k: v for k, v in places.items() if k != "expected"})
        answer = f"```python\n{filled}\n```"
        return name, code_verdict(answer, payload, held, QUICK if name in slow else PATIENT)

    with ThreadPoolExecutor(2) as threads:
        return dict(threads.map(judge, programs.items()))


def unearned(found, slow):
    """The verdicts that must not occur: a hostile program got credit, or a program that is not slow ran into a timeout."""
    return {
        name: verdict
        for name, verdict in found.items()
        if verdict.score != 0 or verdict.correct or ("timeout" in verdict.reason and name not in slow)
    }


def test_hostile_functions_earn_nothing(held, places):
    tests = [{"args": [n], "expected": value} for n, value in enumerate(places["expected"])]
    payload = {"entry_point": "solve", "tests": tests}
    found = verdicts(hostile.CALLED, hostile.SLOW, payload, held, places)
    assert len(found) >= 80
    assert not unearned(found, hostile.SLOW)
    assert code_verdict(HONEST_ANSWER, HONEST, held, PATIENT).correct


def test_tricks_earn_nothing_where_the_tests_are_code(places):
    held = level_2()
    asserts = "\n".join(f"    assert candidate({n}) == expected[{n}]" for n in range(2))
    payload = {
        "entry_point": "solve",
        "prompt": 'def solve(n):\n    """A number."""\n',
        "check": f"def check(candidate):\n    expected = {places['expected']}\n{asserts}\n",
    }
    found = verdicts(hostile.TRICKS, hostile.SLOW, payload, held, places)
    assert not unearned(found, hostile.SLOW)


def test_hostile_programs_earn_nothing(held, places):
    payload = {"tests": [{"stdin": f"{n}\n", "stdout": v} for n, v in enumerate(places["expected"])]}
    found = verdicts(hostile.RUN, hostile.SLOW_RUN, payload, held, places)
    assert not unearned(found, hostile.SLOW_RUN)


@pytest.mark.parametrize(
    "name",
    [
        "sys.exit",
        "os._exit",
        "atexit",
        "excepthook",
        "always equal",
        "own source",
        "re-executed with -O",
    ],
)
def test_the_tricks_fool_a_judge_that_looks_at_the_exit_status(name, tmp_path):
    source = hostile.CALLED[name]
    script = tmp_path / "script.py"
    script.write_text(source + f"\nassert solve(1) == '{secrets.token_hex(16)}'\n")
    assert subprocess.run([sys.executable, script], check=False, timeout=60).returncode == 0


# ------------------------------------------------------------------------------------- isolation

FACTS = r"""
import os
def do(code):
    names = {}
    try:
        exec(code, names)
    except Exception as error:
        return type(error).__name__
    return names.get("result")
"""

FORKS = "import os, signal, time\nresult = 0\nfor _ in range(100):\n try: pid = os.fork()\n except OSError: break\n if not pid: time.sleep(60); os._exit(0)\n result += 1"
BYTES = "result, parts = 0, []\ntry:\n for _ in range(64):\n  parts.append(bytearray(2**25)); result += 2**25\nexcept MemoryError: parts.clear()"
FILES = "result = 0\ntry:\n for i in range(20):\n  with open(f'{i}', 'wb') as f:\n   for _ in range(10): f.write(b'x' * 2**20); f.flush(); result += 2**20\nexcept OSError: pass"
FLOOD = "result = 0\ntry:\n with open('big', 'wb', buffering=0) as f:\n  for _ in range(40): result += f.write(b'x' * 2**20)\nexcept OSError: pass"


def facts(held, *codes):
    with Session(held, FACTS, entry_point="do", limits=PATIENT) as session:
        return [session.call(code) for code in codes]


def test_limits_hold(held):
    small = Limits(test_s=30, problem_s=60, memory_mb=256, num_processes=8)
    with Session(held, FACTS, entry_point="do", limits=small) as session:
        assert 2**26 <= session.call(BYTES) < 2**28
        assert session.call(FLOOD) == 16 * 2**20
        assert session.call("import resource\nresult = resource.getrlimit(resource.RLIMIT_CORE)[0]") == 0
        assert session.call("import os\nresult = len([os.open('/dev/null', 0) for _ in range(64)])") == "OSError"
    if held.own_uid:
        with Session(held, FACTS, entry_point="do", limits=small) as session:
            assert 1 <= session.call(FORKS) <= 7
    assert none_left()


def test_a_program_is_cut_off_from_the_machine(held, tmp_path):
    (tmp_path / "file").write_text("private")
    os.environ["A_PRIVATE_TOKEN"] = "private"
    try:
        environment, network, shared, trace, memory, caps, files = facts(
            held,
            "import os\nresult = sorted(os.environ)",
            "import socket\nresult = socket.create_connection(('127.0.0.1', 22), 1)",
            "import ctypes\nresult = ctypes.CDLL(None).shmget(1, 4096, 0o1777)",
            "import ctypes\nresult = ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
            "import os\nresult = os.memfd_create('x')",
            "result = [l.split()[1] for l in open('/proc/thread-self/status') if l.startswith(('CapEff', 'NoNewPrivs'))]",
            f"result = open({str(tmp_path / 'file')!r}).read()",
        )
    finally:
        del os.environ["A_PRIVATE_TOKEN"]
    known = {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "PYTHONHASHSEED",
        "DISTILL_SANDBOX",
        "PWD",
        "LC_CTYPE",
    }
    assert set(environment) <= known
    assert network in ("PermissionError", "ConnectionRefusedError")
    assert (shared, trace, memory) == (-1, -1, "OSError")  # ENOSYS: no such call
    assert caps == ["0000000000000000", "1"]
    if held.level == 2 or held.own_uid:
        assert files in ("PermissionError", "FileNotFoundError")


NORMAL = """
import asyncio, collections, concurrent.futures, contextlib, ctypes, decimal, hashlib, io, json, os, queue, random, re, select, shutil
import subprocess, sys, tempfile, threading, time, zlib
def threads():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda n: n * n, range(10)))
def files():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        with open(path, "w") as file:
            file.write("x" * 1000)
            file.flush()
            os.fsync(file.fileno())
        os.rename(path, path + "b")
        shutil.copy(path + "b", path)
        os.chmod(path, 0o600)
        os.symlink(path, path + "c")
        with open(path, "r+b") as file:
            file.truncate(10)
        return sorted(map(len, (open(p).read() for p in (path, path + "b", path + "c")))) + [len(os.listdir(folder)), os.stat(path).st_size]
def loops():
    async def work():
        await asyncio.sleep(0.01)
        return await asyncio.gather(*(asyncio.sleep(0, n) for n in range(3)))
    return asyncio.run(work())
def children():
    return subprocess.run([sys.executable, "-S", "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip()
def times():
    began = time.monotonic()
    time.sleep(0.01)
    return time.monotonic() > began and time.process_time() >= 0 and bool(time.strftime("%Y"))
def numbers():
    random.seed(1)
    return len(os.urandom(8)) + len(hashlib.sha256(b"a").digest()) + len(zlib.decompress(zlib.compress(b"abc")))
def do(name):
    return globals()[name]()
"""


def test_what_programs_normally_do_is_allowed(held):
    """A list of allowed calls must hold all that the standard library makes."""
    with Session(held, NORMAL, entry_point="do", limits=PATIENT) as session:
        assert session.call("threads") == 285
        assert session.call("files") == [10, 10, 1000, 3, 10]
        assert session.call("children") == "42"
        assert session.call("times") is True
        assert session.call("numbers") == 8 + 32 + 3
        # An event loop opens a pair of sockets to itself.
        assert session.call("loops") == [0, 1, 2]


def test_calls_that_are_not_on_the_list_do_not_exist(held):
    """Kernel interfaces, known and unknown ones, by their numbers."""
    refused = {"io_uring_setup": 425, "bpf": 321, "keyctl": 250, "userfaultfd": 323, "perf_event_open": 298, "unshare": 272, "mount": 165,
               "init_module": 175, "kexec_load": 246, "open_by_handle_at": 304, "process_vm_readv": 310, "landlock": 444, "unknown": 999}  # fmt: skip
    if platform.machine() != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    (said,) = facts(
        held,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = []\n"
        f"for number in {sorted(refused.values())}:\n result.append([libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno()])",
    )
    assert [tuple(one) for one in said] == [(-1, errno.ENOSYS)] * len(refused)


def test_bubblewrap_shows_the_system_and_nothing_else():
    root, pids, places, written, packages = facts(
        level_2(),
        "import os\nresult = os.listdir('/')",
        "import os\nresult = [int(p) for p in os.listdir('/proc') if p.isdigit()]",
        "import os\nresult = []\nfor p in ('/usr/x', '/x', '/dev/x', '/dev/shm/x', '/etc/x', '/tmp/x'):\n try: open(p, 'w'); result.append(p)\n except OSError: pass",
        FILES,
        "import os, sys\nresult = os.listdir(sys.prefix + f'/lib/python3.{sys.version_info[1]}/site-packages')",
    )
    assert not {"home", "work", "mnt", "srv", "sys", "run", "boot"} & set(root)
    assert len(pids) <= 3
    assert max(pids) < 10
    assert places == ["/tmp/x"]
    assert 2**25 < written <= isolation.SCRATCH_BYTES
    assert packages in ([], "FileNotFoundError")


def test_a_program_dies_with_its_judge(held):
    code = (
        "import time\nfrom distill.tasks.sandbox import *\nfrom distill.tasks.sandbox import isolation\n"
        f"held = isolation.{'bubblewrap' if held.level == 2 else 'limits_only'}()\n"
        "with Session(held, 'import time; time.sleep(600)', limits=Limits(600, 600)) as session:\n"
        "    print('started', flush=True)\n    session.run('')\n"
    )
    judge = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert judge.stdout.readline() == "started\n"
    time.sleep(0.3)
    assert ours()
    judge.send_signal(signal.SIGKILL)
    judge.wait()
    judge.stdout.close()
    assert none_left(), ours()


def test_each_program_has_a_process_of_its_own(held):
    remember = "import os, builtins\ndef do():\n n = getattr(builtins, 'n', 0)\n builtins.n = n + 1\n open(f'f{n}', 'w')\n return [n, len(os.listdir('.'))]"
    for _ in range(2):
        with Session(held, remember, entry_point="do") as session:
            assert [session.call(), session.call()] == [[0, 1], [1, 2]]


# ------------------------------------------------------------------------------------------ messages


def exactly(a, b):
    """Whether two values are equal with all their types, signed zeros and NaNs included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(exactly, a, b))
    if isinstance(a, dict):
        return list(map(type, a)) == list(map(type, b)) and a.keys() == b.keys() and all(exactly(a[k], b[k]) for k in a)
    return a == b


KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
VALUES = st.recursive(
    KEYS | st.floats() | st.integers(-(2**300), 2**300) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(KEYS, inner, max_size=4) | st.sets(KEYS, max_size=4),
    max_leaves=20,
)  # fmt: skip


def test_values_of_builtin_types_come_back_as_they_went():
    held = isolation.limits_only()
    patient = Limits(test_s=60, problem_s=600)
    with Session(held, "def same(x): return x", entry_point="same", limits=patient) as session:

        @settings(max_examples=150, deadline=None)
        @given(VALUES)
        def check(value):
            assert exactly(session.call(value), value)

        check()
        for value in (
            1 << 100_000,
            "\ud800\0",
            b"\0\xff",
            -0.0,
            math.inf,
            {(1, frozenset({2})): {3}},
            1j,
        ):
            assert exactly(session.call(value), value)
        counts = Session(held, "from collections import Counter as solve", entry_point="solve")
        with pytest.raises(sandbox.SandboxError, match="cannot be sent"):
            session.call(lambda: 0)
    with counts:
        assert exactly(counts.call("abca"), {"a": 2, "b": 1, "c": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("lstzdifbcx01", max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)
BUILT_IN = {type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict}


@pytest.mark.parametrize("tag", list("ifcbltszdx"))
def test_a_reply_without_its_value_is_a_fault(tag):
    with pytest.raises(FaultError, match="bad reply"):
        wire.decode([tag])


@given(JSON)
def test_whatever_is_replied_becomes_a_builtin_value_or_a_fault(reply):
    try:
        value = wire.decode(reply)
    except FaultError:
        return
    assert type(value) in BUILT_IN


def test_a_function_sees_copies_and_exceptions_come_through(held):
    source = "def f(x, *, fail=None):\n    if fail: raise fail_of[fail]\n    x.append(1)\n    return x\nfail_of = {'key': KeyError('k'), 'own': type('Own', (Exception,), {})('text')}"
    with Session(held, source, entry_point="f", limits=PATIENT) as session:
        mine = [0]
        assert session.call(mine) == [0, 1]
        assert mine == [0]
        for fail, name in (("key", "KeyError"), ("own", "Own")):
            with pytest.raises(RaisedError) as raised:
                session.call([], fail=fail)
            assert raised.value.name == name
        assert session.call(mine) == [0, 1]


def test_a_run_has_a_real_input_and_a_real_output(held):
    source = (
        "import os, sys\nif __name__ == '__main__':\n"
        "    os.system('cat /dev/null')\n    sys.stdout.write(open(0).read().upper())\n"
        "    sys.stdout.flush()\n    os.system('echo sub')\n    exit(3)\n"
    )
    with Session(held, source, limits=PATIENT) as session:
        assert session.run("año\n") == (3, "AÑO\nsub\n")
        big = "x" * 400_000 + "\n"
        assert session.run(big) == (3, big.upper() + "sub\n")
        assert session.run("") == (3, "sub\n")


def test_time_is_limited_by_test_and_by_problem(held):
    source = "import time\ndef f(n):\n    time.sleep(n)\n    return n"

    def judged(*seconds, limits):
        tests = [{"args": [n], "expected": n} for n in seconds]
        return code_verdict(source, {"entry_point": "f", "tests": tests}, held, limits)

    verdict = judged(0, 600, 0, limits=Limits(test_s=2.5, problem_s=30))
    assert (verdict.score, verdict.reason) == (2 / 3, "test 2 of 3: timeout")
    started = time.monotonic()
    verdict = judged(0, *[0.5] * 60, limits=Limits(test_s=5, problem_s=3))
    assert 1 <= round(verdict.score * 61) <= 8
    assert time.monotonic() - started < 8 * slowness()


# --------------------------------------------------------------------------------------- choice of the level


@pytest.fixture
def fresh_probe():
    isolation.bubblewrap.cache_clear()
    yield
    isolation.bubblewrap.cache_clear()


def test_without_bubblewrap_nothing_is_run_unless_it_is_said_to_be_unsafe(monkeypatch, tmp_path, fresh_probe):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"not installed.*apt-get install bubblewrap.*unsafe: true"):
        sandbox.choose()
    assert sandbox.describe().startswith("none: ")
    assert sandbox.choose(unsafe=True).level == 3
    assert sandbox.describe(unsafe=True).startswith("level 3: unsafe, resource limits only")


def test_bubblewrap_that_does_not_work_is_no_sandbox(monkeypatch, tmp_path, fresh_probe):
    fake = tmp_path / "bwrap"
    fake.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.9.1 && exit\necho bwrap: No permissions to create new namespace >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"does not work here \(bwrap: No permissions to create new namespace\)"):
        sandbox.choose()


def test_a_command_of_the_users_is_level_1():
    command = shlex.join(["env", "-i", "LANG=C.UTF-8", sys.executable, "-S"])
    held = sandbox.choose(command=command)
    assert held.level == 1
    assert sandbox.describe(command=command) == "level 1: the user's command, env"
    assert code_verdict(HONEST_ANSWER, HONEST, held, PATIENT).correct
    assert facts(held, BYTES)[0] < 192 * 2**20
    with pytest.raises(UserError, match="no such program"):
        sandbox.choose(command="no-such-docker run python")


@pytest.mark.parametrize("argv", [("/bin/false",), ("/no/such/program",), ("/bin/echo", "hello")])
def test_a_sandbox_that_does_not_start_gives_no_verdict(argv):
    broken = Isolation(2, argv, False, "broken")
    verdict = code_verdict(HONEST_ANSWER, HONEST, broken, PATIENT)
    assert (verdict.correct, verdict.score) == (None, None)
    assert "did not start" in verdict.reason or "No such file" in verdict.reason
