"""The processes of `binaries.reproduction.pool`; without TensorFlow, which each of them would import."""

import functools
import multiprocessing
import os
import pathlib
import signal
import time

import psutil
import pytest

from binaries.command_line import signals
from binaries.reproduction import pool

CORES = os.sched_getaffinity(0)


def sleep_and_save(path, say):
    say("sleeping")
    try:
        time.sleep(60)
    finally:
        pathlib.Path(path).write_text(str(sorted(os.sched_getaffinity(0))))


class Swallows:
    def __init__(self, say):
        self._say = say

    def __del__(self):
        self._say("sleeping")
        time.sleep(60)


def swallow_and_save(path, say):
    Swallows(say)
    sleep_and_save(path, say)


def never_end(say):
    say("sleeping")
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def pid(say):
    return f"{os.getpid()} on {len(os.sched_getaffinity(0))} core"


def fail(say):
    raise ValueError("no data: get them\nand more")


def die(say):
    os._exit(7)


def test_processes_are_kept_from_job_to_job_and_have_a_core_each():
    with pool.Pool() as processes:
        outcomes = []
        for i in range(3):
            processes.submit(f"job {i}", pid)
            outcomes += processes.wait(60)
    assert [ended.name for ended in outcomes] == ["job 0", "job 1", "job 2"]
    assert len({ended.outcome for ended in outcomes}) == 1
    assert outcomes[0].outcome.endswith(" on 1 core")
    assert not any(ended.failed for ended in outcomes)


def test_no_more_jobs_run_at_once_than_are_allowed():
    with pool.Pool(jobs=1) as processes:
        assert processes.has_room
        processes.submit("the only one", pid)
        assert not processes.has_room
        assert [ended.name for ended in processes.wait(60)] == ["the only one"]
        assert processes.has_room


def test_process_is_replaced_before_what_its_jobs_leave_in_memory_adds_up(monkeypatch):
    monkeypatch.setattr(pool, "_JOBS_PER_PROCESS", 2)
    outcomes = []
    with pool.Pool() as processes:
        for i in range(3):
            processes.submit(f"job {i}", pid)
            outcomes += [ended.outcome for ended in processes.wait(60)]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def started(job):
    """Runs a job in a pool until it sleeps; returns the pool and its processes."""
    processes = pool.Pool()
    processes.submit("job", job)
    while processes.running["job"] != "sleeping":
        processes.wait(0.1)
    return processes, [child for child in psutil.Process().children() if is_a_job(child)]


@pytest.mark.parametrize("job", [sleep_and_save, swallow_and_save])
def test_end_of_the_pool_lets_the_jobs_save_and_leaves_no_process(tmp_path, capfd, job):
    processes, children = started(functools.partial(job, tmp_path / "saved"))
    with processes:
        pass
    assert (tmp_path / "saved").exists()
    assert children and not any(is_a_job(child) for child in children)
    assert capfd.readouterr().err == ""


def test_a_job_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(pool, "_SECONDS_TO_SAVE", 0.5)
    processes, children = started(never_end)
    begun = time.monotonic()
    with processes:
        pass
    assert time.monotonic() - begun < 3
    assert children and not any(is_a_job(child) for child in children)


def test_what_a_terminal_sends_to_all_its_processes_does_not_end_a_job(tmp_path):
    processes, (child,) = started(functools.partial(sleep_and_save, tmp_path / "saved"))
    with processes:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            child.send_signal(number)
        time.sleep(0.5)
        assert is_a_job(child) and not (tmp_path / "saved").exists()


def is_a_job(process):
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_job_that_fails_or_whose_process_dies_is_told_and_frees_its_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {min(CORES)})
    outcomes = []
    with pool.Pool() as processes:
        for name, job in (("bad", fail), ("dead", die), ("good", pid)):
            processes.submit(name, job)
            assert not processes.has_room
            outcomes += processes.wait(60)
            assert processes.has_room
    assert [ended.failed for ended in outcomes] == [True, True, False]
    assert outcomes[0] == pool.Ended("bad", "no data: get them", failed=True, refused=True)
    assert not outcomes[1].refused
    assert outcomes[1].outcome == "its process died with exit status 7, maybe for lack of memory"


def test_a_process_may_die_before_it_takes_a_job_or_when_it_has_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {min(CORES)})

    def kill_the_process():
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    with pool.Pool() as processes:
        processes.submit("first", pid)
        kill_the_process()
        (first,) = processes.wait(60)
        assert first.failed and "died with exit status -9" in first.outcome
        processes.submit("second", pid)
        (second,) = processes.wait(60)
        kill_the_process()
        processes.submit("third", pid)
        (third,) = processes.wait(60)
    assert [(ended.name, ended.failed) for ended in (second, third)] == [("second", False), ("third", False)]


def test_a_process_whose_parent_is_gone_before_it_looks_ends(monkeypatch):
    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(multiprocessing, "parent_process", psutil.Process)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)  # Not of the process of the tests.
    for name in ("catch", "end_with_parent"):
        monkeypatch.setattr(signals, name, lambda: None)
    with pytest.raises(SystemExit):
        pool._work(None, min(CORES))
