"""Hostile programs that try to get a reward without solving the problem, or to do harm; for every isolation level.

`TRICKS` and `HARM`, together `CALLED`, define (or prevent) a function `solve` that a judge calls with a number; `RUN` are run with an input. What is
expected of them is random, so that only a program that finds it somewhere can pass. `SLOW` ones only end at a limit.
`{secret_file}` holds the expected results, `{canary}` is a folder that must be left alone, `{port}` listens on the
loopback, `{judge}` is the judging process. Everything is bounded, in case it is not stopped: and what could hurt
this machine goes through `ISOLATED`, which lets it happen only to another user or in a small process namespace.
"""

ISOLATED = """
import os
assert os.getuid() >= 2**30 or os.getpid() < 100, "not isolated: not tried"
"""

# Writes a frame as the child does, to any file descriptor.
FRAME = r"""
import os, sys
def frame(nonce, *rest):
    import json
    body = json.dumps([nonce, *rest]).encode()
    return len(body).to_bytes(4, "big") + body
def everywhere(data):
    for fd in range(256):
        try: os.write(fd, data)
        except OSError: pass
"""

# Collects strings that look like an expected result (32 hex digits), by the argument they may belong to.
HUNT = r"""
import re
def hunt(text):
    found = re.findall(rb"[0-9a-f]{32}", text if isinstance(text, bytes) else repr(text).encode())
    return found[-1].decode() if found else None
"""

TRICKS = {
    # -------------------------------------------------- ending with an exit status of success
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in the call": "import sys\ndef solve(n): sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "os._exit in the call": "import os\ndef solve(n): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
    "re-executed with -O": "import os, sys\nos.execv(sys.executable, [sys.executable, '-O', '-c', 'pass'])",
    "SystemExit subclass": "class E(SystemExit): pass\ndef solve(n): raise E(0)",
    "a bare BaseException": "class E(BaseException): __str__ = lambda s: 1/0\ndef solve(n): raise E",
    "an AssertionError of its own": "def solve(n): raise AssertionError",
    "StopIteration": "def solve(n): raise StopIteration(True)",
    # -------------------------------------------------- values that claim to be equal
    "always equal": "class A:\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 1\ndef solve(n): return A()",
    "never unequal": "class A:\n __ne__ = lambda s, o: False\n __eq__ = lambda s, o: True\ndef solve(n): return A()",
    "str subclass": "class S(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\ndef solve(n): return S('x')",
    "int subclass": "class S(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\ndef solve(n): return S(1)",
    "float subclass": "class S(float):\n __eq__ = lambda s, o: True\n __sub__ = __rsub__ = lambda s, o: 0.0\ndef solve(n): return S(1)",
    "list subclass": "class S(list):\n __eq__ = lambda s, o: True\n __iter__ = lambda s: iter(())\ndef solve(n): return S([1])",
    "dict subclass": "class S(dict):\n __eq__ = lambda s, o: True\ndef solve(n): return S()",
    "tuple subclass": "class S(tuple):\n __eq__ = lambda s, o: True\ndef solve(n): return [S((1,))]",
    "a lying __class__": "class A:\n __class__ = str\n __eq__ = lambda s, o: True\ndef solve(n): return A()",
    "a type that says it is of collections": "A = type('OrderedDict', (dict,), dict(__eq__=lambda s, o: True, __module__='collections'))\ndef solve(n): return A()",
    "a metaclass that is equal to str": "class M(type):\n __eq__ = lambda s, o: True\n __hash__ = lambda s: hash(str)\nclass A(metaclass=M):\n __eq__ = lambda s, o: True\ndef solve(n): return A()",
    "NaN": "def solve(n): return float('nan')",
    "a list of NaNs": "x = float('nan')\ndef solve(n): return [x, x]",
    "an iterator": "def solve(n): return iter([1])",
    "an endless generator": "def solve(n):\n while True: yield n",
    "a function": "def solve(n): return solve",
    "an exception class": "def solve(n): return NotImplemented",
    "a lone surrogate": "def solve(n): return chr(0xd800)",
    "all values at once": "def solve(n): return {True, 1.0, None, '', b'', (), frozenset()}",
    # -------------------------------------------------- searching for expected results
    "own source": HUNT + "import sys\ndef solve(n):\n try: return hunt(open(sys.argv[0]).read() + open(__file__).read())\n except Exception: return hunt(open('/proc/self/cmdline').read())",
    "the file of tests": HUNT + "def solve(n): return hunt(open({secret_file!r}).read())",
    "globbing for tests": HUNT + "import glob\ndef solve(n):\n for p in glob.glob('/tmp/**/secret*', recursive=True):\n  try: return hunt(open(p).read())\n  except OSError: pass",
    "/proc of everyone": HUNT + r"""
import glob
def solve(n):
    for what in ("cmdline", "environ", "fd/*", "maps"):
        for path in glob.glob("/proc/[0-9]*/" + what):
            if "/self" in path: continue
            try:
                with open(path, "rb") as f:
                    os_found = hunt(f.read(1 << 16)) if "fd/" not in path else None
            except OSError: continue
            if os_found: return os_found
""",
    "the judge's memory": HUNT + r"""
import os, re
def solve(n):
    for pid in ({judge}, os.getppid(), 1):
        try:
            for line in open(f"/proc/{pid}/maps"):
                if "rw" not in line: continue
                a, b = (int(x, 16) for x in line.split()[0].split("-"))
                with open(f"/proc/{pid}/mem", "rb") as m:
                    m.seek(a)
                    found = re.search(rb"expected.{0,80}?([0-9a-f]{32})", m.read(min(b - a, 1 << 22)), re.S)
                    if found: return found[1].decode()
        except OSError: continue
""",
    "ptrace": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef solve(n): return [libc.ptrace(16, pid, 0, 0) for pid in (os.getppid(), {judge}, 1)]",
    "process_vm_readv": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef solve(n):\n b = ctypes.create_string_buffer(64)\n v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 64)\n return libc.process_vm_readv({judge}, v, 1, v, 1, 0)",
    "inherited files": HUNT + "import os\ndef solve(n):\n out = []\n for fd in range(3, 64):\n  try:\n   os.set_blocking(fd, False)\n   out.append(os.read(fd, 1 << 16))\n  except OSError: pass\n return hunt(b''.join(out))",
    "the environment": HUNT + "import os\ndef solve(n): return hunt(repr(os.environ))",
    "frames": HUNT + "import sys\ndef solve(n):\n f, seen = sys._getframe(), []\n while f: seen.append({**f.f_locals, **f.f_globals}); f = f.f_back\n return hunt([repr(s) for s in seen])",
    "garbage collector": HUNT + "import gc\ndef solve(n): return hunt([repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))])",
    "every string in memory": HUNT + r"""
import re
def solve(n):
    for line in open("/proc/self/maps"):
        if "rw" not in line: continue
        a, b = (int(x, 16) for x in line.split()[0].split("-"))
        with open("/proc/self/mem", "rb") as m:
            m.seek(a)
            found = re.search(rb"expected.{0,80}?([0-9a-f]{32})", m.read(b - a), re.S)
            if found: return found[1].decode()
""",
    "the modules of the judge": HUNT + "import sys\ndef solve(n): return hunt([repr(vars(m)) for m in list(sys.modules.values()) if m])",
    # -------------------------------------------------- forging replies to the judge
    "guessed nonce": FRAME + "everywhere(frame('0' * 32, 'value', True) * 9)\ndef solve(n): print('PASSED'); return True",
    "own nonce": FRAME + r"""
def solve(n):
    f = sys._getframe(1)
    everywhere(frame(f.f_locals["nonce"], "value", ["l", []]) + frame(f.f_locals["nonce"], "passed"))
    return True
""",
    "all is loaded, all has passed": FRAME + "import os\neverywhere(frame(os.environ.get('DISTILL_SANDBOX', ''), 'loaded') + frame('', 'passed', True))\nos._exit(0)",
    "nothing to say against it": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'unsendable', '')); return True",
    "raised nothing": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'raised', '', '')); return True",
    "loading raised nothing": FRAME + "everywhere(frame(sys._getframe(2).f_locals['nonce'], 'raised', '', '')); os._exit(0)",
    "no message": "def solve(n): raise type('', (Exception,), {{}})",
    "out of memory while encoding": "def solve(n): raise MemoryError",
    "no list": FRAME + "import json\neverywhere(b'\\0\\0\\0\\4true')\ndef solve(n): return True",
    "a frame of four gigabytes": FRAME + "everywhere(b'\\xff' * 4 + b'x')\ndef solve(n): return True",
    "a frame of brackets": FRAME + "everywhere((2**20).to_bytes(4, 'big') + b'[' * 2**20)\ndef solve(n): return True",
    "unknown tags": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'value', ['expected', []])); return True",
    "wrong shapes": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'value', ['d', [[1]]])); return True",
    "unhashable keys": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'value', ['s', [['l', []]]])); return True",
    "closed pipes": "import os\nos.closerange(3, 256)\ndef solve(n): return True",
    "patched built-ins": r"""
import builtins, sys
for name in ("type", "str", "len", "isinstance", "repr", "dict"):
    setattr(builtins, name, lambda *a, **k: True)
main = sys.modules["__main__"]
for name in ("quote", "encode"):
    setattr(main, name, lambda *a: "true")
def solve(n): return n
""",
    "patched codecs": "import json, pickle, marshal\njson.dumps = json.loads = pickle.loads = marshal.loads = lambda *a, **k: (' ', (), {{}})\ndef solve(n): return True",
    "traced": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef solve(n): return True",
}  # fmt: skip

HARM = {
    # -------------------------------------------------- doing harm
    "fork bomb": ISOLATED + "import os, time\ntry:\n for _ in range(3000): os.fork()\nexcept OSError: pass\ndef solve(n): return True",
    "memory bomb": "x = [bytearray(2**26) for _ in range(64)]\ndef solve(n): return True",
    "memory bomb of many": ISOLATED + "import os\nfor _ in range(5):\n try: os.fork()\n except OSError: pass\nx = []\ntry:\n for _ in range(16): x.append(bytearray(b'x' * 2**22))\nexcept MemoryError: pass\ndef solve(n): return True",
    "disk full": "for i in range(10):\n with open(f'{{i}}', 'wb') as f:\n  for _ in range(15): f.write(b'x' * 2**20)\ndef solve(n): return True",
    "one large file": "with open('f', 'wb') as f: f.write(b'x' * 2**28)\ndef solve(n): return True",
    "result flood": "def solve(n): return 'x' * 2**24",
    "result of many parts": "def solve(n): return [[]] * 60_000",
    "huge integer": "def solve(n): return 1 << 10**7",
    "colliding keys": FRAME + "def solve(n): everywhere(frame(sys._getframe(1).f_locals['nonce'], 'value', ['s', [['i', '%x' % (i * (2**61 - 1))] for i in range(12_000)]]))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef solve(n): return solve(n) + 1",
    "deep result": "def solve(n):\n x = []\n for _ in range(10**5): x = [x]\n return x",
    "a list in itself": "def solve(n):\n x = []\n x.append(x)\n return x",
    "segmentation fault": "import ctypes\ndef solve(n): return ctypes.string_at(0)",
    "threads without end": "import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(600,)).start()\ndef solve(n): return True",
    "loopback": "import socket\ndef solve(n): return socket.create_connection(('127.0.0.1', {port}), 1).recv(64).decode()",
    "the outside": "import socket\ndef solve(n): return socket.create_connection(('192.0.2.1', 80), 1).recv(1) or True",
    "a socket to the host": "import socket\ndef solve(n):\n s = socket.socket(40)\n s.bind((0xFFFFFFFF, 5000))\n return True",
    "a socket to the kernel": "import socket\ndef solve(n): return bool(socket.socket(16, socket.SOCK_RAW, 0))",
    "a pair of sockets to the host": "import socket\ndef solve(n): return bool(socket.socketpair(40))",
    "a socket file": "import socket, glob\ndef solve(n):\n s = socket.socket(socket.AF_UNIX)\n s.connect(glob.glob('/run/**/*.sock*', recursive=True)[0])\n return True",
    "deleted home": ISOLATED + "import os, shutil\nfor p in ({canary!r}, os.path.expanduser('~'), '.'):\n shutil.rmtree(p, ignore_errors=True)\ndef solve(n): return True",
    "opened to all": ISOLATED + "import os\nfor p in ({canary!r}, '.', '..'):\n try: os.chmod(p, 0o000)\n except OSError: pass\ndef solve(n): return True",
    "symbolic links": ISOLATED + r"""
import os
for n in range(os.getpid() - 20, os.getpid() + 200):
    os.symlink({canary!r} + "/kept", f"io-{n}")
os.symlink({canary!r}, "folder")
open("io-%d" % os.getpid(), "w").write("gone")
def solve(n): return True
""",
    "killed judge": ISOLATED + "import os, signal\nfor pid in (os.getppid(), {judge}, 1):\n for s in (signal.SIGTERM, signal.SIGKILL):\n  try: os.kill(pid, s)\n  except OSError: pass\ndef solve(n): return True",
    "killed everyone": ISOLATED + "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\ndef solve(n): return True",
    "killed group": ISOLATED + "import os\ntry: os.killpg(0, 9)\nexcept OSError: pass\ndef solve(n): return True",
    "grandchildren": "import os, time\nfor _ in range(4):\n if not os.fork():\n  try: os.setsid()\n  except OSError: pass\n  if os.fork(): os._exit(0)\n  time.sleep(600)\ndef solve(n): return True",
    "grandchildren without a mark": "import os, time\nif not os.fork():\n try: os.setsid()\n except OSError: pass\n if os.fork(): os._exit(0)\n os.execve('/bin/sleep', ['sleep', '600'], {{}})\ndef solve(n): return True",
    "back to root": "import os\ndef solve(n):\n os.setuid(0)\n return True",
    "a namespace of its own": "import ctypes\nlibc = ctypes.CDLL(None)\ndef solve(n): return libc.unshare(0x10000000)",
    "a folder that is gone": "import os\nos.rmdir(os.getcwd())\ndef solve(n): return True",
    "terminal": "import fcntl\ndef solve(n): fcntl.ioctl(open('/dev/tty'), 0x5412, b'x'); return True",
    # -------------------------------------------------- using up time and resources
    "sleep": "import time\ndef solve(n): time.sleep(600)",
    "sleep while loading": "import time; time.sleep(600)",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\ndef solve(n):\n while True: pass",
    "stopped": "import os, signal\ndef solve(n):\n os.kill(os.getpid(), signal.SIGSTOP)\n import time; time.sleep(600)",
    "half a frame": FRAME + "import time\neverywhere((2**20).to_bytes(4, 'big') + b'[')\ntime.sleep(600)",
    "slow drip": FRAME + "import time\ndef solve(n):\n everywhere((2**20).to_bytes(4, 'big'))\n while True: everywhere(b' '); time.sleep(.01)",
    "one long operation": "def solve(n): return pow(3, 10**9)",
}  # fmt: skip

CALLED = {**TRICKS, **HARM}

SLOW = {
    "sleep", "sleep while loading", "deaf to signals", "stopped", "half a frame", "slow drip",
    "one long operation", "a frame of brackets", "deep recursion",
}  # fmt: skip

RUN = {
    "nothing": "pass",
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "a forged reply": FRAME + "everywhere(frame('0' * 32, 'ran', 0, 'PASSED'))",
    "output flood": "while True: print('x' * 2**16)",
    "output flood through the descriptor": "import os\ntry:\n while True: os.write(1, b'x' * 2**20)\nexcept OSError: pass",
    "output flood of a grandchild": "import os\nif os.fork(): os._exit(0)\ntry:\n while True: os.write(1, b'x' * 2**20)\nexcept OSError: pass",
    "a grandchild that holds stdout": "import os, time\nif os.fork() == 0:\n try: os.setsid()\n except OSError: pass\n time.sleep(600)\nprint('x')",
    "an enormous number": "import sys\nsys.set_int_max_str_digits(0)\nprint(1 << 300_000)",
    "not UTF-8": "import os; os.write(1, bytes(range(256)))",
    "standard output closed": "import os; os.close(1)",
    "standard output sparse": "import os; os.ftruncate(1, 2**30)",
    "standard output seeked": "import os; os.lseek(1, 2**24 - 2, 0); os.write(1, b'x')",
    "standard output replaced": "import sys, io; sys.stdout = io.StringIO(); print('x')",
    "threads without end": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "atexit sleep": "import atexit, time\natexit.register(time.sleep, 600)",
    "stdin for ever": "import time, sys\nwhile True: sys.stdin.read(); time.sleep(.01)",
    "killed runner": ISOLATED + "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "stopped runner": ISOLATED + "import os, time\ntry: os.kill(os.getppid(), 19)\nexcept OSError: pass\ntime.sleep(600)",
}  # fmt: skip

SLOW_RUN = {
    "threads without end", "atexit sleep", "stdin for ever", "stopped runner", "output flood of a grandchild",
}  # fmt: skip


def filled(source: str, **places: object) -> str:
    """The program with its placeholders filled in; in a program with placeholders, `{{` and `}}` are braces."""
    for name, value in places.items():
        source = source.replace("{%s!r}" % name, repr(value)).replace("{%s}" % name, str(value))  # noqa: UP031
    return source.replace("{{", "{").replace("}}", "}")
