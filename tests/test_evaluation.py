import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import loss_and_gradient

from tff_fedavg import build_fed_eval, evaluation


@pytest.mark.parametrize("batch_size", [3, 200])
def test_metrics_are_those_over_all_examples_however_they_are_cut(
    worker, model, client_arrays, client_dataset, batch_size
):
    weights = model.initial_weights[0]
    x = np.concatenate([a["x"] for a in client_arrays])
    y = np.concatenate([a["y"] for a in client_arrays])
    loss, _ = loss_and_gradient(weights, x, y)
    logits = np.maximum(x @ weights[0] + weights[1], 0) @ weights[2] + weights[3]
    fed_eval = build_fed_eval(model, client_dataset, batch_size=batch_size)
    metrics = fed_eval(tff.learning.models.ModelWeights(*model.initial_weights), list(range(6)))
    assert metrics["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == y))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["loss"] == pytest.approx(
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, logits).numpy(), rel=1e-5
    )


def test_clients_are_called_in_equal_numbers_and_those_without_examples_not_at_all(monkeypatch, client_dataset):
    monkeypatch.setattr(evaluation, "_CLIENTS_PER_CALL", 2)
    calls = []

    def computation(weights, clients):
        calls.append(list(clients))
        return [10 * k for k in clients]

    # Client 2 has no examples, 3 has most.
    assert evaluation.for_all_clients(computation, None, client_dataset) == {k: 10 * k for k in (0, 1, 3, 4, 5)}
    assert calls == [[3, 5], [4, 0], [1, 3]]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
def test_a_batch_size_that_would_never_end_is_refused(model, client_dataset, batch_size):
    with pytest.raises((TypeError, ValueError), match=f"batch_size is {batch_size}; it must be"):
        build_fed_eval(model, client_dataset, batch_size=batch_size)
