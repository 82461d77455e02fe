"""Matrix products and convolutions in bfloat16, by a policy of Keras; weights and their averages stay float32."""

import pathlib
from collections.abc import Callable

import tensorflow as tf

from tff_fedavg.export import layers_of
from tff_fedavg.global_policy import global_policy

# What Linux calls the instructions: AVX-512 and AMX of x86, and those of Arm.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}

KerasModelFn = Callable[[], tf.keras.Model]


def in_bfloat16(keras_model_fn: KerasModelFn) -> KerasModelFn:
    """Returns what builds the same model with the policy; a layer that names another one keeps that.

    Raises:
      ValueError: When a model is built, if it has no product in bfloat16.
    """

    def build() -> tf.keras.Model:
        with global_policy("mixed_bfloat16"):
            model = keras_model_fn()
        if not any(map(_multiplies_in_bfloat16, layers_of(model))):
            raise ValueError(
                "--matmul_precision=bfloat16: no layer of this model has matrix products in bfloat16; leave it out"
            )
        if any(output.dtype == tf.bfloat16 for output in tf.nest.flatten(getattr(model, "outputs", None) or [])):
            raise ValueError(
                "--matmul_precision=bfloat16: the output of this model would be bfloat16; give its last layer "
                'dtype="float32"'
            )
        return model

    return build


def check_processor(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> None:
    """Checks that the processor has instructions for bfloat16, without which it takes much longer than float32.

    Raises:
      ValueError: If it has not.
    """
    if not _INSTRUCTIONS & set(cpuinfo.read_text().split()):
        raise ValueError(
            "--matmul_precision=bfloat16: this processor has no instructions for it (avx512_bf16); leave it out"
        )


def _multiplies_in_bfloat16(layer: tf.keras.layers.Layer) -> bool:
    # An embedding looks up what the other layers with a matrix multiply.
    return (
        not isinstance(layer, (tf.keras.Model, tf.keras.layers.Embedding))
        and layer.compute_dtype == "bfloat16"
        and any(weight.shape.rank >= 2 for weight in layer.weights)
    )
