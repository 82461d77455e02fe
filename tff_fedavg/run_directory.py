"""The directory of one run: its configuration, metrics, saved states and pictures, and a lock against a second run."""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from tff_fedavg.learning_curve import Target
from tff_fedavg.replacement import replacement

_CONFIG_JSON = "config.json"
_PACKAGES = ("tensorflow", "tensorflow-federated", "keras", "numpy", "jaxlib")


class RunDirectory:
    """An opened run directory.

    Attributes:
      path: The directory.
      metrics_csv: One row per round, as `tff.program.CSVFileReleaseManager` writes it.
      tensorboard: The same metrics for TensorBoard.
      states: The saved states of the training process.
      learning_curve_png: Test accuracy over rounds.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Makes or opens the directory, and holds its lock until the process ends.

        Args:
          path: The directory.

        Raises:
          ValueError: If the directory cannot be written, is in use, or its config.json is damaged.
        """
        self.path = pathlib.Path(path)
        self.metrics_csv = self.path / "metrics.csv"
        self.tensorboard = self.path / "tensorboard"
        self.states = self.path / "states"
        self.learning_curve_png = self.path / "learning_curve.png"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as e:
            raise ValueError(f"run_dir={self.path} cannot be written: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f"run_dir={self.path} is in use by another run") from e
        read_config(self.path)  # Refuses a damaged one.

    def start(self, settings: Mapping[str, Any], checksums: Mapping[str, str], target: Target) -> None:
        """Writes config.json, when the data have turned out to be good: until then the directory holds no run.

        Args:
          settings: What the run depends on, as JSON values.
          checksums: SHA-256 of the data files, by file name.
          target: What the run aims at.

        Raises:
          ValueError: If the directory holds a run on other data, or cannot be written.
        """
        check_data(self.path, checksums)
        versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
        config = {
            "settings": dict(settings),
            "target": dataclasses.asdict(target),
            "data_checksums": dict(checksums),
            "versions": {"python": sys.version.split()[0], **versions},
        }
        path = self.path / _CONFIG_JSON
        try:
            with replacement(path) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")
        except OSError as e:
            raise ValueError(f"{path} cannot be written: {e.strerror}") from e


def read_config(run_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the configuration of a run ("settings", "target", "data_checksums", "versions"); None if there is none.

    Raises:
      ValueError: If config.json is damaged.
    """
    path = pathlib.Path(run_dir) / _CONFIG_JSON
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        config["settings"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: give another run_dir, or remove this one") from e
    return config


def check_data(run_dir: str | os.PathLike[str], checksums: Mapping[str, str]) -> None:
    """Compares data with those of a run.

    Args:
      run_dir: The directory of the run.
      checksums: SHA-256 of the data files, by file name.

    Raises:
      ValueError: If the directory holds a run on other data, or config.json is damaged.
    """
    found = (read_config(run_dir) or {}).get("data_checksums", checksums)
    for name in sorted(found.keys() | checksums.keys()):
        if found.get(name) != checksums.get(name):
            raise ValueError(f"run_dir={run_dir} holds a run on other data: {name} differs")
