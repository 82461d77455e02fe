"""Pictures of a federated data set, before one trains on it; leaves them as PNG in --output_dir.

python -m binaries.explore --task=mnist_2nn --data=embedded --partition=pathological
"""

from absl import flags

from binaries.command_line import data_flags, experiment_flags, program
from binaries.command_line.output_dir import make_output_dir
from binaries.experiment import Experiment
from tff_fedavg import picture

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where the pictures go; by default pictures/TASK-PARTITION.")

experiment_flags.define("task", "data", "partition", "dirichlet_alpha", "clients", "seed")
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(experiment_flags)


def main() -> None:
    # A task of one's own has no learning rate, and here it does not matter.
    experiment = Experiment(learning_rate=1.0, **experiment_flags.given())
    experiment.find_data(data_flags.directories()["data_dir"])
    name = "-".join(part for part in (experiment.task_name, experiment.partition) if part)
    output_dir = make_output_dir(_OUTPUT_DIR.value or f"pictures/{name}")
    print(f"pictures of {experiment.task} in {output_dir} (TensorFlow takes some seconds to start)", flush=True)

    from tasks import pictures  # Last, since it imports TensorFlow.

    task = experiment.build_task(**data_flags.directories())
    print(pictures.summary(task))
    for name, draw in pictures.kinds(task).items():
        path = output_dir / f"{name}.png"
        picture.save(draw(task), path)
        print(path)


if __name__ == "__main__":
    program.run("explore", main)
