"""A seccomp filter that refuses system calls untrusted code does not need (classic BPF, x86-64 and aarch64, Linux).

These calls allocate memory outside resource limits (shared memory, message queues, memory files), access other
processes, or expose a large part of the kernel. They are refused with EPERM; `clone` only if it asks
for a namespace, and `clone3`, whose flags a filter cannot see, with ENOSYS, so that libc falls back to `clone`. Sockets of
families outside FAMILIES are refused: AF_VSOCK, for one, reaches a virtual machine's host from any network namespace.
Without namespaces also: all sockets, leaving the process group, and sending signals.
"""

from __future__ import annotations

import platform
import struct

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64)
_ALWAYS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "mq_open": (240, 180), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
_WITHOUT_NAMESPACES = {
    "setsid": (112, 157), "setpgid": (109, 154), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
"""Families of the sockets that a program in a network namespace of its own may open."""
_SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_X32 = 0x40000000  # call numbers from here on are the x32 variants of the same calls on x86-64

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def denied(namespaces: bool) -> bytes:
    """Return the filter's instructions, eight bytes each; empty on other machines."""
    machine = platform.machine()
    if machine not in _ARCH:
        return b""
    column = list(_ARCH).index(machine)
    calls = _ALWAYS if namespaces else {**_ALWAYS, **_WITHOUT_NAMESPACES}
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]
    for numbers in calls.values():
        code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    families = [*FAMILIES.values()] if namespaces else []
    for name, numbers in _SOCKETS.items():
        allowed = families if name == "socket" else [FAMILIES["AF_UNIX"]]
        num = len(allowed)
        code += [
            (_EQUAL, 0, num + 3, numbers[column]),
            (_LOAD, 0, 0, 16),
            *[(_EQUAL, num - n, 0, family) for n, family in enumerate(allowed)],
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code += [
        (_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACE),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
