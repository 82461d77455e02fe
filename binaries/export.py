"""Saves the model of a run as a plain Keras model, which is loaded without TFF.

    python -m binaries.export --run_dir=runs/mnist_2nn --output=model.keras

A name that ends in .keras is a file in Keras's format; one without a suffix is a SavedModel, a directory.
"""

import os
import pathlib
import shutil
from typing import TYPE_CHECKING

from absl import flags, logging

from binaries.command_line import program, saved_run
from binaries.command_line.output_dir import make_output_dir
from tff_fedavg import run_directory
from tff_fedavg.metrics_table import ROUND_FIELD
from tff_fedavg.scratch import scratch_directory

if TYPE_CHECKING:
    import tensorflow as tf
    from tensorflow_federated.learning.models import ModelWeights

    from tasks.task import Task

_OUTPUT = flags.DEFINE_string("output", None, "Where the model goes: NAME.keras, or NAME for a SavedModel directory.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replaces a model that is there already.")

flags.adopt_module_key_flags(saved_run)


def main() -> None:
    output = _output()
    run_dir, experiment, round_number = saved_run.chosen()
    print(f"round {round_number} of {run_dir} (TensorFlow takes some seconds to start)", flush=True)
    # Last, since they import TensorFlow.
    import tensorflow as tf

    if logging.get_verbosity() <= logging.WARNING:
        tf.get_logger().setLevel("ERROR")  # It warns that a model for use has no optimizer.
    task = saved_run.build_task(run_dir, experiment)
    model = _model(task, saved_run.load_weights(run_dir, round_number))
    _save(model, output)
    inputs = tf.nest.map_structure(lambda spec: f"{spec.dtype.name} {spec.shape.as_list()}", task.train.batch_spec[0])
    print(f"{output}: {model.count_params():,} parameters, for {inputs}")
    if measured := _measured(run_dir, round_number):
        print(f"on the test set of {experiment.task}: {measured}")
    if output.suffix:
        from tff_fedavg.export import what_loading_needs

        for line in what_loading_needs(model, output):
            print(line)


def _output() -> pathlib.Path:
    if not _OUTPUT.value:
        raise ValueError("--output is missing: give NAME.keras, or NAME for a SavedModel directory")
    output = pathlib.Path(os.path.realpath(os.path.expanduser(_OUTPUT.value)))
    if output.suffix not in ("", ".keras"):
        raise ValueError(f"--output={output}: take a name that ends in .keras, or has no suffix")
    if output.exists():
        is_model = output.is_file() if output.suffix else (output / "saved_model.pb").exists()
        if not is_model:
            raise ValueError(f"--output={output} exists, and is no model: take another name")
        if not _OVERWRITE.value:
            raise ValueError(f"--output={output} exists: take another name, or --overwrite")
    make_output_dir(str(output.parent))
    return output


def _model(task: "Task", weights: "ModelWeights") -> "tf.keras.Model":
    from tff_fedavg.export import keras_model
    from tff_fedavg.functional_model import build_weights

    def architecture():
        model = task.keras_model_fn()
        build_weights(model, task.train.batch_spec[0])
        return model

    return keras_model(architecture, weights)


def _save(model: "tf.keras.Model", output: pathlib.Path) -> None:
    with scratch_directory(output.parent, f".{output.name}.") as directory:
        temporary = directory / output.name
        model.save(temporary)
        if output.is_dir():
            shutil.rmtree(output)
        temporary.replace(output)


def _measured(run_dir: pathlib.Path, round_number: int) -> str:
    """Returns what the run has measured in a round; empty if nothing."""
    rows = run_directory.read_metrics(run_dir)
    row = next((row for row in rows if row[ROUND_FIELD] == round_number), {})
    prefix = "evaluation/"
    return ", ".join(f"{n.removeprefix(prefix)} {value:.4f}" for n, value in row.items() if n.startswith(prefix))


if __name__ == "__main__":
    program.run("export", main)
