"""What all programs have in common, as a user meets it: flags, errors, signals, pipes and terminals."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import psutil
import pytest
import tensorflow as tf
from conftest import ROOT
from programs import run_at_once

from binaries.command_line import program

PROGRAMS = ("train", "evaluate", "explore", "export", "compare", "reproduce", "worker")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
# A shell or nohup may have had this process ignore signals.
PYTHON = ("env", "--unset=PYTHONUNBUFFERED", "--default-signal=INT,TERM,QUIT,HUP", sys.executable)


def run(name, *flags, **kwargs):
    command = [*PYTHON, "-m", f"binaries.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


def start(*arguments, **kwargs):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*PYTHON, *arguments], cwd=ROOT, text=True, **{**pipes, **kwargs})


def program_of(main):
    """A program with this code as `main`."""
    lines = ["import os, sys, time", "from binaries.command_line import program, signals", "def main():"]
    return "\n".join([*lines, *(f"    {line}" for line in main.splitlines()), 'program.run("program", main)'])


def start_program_of(main, **kwargs):
    """Starts it; returns it when it has said that it is ready."""
    started = start("-c", program_of(main), **kwargs)
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    return started


def end(started, timeout=5):
    """Waits for the end; returns the exit status, stdout and stderr."""
    output, errors = started.communicate(timeout=timeout)
    return started.returncode, output, errors


SWALLOWS = """
class Swallows:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
try:
    Swallows()
    time.sleep(60)
finally:
    time.sleep(1.5)
    print("saved")
"""


def test_a_signal_that_a_library_swallows_ends_the_program_and_lets_it_save():
    programs = {number: start_program_of(SWALLOWS) for number in SIGNALS}
    for number, started in programs.items():
        started.send_signal(number)
    for number, started in programs.items():
        told = "program: interrupted\n" if number == signal.SIGINT else ""
        assert end(started) == (128 + number, "saved\n", told)


SAVES = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    try:
        time.sleep(1.5)
        raise KeyError
    except KeyError:
        time.sleep(1.5)
    print("saved")
"""


def test_further_signals_do_not_disturb_the_saving():
    started = start_program_of(SAVES)
    for number in (signal.SIGTERM, *SIGNALS):
        started.send_signal(number)
        time.sleep(0.1)
    assert end(started) == (128 + signal.SIGTERM, "saved\n", "")


def test_a_program_that_swallows_every_signal_is_ended():
    main = """
signals._SECONDS_TO_END = 2
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
    started = start_program_of(main)
    started.terminate()
    assert end(started) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize("after", ["os.missing", "raise ValueError('half')", "pass"])
def test_what_comes_of_an_import_that_a_signal_has_broken_off_is_no_news(after):
    started = start_program_of(f'try:\n    print("ready", flush=True)\n    time.sleep(60)\nexcept:\n    pass\n{after}')
    started.send_signal(signal.SIGINT)
    assert end(started) == (128 + signal.SIGINT, "", "program: interrupted\n")


def test_signals_that_are_ignored_at_the_start_stay_ignored():
    ignore = lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)]  # noqa: E731
    code = program_of('print("ready", flush=True)\ntime.sleep(60)')
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=ignore
    )
    assert started.stdout.readline() == b"ready\n"
    for number in (signal.SIGHUP, signal.SIGINT):
        started.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1)
    started.terminate()
    assert end(started) == (128 + signal.SIGTERM, b"", b"")


def test_ctrl_c_while_a_program_is_still_being_loaded_is_no_traceback(tmp_path):
    (tmp_path / "absl.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    started = start("-m", "binaries.train", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGINT)
    assert end(started) == (-signal.SIGINT, "", "")


def test_every_number_has_a_range_which_is_told_with_the_value_as_it_was_typed():
    code = """
import importlib, sys
from absl import flags
from binaries.command_line import program
name = f"binaries.{sys.argv[1]}"
module = importlib.import_module(name)
for flag in flags.FLAGS.get_key_flags_for_module(name):
    kind = flag.parser.flag_type()
    if kind not in ("int", "float"):
        continue
    for text in ("", "many", "nan", "inf", "-inf", "1e39", "-1", *(["2147483648", "1.5"] if kind == "int" else [])):
        try:
            flag.parse(text)
        except flags.Error as e:
            print(program.first_line(e))
        else:
            print(flag.name, "takes", text)
"""
    found = []
    for name in PROGRAMS:
        result = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True)
        assert result.stderr == ""
        found += result.stdout.splitlines()
    for line in found:
        assert re.fullmatch(r"--\w+=(|many|nan|-?inf|1e39|-1|2147483648|1\.5): take (a number|an integer) .*\d", line)
    names = {re.match(r"--(\w+)", line)[1] for line in found}
    assert names >= {"rounds", "table", "budget_hours", "personalize_epochs", "worker_timeout", "learning_rate"}


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("train --lr=0.1", "train: unknown flag --lr: did you mean --learning_rate?"),
        ("train -C=0.1", "train: unknown flag --C: did you mean --client_fraction?"),
        ("train --localepochs=5", "train: unknown flag --localepochs: did you mean --local_epochs?"),
        ("train --learning-rate=5", "train: unknown flag --learning-rate: did you mean --learning_rate?"),
        ("compare --lr=5", "compare: unknown flag --lr: see --help"),
        ("train --zeroing=maybe", "train: --zeroing=maybe: take true or false"),
        ("train --log_dir=here", "train: unknown flag --log_dir: did you mean --run_dir?"),
        ("train --alsologtostderr", "train: unknown flag --alsologtostderr: see --help"),
        ("train --run_dir=", "train: --run_dir= is empty: give a value, or leave it out"),
        ("evaluate --workers=", "evaluate: --workers= is empty: give a value, or leave it out"),
        ("evaluate --run_dir=a/data=b", "evaluate: --run_dir=a/data=b holds no run: it has no config.json"),
    ],
)
def test_errors_are_one_line_with_flags_as_they_are_typed(typed, told):
    name, *flags = typed.split()
    result = run(name, *flags)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{told}\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_that_of_the_program_and_quick(name):
    result = run_at_once(f"binaries.{name}", "-h")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m binaries.{name}" in result.stdout
    assert "\n  --" in result.stdout and "--pdb" not in result.stdout and str(ROOT) not in result.stdout


def test_version_is_that_of_the_package():
    assert run("train", "--version").stdout == "tff_fedavg 0.1.0\n"


@pytest.fixture
def closed_pipe():
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("command", [("train", "--help"), ("train", "--version"), ("train", "--data=embedded")])
def test_a_program_whose_output_nobody_reads_ends_quietly(closed_pipe, command):
    name, flag = command
    started = start("-m", f"binaries.{name}", flag, stdout=closed_pipe)
    assert end(started) == (128 + signal.SIGPIPE, None, "")


def test_an_error_that_nobody_reads_is_no_other_error(closed_pipe):
    started = start("-m", "binaries.train", "--rounds=0", stdout=closed_pipe, stderr=closed_pipe)
    assert started.wait(5) == 2


def test_another_broken_pipe_is_an_error():
    started = start("-c", program_of("raise BrokenPipeError(32, 'Broken pipe')"))
    assert end(started) == (2, "", "program: [Errno 32] Broken pipe\n")


def test_code_that_ends_the_program_is_an_error():
    told = "program: the program was ended from within, as by a sys.exit in the task's file\n"
    assert end(start("-c", program_of("sys.exit(0)"))) == (2, "", told)


def test_what_the_encoding_of_an_output_lacks_is_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    started = start("-c", program_of("print('ü'); raise ValueError('B = ∞')"), env=environment)
    assert end(started) == (2, "\\xfc\n", "program: B = \\u221e\n")


def test_an_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        started = start("-c", program_of("print('text')"), stdout=full)
    assert end(started) == (2, None, "program: [Errno 28] No space left on device\n")


def test_of_an_error_of_tensorflow_the_line_is_told_that_says_what_it_is():
    @tf.function
    def gather(index):
        return tf.gather([1.0, 2.0], index)

    for fails in (lambda: gather(5), lambda: tf.gather([1.0, 2.0], 5)):
        with pytest.raises(tf.errors.InvalidArgumentError) as raised:
            fails()
        text = str(raised.value)
        assert "\n" in text or "function_node" in text
        assert re.fullmatch(r"(indices = )?5 is not in \[0, 2\)", program.first_line(raised.value))


def test_an_error_of_tensorflow_is_one_line():
    started = start("-c", program_of("import tensorflow as tf\ntf.io.read_file('/missing')"))
    assert end(started, timeout=60) == (2, "", "program: /missing; No such file or directory\n")


def test_what_tensorflow_says_of_a_models_own_code_is_not_cut_to_a_line():
    started = start("-c", program_of("raise ValueError('in user code:\\n\\n    File \"own.py\", line 6, in call')"))
    status, _, errors = end(started)
    assert status == 1
    assert errors.startswith("Traceback") and errors.endswith('File "own.py", line 6, in call\n')


PROGRESS = """
import sys, types
from binaries.command_line.progress import ProgressPrinter
target = types.SimpleNamespace(field="evaluation/accuracy", metric="accuracy")
with ProgressPrinter("runs/run", 4000) as printer:
    printer.start(0)
    for i in range(0, 4001, 500):
        metrics = {"evaluation/accuracy": i / 4000, "clients_left_out": i // 1000}
        printer.update(types.SimpleNamespace(round_number=i, metrics=metrics, target=target, best=0.95))
print("done")
"""


@contextlib.contextmanager
def in_terminal(columns, *arguments, term="xterm"):
    """Starts Python in a terminal of its own; yields the process and the terminal."""
    terminal, end_of_program = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    started = subprocess.Popen(
        [*PYTHON, *arguments],
        cwd=ROOT,
        env={**os.environ, "TERM": term},
        stdin=end_of_program,
        stdout=end_of_program,
        stderr=end_of_program,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end_of_program)
    try:
        yield started, terminal
    finally:
        started.kill()
        started.wait()


def read_until(terminal, pattern=None, timeout=60):
    """Returns what is written to the terminal, until a pattern is found or nobody has it open any more."""
    written = ""
    until = time.monotonic() + timeout
    while pattern is None or not re.search(pattern, written):
        assert select.select([terminal], [], [], max(0, until - time.monotonic()))[0], written
        try:
            written += os.read(terminal, 4096).decode()
        except OSError:
            break
    return written


@pytest.mark.parametrize("columns", [100, 60, 40])
def test_progress_in_a_terminal_is_one_line_which_begins_with_what_matters(columns):
    with in_terminal(columns, "-c", PROGRESS) as (_, terminal):
        written = read_until(terminal)
        os.close(terminal)
    bar, done, rest = written.split("\r\n")
    assert (done, rest) == ("done", "")
    assert "\x1b[A" not in bar and all(len(shown) < columns for shown in bar.split("\r"))
    assert bar.split("\r")[-1].startswith("round 4000/4000, accuracy 1.0000"[: columns - 1])


@pytest.mark.parametrize(("columns", "term"), [(0, "xterm"), (60, "dumb")])
def test_progress_where_no_bar_can_be_shown_is_lines(columns, term):
    with in_terminal(columns, "-c", PROGRESS, term=term) as (_, terminal):
        first, last, done, rest = read_until(terminal).split("\r\n")
        os.close(terminal)
    assert first == "round 0/4000  accuracy 0.0000 (best 0.9500)"
    assert last.startswith("round 4000/4000  accuracy 1.0000 (best 0.9500), 4 clients left out")
    assert (done, rest) == ("done", "")


def wait_until_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


# Rounds of about 0.1 s.
TRAIN = ("--data=embedded", "--local_epochs=20", "--rounds=4000", "--target_accuracy=1")


def test_training_in_a_terminal_that_is_closed_saves_and_ends(tmp_path):
    flags = [*TRAIN, f"--run_dir={tmp_path}/run", f"--cache_dir={tmp_path}/cache"]
    with in_terminal(40, "-m", "binaries.train", *flags) as (training, terminal):
        read_until(terminal, r"round ([2-9]|\d\d+)/4000, accuracy")
        children = psutil.Process(training.pid).children(recursive=True)
        os.close(terminal)
        assert training.wait(10) == 128 + signal.SIGHUP
    wait_until_gone(children)
    rounds = [int(re.search(r"\d+", path.name)[0]) for path in (tmp_path / "run/states").iterdir()]
    assert max(rounds) > 0


def test_training_whose_output_nobody_reads_any_more_saves_and_ends_quietly(tmp_path):
    started = start("-m", "binaries.train", *TRAIN, f"--run_dir={tmp_path}/run", f"--cache_dir={tmp_path}/cache")
    while not (line := started.stdout.readline()).startswith("round 0/4000"):
        assert line, started.stderr.read()
    started.stdout.close()
    assert started.wait(20) == 128 + signal.SIGPIPE
    assert started.stderr.read() == ""
    rounds = [int(re.search(r"\d+", path.name)[0]) for path in (tmp_path / "run/states").iterdir()]
    assert max(rounds) > 0


def test_reproduction_that_loses_its_terminal_saves_and_leaves_no_process(tmp_path):
    flags = ["--quick", "--table=4", f"--results_dir={tmp_path}", f"--cache_dir={tmp_path}/cache"]
    reproduction = start("-m", "binaries.reproduce", *flags, start_new_session=True)
    until = time.monotonic() + 60
    children = []
    while not any(child.name() == "worker_binary" for child in children):
        assert time.monotonic() < until and reproduction.poll() is None
        time.sleep(0.05)
        children = psutil.Process(reproduction.pid).children(recursive=True)
    os.killpg(reproduction.pid, signal.SIGHUP)
    status, _, errors = end(reproduction, timeout=10)
    assert (status, errors) == (128 + signal.SIGHUP, "")
    wait_until_gone(children)


def test_a_stream_that_is_closed_leads_nowhere():
    said = "print('said', file=sys.stderr); print(open(os.devnull).fileno() > 2, sys.stderr.fileno())"
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program_of(said)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True 2\n", "")


def test_a_run_takes_no_notice_of_a_home_and_of_settings_for_other_models_and_pictures(tmp_path):
    (tmp_path / "keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nno.such.key: 1\n")
    settings = {"HOME": "/proc/nothing", "MPLBACKEND": "none", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    settings["KERAS_HOME"] = str(tmp_path)
    environment = {**{k: v for k, v in os.environ.items() if k != "MPLCONFIGDIR"}, **settings}
    flags = ["--data=embedded", "--rounds=1", f"--run_dir={tmp_path}/run", f"--cache_dir={tmp_path}/cache"]
    result = run("train", *flags, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
