"""A program that runs TFF's worker where nobody but its owner can reach it.

    python -I -S confined_worker.py PARENT SOCKET WORKER_BINARY [WORKER_FLAG ...]

TFF's worker listens on all of a machine's interfaces, runs any graph that it is sent, as its owner, and asks nobody
who they are. Here it gets a network namespace of its own (and a user namespace, which lets others than root make one),
whose only interface is its loopback. This process, in the same namespace, moves bytes between that and a unix socket,
which the permissions of its directory protect.

Ends with the worker, with PARENT (the process that starts it), and with exit status 3 where the kernel refuses the
namespaces. It needs nothing but Python's own modules, and starts in some 20 ms.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time

REFUSED = 3

_PORT = 10000  # In a network namespace of its own it is free.
_SECONDS_TO_LISTEN = 60.0
_CHUNK = 1 << 20
# From <linux/sched.h>, <linux/sockios.h>, <linux/if.h>, <linux/prctl.h> and <linux/fcntl.h>.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40
_PR_SET_PDEATHSIG = 1
_F_SETPIPE_SZ = 1031

_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Has the kernel end this process with its parent; ends it here if that is gone already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    parent, path, binary, *worker_flags = sys.argv[1:]
    end_with(int(parent))
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    # Root needs no user namespace, in which it could no longer read what others own.
    if _libc.unshare(_CLONE_NEWNET) and _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        print(os.strerror(ctypes.get_errno()), file=sys.stderr)
        sys.exit(REFUSED)
    end_with(int(parent))  # The new credentials have made the kernel forget it.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))
    this = os.getpid()
    worker = os.fork()
    if worker == 0:
        end_with(this)
        os.execv(binary, [binary, f"--port={_PORT}", *worker_flags])
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    _, status = os.waitpid(worker, 0)
    signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if signal_number:  # This process ends as the worker did.
        os.kill(this, signal_number)
    sys.exit(os.waitstatus_to_exitcode(status))


def _serve(server: socket.socket) -> None:
    _connect().close()
    server.listen()  # Only now: who connects finds a worker that answers.
    while True:
        driver, _ = server.accept()
        worker = _connect()
        for pair in ((driver, worker), (worker, driver)):
            threading.Thread(target=_move, args=pair, daemon=True).start()


def _connect() -> socket.socket:
    """Returns a connection to the worker, when it listens."""
    until = time.monotonic() + _SECONDS_TO_LISTEN
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", _PORT))
        except OSError:
            if time.monotonic() > until:
                os._exit(1)
            time.sleep(0.02)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _move(source: socket.socket, sink: socket.socket) -> None:
    """Moves bytes from one socket to the other, inside the kernel, until the end of the first."""
    reader, writer = os.pipe()
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
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


if __name__ == "__main__":
    main()
