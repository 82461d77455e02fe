"""Metrics of single clients, before and after they were personalized, against NumPy."""

import itertools

import numpy as np
import pytest
import tensorflow_federated as tff
from numpy_model import client_update, loss_and_gradient

from tff_fedavg import build_client_eval, build_personalization_eval
from tff_fedavg.personalization import num_held_out

RATE = 0.5


@pytest.fixture(scope="module")
def weights(model):
    return tff.learning.models.ModelWeights(*model.initial_weights)


def loss_of(weights, x, y):
    return loss_and_gradient(weights, x, y)[0]


def test_each_client_has_the_metrics_of_its_own_examples(worker, model, client_dataset, client_arrays, weights):
    clients = [3, 0, 5, 1]
    found = build_client_eval(model, client_dataset, batch_size=4)(weights, clients)
    w1, b1, w2, b2 = weights.trainable
    for k, metrics in zip(clients, found, strict=True):
        x, y = client_arrays[k]["x"], client_arrays[k]["y"]
        logits = np.maximum(x @ w1 + b1, 0) @ w2 + b2
        assert metrics["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == y))
        assert metrics["loss"] == pytest.approx(loss_of(weights.trainable, x, y), rel=1e-5)


def splits(n):
    """Yields all splits of n examples into those that are held out and the others."""
    for held_out in itertools.combinations(range(n), -(-n // 5)):
        yield list(held_out), [i for i in range(n) if i not in held_out]


def explaining_splits(weights, arrays, metrics, epochs):
    """Returns the splits for which training on the others, in one batch, gives these losses."""
    x, y = arrays["x"], arrays["y"]
    found = []
    for held_out, others in splits(len(y)):
        personalized = client_update(
            weights.trainable, x, y, others, epochs=epochs, batch_size=len(y), learning_rate=RATE
        )
        expected = [loss_of(w, x[held_out], y[held_out]) for w in (weights.trainable, personalized)]
        if np.allclose([metrics[when]["loss"] for when in ("before", "after")], expected, rtol=1e-5):
            found.append(held_out)
    return found


def test_held_out_examples_are_measured_before_and_after_training_on_the_others(
    worker, model, client_dataset, client_arrays, weights
):
    clients = [0, 4, 5]  # With 7, 10 and 12 examples.
    results = {}
    for seed in (0, 1):
        evaluate = build_personalization_eval(
            model, client_dataset, epochs=3, batch_size=None, learning_rate=RATE, seed=seed
        )
        results[seed] = [
            explaining_splits(weights, client_arrays[k], metrics, epochs=3)
            for k, metrics in zip(clients, evaluate(weights, clients), strict=True)
        ]
        assert [len(found) for found in results[seed]] == [1, 1, 1]
    assert results[0] != results[1]


def test_client_with_one_example_has_nothing_to_train_on(worker, model, client_dataset, weights):
    evaluate = build_personalization_eval(model, client_dataset, epochs=3, batch_size=2, learning_rate=RATE)
    (metrics,) = evaluate(weights, [1])
    assert metrics["before"] == metrics["after"]


def test_a_fifth_is_held_out_and_at_least_one_example():
    assert [num_held_out(n) for n in (0, 1, 5, 6, 10, 600)] == [0, 1, 1, 2, 2, 120]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, r"epochs \(E\) is 0"),
        ({"batch_size": 0}, r"batch_size \(B; None is B = inf\) is 0"),
        ({"learning_rate": -1.0}, r"learning_rate \(eta\) is -1.0"),
    ],
)
def test_arguments_out_of_range_are_told(model, client_dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_personalization_eval(
            model, client_dataset, **{"epochs": 1, "batch_size": 5, "learning_rate": 0.1, **arguments}
        )
