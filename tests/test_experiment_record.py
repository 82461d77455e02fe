"""The record of an experiment: defaults, ranges, config.json, and the runs in `results/`. Without TensorFlow."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

import tasks
from binaries.experiment import Experiment
from binaries.experiment.record import SETTINGS
from binaries.reproduction import plan
from tff_fedavg.json_record import write_record

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "results").rglob("config.json"))


def write(run_dir, settings):
    (run_dir / "config.json").write_text(json.dumps({"settings": settings}))


def test_what_follows_from_a_setting_that_is_changed_is_chosen_anew():
    experiment = Experiment(task="mnist_2nn", client_fraction=0.2, seed=3)
    changed = experiment.change({"algorithm": "fedsgd", "rounds": 7})
    assert changed == Experiment(task="mnist_2nn", client_fraction=0.2, seed=3, algorithm="fedsgd", rounds=7)
    assert (experiment.batch_size, changed.batch_size) == (10, 0)


def test_settings_of_what_is_not_there_any_more_go_with_it():
    experiment = Experiment(aggregator="dp", noise_multiplier=2.0, delta=1e-6, local_epochs=20, seed=3)
    assert experiment.change({"aggregator": "robust"}) == Experiment(aggregator="robust", local_epochs=20, seed=3)
    assert experiment.change({"algorithm": "sgd"}) == Experiment(algorithm="sgd", seed=3)
    fed_sgd = Experiment(algorithm="fedsgd", aggregator="dp", noise_multiplier=2.0, delta=1e-6, seed=3)
    assert experiment.change({"algorithm": "fedsgd"}) == fed_sgd
    assert experiment.change({"noise_multiplier": 1.0}).delta == 1e-6
    with pytest.raises(ValueError, match="^--local_epochs=2 needs --algorithm=fedavg: give that, or leave it out"):
        experiment.change({"algorithm": "sgd", "local_epochs": 2})


def test_a_configuration_that_was_changed_by_hand_is_read_without_its_checksum(tmp_path):
    path = tmp_path / "config.json"
    write_record(path, {"settings": Experiment(task="mnist_2nn", seed=3).to_json()})
    assert Experiment.read_json(path).seed == 3
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ValueError, match="config.json is damaged, or was changed"):
        Experiment.read_json(path)
    path.write_text(json.dumps({"settings": {"task": "mnist_2nn", "seed": 4}}))
    assert Experiment.read_json(path) == Experiment(task="mnist_2nn", seed=4)


@pytest.mark.parametrize(
    ("algorithm", "C", "E", "B", "rounds", "eval_every"),
    [("fedavg", 0.1, 5, 10, 100, 1), ("fedsgd", 0.1, 1, 0, 100, 1), ("sgd", None, None, 100, 10_000, 100)],
)
def test_defaults_are_those_of_the_algorithm(algorithm, C, E, B, rounds, eval_every):
    experiment = Experiment(algorithm=algorithm)
    assert (experiment.client_fraction, experiment.local_epochs, experiment.batch_size) == (C, E, B)
    assert (experiment.rounds, experiment.eval_every) == (rounds, eval_every)
    # What is its default may be said too.
    assert Experiment(algorithm=algorithm, client_fraction=C, local_epochs=E, batch_size=B) == experiment


@pytest.mark.parametrize("task", tasks.TASKS)
def test_defaults_are_those_of_the_task(task):
    entry, experiment = tasks.TASKS[task], Experiment(task=task)
    assert experiment.data == entry.data[0]
    assert experiment.partition == entry.partitions[0]
    assert experiment.learning_rate == entry.learning_rate
    assert (experiment.clients, experiment.target_accuracy) == (None, None)
    assert (experiment.seed, experiment.algorithm, experiment.eval_train) == (0, "fedavg", False)
    assert (experiment.learning_rate_decay, experiment.decay_every) == (None, None)
    if entry.embedded:
        assert Experiment(task=task, data="embedded").data == entry.embedded


def test_eta_decays_every_round_unless_told_otherwise():
    assert Experiment(learning_rate_decay=0.99).decay_every == 1
    assert Experiment(learning_rate_decay=0.99, decay_every=10).decay_every == 10


def test_values_have_the_type_of_their_field():
    experiment = Experiment(learning_rate=1, client_fraction=0, target_accuracy=1)
    values = (experiment.learning_rate, experiment.client_fraction, experiment.target_accuracy)
    assert [type(value) for value in values] == [float] * 3


OUT_OF_RANGE = [
    ("task", ["mnist_3nn", 1]),
    ("data", ["mnist6k", 1]),
    ("partition", ["by_hand", 1]),
    ("clients", [0, -1, 2**31, 1.5, "10", True]),
    ("seed", [-1, 2**31, 0.5]),
    ("algorithm", ["fedprox", 1]),
    ("client_fraction", [-0.1, 1.1, math.nan, math.inf, "0.1", True]),
    ("local_epochs", [0, 1_000_001, 1.5]),
    ("batch_size", [-1, 2**31, 0.5]),
    ("learning_rate", [0, -0.1, math.nan, math.inf, 1e39, 10**400]),
    ("learning_rate_decay", [0, 1.01, math.nan]),
    ("rounds", [0, 2**31, "20"]),
    ("eval_every", [-1, 2**31]),
    ("client_optimizer", ["rmsprop", 1]),
    ("proximal_strength", [-0.1, math.nan, math.inf]),
    ("server_optimizer", ["rmsprop", 1]),
    ("server_learning_rate", [0, -1, math.nan]),
    ("aggregator", ["median", 1]),
    ("client_weighting", ["equal", 1]),
    ("eval_train", [1, "true"]),
    ("matmul_precision", ["float16", 16]),
    ("target_accuracy", [-0.1, 1.01, math.nan]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUT_OF_RANGE for value in values])
def test_what_is_out_of_range_is_refused_in_one_line_that_names_the_flag(name, value):
    with pytest.raises(ValueError) as error:
        Experiment(**{name: value})
    assert str(error.value).startswith(f"--{name}") and "\n" not in str(error.value)
    assert str(value) in str(error.value)
    assert "take" in str(error.value)


# What can be chosen with another setting only.
DEPENDENT = [
    ("decay_every", [0, 2**31], dict(learning_rate_decay=0.99)),
    ("dirichlet_alpha", [0, -1, math.nan, math.inf], dict(partition="dirichlet")),
    ("zeroing", [2, "true"], dict(aggregator="robust")),
    ("clipping", [0, "false"], dict(aggregator="compressed")),
    ("noise_multiplier", [0, -1, math.nan], dict(aggregator="dp")),
    ("clients_per_subround", [0, 1.5], dict(aggregator="robust")),
    ("delta", [0, 1.1], dict(aggregator="dp", noise_multiplier=1)),
    *(
        (f"{side}_{name}", [-0.1, 1.1, math.nan], {f"{side}_optimizer": optimizer})
        for side in ("client", "server")
        for name, optimizer in (
            ("momentum", "momentum"),
            ("beta_1", "adam"),
            ("beta_2", "yogi"),
            ("epsilon", "adagrad"),
            ("initial_preconditioner_value", "adagrad"),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "others"), [(name, value, others) for name, values, others in DEPENDENT for value in values]
)
def test_dependent_settings_have_a_range_too(name, value, others):
    with pytest.raises(ValueError, match=f"^--{name}=.*: take ") as error:
        Experiment(**others, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value", "others"), [(name, values[0], others) for name, values, others in DEPENDENT])
def test_dependent_settings_need_another_one(name, value, others):
    allowed = {"zeroing": True, "clipping": True, "decay_every": 1, "clients_per_subround": 9}.get(name, 0.5)
    with pytest.raises(ValueError, match=f"^--{name}={allowed} needs --{next(iter(others))}"):
        Experiment(**{name: allowed})


@pytest.mark.parametrize("name", ["server_beta_1", "server_beta_2"])
def test_moments_that_nothing_is_added_to_are_refused(name):
    """Adam divides by 1 - beta^t."""
    with pytest.raises(ValueError, match=f"^--{name}=1.0: take a number from 0 to below 1"):
        Experiment(server_optimizer="adam", server_learning_rate=0.1, **{name: 1.0})


def test_ranges_of_all_fields_are_tested():
    assert {name for name, *_ in (*OUT_OF_RANGE, *DEPENDENT)} == SETTINGS.keys()


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (dict(client_optimizer="adam"), "--learning_rate has no default for --client_optimizer=adam"),
        (dict(server_optimizer="yogi"), "--server_learning_rate has no default for --server_optimizer=yogi"),
        (dict(aggregator="dp"), "--noise_multiplier has no default for --aggregator=dp"),
    ],
)
def test_what_has_no_good_default_is_asked_for(settings, missing):
    with pytest.raises(ValueError, match=f"^{missing}: give it$"):
        Experiment(**settings)


def test_parameters_of_optimizers_have_the_defaults_of_tff_and_of_reddi_et_al():
    adam = Experiment(client_optimizer="adam", learning_rate=0.001, server_optimizer="adam", server_learning_rate=0.1)
    assert (adam.client_beta_1, adam.client_beta_2, adam.client_epsilon) == (0.9, 0.999, 1e-7)
    assert (adam.server_beta_1, adam.server_beta_2, adam.server_epsilon) == (0.9, 0.99, 1e-3)
    plain = Experiment()
    assert (plain.client_optimizer, plain.server_optimizer, plain.server_learning_rate) == ("sgd", "sgd", 1.0)
    assert (plain.client_momentum, plain.server_beta_1, plain.zeroing, plain.delta) == (None, None, None, None)
    assert Experiment(aggregator="dp", noise_multiplier=1).client_weighting == "uniform"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(algorithm="fedsgd", local_epochs=5), "--local_epochs=5 needs --algorithm=fedavg: give that, or leave"),
        (dict(algorithm="fedsgd", batch_size=10), "--batch_size=10 needs --algorithm=fedavg or sgd: give that, or "),
        (dict(algorithm="sgd", client_fraction=0.1), "--client_fraction=0.1 needs --algorithm=fedavg or fedsgd: give"),
        (dict(algorithm="sgd", local_epochs=1), "--local_epochs=1 needs --algorithm=fedavg: give that, or leave it "),
        (dict(algorithm="sgd", client_weighting="uniform"), "--client_weighting=uniform: --algorithm=sgd has no"),
        (dict(algorithm="sgd", batch_size=0), "--batch_size=0: --algorithm=sgd takes minibatches, give their size"),
        (dict(decay_every=10), "--decay_every=10 needs --learning_rate_decay: give that, or leave it out"),
        (dict(task="cifar_cnn", data="embedded"), "--data=embedded, but no package comes with data for cifar_cnn"),
        (dict(task="cifar_cnn", partition="role"), "--partition=role: cifar_cnn takes iid"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError) as error:
        Experiment(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "experiment",
    [
        Experiment(),
        Experiment(task="cifar_cnn", algorithm="sgd", learning_rate_decay=0.9934, decay_every=500),
        Experiment(task="shakespeare_lstm", data="embedded", partition="role", eval_train=True, target_accuracy=1),
        Experiment(clients=7, seed=3, client_fraction=0, batch_size=0, rounds=2, eval_every=2, learning_rate=1e-3),
    ],
)
def test_what_is_written_to_config_json_is_read_from_it(tmp_path, experiment):
    write(tmp_path, experiment.to_json())
    assert Experiment.read(tmp_path) == experiment


def test_without_config_json_there_is_no_experiment(tmp_path):
    assert Experiment.read(tmp_path) is None


def test_what_an_older_config_json_lacks_has_its_default(tmp_path):
    write(tmp_path, {"task": "cifar_cnn", "algorithm": "sgd", "eval_train": None})
    assert Experiment.read(tmp_path) == Experiment(task="cifar_cnn", algorithm="sgd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.9}, "holds a run with momentum, which this version does not know"),
        ({"rounds": 0}, "holds a run that this version does not take: --rounds=0: take an integer from 1"),
    ],
)
def test_config_json_that_this_version_does_not_take_is_refused_in_one_line(tmp_path, settings, message):
    write(tmp_path, settings)
    with pytest.raises(ValueError) as error:
        Experiment.read(tmp_path)
    assert str(error.value).startswith(f"run_dir={tmp_path} {message}") and "\n" not in str(error.value)


def test_run_goes_on_with_another_end_or_in_other_subrounds_only():
    held = Experiment(data="embedded", local_epochs=20, rounds=5, aggregator="robust")
    changes = {"rounds": 9, "target_accuracy": 1.0, "eval_every": 3, "clients_per_subround": 20}
    assert held.go_on("run", changes) == dataclasses.replace(held, **changes)
    assert held.go_on("run", {"data": "embedded", "local_epochs": 20}) == held
    assert {name for name, setting in SETTINGS.items() if setting.may_differ} == changes.keys()
    for name, value in (("seed", 1), ("algorithm", "fedsgd"), ("task", "mnist_cnn"), ("eval_train", True)):
        with pytest.raises(ValueError) as error:
            held.go_on("run", {name: value})
        assert str(error.value) == (
            f"run_dir=run holds a run with {name}={getattr(held, name)}, not {value}: give another run_dir to start a "
            "new run"
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.parent.relative_to(ROOT / "results")))
def test_experiments_of_the_results_are_read_and_go_on_as_they_are(path):
    config = json.loads(path.read_text())
    settings = config["settings"]
    for change in config.get("changes", ()):  # Of a run that went on further than it was to at first, or less far.
        settings |= change["settings"]
    experiment = Experiment.read(path.parent)
    said = {name: value for name, value in settings.items() if value is not None}
    assert said.items() <= experiment.to_json().items()
    assert experiment.go_on(path.parent, experiment.to_json()) == experiment


def test_runs_of_the_plan_among_the_results_go_on_with_the_plans_experiments():
    grids = [grid for number in (1, 2, 3, 4) for grid in plan.table(number)]
    grids += [curve.grid for figure in plan.figures().values() for curve in figure.curves]
    results, found = ROOT / "results", set()
    for grid in grids:
        for run in (run for runs in grid.progress(results) for run in runs):
            directory = run.directory(results)
            if held := Experiment.read(directory):
                found.add(directory / "config.json")
                assert held.go_on(directory, run.experiment.to_json()) == run.experiment
    assert found == {path for path in CONFIGS if (results / "runs") in path.parents}


@pytest.mark.parametrize("module", ["explore", "reproduce", "train", "reproduction.report", "reproduction.execution"])
def test_programs_and_the_report_are_imported_without_tensorflow(module):
    code = f"import sys, binaries.{module}; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
