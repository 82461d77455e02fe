"""The directory of one run: its configuration, metrics, saved states and pictures, and a lock against a second run."""

import fcntl
import importlib.metadata
import os
import pathlib
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from tff_fedavg import metrics_table, saved_state
from tff_fedavg.json_record import read_record, write_record
from tff_fedavg.learning_curve import Target
from tff_fedavg.regular_file import check_regular

_CONFIG_JSON = "config.json"
METRICS_CSV = "metrics.csv"
_PACKAGES = ("tff_fedavg", "tensorflow", "tensorflow-federated", "keras", "numpy", "jaxlib")


class RunDirectory:
    """An opened run directory.

    Attributes:
      path: The directory.
      run: What tells its run from others, also in the saved states.
      metrics_csv: One row per round.
      tensorboard: The same metrics for TensorBoard.
      learning_curve_png: Test accuracy over rounds.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Makes or opens the directory, and holds its lock until it is closed, or the process ends.

        Args:
          path: The directory.

        Raises:
          ValueError: If the directory cannot be written, is in use, or its config.json is damaged or missing.
        """
        self.path = pathlib.Path(path)
        self.metrics_csv = self.path / METRICS_CSV
        self.tensorboard = self.path / "tensorboard"
        self.learning_curve_png = self.path / "learning_curve.png"
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if lock.exists():
                check_regular(lock)
            self._lock = open(lock, "a")
        except OSError as e:
            raise ValueError(f"run_dir={self.path} cannot be written: {e.strerror or e}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"run_dir={self.path} is in use by another run") from e
        except OSError:
            pass  # The file system has no locks.
        config = read_config(self.path)
        if config is None and (self.metrics_csv.exists() or saved_state.saved_rounds(self.path)):
            raise ValueError(f"run_dir={self.path} holds a run whose {_CONFIG_JSON} is missing: give another run_dir")
        self.run = (config or {}).get("run") or uuid.uuid4().hex

    def close(self) -> None:
        """Lets others use the directory."""
        self._lock.close()

    def start(
        self,
        settings: Mapping[str, Any],
        checksums: Mapping[str, str],
        target: Target,
        *,
        task_file: str | None = None,
        after_round: int = 0,
    ) -> None:
        """Writes config.json, when the data have turned out to be good: until then the directory holds no run.

        Args:
          settings: What the run depends on, as JSON values. Those that differ from the ones before are kept as changes.
          checksums: SHA-256 of the data files, by file name.
          target: What the run aims at.
          task_file: SHA-256 of the file with the code of the task, if it is one of the user's own.
          after_round: The round that it goes on after; 0 for a new run.

        Raises:
          ValueError: If it cannot be written.
        """
        held = read_config(self.path)
        if held is None or not after_round:
            changes = []
        else:
            changes = [change for change in held["changes"] if change["after_round"] < after_round]
            before = settings_of({**held, "changes": changes})
            if changed := {name: value for name, value in settings.items() if before.get(name) != value}:
                changes.append({"after_round": after_round, "settings": changed})
        config = {
            "run": self.run,
            "settings": dict(held["settings"]) if changes else dict(settings),
            "changes": changes,
            "target": vars(target),
            "data_checksums": dict(checksums),
            "task_file": task_file,
            "versions": {
                "python": sys.version.split()[0],
                **{package: importlib.metadata.version(package) for package in _PACKAGES},
            },
        }
        path = self.path / _CONFIG_JSON
        try:
            write_record(path, config)
        except OSError as e:
            raise ValueError(f"{path} cannot be written: {e.strerror}") from e


def read_config(run_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the configuration of a run, as `read_config_json`; None if there is none.

    Raises:
      ValueError: If config.json is damaged.
    """
    try:
        return read_config_json(pathlib.Path(run_dir) / _CONFIG_JSON)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{e}; give another run_dir, or remove this one") from e


def read_config_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a config.json.

    It has "run" (None in those of the first version), "settings" as the run began with, "changes" (what was changed,
    and after which round), "target", "data_checksums", "task_file" and "versions". One without a checksum is taken as
    it is: without that line it can be written, or changed, by hand.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is damaged.
    """
    config = read_record(path, needs_checksum=False)
    config = {
        "run": None,
        "changes": [],
        "target": {},
        "data_checksums": {},
        "task_file": None,
        "versions": {},
        **config,
    }
    try:
        settings_of(config)
        for name in ("data_checksums", "versions"):
            config[name].keys()
        Target(**{"value": None, **config["target"]})
        if not all(isinstance(change["after_round"], int) for change in config["changes"]):
            raise TypeError("after_round is no number")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is damaged: it is no configuration of a run ({e!r})") from e
    return config


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a run has gone on with last."""
    settings = dict(config["settings"])
    for change in config["changes"]:
        settings |= change["settings"]
    return settings


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Reads the rows of a run's metrics.csv, as `metrics_table.read_metrics`, and holds them against its newest state.

    Raises:
      ValueError: If the file is damaged, or has been changed since the state was saved.
    """
    path = pathlib.Path(run_dir) / METRICS_CSV
    config = read_config(run_dir)
    for round_number in reversed(saved_state.saved_rounds(run_dir)):
        try:
            saved = saved_state.load_metrics(run_dir, round_number, run=config["run"] if config else "")
        except ValueError:
            continue  # The training goes on from the one before it, too.
        return metrics_table.read_metrics(path, saved=saved, last_round=round_number)
    return metrics_table.read_metrics(path)


def task_has_changed(run_dir: str | os.PathLike[str], task_file: str | None) -> bool:
    """Whether the file of the task is another than the one that a run has been trained with, as far as that is kept.

    Args:
      run_dir: The directory of the run.
      task_file: As for `RunDirectory.start`, of now.
    """
    return read_config(run_dir)["task_file"] not in (None, task_file)


def check_data(run_dir: str | os.PathLike[str], checksums: Mapping[str, str]) -> None:
    """Compares data with those of a run.

    Args:
      run_dir: The directory of the run.
      checksums: SHA-256 of the data files, by file name.

    Raises:
      ValueError: If the directory holds a run on other data, or config.json is damaged.
    """
    found = (read_config(run_dir) or {}).get("data_checksums") or checksums  # Earlier versions had none of own tasks.
    for name in sorted(found.keys() | checksums.keys()):
        if found.get(name) != checksums.get(name):
            raise ValueError(f"run_dir={run_dir} holds a run on other data: {name} differs")
