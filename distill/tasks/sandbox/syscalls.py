"""A seccomp filter that allows the system calls a program needs and refuses all others (classic BPF, x86-64 and aarch64, Linux).

What is not in `allowed_calls` gets ENOSYS, as on a kernel without the call, so that libraries fall back on an older one. `clone` is
refused with EPERM if it asks for a namespace; `clone3`, whose flags a filter cannot see, always. Sockets are allowed by family:
AF_VSOCK, for one, reaches a virtual machine's host from any network namespace. Without namespaces there are no sockets but pairs, and
no signals; a program cannot leave its process group.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterable, Iterator

from distill.tasks.sandbox.allowed_calls import CALLS, NOT_WITHOUT_NAMESPACES

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
"""Families of the sockets that a program in a network namespace of its own may open."""
_SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
_CLONE = (56, 220)
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_X32 = 0x40000000  # call numbers from here on are the x32 variants of the same calls on x86-64

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def allowed(namespaces: bool) -> bytes:
    """Return the filter's instructions, eight bytes each; empty on other machines."""
    machine = platform.machine()
    if machine not in _ARCH:
        return b""
    column = list(_ARCH).index(machine)
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]
    families = [*FAMILIES.values()] if namespaces else []
    for name, numbers in _SOCKETS.items():
        open_to = families if name == "socket" else [FAMILIES["AF_UNIX"]]
        num = len(open_to)
        code += [
            (_EQUAL, 0, num + 3, numbers[column]),
            (_LOAD, 0, 0, 16),
            *[(_EQUAL, num - n, 0, family) for n, family in enumerate(open_to)],
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code += [
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACE),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    refused = frozenset[str]() if namespaces else NOT_WITHOUT_NAMESPACES
    here = {name: number for name, numbers in CALLS.items() if (number := numbers[column]) is not None}
    for name in sorted(refused & here.keys()):
        code += [(_EQUAL, 0, 1, here[name]), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    for first, last in _runs(number for name, number in here.items() if name not in refused):
        code += [(_AT_LEAST, 0, 2, first), (_AT_LEAST, 1, 0, last + 1), (_RETURN, 0, 0, _ALLOW)]
    code += [(_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last of each run of consecutive numbers."""
    ordered = sorted({*numbers})
    start = 0
    for n in range(1, len(ordered) + 1):
        if n == len(ordered) or ordered[n] != ordered[n - 1] + 1:
            yield ordered[start], ordered[n - 1]
            start = n
