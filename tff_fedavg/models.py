"""The architectures of the paper (Section 3), as Keras models that return logits."""

import tensorflow as tf


def mnist_2nn() -> tf.keras.Model:
    """MNIST 2NN: two hidden layers of 200 ReLU units; 199,210 parameters. `[batch, 28, 28]` to `[batch, 10]`."""
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([28, 28]),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(200, activation="relu"),
            tf.keras.layers.Dense(200, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )


def mnist_cnn() -> tf.keras.Model:
    """MNIST CNN: 1,663,370 parameters. `[batch, 28, 28]` to `[batch, 10]`.

    Two 5x5 convolutions of 32 and 64 channels, each followed by 2x2 max pooling, a layer of 512 ReLU units, and the
    output. The count of parameters needs SAME padding. The paper names ReLU for the dense layer only; the
    convolutions have it too here, as in every re-implementation.
    """
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([28, 28]),
            tf.keras.layers.Reshape([28, 28, 1]),
            tf.keras.layers.Conv2D(32, 5, padding="same", activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Conv2D(64, 5, padding="same", activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(512, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )
