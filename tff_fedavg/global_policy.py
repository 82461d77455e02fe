"""Keras's global policy, which says in which dtype new layers and metrics compute, for a while."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf


@contextlib.contextmanager
def global_policy(name: str) -> Iterator[None]:
    """Has layers and metrics made with a policy within the `with` statement, such as "float32" or "mixed_bfloat16"."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
