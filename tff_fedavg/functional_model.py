"""Keras models as what the algorithms take: a training step, predictions and metrics, all of them functions of weights.

TFF's own `functional_model_from_keras` builds the model anew in each of TFF's graphs, leaves out the losses that its
layers add, and draws other random numbers in each run. Here the model is traced as `tf.keras.Model.fit` traces it.
"""

import collections
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.traced import ChangedVariableError, TracedFunction, first_error

Loss = tf.keras.losses.Loss | Callable[[Any, Any], tf.Tensor] | str
Metric = tf.keras.metrics.Metric | Callable[[], tf.keras.metrics.Metric] | Callable[[Any, Any], tf.Tensor] | str
# Trainable and other weights, as in `tff.learning.models.ModelWeights`.
Weights = tuple[Sequence[tf.Tensor], Sequence[tf.Tensor]]

_LOSS_METRIC = "loss"


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
        mean of l over the examples, without the added losses.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If the model cannot be trained in this way. The message says why.
    """
    if not isinstance(keras_model, tf.keras.Model) and callable(keras_model):
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
        trainable, non_trainable = keras_model.trainable_variables, keras_model.non_trainable_variables
        _check_model(keras_model)
        loss_fn = _loss_fn(loss)

        def loss_and_gradient(batch, scale):
            x, y, *sample_weight = batch
            with tf.GradientTape() as tape:
                value = loss_fn(keras_model(x, training=True), y, *sample_weight)
                if keras_model.losses:
                    value += tf.add_n([tf.cast(added, value.dtype) for added in keras_model.losses])
                scaled_value = scale * value
            # A weight that the loss does not depend on stays as it is.
            return value, tape.gradient(scaled_value, trainable, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        def predict(x):
            output = keras_model(x, training=False)
            return [output, *_masks(output)]

        try:
            scale_spec = tf.TensorSpec([], tf.float32)
            variables = [*trainable, *non_trainable]
            self._predict = TracedFunction("the model", predict, [x_spec], variables)
            output_spec, *mask_spec = self._predict.output_spec
            _check_loss(loss, output_spec)
            self._loss_and_gradient = TracedFunction(
                "the model", loss_and_gradient, [input_spec, scale_spec], variables
            )
        except ChangedVariableError as e:
            raise ValueError(_changed_in_training(keras_model, e)) from e
        matched = tf.function(lambda *args: _as_keras_has_them(*args)[0], autograph=False)
        matched_labels = matched.get_concrete_function(output_spec, y_spec).structured_outputs
        y_spec = tf.nest.map_structure(lambda label: tf.TensorSpec(label.shape, label.dtype), matched_labels)
        constructors = _metric_constructors(metrics, loss_fn, output_spec, y_spec, mask_spec)
        metrics_fns = _metrics_fns(constructors, output_spec, y_spec, mask_spec)
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
        output, *mask = self._predict(x, variables=[*trainable, *non_trainable])
        if mask:
            (output._keras_mask,) = mask  # As Keras has it, for `update_metrics_state`.
        return output

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
        if mask := _masks(output):
            batch_output = tff.learning.models.BatchOutput(predictions=(output, *mask))
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
    if not keras_model.built:
        keras_model(tf.nest.map_structure(lambda spec: tf.zeros([d or 1 for d in spec.shape], spec.dtype), x_spec))


def _check_model(keras_model: tf.keras.Model) -> None:
    if not keras_model.trainable_variables:
        raise ValueError("the model has no trainable weights")
    for layer in _layers(keras_model):
        if layer.dtype_policy.name == "mixed_float16":
            raise ValueError(
                f"layer {layer.name!r} has the policy mixed_float16, whose gradients vanish without loss scaling: take "
                "mixed_bfloat16 or float32"
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


def is_of_keras(thing: Any) -> bool:
    """Whether a class, an instance of one, or a function is Keras's own."""
    return str(getattr(thing, "__module__", "")).startswith("keras.")


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


def _masks(output: Any) -> list[tf.Tensor]:
    """Returns the mask that Keras has put on the output of a model; none if it has none."""
    masks = [getattr(each, "_keras_mask", None) for each in tf.nest.flatten(output)]
    if len(masks) > 1 and any(mask is not None for mask in masks):
        raise ValueError("one of several outputs has a mask, which metrics of all of them would not get")
    return [mask for mask in masks if mask is not None]


def _metrics_fns(
    constructors: Mapping[str, Callable[[], tf.keras.metrics.Metric]], output_spec: Any, y_spec: Any, mask_spec: Any
) -> tuple[Callable, Callable, Callable]:
    """Returns TFF's functions of the metrics, which have been tried out.

    Raises:
      ValueError: If TFF cannot make functions of a metric, or it is not a number.
    """
    predictions_spec = (output_spec, *mask_spec) if mask_spec else output_spec

    def build(constructors):
        initialize, update, finalize = tff.learning.metrics.create_functional_metric_fns(constructors)

        @tf.function(autograph=False)
        def measure(labels, predictions):
            output = tff.learning.models.BatchOutput(predictions=predictions)
            return finalize(update(initialize(), labels, output))

        for value in measure.get_concrete_function(y_spec, predictions_spec).structured_outputs.values():
            if not (tf.is_tensor(value) and value.shape.rank == 0):
                raise ValueError(f"its value is {value}, not a number")
        return initialize, update, finalize

    try:
        return build(collections.OrderedDict(constructors))
    except Exception:  # Of any kind: it may be somebody else's code.
        for name, constructor in constructors.items():
            try:
                build(collections.OrderedDict({name: constructor}))
            except Exception as e:
                raise ValueError(
                    f"TFF can make no function of the metric {name!r} ({first_error(e)}): it has to make its variables "
                    "in __init__, and to be one number"
                ) from e
        raise


def _metric_constructors(
    metrics: Mapping[str, Metric] | Sequence[Metric],
    loss_fn: Callable[..., tf.Tensor],
    output_spec: Any,
    y_spec: Any,
    mask_spec: Any,
) -> dict[str, Callable[[], tf.keras.metrics.Metric]]:
    """Returns what TFF makes metrics of, by name."""
    if isinstance(metrics, Mapping):
        named = {name: _constructor(metric, output_spec, y_spec) for name, metric in metrics.items()}
    else:
        constructors = [_constructor(metric, output_spec, y_spec) for metric in metrics]
        named = {constructor().name: constructor for constructor in constructors}
        if len(named) < len(constructors):
            raise ValueError(f"several metrics have the same name: give them others, or as a mapping: {list(named)}")

    def masked_loss_fn(output, label, *mask):
        if mask:
            (output._keras_mask,) = mask  # Keras's losses look for it there.
        return loss_fn(output, label)

    # Traced, for what a loss function may capture.
    mean_loss = TracedFunction("the loss", masked_loss_fn, [output_spec, y_spec, *mask_spec])
    named = {_LOSS_METRIC: functools.partial(_MeanLoss, mean_loss), **named}
    return (
        {name: functools.partial(_masked, constructor) for name, constructor in named.items()} if mask_spec else named
    )


def _masked(constructor: Callable[[], tf.keras.metrics.Metric]) -> tf.keras.metrics.Metric:
    """Makes a metric that takes a pair of outputs and mask, where Keras would give it the mask as weights."""
    metric = constructor()
    update_state = metric.update_state
    while hasattr(update_state, "__original_wrapped__"):  # As TFF does.
        update_state = update_state.__original_wrapped__
    metric.update_state = lambda y_true, y_pred: update_state(y_true, y_pred[0], sample_weight=y_pred[1])
    return metric


class _MeanLoss(tf.keras.metrics.Mean):
    """The mean over the examples of a loss that is the mean over a batch."""

    def __init__(self, loss_fn: TracedFunction):
        super().__init__(_LOSS_METRIC)
        self._loss_fn = loss_fn

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: tf.Tensor | None = None):
        num_examples = tf.shape(tf.nest.flatten(y_true)[0])[0]
        mask = [] if sample_weight is None else [sample_weight]
        return super().update_state(self._loss_fn(y_pred, y_true, *mask), num_examples)


def _constructor(metric: Metric, output_spec: Any, y_spec: Any) -> Callable[[], tf.keras.metrics.Metric]:
    if metric in ("accuracy", "acc"):
        if not isinstance(output_spec, tf.TensorSpec):
            raise ValueError(f"the metric {metric!r} is for a model with one output: give one for all of them")
        return functools.partial(_accuracy(output_spec, y_spec), name=metric)
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
        return functools.partial(type(metric).from_config, config)
    if not callable(metric):
        raise TypeError(f"a metric is {metric!r}; it must be a Keras metric, a function that makes one, or a name")
    if not isinstance(metric, (type, functools.partial)) and len(_parameters(metric)) == 2:  # Of labels and outputs.
        return functools.partial(tf.keras.metrics.MeanMetricWrapper, metric, name=metric.__name__)
    return metric


def _parameters(function: Callable) -> list[str]:
    """Returns the names of what a function, or a class, takes; of `*args` and `**kwargs` nothing is known."""
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in named]


def _accuracy(output_spec: tf.TensorSpec, y_spec: tf.TensorSpec) -> type[tf.keras.metrics.Metric]:
    """Returns what `tf.keras.Model.compile` takes "accuracy" for."""
    if output_spec.shape[-1] == 1:
        return tf.keras.metrics.BinaryAccuracy
    if y_spec.shape.rank < output_spec.shape.rank or y_spec.shape[-1] == 1:
        return tf.keras.metrics.SparseCategoricalAccuracy
    return tf.keras.metrics.CategoricalAccuracy
