"""Optimizers of TFF, traced in eager mode: in the graphs that TFF builds `==` would compare Python objects."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.traced import TracedFunction, fits


class TracedOptimizer(tff.learning.optimizers.Optimizer):
    """An optimizer of certain weights, whose functions can be called in any graph."""

    def __init__(self, argument: str, optimizer: tff.learning.optimizers.Optimizer, weights: Sequence[Any]):
        """Traces an optimizer.

        Args:
          argument: What it was given as, for errors.
          optimizer: The optimizer.
          weights: The weights that it is for.

        Raises:
          TypeError: If it is no optimizer of TFF.
          ValueError: If it fails.
        """
        if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
            raise TypeError(
                f"{argument} is {optimizer!r}; it must be one of tff.learning.optimizers, such as build_sgdm(1.0, "
                "momentum=0.9)"
            )
        specs = tuple(tf.TensorSpec(w.shape, w.dtype) for w in weights)
        name = f"{argument} is a {type(optimizer).__name__}, which"
        self._optimizer = optimizer
        self._initialize = TracedFunction(name, lambda: optimizer.initialize(specs), [])
        state_spec = self._initialize.output_spec
        self._next = TracedFunction(name, optimizer.next, [state_spec, specs, specs])
        if not fits((state_spec, specs), self._next.output_spec):
            raise ValueError(f"{name} fails: its next returns {self._next.output_spec} for a state {state_spec}")
        if self._next.is_random:
            raise ValueError(
                f"{name} draws random numbers, the same in each step: take tf.random.stateless_*, with a seed in "
                "its state"
            )

    def initialize(self, specs: Any) -> Any:
        return self._initialize()

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        return self._next(state, weights, gradients)

    def get_hparams(self, state: Any) -> Any:
        return self._optimizer.get_hparams(state)

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        return self._optimizer.set_hparams(state, hparams)
