"""FedAvg by Flower's simulation, whose clients train with PyTorch, one on each core.

python with_flower.py WORK.npz
"""

import logging
import os
import sys

# Before they are imported: nothing is to be reported to anybody; the last one ends a warning about GPUs.
for variable in "FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO":
    os.environ[variable] = "0"

from flower_client import build_app  # noqa: E402
from flwr.app import ArrayRecord  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from torch_models import Trainer  # noqa: E402
from work import Work, serve  # noqa: E402


def main() -> None:
    path = sys.argv[1]
    work = Work.load(path)
    initial_weights = [w.numpy() for w in Trainer(work).initial_weights]
    app = ServerApp()

    @app.main()
    def serve_rounds(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=len(work.clients))
        initial_arrays = ArrayRecord(initial_weights)

        def run_round():
            return strategy.start(grid, initial_arrays, num_rounds=1).arrays.to_numpy_ndarrays()

        serve(run_round, initial_weights)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        app,
        build_app(path),
        num_supernodes=len(work.clients),
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": len(os.sched_getaffinity(0)), "log_to_driver": False, "logging_level": "error"},
        },
    )


if __name__ == "__main__":
    main()
