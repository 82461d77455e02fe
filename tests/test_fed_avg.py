import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import client_update, loss_and_gradient, max_difference
from tff_reference import run_rounds_of_tff, split

from tff_fedavg import ClientDataset, build_fed_avg, build_fed_eval, build_fed_sgd
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.runtime import ComputationError

CLIENTS = [0, 1, 3, 4]  # 7, 1, 20 and 10 examples.
SGD = tff.learning.optimizers.build_sgdm(0.1)


class Clipped(tff.learning.optimizers.Optimizer):
    """Keeps its rate out of its state, as users write it."""

    def initialize(self, specs):
        return ()

    def next(self, state, weights, gradients):
        return state, tuple(w - 0.1 * tf.clip_by_norm(g, 1.0) for w, g in zip(weights, gradients))


def weights_of(state):
    return state.global_model_weights.trainable


def run_rounds(process, rounds, clients=CLIENTS):
    state = process.initialize()
    for _ in range(rounds):
        state, metrics = process.next(state, clients)
    return state, metrics


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 10), (2, 3), (3, 50)])
def test_rounds_equal_those_of_tffs_own_fed_avg(worker, model, client_arrays, client_dataset, epochs, batch_size):
    settings = dict(epochs=epochs, batch_size=batch_size)
    state, metrics = run_rounds(build_fed_avg(model, client_dataset, **settings, learning_rate=0.1), 3)
    reference = tff.learning.algorithms.build_weighted_fed_avg(
        model, tff.learning.optimizers.build_sgdm(0.1), tff.learning.optimizers.build_sgdm(1.0)
    )
    expected, expected_metrics = run_rounds_of_tff(reference, client_arrays, CLIENTS, **settings, rounds=3)
    assert max_difference(weights_of(state), weights_of(expected)) < 1e-5
    train = metrics["client_work"]["train"]
    assert train["num_examples"] == 38
    assert train["loss"] == pytest.approx(expected_metrics["client_work"]["train"]["loss"], rel=1e-5)


def test_a_round_averages_the_clients_weights_by_their_number_of_examples(worker, model, client_arrays, client_dataset):
    """w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}, by hand. Client 2 has no examples, and weight 0."""
    clients = [0, 1, 2, 3, 4]
    state, _ = run_rounds(build_fed_avg(model, client_dataset, epochs=2, batch_size=5, learning_rate=0.1), 1, clients)
    w_0 = model.initial_weights[0]
    expected = [np.zeros_like(w, float) for w in w_0]
    for k in clients:
        n_k = len(client_arrays[k]["y"])
        order = split(0, 0, k, n_k)
        w_k = client_update(
            w_0, client_arrays[k]["x"], client_arrays[k]["y"], order, epochs=2, batch_size=5, learning_rate=0.1
        )
        expected = [e + n_k / 38 * w for e, w in zip(expected, w_k)]
    assert max_difference(weights_of(state), expected) < 1e-5


def test_a_round_of_empty_clients_changes_nothing(worker, model, client_dataset):
    for process in (
        build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=0.1),
        build_fed_sgd(model, client_dataset, learning_rate=0.1),
    ):
        state, metrics = run_rounds(process, 1, [2])
        assert max_difference(weights_of(state), model.initial_weights[0]) == 0
        assert metrics["client_work"]["train"]["loss"] == 0


def test_fed_sgd_is_one_gradient_step_on_the_data_of_all_clients(worker, model, client_arrays, client_dataset):
    state, metrics = run_rounds(build_fed_sgd(model, client_dataset, learning_rate=0.5), 1)
    x = np.concatenate([client_arrays[k]["x"] for k in CLIENTS])
    y = np.concatenate([client_arrays[k]["y"] for k in CLIENTS])
    loss, gradient = loss_and_gradient(model.initial_weights[0], x, y)
    expected = [w - 0.5 * g for w, g in zip(model.initial_weights[0], gradient)]
    assert max_difference(weights_of(state), expected) < 1e-6
    assert metrics["client_work"]["train"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_fed_sgd_is_fed_avg_with_one_epoch_and_infinite_batches(worker, model, client_dataset):
    sgd, _ = run_rounds(build_fed_sgd(model, client_dataset, learning_rate=0.5), 4)
    avg, _ = run_rounds(build_fed_avg(model, client_dataset, epochs=1, batch_size=None, learning_rate=0.5), 4)
    assert max_difference(weights_of(sgd), weights_of(avg)) < 1e-5


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_learning_rate_follows_a_schedule_over_the_rounds(worker, model, client_dataset, algorithm):
    def build(learning_rate):
        if algorithm == "fedsgd":
            return build_fed_sgd(model, client_dataset, learning_rate=learning_rate)
        return build_fed_avg(model, client_dataset, epochs=2, batch_size=3, learning_rate=learning_rate)

    schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.2, decay_steps=2, decay_rate=0.5, staircase=True)
    scheduled, _ = run_rounds(build(schedule), 3)
    state = build(0.2).initialize()
    for learning_rate in (0.2, 0.2, 0.1):
        state, _ = build(learning_rate).next(state, CLIENTS)
    assert max_difference(weights_of(scheduled), weights_of(state)) < 1e-6


def test_same_seed_gives_bit_equal_weights_and_another_seed_does_not(worker, model, client_dataset):
    runs = []
    for seed in (0, 0, 1):
        process = build_fed_avg(model, client_dataset, epochs=2, batch_size=3, learning_rate=0.1, seed=seed)
        runs.append(weights_of(run_rounds(process, 3)[0]))
    assert max_difference(runs[0], runs[1]) == 0
    assert max_difference(runs[0], runs[2]) > 0


def test_clients_split_their_data_anew_in_every_round(worker, model, client_dataset):
    """Two rounds from the same weights, numbered 0 and 1, differ by the order of the minibatches alone."""
    process = build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1)
    state = process.initialize()
    first, _ = process.next(state, CLIENTS)
    again = process.set_model_weights(first, process.get_model_weights(state))
    second, _ = process.next(again, CLIENTS)
    assert (first.client_work, second.client_work) == (1, 2)
    assert max_difference(weights_of(first), weights_of(second)) > 0


def test_server_optimizer_applies_the_averaged_update(worker, model, client_dataset):
    settings = dict(epochs=1, batch_size=5, learning_rate=0.1)
    plain, _ = run_rounds(build_fed_avg(model, client_dataset, **settings), 1)
    half = tff.learning.optimizers.build_sgdm(0.5)
    damped, _ = run_rounds(build_fed_avg(model, client_dataset, **settings, server_optimizer=half), 1)
    expected = [(a + b) / 2 for a, b in zip(model.initial_weights[0], weights_of(plain))]
    assert max_difference(weights_of(damped), expected) < 1e-6


@pytest.mark.parametrize(
    "build_aggregator",
    [
        lambda: tff.aggregators.UnweightedMeanFactory(),
        lambda: tff.learning.robust_aggregator(),
        lambda: tff.learning.compression_aggregator(),
        lambda: tff.learning.dp_aggregator(0.01, 4.0),
    ],
    ids=["unweighted", "robust", "compression", "dp"],
)
def test_aggregators_of_tff_drop_in(worker, model, client_dataset, build_aggregator):
    process = build_fed_avg(
        model, client_dataset, epochs=1, batch_size=5, learning_rate=0.1, aggregator=build_aggregator()
    )
    state, metrics = run_rounds(process, 2)
    assert all(np.all(np.isfinite(w)) for w in weights_of(state))
    assert max_difference(weights_of(state), model.initial_weights[0]) > 0
    assert metrics["finalizer"]["update_non_finite"] == 0


def test_unweighted_aggregator_weights_all_clients_alike(worker, model, client_arrays, client_dataset):
    process = build_fed_sgd(
        model, client_dataset, learning_rate=0.5, aggregator=tff.aggregators.UnweightedMeanFactory()
    )
    state, _ = run_rounds(process, 1)
    w_0 = model.initial_weights[0]
    gradients = [loss_and_gradient(w_0, client_arrays[k]["x"], client_arrays[k]["y"])[1] for k in CLIENTS]
    expected = [w - 0.5 * np.mean(g, axis=0) for w, g in zip(w_0, zip(*gradients))]
    assert max_difference(weights_of(state), expected) < 1e-6


def test_the_learning_rate_is_any_function_of_the_rounds(worker, model, client_dataset):
    rates = tf.constant([0.2, 0.1, 0.05])
    functions = (
        lambda t: 0.2 * 0.5**t,
        lambda t: 0.2 if t < 1 else 0.1 / t,
        lambda t: rates[tf.cast(t, tf.int32)],
    )
    runs = []
    for learning_rate in functions:
        process = build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=learning_rate)
        runs.append(weights_of(run_rounds(process, 3)[0]))
    state = process.initialize()
    for rate in (0.2, 0.1, 0.05):
        state, _ = build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=rate).next(state, CLIENTS)
    for run in runs:
        assert max_difference(run, weights_of(state)) < 1e-6


def diverging_for(client_dataset, clients, feature=np.inf):
    """The dataset, with these clients' features replaced; they are known by their number of examples."""
    sizes = [int(client_dataset.num_examples[k]) for k in clients]

    def preprocess(example):
        is_bad = tf.reduce_any(tf.equal(tf.shape(example["x"])[0], sizes))
        return tf.where(is_bad, feature, example["x"]), tf.cast(example["y"], tf.int32)

    return ClientDataset(client_dataset.directory, preprocess)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_a_client_whose_update_is_not_finite_is_left_out_with_its_weight(worker, model, client_dataset, algorithm):
    def build(dataset):
        if algorithm == "fedsgd":
            return build_fed_sgd(model, dataset, learning_rate=0.5)
        return build_fed_avg(model, dataset, epochs=2, batch_size=None, learning_rate=0.5)

    state, metrics = run_rounds(build(diverging_for(client_dataset, [3])), 1)
    expected, expected_metrics = run_rounds(build(client_dataset), 1, clients=[0, 1, 4])
    assert max_difference(weights_of(state), weights_of(expected)) < 1e-7
    assert metrics["clients_left_out"] == 1 and expected_metrics["clients_left_out"] == 0
    assert metrics["client_work"]["train"] == pytest.approx(expected_metrics["client_work"]["train"], rel=1e-6)


def test_a_client_whose_updates_norm_overflows_is_left_out(worker, model, client_dataset):
    """Its values are finite, but what clips by the norm would make NaN of the average."""
    diverging = diverging_for(client_dataset, [3], feature=1e25)
    state, metrics = run_rounds(build_fed_sgd(model, diverging, learning_rate=0.5), 1)
    expected, _ = run_rounds(build_fed_sgd(model, client_dataset, learning_rate=0.5), 1, clients=[0, 1, 4])
    assert metrics["clients_left_out"] == 1
    assert max_difference(weights_of(state), weights_of(expected)) < 1e-7


@pytest.mark.parametrize("aggregator", [None, tff.learning.robust_aggregator()], ids=["mean", "robust"])
def test_all_left_out_leaves_the_weights_and_the_servers_optimizer(worker, model, client_dataset, aggregator):
    process = build_fed_avg(
        model,
        diverging_for(client_dataset, CLIENTS),
        epochs=1,
        batch_size=None,
        learning_rate=0.1,
        server_optimizer=tff.learning.optimizers.build_adam(0.1),
        aggregator=aggregator,
    )
    good, _ = process.next(process.initialize(), [5])
    state, metrics = process.next(good, CLIENTS)
    assert metrics["clients_left_out"] == 4 and metrics["finalizer"]["update_non_finite"] == 1
    assert max_difference(weights_of(state), weights_of(good)) == 0
    assert max_difference(tf.nest.flatten(state.finalizer), tf.nest.flatten(good.finalizer)) == 0
    assert (good.client_work, state.client_work) == (1, 2)


@pytest.mark.parametrize("convert", [np.array, tuple, tf.constant, lambda ids: map(np.int64, ids)])
def test_client_ids_are_integers_of_any_kind(worker, model, client_dataset, convert):
    process = build_fed_sgd(model, client_dataset, learning_rate=0.5)
    state = process.initialize()
    expected, found = process.next(state, CLIENTS).state, process.next(state, convert(CLIENTS)).state
    assert max_difference(weights_of(found), weights_of(expected)) == 0


def test_clients_that_do_not_exist_are_refused_in_one_line(model, client_dataset):
    computations = build_fed_sgd(model, client_dataset, learning_rate=0.5).next, build_fed_eval(model, client_dataset)
    for computation in computations:
        for client_ids, error, message in (
            ([0, 6], ValueError, r"client_ids\[1\] is 6; it must be from 0 to 5"),
            ([], ValueError, "client_ids is empty"),
            ([0.5], TypeError, r"client_ids\[0\] is 0.5; it must be an integer"),
        ):
            with pytest.raises(error, match=message):
                computation(None, client_ids)


def test_weights_of_another_model_are_refused_in_one_line(model, client_dataset):
    process = build_fed_sgd(model, client_dataset, learning_rate=0.5)
    weights = tff.learning.models.ModelWeights(
        tuple(np.zeros([7, 3], np.float32) for _ in model.initial_weights[0]), ()
    )
    state = tff.learning.templates.LearningAlgorithmState(weights, (), np.int32(0), (), ())
    for computation, value, name in (
        (process.next, state, "state"),
        (build_fed_eval(model, client_dataset), weights, "weights"),
    ):
        with pytest.raises(
            ValueError, match=rf"^the trainable weights of {name} have the shapes \[\(7, 3\), "
        ) as error:
            computation(value, [0])
        assert "\n" not in str(error.value)


def test_an_error_of_a_client_is_one_line_with_the_client_and_its_files(worker, model, client_arrays, tmp_path):
    """And the round can be run again from the same state when it is mended."""
    arrays = [dict(client) for client in client_arrays]
    arrays[3]["y"] = np.full(20, 7, np.uint8)
    write_client_dataset(tmp_path, arrays)
    dataset = ClientDataset(tmp_path, lambda example: (example["x"], tf.cast(example["y"], tf.int32)))
    process = build_fed_sgd(model, dataset, learning_rate=0.5)
    state = process.initialize()
    with pytest.raises(ComputationError) as error:
        process.next(state, CLIENTS)
    label = "Received a label value of 7 which is outside the valid range of [0, 3)."
    assert str(error.value).startswith(f"client 3 of {tmp_path}: {label}") and "\n" not in str(error.value)
    process.next(state, [0, 1, 4])
    fed_eval = build_fed_eval(model, dataset)
    (tmp_path / "examples.bin").rename(tmp_path / "gone")
    with pytest.raises(ComputationError, match=f"client 0 of {tmp_path}: .*examples.bin; No such file or directory"):
        fed_eval(state.global_model_weights, [0, 1])
    (tmp_path / "gone").rename(tmp_path / "examples.bin")
    process.next(state, [0, 1, 4])


def test_computations_are_those_of_tff_with_their_types(model, client_dataset):
    next_round = build_fed_sgd(model, client_dataset, learning_rate=0.5).next
    assert isinstance(next_round, tff.framework.ConcreteComputation)

    @tff.federated_computation(*next_round.type_signature.parameter)
    def composed(state, client_ids):
        return next_round(state, client_ids)

    assert composed.type_signature.is_equivalent_to(next_round.type_signature)


def a_keras_model():
    return tf.keras.Sequential([tf.keras.layers.InputLayer([4]), tf.keras.layers.Dense(3)])


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("model", a_keras_model, "model is a Sequential; .*functional_model_from_keras"),
        ("client_dataset", lambda: [{"x": [1]}], "client_dataset is a list; .*from_arrays"),
        ("client_optimizer", tf.keras.optimizers.Adam, r"client_optimizer is .*; it must be one of tff\.learning"),
        ("client_optimizer", lambda: "adam", "client_optimizer is 'adam'"),
        ("server_optimizer", lambda: tf.keras.optimizers.SGD, "server_optimizer is <class"),
        ("aggregator", lambda: "mean", "aggregator is 'mean'; it must be an aggregation factory"),
        ("client_weighting", lambda: "uniform", "client_weighting is 'uniform'; it must be a tff.learning.Client"),
        ("learning_rate", lambda: "0.1", r"learning_rate \(eta\) is '0.1'; it must be a number or a function"),
        ("learning_rate", lambda: None, r"learning_rate \(eta\) is None"),
    ],
)
def test_arguments_of_another_type_are_told_with_what_is_taken(model, client_dataset, name, build, message):
    arguments = {"model": model, "client_dataset": client_dataset, "epochs": 1, "batch_size": 5, "learning_rate": 0.1}
    with pytest.raises(TypeError, match=message) as error:
        build_fed_avg(**{**arguments, name: build()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (tff.learning.secure_aggregator, "needs secure sums, which TFF's runtime does not have"),
        (lambda: tff.learning.ddp_secure_aggregator(0.1, 4), "Factory of which TFF can make nothing here: "),
    ],
)
def test_aggregators_that_need_secure_sums_are_refused_before_the_round(model, client_dataset, aggregator, message):
    with pytest.raises(ValueError, match=f"^aggregator is a .*{message}"):
        build_fed_sgd(model, client_dataset, learning_rate=0.1, aggregator=aggregator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=0), r"epochs \(E\) is 0; it must be from 1 to"),
        (dict(epochs=2**29, batch_size=4), r"epochs \(E\) is 536870912: a client with 20 examples makes 2,684,354,560"),
        (
            dict(batch_size=2**31),
            r"batch_size \(B; None is B = inf\) is 2147483648; it must be from 1 to 2,147,483,647$",
        ),
        (dict(batch_size=0), r"batch_size \(B; None is B = inf\) is 0; it must be from 1 to"),
        (dict(learning_rate=-0.1), r"learning_rate \(eta\) is -0.1; it must be a number above 0"),
        (dict(learning_rate=float("nan")), r"learning_rate \(eta\) is nan"),
        (dict(learning_rate=1e-46), r"learning_rate \(eta\) is 1e-46; it must be a number above 0, also in float32"),
        (dict(learning_rate=lambda t: 1 / "a"), "learning_rate fails: TypeError: "),
        (dict(learning_rate=lambda t: tf.constant([0.1, 0.2])), r"is a function that returns TensorSpec\(shape=\(2,\)"),
        (dict(learning_rate=lambda t: None), "is a function that returns None; it must return a number"),
        (
            dict(client_optimizer=Clipped()),
            "learning_rate is given, but client_optimizer has none in its hyperparameters",
        ),
        (
            dict(client_optimizer=tff.learning.optimizers.schedule_learning_rate(SGD, lambda t: 0.1)),
            "learning_rate is given, but client_optimizer has none in its hyperparameters",
        ),
        (dict(proximal_strength=-1.0), r"proximal_strength \(mu\) is -1.0; it must be a number from 0 on"),
    ],
)
def test_arguments_out_of_range_are_refused(model, client_dataset, change, message):
    with pytest.raises(ValueError, match=message):
        build_fed_avg(model, client_dataset, **{"epochs": 1, "batch_size": 5, "learning_rate": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=2.0), r"epochs \(E\) is 2.0; it must be an integer"),
        (dict(epochs=np.array([2])), r"epochs \(E\) is array\(\[2\]\); it must be an integer"),
        (dict(epochs=True), r"epochs \(E\) is True; it must be an integer"),
        (dict(batch_size="5"), r"batch_size \(B; None is B = inf\) is '5'; it must be an integer"),
        (dict(seed=None), "seed is None; it must be an integer"),
        (dict(proximal_strength="1"), r"proximal_strength \(mu\) is '1'; it must be a number"),
        (dict(learning_rate=0.1j), r"learning_rate \(eta\) is 0.1j; it must be a number or a function"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(model, client_dataset, change, message):
    with pytest.raises(TypeError, match=message):
        build_fed_avg(model, client_dataset, **{"epochs": 1, "batch_size": 5, "learning_rate": 0.1, **change})


def test_a_computation_is_called_by_the_names_of_its_parameters_too(worker, model, client_dataset):
    process = build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=0.1)
    state = process.initialize()
    evaluate = build_fed_eval(model, client_dataset)
    by_place, by_name = process.next(state, [0]), process.next(client_ids=[0], state=state)
    assert max_difference(weights_of(by_place.state), weights_of(by_name.state)) == 0
    assert evaluate(weights=state.global_model_weights, client_ids=[3]) == evaluate(state.global_model_weights, [3])


def test_a_value_of_another_kind_is_told_in_one_line_with_what_to_give(worker, model, client_dataset):
    process = build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=0.1)
    state = process.initialize()
    message = "^state is a LearningProcessOutput; it must be a LearningAlgorithmState: give its state$"
    with pytest.raises(TypeError, match=message):
        process.next(process.next(state, [0]), [0])
    message = "^weights is a LearningAlgorithmState; it must be a ModelWeights: give its global_model_weights$"
    with pytest.raises(TypeError, match=message):
        build_fed_eval(model, client_dataset)(state, [0])
    with pytest.raises(TypeError, match="^state is a ModelWeights; it must be a LearningAlgorithmState$"):
        process.next(state.global_model_weights, [0])
