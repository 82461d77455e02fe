"""Trained weights in a plain Keras model: the way back from `functional_model_from_keras`."""

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tff_fedavg.layers import MaxPooling
from tff_fedavg.traced import first_error

if TYPE_CHECKING:
    import tensorflow_federated as tff


def keras_model(
    model: tf.keras.Model | Callable[[], tf.keras.Model], weights: "tff.learning.models.ModelWeights"
) -> tf.keras.Model:
    """Returns a new Keras model with these weights, which can be used, trained and saved without TFF.

    A `MaxPooling` among its layers becomes `tf.keras.layers.MaxPooling2D`, whose outputs are the same: so the MNIST CNN
    is loaded by Keras alone. A saved model with another layer of `tff_fedavg.layers` is loaded after that is imported.

    Args:
      model: The architecture: a model, which stays as it is, or a function that builds one.
      weights: Trainable and other weights, in the order of the model's `trainable_variables` and
        `non_trainable_variables`, such as the `global_model_weights` of a state.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If the weights do not fit the model.
    """
    if isinstance(model, tf.keras.Model):
        model = _copy(model)
    elif callable(model):
        model = model()
    if not isinstance(model, tf.keras.Model):
        raise TypeError(f"model is {model!r}; it must be a tf.keras.Model or a function that returns one")
    if not model.built:
        raise ValueError("the model has no weights yet: give it an input shape, or call it on a batch first")
    for part in ("trainable", "non_trainable"):
        if not hasattr(weights, part):
            raise TypeError(f"weights is a {type(weights).__name__}; it must be a tff.learning.models.ModelWeights")
        variables, values = variables_of(model, part), getattr(weights, part)
        check_shapes(f"the {part} weights", values, variables)
        for variable, value in zip(variables, values):
            variable.assign(value)
    for layer in layers_of(model):
        if isinstance(layer, tf.keras.layers.Normalization) and layer.input_mean is None:
            layer.finalize_state()  # What it computes with is made of its variables then only.
    # Of a subclass of Model, which has no inputs, the layers cannot be exchanged.
    if model.inputs and any(isinstance(layer, MaxPooling) for layer in model.layers):
        model = tf.keras.models.clone_model(model, clone_function=_keras_layer)
    return model


def _copy(model):
    try:
        with tf.keras.utils.custom_object_scope(_own_objects(model)):  # Keras writes a model down to copy it.
            return copy.deepcopy(model)
    except Exception as e:  # Of many kinds: it may be somebody else's code.
        raise ValueError(f"the model cannot be copied ({first_error(e)}): give a function that builds it") from e


def what_loading_needs(model: tf.keras.Model, path: str | os.PathLike[str]) -> list[str]:
    """Returns what is to be known to load a model with Keras from the `.keras` file that it was saved in, in lines."""
    objects = _own_objects(model)
    ours = {each.__module__ for each in objects.values() if each.__module__.startswith("tff_fedavg.")}
    own = {name: each for name, each in objects.items() if each.__module__ not in ours}
    lines = []
    if ours:
        lines.append(f"it has layers of {', '.join(sorted(ours))}: import that before it is loaded")
    if own:
        lines.append(f"it has what is not Keras's, and load_model takes as custom_objects: {', '.join(sorted(own))}")
    try:
        tf.keras.models.load_model(path, own)
    except Exception as e:  # Of many kinds: it may be somebody else's code.
        lines.append(f"Keras cannot load it so ({first_error(e)}): a SavedModel needs nothing")
    return lines


def _own_objects(model):
    """Returns the classes and functions that a model is made of and that are not Keras's, by name."""
    kinds = tf.keras.initializers.Initializer, tf.keras.regularizers.Regularizer, tf.keras.constraints.Constraint
    layers = layers_of(model)
    found = {type(layer) for layer in (model, *layers)}
    for thing in (thing for layer in layers for thing in vars(layer).values()):
        if inspect.isfunction(thing) and thing.__name__ != "<lambda>":
            found.add(thing)
        elif isinstance(thing, kinds):
            found.add(type(thing))
    return {each.__name__: each for each in found if not is_of_keras(each)}


def is_of_keras(thing: Any) -> bool:
    """Whether a class, an instance of one, or a function is Keras's own."""
    return str(getattr(thing, "__module__", "")).startswith("keras.")


def variables_of(model: tf.keras.Model, part: str) -> list[tf.Variable]:
    """Returns the "trainable" or the "non_trainable" variables of a model, without the tables of its lookup layers."""
    return [v for v in getattr(model, f"{part}_variables") if isinstance(v, tf.Variable)]


def layers_of(model: tf.keras.Model) -> list[tf.keras.layers.Layer]:
    """Returns the layers of a model at any depth, outer before inner ones."""
    return list(model._flatten_layers(include_self=False))  # `submodules` fails where one has recurrent dropout.


def check_shapes(what: str, values: Sequence[Any], of_model: Sequence[Any]) -> None:
    """Raises a `ValueError` if weights, which are called `what`, have not the shapes of those of a model."""
    found, expected = ([tuple(w.shape) for w in each] for each in (values, of_model))
    if found != expected:
        raise ValueError(f"{what} have the shapes {found}, but those of the model have {expected}")


def _keras_layer(layer):
    if isinstance(layer, MaxPooling):
        return tf.keras.layers.MaxPooling2D(
            layer.pool_size, 2, padding="same", data_format="channels_last", name=layer.name
        )
    return layer
