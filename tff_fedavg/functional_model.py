"""Keras models as what the algorithms take: a training step, predictions and metrics, all of them functions of weights.

TFF's own `functional_model_from_keras` builds the model anew in each of TFF's graphs, leaves out the losses that its
layers add, and draws other random numbers in each run. Here the model is traced as `tf.keras.Model.fit` traces it.
"""

import collections
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg.default_context  # noqa: F401
from tff_fedavg.export import is_of_keras, variables_of
from tff_fedavg.global_policy import global_policy
from tff_fedavg.traced import ChangedVariableError, TracedFunction, first_error

Loss = tf.keras.losses.Loss | Callable[[Any, Any], tf.Tensor] | str
Metric = tf.keras.metrics.Metric | Callable[[], tf.keras.metrics.Metric] | Callable[[Any, Any], tf.Tensor] | str
# Trainable and other weights, as in `tff.learning.models.ModelWeights`.
Weights = tuple[Sequence[tf.Tensor], Sequence[tf.Tensor]]

_LOSS_METRIC = "loss"
_NAME = re.compile(r"[A-Za-z0-9_./-]+")
_MASK, _LOGITS = "_keras_mask", "_keras_logits"
_ACCURACY, _CROSSENTROPY = ("accuracy", "acc"), ("crossentropy", "ce")


def functional_model_from_keras(
    keras_model: tf.keras.Model | Callable[[], tf.keras.Model],
    loss: Loss,
    input_spec: Sequence[Any],
    metrics: Mapping[str, Metric] | Sequence[Metric] = (),
) -> "KerasFunctionalModel":
    """Makes a functional model of a Keras model, which can be used afterwards as before.

    Args:
      keras_model: The model, or a function that builds it. Its weights are the initial weights w_0; those that are not
        trainable stay as they are. The losses that its layers add (regularisers, `add_loss`) are trained on.
      loss: l, a function of the labels and the outputs, as for `tf.keras.Model.compile`. If it returns the losses of
        the single examples, their mean is meant.
      input_spec: The specs of a batch: `client_dataset.batch_spec`. x may be any nest of tensors that the model takes.
      metrics: What `build_fed_eval` computes, by name or as a list: metrics, functions that make them, functions of the
        labels and the outputs, whose mean is meant, or Keras's names for them. If none is called "loss", that is the
        mean of l over the examples, without the added losses; of a batch's sum it is no mean, as in Keras.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If the model cannot be trained in this way. The message says why.
    """
    if not isinstance(keras_model, tf.keras.layers.Layer) and callable(keras_model):
        keras_model = keras_model()
    if not isinstance(keras_model, tf.keras.Model):
        raise TypeError(f"keras_model is {keras_model!r}; it must be a tf.keras.Model or a function that returns one")
    if not isinstance(input_spec, (tuple, list)) or not 2 <= len(input_spec) <= 3:
        raise TypeError(f"input_spec is {input_spec!r}; it must be the batch_spec of a client dataset: (x, y)")
    if not isinstance(metrics, (Mapping, tuple, list)):
        raise TypeError(f"metrics is {metrics!r}; it must be a list of metrics, or a mapping from names to them")
    return KerasFunctionalModel(keras_model, loss, tuple(input_spec), metrics)


class KerasFunctionalModel(tff.learning.models.FunctionalModel):
    """A functional model with a training step of its own. Made by `functional_model_from_keras`."""

    def __init__(self, keras_model: tf.keras.Model, loss: Loss, input_spec: tuple[Any, ...], metrics: Any):
        x_spec, y_spec, *_ = input_spec
        build_weights(keras_model, x_spec)
        _check_model(keras_model)
        trainable, non_trainable = (variables_of(keras_model, part) for part in ("trainable", "non_trainable"))
        loss_fn = _loss_fn(loss)

        def loss_and_gradient(batch, scale):
            x, y, *sample_weight = batch
            with tf.GradientTape() as tape:
                value = tf.cast(loss_fn(keras_model(x, training=True), y, *sample_weight), tf.float32)
                if keras_model.losses:
                    value += tf.add_n([tf.cast(added, value.dtype) for added in keras_model.losses])
                scaled_value = scale * value
            gradient = tape.gradient(scaled_value, trainable)
            if all(g is None for g in gradient):
                raise ValueError("the loss has no gradient by any of the weights: there is nothing to train")
            # A weight that the loss does not depend on stays as it is.
            return value, [tf.zeros(v.shape) if g is None else g for g, v in zip(gradient, trainable)]

        def predict(x):
            output = keras_model(x, training=False)
            return output, _attached_to(output)

        try:
            scale_spec = tf.TensorSpec([], tf.float32)
            variables = [*trainable, *non_trainable]
            self._predict = TracedFunction("the model", predict, [x_spec], variables)
            output_spec, attached_spec = self._predict.output_spec
            _check_loss(loss, output_spec)
            self._loss_and_gradient = TracedFunction(
                "the model", loss_and_gradient, [input_spec, scale_spec], variables
            )
        except ChangedVariableError as e:
            raise ValueError(_changed_in_training(keras_model, e)) from e
        matched = tf.function(lambda *args: _as_keras_has_them(*args)[0], autograph=False)
        matched_labels = matched.get_concrete_function(output_spec, y_spec).structured_outputs
        y_spec = tf.nest.map_structure(lambda label: tf.TensorSpec(label.shape, label.dtype), matched_labels)
        constructors = _metric_constructors(metrics, loss_fn, output_spec, y_spec, attached_spec)
        metrics_fns = _metrics_fns(constructors, output_spec, y_spec, attached_spec)
        super().__init__(
            initial_weights=tuple(tuple(v.numpy() for v in part) for part in (trainable, non_trainable)),
            predict_on_batch_fn=tf.function(self.predict_on_batch),
            loss_fn=loss_fn,
            metrics_fns=metrics_fns,
            input_spec=input_spec,
        )

    def predict_on_batch(self, model_weights: Weights, x: Any, training: bool = True) -> Any:
        """Returns the outputs of the model. Training is more than that: see `loss_and_gradient`."""
        if training:
            raise NotImplementedError(
                "TFF's own algorithms would leave out the losses that the layers of this model add: for them make it "
                "with tff.learning.models.functional_model_from_keras"
            )
        trainable, non_trainable = model_weights
        output, attached = self._predict(x, variables=[*trainable, *non_trainable])
        return _attach(output, attached)  # For `update_metrics_state`.

    def update_metrics_state(
        self,
        state: Any,
        labels: Any,
        batch_output: tff.learning.models.BatchOutput,
        sample_weight: tf.Tensor | None = None,
    ) -> Any:
        """As of any functional model; metrics are not weighted, as those of `tf.keras.Model.compile(metrics=...)`."""
        output = batch_output.predictions
        labels, _ = _as_keras_has_them(output, labels)
        if any(attached := _attached_to(output)):
            batch_output = tff.learning.models.BatchOutput(predictions=(output, attached))
        return super().update_metrics_state(state, labels, batch_output, sample_weight)

    def loss_and_gradient(
        self, model_weights: Weights, batch: tuple[Any, ...], *, seed: tf.Tensor, scale: float | tf.Tensor = 1.0
    ) -> tuple[tf.Tensor, list[tf.Tensor | tf.IndexedSlices]]:
        """Computes l(w; b) as `tf.keras.Model.train_on_batch` does, with the losses that layers add.

        Args:
          model_weights: Trainable and other weights.
          batch: `(x, y)` or `(x, y, sample_weight)`.
          seed: Integer `[2]`, for layers that draw random numbers, such as dropout.
          scale: A factor on the gradient.

        Returns:
          The float32 scalar l(w; b), and `scale` times its gradient by the trainable weights.
        """
        trainable, non_trainable = model_weights
        return self._loss_and_gradient(batch, scale, variables=[*trainable, *non_trainable], seed=seed)


def build_weights(keras_model: tf.keras.Model, x_spec: Any) -> None:
    """Gives a model its weights, if it has been waiting for its first input."""
    if keras_model.built:
        return
    try:
        keras_model(tf.nest.map_structure(lambda spec: tf.zeros([d or 1 for d in spec.shape], spec.dtype), x_spec))
    except Exception as e:  # Of any kind: it may be somebody else's code.
        raise ValueError(f"the model fails: {first_error(e)}") from e


def _check_model(keras_model: tf.keras.Model) -> None:
    if not keras_model.trainable_variables:
        raise ValueError("the model has no trainable weights")
    for layer in _layers(keras_model):
        if layer.dtype_policy.name == "mixed_float16":
            raise ValueError(
                f"layer {layer.name!r} has the policy mixed_float16, whose gradients vanish without loss scaling: take "
                "mixed_bfloat16 or float32"
            )
        if isinstance(layer, tf.keras.layers.Discretization) and layer.input_bin_boundaries is None:
            raise ValueError(
                f"layer {layer.name!r} (Discretization) is adapted, which Keras loses when it copies or saves a model; "
                f"make it with bin_boundaries={[float(b) for b in layer.bin_boundaries]}"
            )
    for v in keras_model.trainable_variables:
        if v.dtype != tf.float32:
            raise ValueError(f"{v.name} is {v.dtype.name}; take float32, or the policy mixed_bfloat16")
        if v.constraint is not None:
            raise ValueError(
                f"{v.name} has the constraint {type(v.constraint).__name__}, which the average of weights that meet it "
                "need not meet: leave it out"
            )
    for name in ("train_step", "compute_loss"):
        if getattr(type(keras_model), name) is not getattr(tf.keras.Model, name):
            raise ValueError(
                f"{type(keras_model).__name__} has a {name} of its own, which would not be called: give what it "
                "computes as the loss, or by add_loss"
            )


def _check_loss(loss: Loss, output_spec: Any) -> None:
    if (isinstance(loss, str) or is_of_keras(loss)) and not isinstance(output_spec, tf.TensorSpec):
        raise ValueError(
            f"the model has {len(tf.nest.flatten(output_spec))} outputs, and Keras's losses are for one: give a "
            "function of (y_true, y_pred) that takes all of them"
        )


def _layers(layer: tf.keras.layers.Layer) -> Iterator[tf.keras.layers.Layer]:
    """Yields the layers of a model or a layer, at any depth."""
    for inner in getattr(layer, "layers", ()):
        yield inner
        yield from _layers(inner)


def _changed_in_training(keras_model: tf.keras.Model, error: ChangedVariableError) -> str:
    owners = [layer for layer in _layers(keras_model) if any(v is error.variable for v in layer.weights)]
    if not owners:
        return f"{error} in training; FedAvg averages trained weights only"
    layer = min(owners, key=lambda layer: len(layer.weights))
    return (
        f"layer {layer.name!r} ({type(layer).__name__}) changes {error.variable.name} in training, and FedAvg averages "
        "trained weights only: take GroupNormalization or LayerNormalization for BatchNormalization, or trainable=False"
    )


def _loss_fn(loss: Loss) -> Callable[..., tf.Tensor]:
    """Returns l as a function of outputs, labels and sample weights, as Keras would compute it."""
    if isinstance(loss, str):
        loss = tf.keras.losses.get(loss)
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            f"loss is {loss!r}; it must be a tf.keras.losses.Loss, a function of (y_true, y_pred) or a name"
        )
    if not isinstance(loss, tf.keras.losses.Loss):
        loss = tf.keras.__internal__.losses.LossFunctionWrapper(loss)

    def loss_fn(output: Any, label: Any, sample_weight: tf.Tensor | None = None) -> tf.Tensor:
        label, sample_weight = _as_keras_has_them(output, label, sample_weight)
        value = loss(label, output, sample_weight)
        return value if value.shape.rank == 0 else tf.reduce_mean(value)

    return loss_fn


def _as_keras_has_them(output: Any, label: Any, sample_weight: tf.Tensor | None = None) -> tuple[Any, tf.Tensor | None]:
    """Returns labels and sample weights as `Model.fit` gives them to losses and metrics.

    Those `[batch]` are `[batch, 1]` where the outputs are of rank 2, lest both be spread to a square; and they have the
    outputs' dtype, but for integers where the outputs are none.
    """
    if not (tf.is_tensor(output) and tf.is_tensor(label)):
        return label, sample_weight
    if output.shape.rank == 2:
        label, sample_weight = (
            tensor[:, tf.newaxis] if tensor is not None and tensor.shape.rank == 1 else tensor
            for tensor in (label, sample_weight)
        )
    if (label.dtype.is_floating, label.dtype.is_integer) == (output.dtype.is_floating, output.dtype.is_integer):
        label = tf.cast(label, output.dtype)
    return label, sample_weight if sample_weight is None else tf.cast(sample_weight, output.dtype)


def _attached_to(output: Any) -> list[dict[str, tf.Tensor]]:
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


def _attach(output: Any, attached: Sequence[Mapping[str, tf.Tensor]]) -> Any:
    """Does what Keras did with the outputs from which `attached` comes, to the same outputs in another graph."""
    for each, of_each in zip(tf.nest.flatten(output), attached, strict=True):
        for name, tensor in of_each.items():
            setattr(each, name, tensor)
    return output


def _metrics_fns(
    constructors: Mapping[str, Callable[[], tf.keras.metrics.Metric]], output_spec: Any, y_spec: Any, attached_spec: Any
) -> tuple[Callable, Callable, Callable]:
    """Returns TFF's functions of the metrics, which have been tried out.

    Raises:
      ValueError: If TFF cannot make functions of a metric, it is not a number, or its variables are not sums.
    """
    predictions_spec = (output_spec, attached_spec) if any(attached_spec) else output_spec

    def build(constructors):
        fns = tff.learning.metrics.create_functional_metric_fns(constructors)
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
                    "in __init__, to add to them in update_state, from zero, and to be one number"
                ) from e
        raise


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


def _metric_constructors(
    metrics: Mapping[str, Metric] | Sequence[Metric],
    loss_fn: Callable[..., tf.Tensor],
    output_spec: Any,
    y_spec: Any,
    attached_spec: Any,
) -> dict[str, Callable[[], tf.keras.metrics.Metric]]:
    """Returns what TFF makes metrics of, by name."""
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
    # Traced, for what a loss function may capture.
    mean_loss = TracedFunction(
        "the loss",
        lambda output, label, attached: loss_fn(_attach(output, attached), label),
        [output_spec, y_spec, attached_spec],
    )
    named = {_LOSS_METRIC: functools.partial(_MeanLoss, mean_loss), **named}
    return {name: functools.partial(_as_in_keras, each, any(attached_spec)) for name, each in named.items()}


def _as_in_keras(constructor: Callable[[], tf.keras.metrics.Metric], takes_attached: bool) -> tf.keras.metrics.Metric:
    """Makes a metric in float32, which may take a pair: the outputs, and what Keras would have attached to them."""
    with global_policy("float32"):
        metric = constructor()
    if takes_attached:
        update_state = metric.update_state
        while hasattr(update_state, "__original_wrapped__"):  # As TFF does.
            update_state = update_state.__original_wrapped__

        def update_with_attached(y_true, y_pred):
            output = _attach(*y_pred)
            mask = getattr(output, _MASK, None)
            return update_state(y_true, output) if mask is None else update_state(y_true, output, sample_weight=mask)

        metric.update_state = update_with_attached
    return metric


class _MeanLoss(tf.keras.metrics.Mean):
    """The mean over the examples of a loss that is the mean over a batch."""

    def __init__(self, loss_fn: TracedFunction):
        super().__init__(_LOSS_METRIC)
        self._loss_fn = loss_fn

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: tf.Tensor | None = None):
        del sample_weight  # The mask, which the loss function finds where it is.
        return super().update_state(self._loss_fn(y_pred, y_true, _attached_to(y_pred)), _num_examples(y_true))


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
        lost = [] if is_of_keras(metric) else [name for name in _parameters(type(metric)) if name not in config]
        if lost:
            raise ValueError(
                f"the metric {metric.name!r} cannot be made anew: get_config of {type(metric).__name__} lacks "
                f"{', '.join(lost)}; give a function that makes it"
            )
        return lambda: type(metric).from_config(dict(config))  # Some take what they need out of it.
    if isinstance(metric, tf.keras.losses.Loss):
        return functools.partial(tf.keras.metrics.MeanMetricWrapper, metric.call, name=metric.name)
    if not callable(metric):
        raise TypeError(f"a metric is {metric!r}; it must be a Keras metric, a function that makes one, or a name")
    if not isinstance(metric, type) and len(_parameters(metric, required=True)) == 2:  # Of labels and outputs.
        wrapper = tf.keras.metrics.MeanMetricWrapper if isinstance(output_spec, tf.TensorSpec) else _MeanOfFunction
        name = getattr(metric, "__name__", type(metric).__name__)
        return functools.partial(wrapper, _for_each_example(metric), name=name)
    return metric


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
