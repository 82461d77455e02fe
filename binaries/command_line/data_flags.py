"""The flags that say where the data are."""

from absl import flags

import tasks

_DATA_DIR = flags.DEFINE_string("data_dir", tasks.DATA_DIR, "Where the data are, or are kept after a download.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", tasks.CACHE_DIR, "Where the client files are kept.")


def directories() -> dict[str, str]:
    """Returns where the data and the client files are: `data_dir` and `cache_dir`."""
    return {flag.name: flag.value for flag in (_DATA_DIR, _CACHE_DIR)}
