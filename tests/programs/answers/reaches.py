"Tries to reach what is outside the sandbox, and says what came of each try."

import ctypes
import errno
import os
import socket
import subprocess
import sys
import threading


def refused(action, *args, **kwargs):
    try:
        action(*args, **kwargs)
    except BaseException as e:
        return type(e).__name__
    return "done"


def fill():
    for i in range(64):
        with open(f"/tmp/{i}", "wb") as f:
            f.write(bytes(1 << 20))


def call(name, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        return errno.errorcode[ctypes.get_errno()]
    return "done"


def f(path, port):
    return {
        "file": refused(open, path),
        "users": refused(open, "/etc/passwd"),
        "processes": refused(os.listdir, "/proc"),
        "tests": "tests" in sys.modules or os.path.exists("/program/tests.py"),
        "packages": refused(__import__, "codex_nb"),
        "write": [refused(open, p, "w") for p in ("/x", "/program/x", "/dev/x", "/python/x")],
        "change": refused(open, "/program/answer.py", "a"),
        "fill": refused(fill),
        "internet": refused(socket.create_connection, ("127.0.0.1", port)),
        "sockets": [refused(socket.socket, family) for family in (1, 2, 10, 16, 40)],
        "fork": refused(os.fork),
        "process": refused(subprocess.run, ["/python/bin/python3", "-c", ""]),
        "thread": refused(threading.Thread(target=print).start),
        "namespace": call("unshare", 0x10000000),
        "memory": [refused(bytearray, 1 << 30), call("memfd_create", b"x", 0)],
        "signal": refused(os.kill, -1, 9),
        "variables": sorted({*os.environ} - {"LC_CTYPE", "PWD"}),
    }
