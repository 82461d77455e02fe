import fcntl
import os
import pathlib
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import grpc
import numpy as np
import portpicker
import psutil
import pytest
import tensorflow_federated as tff
from conftest import ROOT

from tff_fedavg import worker_process
from tff_fedavg.worker_process import WorkerProcess

ENDED_AGAIN = "the TFF worker is started again: it ended by signal SIGKILL\n"


def popen(*flags, environment=None):
    # A shell or nohup may have had this process ignore signals.
    command = ["env", "--default-signal=HUP,INT,QUIT", sys.executable, "-m", "binaries.worker", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, text=True, **pipes)


def start(address, *flags):
    """Starts the program; returns it when it says that it listens at the address."""
    program = popen(f"--address={address}", *flags)
    line = program.stdout.readline()
    cores = len(os.sched_getaffinity(0))
    assert line == f"listening at {address}, {cores} cores; end with Ctrl-C\n", program.stderr.read()
    return program


def end(program, signal_number=signal.SIGTERM):
    """Ends the program; returns its exit status and what is left on its stderr."""
    program.send_signal(signal_number)
    _, errors = program.communicate(timeout=10)
    return program.returncode, errors


def run(*flags):
    """Runs a program that is to fail; returns its exit status and its stderr."""
    program = popen(*flags)
    output, errors = program.communicate(timeout=10)
    assert output == ""
    return program.returncode, errors


def wait_until(condition):
    """Returns what the condition gives, when that is true."""
    until = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value


def binary_of(program):
    """The process of the TFF worker of a program."""
    children = psutil.Process(program.pid).children
    return wait_until(lambda: next((p for p in children(recursive=True) if p.name() == "worker_binary"), None))


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # Until somebody asks how it ended.
    except psutil.NoSuchProcess:
        return True


def compute(address):
    """Has the worker at an address add up 1, 2 and 3."""

    @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
    def total(values):
        return tff.federated_sum(values)

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = tff.framework.RemoteExecutorGrpcStub(channel)
        wait_until(lambda: stub.is_ready)

        def executor_stack(cardinalities):
            executor = tff.framework.RemoteExecutor(stub)
            executor.set_cardinalities(cardinalities)
            return executor

        context = tff.framework.SyncExecutionContext(
            tff.framework.ResourceManagingExecutorFactory(executor_stack),
            compiler_fn=tff.backends.native.desugar_and_transform_to_native,
            transform_args=tff.tensorflow.transform_args,
            transform_result=tff.tensorflow.transform_result,
        )
        with tff.framework.get_context_stack().install(context):
            return total([1, 2, 3])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("w")  # The path of a socket has 107 bytes at most.


@pytest.fixture(scope="module")
def on_socket(directory):
    """A program that listens at a unix socket, and its address."""
    address = f"unix:{directory}/shared.sock"
    program = start(address)
    yield program, address
    assert end(program) == (128 + signal.SIGTERM, "")


@pytest.fixture(scope="module")
def on_port():
    """A program that listens at a port, and its address."""
    address = f"127.0.0.1:{portpicker.pick_unused_port()}"
    program = start(address)
    warning = program.stderr.readline()
    assert warning == f"whoever reaches {address} can run anything as this user: it is for private networks\n"
    yield program, address
    assert end(program) == (128 + signal.SIGTERM, "")


def test_a_worker_on_a_unix_socket_computes_and_is_its_owners_only(on_socket):
    program, address = on_socket
    assert compute(address) == 6
    assert stat.S_IMODE(os.stat(address.removeprefix("unix:")).st_mode) == 0o600
    binary = binary_of(program)
    assert pathlib.Path(f"/proc/{binary.pid}/ns/net").readlink() != pathlib.Path("/proc/self/ns/net").readlink()
    processes = (binary, *binary.parents()[:2])
    assert [c for p in processes for c in p.connections(kind="inet") if c.status == "LISTEN"] == []


def test_a_worker_on_a_port_computes_and_listens_nowhere_else(on_port):
    program, address = on_port
    assert compute(address) == 6
    binary = binary_of(program)
    assert pathlib.Path(f"/proc/{binary.pid}/ns/net").readlink() != pathlib.Path("/proc/self/ns/net").readlink()
    listening = [c for c in binary.parent().connections(kind="inet") if c.status == "LISTEN"]
    assert [f"{c.laddr.ip}:{c.laddr.port}" for c in listening] == [address]


@pytest.mark.parametrize("where", ["on_socket", "on_port"])
def test_an_address_in_use_is_told_and_left_to_who_uses_it(where, request):
    _, address = request.getfixturevalue(where)
    told = f"cannot listen at {address}: another worker does"
    if where == "on_port":
        told = (
            "the TFF worker did not start: it ended with exit status 1: "
            f"cannot listen at {address}: Address already in use"
        )
    assert run(f"--address={address}") == (2, f"worker: {told}\n")
    assert compute(address) == 6


def test_a_socket_of_another_program_that_listens_is_left_alone(directory):
    address = f"unix:{directory}/other.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{directory}/other.sock")
        server.listen()
        status, errors = run(f"--address={address}")
        assert status == 2 and errors.endswith(f": cannot listen at {address}: Address already in use\n")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{directory}/other.sock")


def test_a_socket_of_a_worker_that_does_not_listen_yet_is_left_alone(directory):
    """As of one that is started at the same time: nobody can tell it from that of a dead one."""
    address = f"unix:{directory}/starts.sock"
    with open(f"{directory}/starts.sock.lock", "w") as lock, socket.socket(socket.AF_UNIX) as server:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.bind(f"{directory}/starts.sock")
        assert run(f"--address={address}") == (2, f"worker: cannot listen at {address}: another worker does\n")
    assert (directory / "starts.sock").exists()


def test_a_worker_that_is_not_confined_computes_too(directory):
    address = f"unix:{directory}/not_confined.sock"
    program = start(address, "--noconfined")
    assert compute(address) == 6
    assert (
        pathlib.Path(f"/proc/{binary_of(program).pid}/ns/net").readlink()
        == pathlib.Path("/proc/self/ns/net").readlink()
    )
    assert end(program) == (128 + signal.SIGTERM, "")


def test_a_kernel_that_refuses_is_told_and_refused_if_confinement_is_asked_for(directory):
    address = f"unix:{directory}/refused.sock"
    # In a user namespace of its own root may forbid what the kernel of a container, or a hardened one, forbids.
    command = """
echo 0 > /proc/sys/user/max_net_namespaces
"$0" -m binaries.worker --address="$1" --confined
exec timeout --signal=INT 1 "$0" -m binaries.worker --address="$1"
"""
    arguments = ["unshare", "--user", "--map-root-user", "sh", "-c", command, sys.executable, address]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert result.stdout.startswith(f"listening at {address}, ")
    reason = "No space left on device"  # What unshare says where the number of namespaces is at its limit.
    assert result.stderr.splitlines() == [
        f"worker: the TFF worker cannot be confined: {reason}",
        f"the kernel does not let the TFF worker be confined ({reason}): it listens on another port too, where whoever "
        "reaches this machine can run anything as this user",
        "worker: interrupted",
    ]


@pytest.mark.parametrize("kind", ["socket", "port"])
def test_a_worker_that_dies_is_started_again_but_not_for_ever(directory, kind):
    address = f"unix:{directory}/dies.sock" if kind == "socket" else f"127.0.0.1:{portpicker.pick_unused_port()}"
    program = start(address)
    if kind == "port":
        program.stderr.readline()
    for _ in range(2):
        assert compute(address) == 6
        binary_of(program).kill()
        assert program.stderr.readline() == ENDED_AGAIN
    binary_of(program).kill()
    _, errors = program.communicate(timeout=10)
    assert errors == "worker: the TFF worker ended 3 times within a minute, last by signal SIGKILL\n"
    assert program.returncode == 2
    assert not (directory / "dies.sock").exists()


@pytest.mark.parametrize(
    ("signal_number", "status", "told"),
    [
        (signal.SIGINT, 130, "worker: interrupted\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
        (signal.SIGQUIT, 131, ""),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_nothing_is_left_when_the_program_ends(directory, signal_number, status, told):
    address = f"unix:{directory}/ends.sock"
    program = start(address)  # After SIGKILL, in the place of the dead socket.
    binary = binary_of(program)
    relay = binary.parent()
    assert end(program, signal_number) == (status, told)
    wait_until(lambda: has_ended(binary) and has_ended(relay))
    assert (directory / "ends.sock").exists() == (signal_number == signal.SIGKILL)


def test_a_dead_socket_is_replaced(directory):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{directory}/dead.sock")
        server.listen()
    address = f"unix:{directory}/dead.sock"
    program = start(address)
    assert compute(address) == 6
    end(program)


def test_what_is_no_socket_is_left_alone(directory):
    (directory / "file").write_text("text")
    status, errors = run(f"--address=unix:{directory}/file")
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.endswith(f"cannot listen at unix:{directory}/file: what is there is no socket\n")
    assert (directory / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("somewhere", "--address=somewhere: it is no address of a worker; give unix:PATH or HOST:PORT"),
        ("unix:", "--address=unix:: it is no address of a worker; give unix:PATH or HOST:PORT"),
        (":7000", "--address=:7000: it is no address of a worker; give unix:PATH or HOST:PORT"),
        ("127.0.0.1:0", "--address=127.0.0.1:0: it is no port; give HOST:PORT with one from 1 to 65535"),
        ("127.0.0.1:65536", "--address=127.0.0.1:65536: it is no port; give HOST:PORT with one from 1 to 65535"),
        ("192.0.2.1:7000", "cannot listen at 192.0.2.1:7000: Cannot assign requested address"),
        ("unix:/nowhere/socket", "cannot listen at unix:/nowhere/socket: No such file or directory"),
        ("unix:/" + "a" * 107, f"=unix:/{'a' * 107}: the path of a socket may have 107 bytes; give a shorter one"),
    ],
)
def test_an_address_where_nobody_can_listen_is_told_in_one_line(address, told):
    status, errors = run(f"--address={address}")
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("worker: ") and errors.endswith(f"{told}\n")


@pytest.mark.parametrize(("variable", "parent"), [("XDG_RUNTIME_DIR", ""), ("HOME", ".cache")])
def test_the_default_is_a_socket_in_a_directory_of_the_owner(directory, variable, parent):
    home = directory / variable
    home.mkdir()
    program = popen(environment={"XDG_RUNTIME_DIR": "", variable: str(home)})
    path = home / parent / "tff_fedavg/worker.sock"
    assert program.stdout.readline().startswith(f"listening at unix:{path}, ")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    end(program)


def test_it_starts_without_tensorflow():
    program = "import sys, binaries.worker; sys.exit('tensorflow' in sys.modules or 'grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Has a shell script take the place of TFF's worker."""

    def replace(text):
        binary = tmp_path / "worker"
        binary.write_text(f"#!/bin/sh\n{text}\n")
        binary.chmod(0o755)
        monkeypatch.setattr(worker_process, "BINARY", binary)
        return WorkerProcess(f"unix:{tmp_path}/socket", confined=False)

    return replace


@pytest.mark.parametrize(
    ("oom_kills", "text", "how"),
    [
        ([4, 4], "kill -KILL $$", "by signal SIGKILL: one | two"),
        ([4, 5], "kill -KILL $$", "by the kernel, since memory ran out: one | two"),
        ([4, 5], "kill -SEGV $$", "by signal SIGSEGV: one | two"),
        ([4, 5], "exit 7", "with exit status 7: one | two"),
    ],
)
def test_how_a_worker_ended_is_told(script, monkeypatch, oom_kills, text, how):
    monkeypatch.setattr(worker_process, "_oom_kills", iter(oom_kills).__next__)
    process = script(f"echo one >&2; echo two >&2; {text}")
    assert not process.listens()
    assert not process.refused
    assert process.end() == how


def test_a_worker_that_cannot_be_ended_at_once_does_not_hold_up_the_program(script):
    process = script("setsid sh -c 'echo $$ >&2; exec sleep 60' & wait")
    assert not process.listens(timeout=0.1)
    pid = int(wait_until(process.said))
    started = time.monotonic()
    process.kill()
    assert time.monotonic() - started < 3
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def ssh_server(directory):
    """The flags with which ssh gets into this machine by an sshd of its own."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    programs = {name: shutil.which(name, path=path) for name in ("sshd", "ssh", "ssh-keygen")}
    if missing := [name for name, program in programs.items() if program is None]:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    for key in ("host", "user"):
        subprocess.run([programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    port = portpicker.pick_unused_port()
    config = directory / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\n"
    )
    check = subprocess.run([programs["sshd"], "-t", "-f", config], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"sshd does not start here: {check.stderr.strip()}")
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
    server = subprocess.Popen([programs["sshd"], "-D", "-e", "-f", config], stderr=subprocess.PIPE, text=True)
    assert "listening" in server.stderr.readline()
    yield (
        *(programs["ssh"], "-F", "none", "-p", str(port), "-i", f"{directory}/user", "-o", "BatchMode=yes"),
        *("-o", f"UserKnownHostsFile={directory}/known_hosts", "-o", "ExitOnForwardFailure=yes"),
        f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1",
    )
    server.kill()
    server.communicate()


def test_a_worker_computes_through_ssh(on_socket, ssh_server, directory):
    _, address = on_socket
    here = directory / "here.sock"
    tunnel = subprocess.Popen(
        [*ssh_server, "-N", "-L", f"{here}:{address.removeprefix('unix:')}"], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: here.exists() or tunnel.poll() is not None)
    assert tunnel.poll() is None, tunnel.stderr.read()
    assert compute(f"unix:{here}") == 6
    tunnel.kill()
    tunnel.communicate()
