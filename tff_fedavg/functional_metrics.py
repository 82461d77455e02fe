"""Keras's metrics, and functions of labels and outputs, as functions that TFF evaluates."""

import collections
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.export import is_of_keras
from tff_fedavg.global_policy import global_policy
from tff_fedavg.traced import TracedFunction, first_error

Metric = tf.keras.metrics.Metric | Callable[[], tf.keras.metrics.Metric] | Callable[[Any, Any], tf.Tensor] | str

_LOSS_METRIC = "loss"
_NAME = re.compile(r"[A-Za-z0-9_./-]+")
_MASK, _LOGITS = "_keras_mask", "_keras_logits"
_ACCURACY, _CROSSENTROPY = ("accuracy", "acc"), ("crossentropy", "ce")


def metrics_fns(
    metrics: Mapping[str, Metric] | Sequence[Metric],
    loss_fn: Callable[..., tf.Tensor],
    output_spec: Any,
    y_spec: Any,
    attached_spec: Any,
) -> tuple[Callable, Callable, Callable]:
    """Returns TFF's functions of the metrics, which have been tried out.

    Args:
      metrics: As for `functional_model_from_keras`.
      loss_fn: l, of outputs and labels, of which "loss" is the mean.
      output_spec: Of the model's outputs for a batch.
      y_spec: Of its labels.
      attached_spec: Of what `attached_to` finds there. If anything, the predictions are pairs of the outputs and that.

    Raises:
      TypeError: If a metric is something else.
      ValueError: If TFF cannot make functions of a metric, it is not a number, or its variables are not sums.
    """
    constructors = _constructors(metrics, output_spec, y_spec)
    # Traced, for what a loss function may capture.
    mean_loss = TracedFunction(
        "the loss",
        lambda output, label, attached: loss_fn(attach(output, attached), label),
        [output_spec, y_spec, attached_spec],
    )
    constructors = {_LOSS_METRIC: functools.partial(_MeanLoss, mean_loss), **constructors}
    takes_attached = any(attached_spec)
    constructors = {
        name: functools.partial(_as_in_keras, constructor, output_spec, y_spec, takes_attached)
        for name, constructor in constructors.items()
    }
    predictions_spec = (output_spec, attached_spec) if takes_attached else output_spec

    def build(constructors):
        fns = _traced(*tff.learning.metrics.create_functional_metric_fns(constructors), y_spec, predictions_spec)
        made = [constructor() for constructor in constructors.values()]
        are_known = all(is_of_keras(metric) or type(metric).__module__.startswith("tff_fedavg.") for metric in made)
        _try_metrics(*fns, y_spec, predictions_spec, are_known)
        return fns

    try:
        return build(collections.OrderedDict(constructors))
    except Exception:  # Of any kind: it may be somebody else's code.
        for name, constructor in constructors.items():
            try:
                build(collections.OrderedDict({name: constructor}))
            except Exception as e:
                raise ValueError(
                    f"TFF can make no function of the metric {name!r} ({first_error(e)}): it has to make its variables "
                    "in __init__ or build, to add to them in update_state, from zero, and to be one number"
                ) from e
        raise


def _traced(
    initialize: Callable, update: Callable, finalize: Callable, y_spec: Any, predictions_spec: Any
) -> tuple[Callable, Callable, Callable]:
    """Returns TFF's functions of metrics, traced as Keras traces them: in TFF's graphs `==` compares Python objects."""
    traced_initialize = TracedFunction("it", initialize, [])
    state_spec = traced_initialize.output_spec
    traced_update = TracedFunction(
        "it",
        lambda state, y, predictions: update(state, y, tff.learning.models.BatchOutput(predictions=predictions)),
        [state_spec, y_spec, predictions_spec],
    )

    def update_with_batch_output(state, labels, batch_output, sample_weight=None):
        del sample_weight  # As TFF does.
        return traced_update(state, labels, batch_output.predictions)

    return traced_initialize, update_with_batch_output, TracedFunction("it", finalize, [state_spec])


def _try_metrics(
    initialize: Callable, update: Callable, finalize: Callable, y_spec: Any, predictions_spec: Any, are_known: bool
) -> None:
    """Tries out functions of metrics in a graph as TFF's; those that are not known also on two made-up batches.

    Raises:
      Exception: If they fail.
      ValueError: If a value is not a number, or the variables after both batches are not the sums of those after each,
        which they are taken for: the test set is evaluated in parts.
    """
    rng = np.random.default_rng(0)
    made_up = {}

    def placeholder(spec):
        tensor = tf.compat.v1.placeholder(spec.dtype, spec.shape)
        shape = [4 if dimension is None else dimension for dimension in spec.shape]
        # Zeros and ones, or numbers between them, which suit most metrics.
        made_up[tensor] = rng.random(shape) if spec.dtype.is_floating else rng.integers(2, size=shape)
        return tensor

    def batch():
        labels, predictions = tf.nest.map_structure(placeholder, (y_spec, predictions_spec))
        return labels, tff.learning.models.BatchOutput(predictions=predictions)

    with tf.Graph().as_default():
        state = update(initialize(), *batch())
        for value in finalize(state).values():
            if not (tf.is_tensor(value) and value.shape.rank == 0):
                raise ValueError(f"its value is {value}, not a number")
        if are_known:
            return
        other = batch()
        states = [tf.nest.flatten(each) for each in (state, update(initialize(), *other), update(state, *other))]
        config = tf.compat.v1.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True  # It would take longer, and tell of itself.
        with tf.compat.v1.Session(config=config) as session:
            try:
                states = session.run(states, made_up)
            except tf.errors.OpError:  # What is made up does not fit.
                return
    for of_one, of_other, of_both in zip(*states):
        if not np.allclose(np.add(of_one, of_other), of_both, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError("its variables are not sums over the examples")


def _constructors(
    metrics: Mapping[str, Metric] | Sequence[Metric], output_spec: Any, y_spec: Any
) -> dict[str, Callable[[], tf.keras.metrics.Metric]]:
    """Returns functions that make the metrics, by name."""
    if isinstance(metrics, Mapping):
        named = {name: _constructor(metric, output_spec, y_spec) for name, metric in metrics.items()}
    else:
        constructors = [_constructor(metric, output_spec, y_spec) for metric in metrics]
        named = {constructor().name: constructor for constructor in constructors}
        if len(named) < len(constructors):
            raise ValueError(f"several metrics have the same name: give them others, or as a mapping: {list(named)}")
    for name in named:
        if not _NAME.fullmatch(name):  # TensorFlow's names of operations have it in them.
            raise ValueError(f"a metric has the name {name!r}: give it one of letters, digits and _ in a mapping")
    return named


def _as_in_keras(
    constructor: Callable[[], tf.keras.metrics.Metric], output_spec: Any, y_spec: Any, takes_attached: bool
) -> tf.keras.metrics.Metric:
    """Makes a metric in float32, which may take a pair: the outputs, and what Keras would have attached to them.

    Its `update_state` gets labels and outputs by place, as from Keras; TFF gives them by the names y_true and y_pred.
    """
    with global_policy("float32"):
        metric = constructor()
        if not metric.built:  # As F1Score and R2Score, which have their variables from then on.
            metric.build(*tf.nest.map_structure(lambda spec: spec.shape, (y_spec, output_spec)))
    update_state = metric.update_state
    while hasattr(update_state, "__original_wrapped__"):  # As TFF does.
        update_state = update_state.__original_wrapped__

    def update_as_keras(y_true, y_pred):
        output = attach(*y_pred) if takes_attached else y_pred
        mask = getattr(output, _MASK, None)
        return update_state(y_true, output) if mask is None else update_state(y_true, output, sample_weight=mask)

    metric.update_state = update_as_keras
    return metric


class _MeanLoss(tf.keras.metrics.Mean):
    """The mean over the examples of a loss that is the mean over a batch."""

    def __init__(self, loss_fn: TracedFunction):
        super().__init__(_LOSS_METRIC)
        self._loss_fn = loss_fn

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: tf.Tensor | None = None):
        del sample_weight  # The mask, which the loss function finds where it is.
        return super().update_state(self._loss_fn(y_pred, y_true, attached_to(y_pred)), _num_examples(y_true))


def _num_examples(y_true: Any) -> tf.Tensor:
    return tf.shape(tf.nest.flatten(y_true)[0])[0]


class _MeanOfFunction(tf.keras.metrics.Mean):
    """The mean of a function of all labels and outputs, where there are several: Keras has one for tensors only."""

    def __init__(self, fn: Callable[[Any, Any], tf.Tensor], name: str):
        super().__init__(name)
        self._fn = fn

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: tf.Tensor | None = None):
        return super().update_state(self._fn(y_true, y_pred), sample_weight)


def _constructor(metric: Metric, output_spec: Any, y_spec: Any) -> Callable[[], tf.keras.metrics.Metric]:
    if metric in (*_ACCURACY, *_CROSSENTROPY):
        if not isinstance(output_spec, tf.TensorSpec):
            raise ValueError(f"the metric {metric!r} is for a model with one output: give one for all of them")
        accuracy, crossentropy = _of_classes(output_spec, y_spec)
        if metric in _ACCURACY:
            return functools.partial(accuracy, name=metric)
        return functools.partial(tf.keras.metrics.MeanMetricWrapper, crossentropy, name=metric)
    if isinstance(metric, str):
        found = tf.keras.metrics.get(metric)
        if not callable(found):
            raise ValueError(f"there is no metric {metric!r} in Keras")
        if not isinstance(found, tf.keras.metrics.Metric):
            return functools.partial(tf.keras.metrics.MeanMetricWrapper, found, name=metric)
        metric = found
    if isinstance(metric, tf.keras.metrics.Metric):
        config = metric.get_config()
        lost = [] if is_of_keras(metric) else _lost(metric, config)
        if lost:
            raise ValueError(
                f"the metric {metric.name!r} cannot be made anew: get_config of {type(metric).__name__} lacks "
                f"{', '.join(lost)}; give a function that makes it"
            )
        return functools.partial(_from_config, metric, config)
    if isinstance(metric, tf.keras.losses.Loss):
        return functools.partial(tf.keras.metrics.MeanMetricWrapper, metric.call, name=metric.name)
    if not callable(metric):
        raise TypeError(f"a metric is {metric!r}; it must be a Keras metric, a function that makes one, or a name")
    if not isinstance(metric, type) and len(_parameters(metric, required=True)) == 2:  # Of labels and outputs.
        wrapper = tf.keras.metrics.MeanMetricWrapper if isinstance(output_spec, tf.TensorSpec) else _MeanOfFunction
        name = getattr(metric, "__name__", type(metric).__name__)
        return functools.partial(wrapper, _for_each_example(metric), name=name)
    return metric


def _from_config(metric: tf.keras.metrics.Metric, config: Mapping[str, Any]) -> tf.keras.metrics.Metric:
    return type(metric).from_config(dict(config))  # Some take what they need out of it.


def _lost(metric: tf.keras.metrics.Metric, config: Mapping[str, Any]) -> list[str]:
    """Returns what another metric made from the config would lack: arguments by name, and attributes that are plain."""
    if lost := [name for name in _parameters(type(metric)) if name not in config]:
        return lost
    try:
        attributes = vars(_from_config(metric, config))
    except Exception as e:  # Of any kind: it may be somebody else's code.
        raise ValueError(
            f"the metric {metric.name!r} cannot be made anew ({first_error(e)}): give a function that makes it"
        ) from e
    plain = {name: value for name, value in vars(metric).items() if isinstance(value, (bool, int, float, str))}
    of_keras = vars(tf.keras.metrics.Mean())  # What it notes in each, such as whether it is built.
    differs = (name for name, value in plain.items() if repr(value) != repr(attributes.get(name)))  # NaN is NaN here.
    return [name for name in differs if name not in of_keras]


def _for_each_example(fn: Callable[[Any, Any], tf.Tensor]) -> Callable[[Any, Any], tf.Tensor]:
    """Has a function that gives one number for a batch give it for each example: batches are of several sizes."""

    def fn_for_each(y_true, y_pred):
        value = tf.convert_to_tensor(fn(y_true, y_pred))
        if value.shape.rank == 0 and not hasattr(y_pred, _MASK):  # With a mask it gets the weights of that.
            value = tf.fill([_num_examples(y_true)], value)
        return value

    return fn_for_each


def _parameters(function: Callable, required: bool = False) -> list[str]:
    """Returns the names of what a function, or a class, takes, or needs; of `*args` and `**kwargs` nothing is known."""
    unnamed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in unnamed]
    return [p.name for p in parameters if not required or p.default is p.empty]


def _of_classes(output_spec: tf.TensorSpec, y_spec: tf.TensorSpec) -> tuple[type[tf.keras.metrics.Metric], Callable]:
    """Returns what `tf.keras.Model.compile` takes "accuracy" and "crossentropy" for."""
    metrics = tf.keras.metrics
    if output_spec.shape[-1] == 1:
        return metrics.BinaryAccuracy, metrics.binary_crossentropy
    if y_spec.shape.rank < output_spec.shape.rank or y_spec.shape[-1] == 1:
        return metrics.SparseCategoricalAccuracy, metrics.sparse_categorical_crossentropy
    return metrics.CategoricalAccuracy, metrics.categorical_crossentropy


def attached_to(output: Any) -> list[dict[str, tf.Tensor]]:
    """Returns what Keras has attached to each output of a model for its losses and metrics, by the attribute.

    That is a mask, and of a softmax or a sigmoid its logits, from which cross entropies are computed where they can be:
    of the probabilities they would have to be clipped.
    """
    outputs = tf.nest.flatten(output)
    attached = [
        {name: getattr(each, name) for name in (_MASK, _LOGITS) if getattr(each, name, None) is not None}
        for each in outputs
    ]
    if len(outputs) > 1 and any(_MASK in of_each for of_each in attached):
        raise ValueError("one of several outputs has a mask, which metrics of all of them would not get")
    return attached


def attach(output: Any, attached: Sequence[Mapping[str, tf.Tensor]]) -> Any:
    """Does what Keras did with the outputs from which `attached` comes, to the same outputs in another graph."""
    for each, of_each in zip(tf.nest.flatten(output), attached, strict=True):
        for name, tensor in of_each.items():
            setattr(each, name, tensor)
    return output
