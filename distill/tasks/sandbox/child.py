"""The inside of the sandbox: the text of this file is given to a bare interpreter with `-c`.

Self-contained, and never imported by the package. It takes frames on its standard input (a length in four
bytes, then marshal: they come from the trusted side) and writes frames to its standard output (a length, then
JSON, which the other side does not trust). It confines itself, reports that it is ready, and runs one untrusted
program: with a standard input, in one process per test, or by calling its function repeatedly. No frame it receives has an
expected result, so a program that takes it over can only answer the calls it gets.
"""

from __future__ import annotations

import marshal
import os
import sys
from _json import encode_basestring_ascii as quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9  # `signal` takes longer to import than most programs take to run
EXACT_FLOAT = 2**53
TAGS: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}


def confine(uid: int, limits: dict[str, int], calls: bytes | None) -> None:
    """Change the user, set limits and drop privileges for good. calls: a seccomp filter; None if bubblewrap sets one."""
    import resource

    try:
        # When memory runs out, the kernel kills this process first.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if calls is not None:
        control(PR_SET_DUMPABLE, 0)
        control(PR_SET_NO_NEW_PRIVS, 1)
    if calls:
        import ctypes
        import struct

        filters = ctypes.create_string_buffer(calls, len(calls))
        header = struct.pack("H6xQ", len(calls) // 8, ctypes.addressof(filters))
        program = ctypes.create_string_buffer(header, len(header))
        control(PR_SET_SECCOMP, 2, ctypes.addressof(program))


def control(option: int, first: int, second: int = 0) -> None:
    """Call prctl(2)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *[ctypes.c_ulong(value) for value in (first, second, 0, 0)]):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(fd: int) -> Any:
    return marshal.loads(read_exactly(fd, int.from_bytes(read_exactly(fd, 4), "big")))


def write_frame(fd: int, nonce: str, kind: str, *values: str) -> None:
    """Write a frame. values: JSON texts."""
    body = f"[{','.join([quote(nonce), quote(kind), *values])}]".encode()
    frame = memoryview(len(body).to_bytes(4, "big") + body)
    while frame:
        frame = frame[os.write(fd, frame) :]


def encode(value: Any) -> str:
    """JSON text of a value of built-in types, with tags for types that JSON lacks. Raises TypeError for other types."""
    kind = type(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return str(value) if -EXACT_FLOAT < value < EXACT_FLOAT else f'["i","{value:x}"]'
    if kind is float:
        return f'["f","{value.hex()}"]'
    if kind is str:
        return quote(value)
    if kind is bytes:
        return f'["b","{value.hex()}"]'
    if kind is complex:
        return f'["c","{value.real.hex()}","{value.imag.hex()}"]'
    if kind in TAGS:
        tag = TAGS[kind]
        items = ",".join([encode(item) for item in value])
        return f'["{tag}",[{items}]]'
    if kind is dict or (kind.__module__ == "collections" and issubclass(kind, dict)):
        items = ",".join([f"[{encode(key)},{encode(item)}]" for key, item in dict.items(value)])
        return f'["d",[{items}]]'
    raise TypeError(f"a {kind.__name__} is not of a built-in type")


def load(source: str, entry_point: str) -> Any:
    """The function of a program, or `Class.method` on a new instance."""
    module = type(sys)("program")
    sys.modules["program"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    found: Any = module
    for part in entry_point.split("."):
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def answer_calls(requests: int, replies: int, source: str, entry_point: str, nonce: str) -> None:
    """Load the program, then answer one call per frame: (nonce, args, kwargs), passed by value."""
    try:
        function = load(source, entry_point)
        write_frame(replies, nonce, "loaded")
    except BaseException as error:
        write_frame(replies, nonce, "raised", *described(error))
        return
    while True:
        nonce, args, kwargs = read_frame(requests)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            reply = ["raised", *described(error)]
        else:
            try:
                reply = ["value", encode(result)]
            except (TypeError, RecursionError, MemoryError) as error:
                reply = ["unsendable", quote(str(error)[:300])]
        write_frame(replies, nonce, *reply)


def described(error: BaseException) -> tuple[str, str]:
    try:
        message = str(error)[:300]
    except BaseException:
        message = ""
    return quote(type(error).__name__), quote(message)


def scratch() -> int:
    """Open an unnamed file in the working folder."""
    name = f"io-{os.getpid()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    return fd


def answer_runs(requests: int, replies: int, max_output: int) -> None:
    """Run the program once per frame: (nonce, stdin). Returns only in the forked process, which then runs the program."""
    while True:
        nonce, text = read_frame(requests)
        stdin, stdout = scratch(), scratch()
        while text:
            text = text[os.write(stdin, text) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        pid = os.fork()
        if not pid:
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            for fd in (stdin, stdout, requests, replies):
                os.close(fd)
            return
        status = os.waitpid(pid, 0)[1]
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        size = os.fstat(stdout).st_size
        os.lseek(stdout, 0, os.SEEK_SET)
        written = read_exactly(stdout, size).decode("utf-8", "replace") if size <= max_output else None
        os.close(stdin)
        os.close(stdout)
        if written is None:
            write_frame(replies, nonce, "flood")
        else:
            write_frame(replies, nonce, "ran", str(code), quote(written))


def main() -> str:
    """Serve requests for the program; returns its source only in a process that is to run it."""
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    hello = read_frame(requests)
    confine(hello["uid"], hello["limits"], hello["calls"])
    if hello["die_with_parent"]:
        control(PR_SET_PDEATHSIG, SIGKILL)
    import builtins

    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as the module `site` does, which is not loaded
    sys.path[:] = [path for path in sys.path if path]
    write_frame(replies, hello["nonce"], "ready")
    if hello["entry_point"] is not None:
        answer_calls(requests, replies, hello["source"], hello["entry_point"], hello["nonce"])
        os._exit(0)
    answer_runs(requests, replies, hello["max_output"])
    if hello["die_with_parent"]:
        control(PR_SET_PDEATHSIG, SIGKILL)
    return str(hello["source"])


program = main()
sys.modules["__main__"] = type(sys)("__main__")
exec(compile(program, "program.py", "exec"), sys.modules["__main__"].__dict__)
