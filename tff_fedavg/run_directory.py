"""The directory of one run: its configuration, metrics, saved states and pictures, and a lock against a second run."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from tff_fedavg.replacement import replacement

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

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, may_differ: Collection[str]):
        """Makes or opens the directory, and holds its lock until the process ends.

        Args:
          path: The directory.
          settings: What the run depends on, as JSON values.
          may_differ: Names of settings that may differ from those of the run that the directory holds.

        Raises:
          ValueError: If the directory cannot be written, is in use, or holds a run with other settings.
        """
        self.path = pathlib.Path(path)
        self.metrics_csv = self.path / "metrics.csv"
        self.tensorboard = self.path / "tensorboard"
        self.states = self.path / "states"
        self.learning_curve_png = self.path / "learning_curve.png"
        self._config_json = self.path / "config.json"
        self._settings = json.loads(json.dumps(settings))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as e:
            raise ValueError(f"run_dir={self.path} cannot be written: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f"run_dir={self.path} is in use by another run") from e
        self._config = self._read_config()
        found = self._config.get("settings", self._settings)
        for name in sorted(found.keys() | self._settings.keys()):
            if name not in may_differ and found.get(name) != self._settings.get(name):
                raise ValueError(
                    f"run_dir={self.path} holds a run with {name}={found.get(name)}, not {self._settings.get(name)}: "
                    "give another run_dir to start a new run"
                )

    def start(self, checksums: Mapping[str, str]) -> None:
        """Writes config.json, when the data have turned out to be good: until then the directory holds no run.

        Args:
          checksums: SHA-256 of the data files, by file name.

        Raises:
          ValueError: If the directory holds a run on other data, or cannot be written.
        """
        found = self._config.get("data_checksums", checksums)
        for name in sorted(found.keys() | checksums.keys()):
            if found.get(name) != checksums.get(name):
                raise ValueError(f"run_dir={self.path} holds a run on other data: {name} differs")
        versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
        config = {
            "settings": self._settings,
            "data_checksums": dict(checksums),
            "versions": {"python": sys.version.split()[0], **versions},
        }
        try:
            with replacement(self._config_json) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")
        except OSError as e:
            raise ValueError(f"{self._config_json} cannot be written: {e.strerror}") from e

    def _read_config(self) -> dict[str, Any]:
        if not self._config_json.exists():
            return {}
        try:
            config = json.loads(self._config_json.read_text())
            config["settings"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{self._config_json} is damaged: give another run_dir, or remove this one") from e
        return config
