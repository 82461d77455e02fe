import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import loss_and_gradient

from tff_fedavg import ClientDataset, build_fed_eval, build_fed_sgd, evaluation, functional_model_from_keras


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


@pytest.mark.parametrize("build", [build_fed_eval, lambda *args: build_fed_sgd(*args, learning_rate=0.1)])
@pytest.mark.parametrize(
    ("change", "has"),
    [
        ({"x": np.zeros([2, 4])}, "float64 (None, 4)', 'int64 (None,)'"),
        ({"x": np.zeros([2, 5], np.float32)}, "float32 (None, 5)', 'int64 (None,)'"),
        ({"y": np.zeros(2, np.int32)}, "float32 (None, 4)', 'int32 (None,)'"),
    ],
)
def test_a_data_set_of_other_batches_than_the_model_takes_is_refused(build, change, has):
    columns = {"x": np.zeros([2, 4], np.float32), "y": np.zeros(2, np.int64)}
    model = _model(ClientDataset.from_arrays([columns]).batch_spec)
    other = ClientDataset.from_arrays([columns | change])
    with pytest.raises(ValueError) as error:
        build(model, other)
    takes = "model takes batches ('float32 (None, 4)', 'int64 (None,)')"
    assert str(error.value).startswith(f"{takes}, and client_dataset has ('{has}): ")


@pytest.mark.parametrize("convert", [tuple, list, lambda spec: collections.OrderedDict(zip("xy", spec))])
def test_functional_models_of_tff_may_name_what_they_take(worker, convert):
    columns = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "y": np.array([0, 1])}
    dataset = ClientDataset.from_arrays([columns])
    model = _model(convert(dataset.batch_spec), tff.learning.models.functional_model_from_keras)
    process = build_fed_sgd(model, dataset, learning_rate=0.1)
    assert process.next(process.initialize(), [0]).metrics["client_work"]["train"]["num_examples"] == 2


def test_sample_weights_are_for_training_and_a_data_set_to_evaluate_may_have_them_or_not(worker):
    columns = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "y": np.array([0, 1])}
    weighted = columns | {"sample_weight": np.float32([1, 3])}
    without_weights, with_weights = (ClientDataset.from_arrays([c]) for c in (columns, weighted))
    for trained, evaluated in (
        (without_weights, with_weights),
        (with_weights, with_weights),
        (with_weights, without_weights),
    ):
        model = _model(trained.batch_spec)
        weights = tff.learning.models.ModelWeights(*model.initial_weights)
        logits = columns["x"] @ weights.trainable[0] + weights.trainable[1]
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1], columns["y"]]
        metrics = build_fed_eval(model, evaluated)(weights, [0])
        assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="^model takes batches "):
        build_fed_sgd(_model(with_weights.batch_spec), without_weights, learning_rate=0.1)


def _model(input_spec, from_keras=functional_model_from_keras):
    tf.keras.utils.set_random_seed(0)
    keras_model = tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(4,))])
    return from_keras(keras_model, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), input_spec)
