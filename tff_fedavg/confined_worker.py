"""A program that runs TFF's worker where nobody but its owner can reach it.

    python -I -S confined_worker.py PARENT ADDRESS CONFINED WORKER_BINARY [WORKER_FLAG ...]

TFF's worker listens on all of a machine's interfaces, runs any graph that it is sent, as its owner, and asks nobody
who they are. With 1 for CONFINED it gets a network namespace of its own (and a user namespace, which lets others than
root make one), whose only interface is its loopback. This process, in the same namespace, moves bytes between that and
ADDRESS, outside: unix:PATH, a socket that only its owner can connect to, or HOST:PORT, which protects nothing. With 0
the worker stays outside, on a free port, and can be reached there too.

It listens when the worker answers, and says so on stderr, with the worker's process id. It ends with the worker, and as
that did; with PARENT, the process that starts it; with exit status 3 where the kernel refuses the namespaces, 1 where
ADDRESS cannot be had. The file of a unix socket that nobody listens at is replaced. It needs nothing but Python's own
modules, and starts in some 20 ms.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time

REFUSED = 3
LISTENING = "listening"

_CONFINED_PORT = 10000  # In a network namespace of its own it is free.
_SECONDS_TO_LISTEN = 60.0
_CHUNK = 1 << 20
# From <linux/sched.h>, <linux/sockios.h>, <linux/if.h>, <linux/prctl.h> and <linux/fcntl.h>.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40
_PR_SET_PDEATHSIG = 1
_F_SETPIPE_SZ = 1031

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    parent, address, confined, binary, *worker_flags = sys.argv[1:]
    _end_with(int(parent))
    try:
        server = _bind(address)
    except OSError as e:
        _fail(f"cannot listen at {address}: {e.strerror or e}")
    if confined == "1":
        _confine()
        _end_with(int(parent))  # The new credentials have made the kernel forget it.
        port = _CONFINED_PORT
    else:
        # As long as it is open nobody but the worker gets its port: gRPC sets the same option.
        reserved = socket.socket()
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
    this = os.getpid()
    worker = os.fork()
    if worker == 0:
        _end_with(this)
        os.execv(binary, [binary, f"--port={port}", *worker_flags])
    threading.Thread(target=_serve, args=(server, address, port, worker), daemon=True).start()
    _, status = os.waitpid(worker, 0)
    signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if signal_number:  # This process ends as the worker did.
        os.kill(this, signal_number)
    sys.exit(os.waitstatus_to_exitcode(status))


def _end_with(parent: int) -> None:
    """Has the kernel end this process with its parent; ends it here if that is gone already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _fail(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # Also from a thread.


def _bind(address: str) -> socket.socket:
    """Returns a socket at an address, which does not listen yet."""
    if not address.startswith("unix:"):
        host, port = address.rsplit(":", 1)
        server = socket.socket()
        # The connections that it accepts have these options too.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.bind((host, int(port)))
        return server
    path = address.removeprefix("unix:")
    _remove_dead_socket(path)
    server = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    server.bind(path)
    os.umask(mask)
    return server


def _remove_dead_socket(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError("what is there is no socket")
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)  # Who listens, but does not accept, is there too.
            client.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _confine() -> None:
    """Moves this process into a network namespace of its own; ends it where the kernel refuses that."""
    # Root needs no user namespace, in which it could no longer read what others own.
    try:
        if _libc.unshare(_CLONE_NEWNET) and _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))
    except OSError as e:  # Some give the namespace, and not the right to use it.
        print(e.strerror, file=sys.stderr)
        sys.exit(REFUSED)


def _serve(server: socket.socket, address: str, port: int, worker_pid: int) -> None:
    _connect(port).close()
    try:
        server.listen()  # Only now: who connects finds a worker that answers.
    except OSError as e:
        _fail(f"cannot listen at {address}: {e.strerror or e}")
    print(LISTENING, worker_pid, file=sys.stderr, flush=True)
    while True:
        driver, _ = server.accept()
        worker = _connect(port)
        for pair in ((driver, worker), (worker, driver)):
            threading.Thread(target=_move, args=pair, daemon=True).start()


def _connect(port: int) -> socket.socket:
    """Returns a connection to the worker, when it listens."""
    until = time.monotonic() + _SECONDS_TO_LISTEN
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except OSError as e:
            if time.monotonic() > until:
                _fail(f"the worker cannot be reached: {e}")
            time.sleep(0.02)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _move(source: socket.socket, sink: socket.socket) -> None:
    """Moves bytes from one socket to the other, inside the kernel, until the end of the first."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):  # Of all pipes of a user the kernel lets only so many be larger than usual.
        fcntl.fcntl(writer, _F_SETPIPE_SZ, _CHUNK)
    try:
        while waiting := os.splice(source.fileno(), writer, _CHUNK):
            while waiting:
                waiting -= os.splice(reader, sink.fileno(), waiting)
    except OSError:
        pass  # One of the two has gone: so does the other.
    finally:
        os.close(reader)
        os.close(writer)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
