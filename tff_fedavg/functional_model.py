"""Keras models as what the algorithms take: a training step, predictions and metrics, all of them functions of weights.

TFF's own `functional_model_from_keras` builds the model anew in each of TFF's graphs, leaves out the losses that its
layers add, and draws other random numbers in each run. Here the model is traced as `tf.keras.Model.fit` traces it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg.default_context  # noqa: F401
from tff_fedavg.export import is_of_keras, layers_of, variables_of
from tff_fedavg.functional_metrics import Metric, attach, attached_to, metrics_fns
from tff_fedavg.traced import ChangedVariableError, TracedFunction, first_error

Loss = tf.keras.losses.Loss | Callable[[Any, Any], tf.Tensor] | str
# Trainable and other weights, as in `tff.learning.models.ModelWeights`.
Weights = tuple[Sequence[tf.Tensor], Sequence[tf.Tensor]]


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
                output = keras_model(x, training=True)
                _check_loss(loss, output)  # There may be more outputs than in `predict`.
                value = tf.cast(loss_fn(output, y, *sample_weight), tf.float32)
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
            return output, attached_to(output)

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
        known = {id(v) for v in variables}
        made = [v for part in ("trainable", "non_trainable") for v in variables_of(keras_model, part)]
        if late := [v.name for v in made if id(v) not in known]:
            raise ValueError(
                f"the model makes {', '.join(late)} only when it is called: call it on a batch before, with "
                "training=True too"
            )
        matched = tf.function(lambda *args: _as_keras_has_them(*args)[0], autograph=False)
        matched_labels = matched.get_concrete_function(output_spec, y_spec).structured_outputs
        y_spec = tf.nest.map_structure(lambda label: tf.TensorSpec(label.shape, label.dtype), matched_labels)
        super().__init__(
            initial_weights=tuple(tuple(v.numpy() for v in part) for part in (trainable, non_trainable)),
            predict_on_batch_fn=tf.function(self.predict_on_batch),
            loss_fn=loss_fn,
            metrics_fns=metrics_fns(metrics, loss_fn, output_spec, y_spec, attached_spec),
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
        return attach(output, attached)  # For `update_metrics_state`.

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
        if any(attached := attached_to(output)):
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
    for layer in (keras_model, *layers_of(keras_model)):
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
    instead = "as the loss, or by add_loss"
    for name in ("train_step", "compute_loss", "test_step", "compute_metrics"):
        if name in vars(keras_model) or getattr(type(keras_model), name) is not getattr(tf.keras.Model, name):
            raise ValueError(
                f"{type(keras_model).__name__} has a {name} of its own, which would not be called: give what it "
                f"computes {instead if name in ('train_step', 'compute_loss') else 'as metrics'}"
            )


def _check_loss(loss: Loss, output: Any) -> None:
    """Checks that a loss is for the outputs, or the specs of them, of a model."""
    if (isinstance(loss, str) or is_of_keras(loss)) and tf.nest.is_nested(output):
        raise ValueError(
            f"the model has {len(tf.nest.flatten(output))} outputs, and Keras's losses are for one: give a "
            "function of (y_true, y_pred) that takes all of them"
        )


def _changed_in_training(keras_model: tf.keras.Model, error: ChangedVariableError) -> str:
    owners = [layer for layer in layers_of(keras_model) if any(v is error.variable for v in layer.weights)]
    if not owners:
        return f"{error} in training; FedAvg averages trained weights only"
    layer = min(reversed(owners), key=lambda layer: len(layer.weights))
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
