"""The processes of `binaries.reproduction.pool`; without TensorFlow, which each of them would import."""

import functools
import os
import pathlib
import time

import psutil

from binaries.reproduction import pool

CORES = os.sched_getaffinity(0)


def sleep_and_save(path, say):
    say("sleeping")
    try:
        time.sleep(60)
    finally:
        pathlib.Path(path).write_text(str(sorted(os.sched_getaffinity(0))))


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


def test_process_is_replaced_before_what_its_jobs_leave_in_memory_adds_up(monkeypatch):
    monkeypatch.setattr(pool, "_JOBS_PER_PROCESS", 2)
    outcomes = []
    with pool.Pool() as processes:
        for i in range(3):
            processes.submit(f"job {i}", pid)
            outcomes += [ended.outcome for ended in processes.wait(60)]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_end_of_the_pool_lets_the_jobs_save_and_leaves_no_process(tmp_path):
    with pool.Pool() as processes:
        processes.submit("job", functools.partial(sleep_and_save, tmp_path / "saved"))
        while processes.running["job"] != "sleeping":
            processes.wait(0.1)
        children = psutil.Process().children()
    assert (tmp_path / "saved").exists()
    assert not any(is_a_job(child) for child in children)


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
    assert outcomes[0] == pool.Ended("bad", "no data: get them", failed=True)
    assert outcomes[1].outcome == "its process died with exit status 7, maybe for lack of memory"
