"""Rounds of TFF's own algorithms, fed with the minibatches of `build_fed_avg`: the truth that this is held to."""

import numpy as np
import tensorflow as tf

from tff_fedavg.client_update import minibatch_seed


def split(seed, round_number, client_id, num_examples):
    """The order in which a client goes through its examples."""
    key = minibatch_seed(seed, tf.constant(round_number), tf.constant(client_id))
    return tf.random.experimental.stateless_shuffle(tf.range(num_examples), key).numpy()


def run_rounds_of_tff(process, client_arrays, clients, *, epochs, batch_size, rounds):
    """Returns the state of a process of `tff.learning.algorithms` after some rounds, and the last metrics."""
    state = process.initialize()
    for t in range(rounds):
        datasets = []
        for k in clients:
            order = split(0, t, k, len(client_arrays[k]["y"]))
            x, y = client_arrays[k]["x"][order], client_arrays[k]["y"][order].astype(np.int32)
            datasets.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).repeat(epochs))
        state, metrics = process.next(state, datasets)
    return state, metrics
