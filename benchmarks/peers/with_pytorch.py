"""FedAvg in PyTorch without a framework: a process for each core, which trains one client after the other.

python with_pytorch.py WORK.npz
"""

import contextlib
import os
import sys

import torch
from torch import multiprocessing
from torch_models import Trainer
from work import Work, serve


def _train(path, next_client, sums, connection):
    """Adds up n_k (w_k - w_0) of the clients that this process gets to train, for each message."""
    work = Work.load(path)
    trainer = Trainer(work)
    # Those that come last, and may have to be waited for, are the smallest.
    clients = sorted(range(len(work.clients)), key=lambda k: -len(work.clients[k][0]))
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while connection.recv():
            for s in sums:
                s.zero_()
            while (i := _count(next_client)) < len(clients):
                trainer.train(clients[i], trainer.initial_weights)
                with torch.no_grad():
                    for s, w, w_0 in zip(sums, trainer.weights, trainer.initial_weights):
                        s.add_(w - w_0, alpha=len(work.clients[clients[i]][0]))
            connection.send("done")


def _count(number):
    with number.get_lock():
        number.value += 1
        return number.value - 1


def main() -> None:
    path = sys.argv[1]
    work = Work.load(path)
    num_examples = sum(len(x) for x, _ in work.clients)
    initial_weights = Trainer(work).initial_weights
    next_client = multiprocessing.Value("i")
    sums_of_all, connections = [], []
    for _ in os.sched_getaffinity(0):
        sums_of_all.append([torch.zeros_like(w).share_memory_() for w in initial_weights])
        connection, other_end = multiprocessing.Pipe()
        connections.append(connection)
        arguments = path, next_client, sums_of_all[-1], other_end
        multiprocessing.Process(target=_train, args=arguments, daemon=True).start()
    for connection in connections:
        connection.recv()

    def run_round():
        next_client.value = 0
        for connection in connections:
            connection.send("train")
        for connection in connections:
            connection.recv()
        return [w_0 + sum(sums) / num_examples for w_0, *sums in zip(initial_weights, *sums_of_all)]

    serve(run_round, initial_weights)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # What has run threads must not fork.
    main()
