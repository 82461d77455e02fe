"""The architectures of the paper (Section 3), as Keras models that return logits.

Under a mixed policy of Keras two things stay float32: the logits, whose softmax is not to be rounded, and ReLU after a
convolution, whose gradient in bfloat16 takes four times as long in TFF's worker. The order of the axes is the same
whatever the user's keras.json says.
"""

from typing import Any

import tensorflow as tf

from tff_fedavg.layers import LocalResponseNormalization, MaxPooling, PeepholeLSTM


def mnist_2nn(num_classes: int = 10) -> tf.keras.Model:
    """MNIST 2NN: two hidden layers of 200 ReLU units. `[batch, 28, 28]` to `[batch, num_classes]`.

    199,210 parameters; 209,662 for the 62 classes of EMNIST.
    """
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([28, 28]),
            tf.keras.layers.Flatten(data_format="channels_last"),
            tf.keras.layers.Dense(200, activation="relu"),
            tf.keras.layers.Dense(200, activation="relu"),
            tf.keras.layers.Dense(num_classes, dtype="float32"),
        ]
    )


def mnist_cnn(num_classes: int = 10) -> tf.keras.Model:
    """MNIST CNN: two convolutional and two dense layers. `[batch, 28, 28]` to `[batch, num_classes]`.

    1,663,370 parameters; 1,690,046 for the 62 classes of EMNIST.

    Two 5x5 convolutions of 32 and 64 channels, each followed by 2x2 max pooling, a layer of 512 ReLU units, and the
    output. The count of parameters needs SAME padding. The paper names ReLU for the dense layer only; the
    convolutions have it too here, as in every re-implementation.
    """
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([28, 28]),
            tf.keras.layers.Reshape([28, 28, 1]),
            _conv2d(32),
            tf.keras.layers.ReLU(dtype="float32"),
            MaxPooling(2),
            _conv2d(64),
            tf.keras.layers.ReLU(dtype="float32"),
            MaxPooling(2),
            tf.keras.layers.Flatten(data_format="channels_last"),
            tf.keras.layers.Dense(512, activation="relu"),
            tf.keras.layers.Dense(num_classes, dtype="float32"),
        ]
    )


def char_lstm() -> tf.keras.Model:
    """Shakespeare LSTM: 866,578 parameters. int32 `[batch, time]` to `[batch, time, 258]`.

    Characters embedded in 8 dimensions, two LSTM layers of 256 units, and for every character the logits of the next.
    The count of parameters is met by LSTMs with peepholes and 258 symbols only: the 256 values of a byte and two more,
    to whose meaning the model is blind.

    The paper does not say how it initialised. The embeddings start in [-1, 1]: from Keras's default, [-0.05, 0.05], SGD
    with rate 1.47 stays where the model knows the frequencies of the characters only for more than 1,000 steps of 10
    lines; from here it leaves that plateau after 500 (in Figure 3 at E = 5 by round 5 by role, after 10 on IID lines).
    """
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([None], dtype=tf.int32),
            tf.keras.layers.Embedding(258, 8, embeddings_initializer=tf.keras.initializers.RandomUniform(-1, 1)),
            PeepholeLSTM(256),
            PeepholeLSTM(256),
            tf.keras.layers.Dense(258, dtype="float32"),
        ]
    )


def cifar_cnn() -> tf.keras.Model:
    """CIFAR CNN: 1,068,298 parameters. `[batch, 24, 24, 3]` to `[batch, 10]`.

    The network of TensorFlow's tutorial on convolutional networks (`cifar10.py`), which the paper refers to, with its
    initial values: two 5x5 convolutions of 64 channels, each with 3x3 max pooling and local response normalization,
    and layers of 384 and 192 ReLU units. The convolutions start near zero, as in the tutorial until 2016 (0.05 since):
    so the accuracy stays at 10 % for the first hundreds of steps, as the paper's does (docs/reproduce.md). Without the
    tutorial's L2 term (0.004 on the weights of the two layers): the paper does not say whether it kept it.
    """

    def weights(stddev):
        return tf.keras.initializers.TruncatedNormal(stddev=stddev)

    bias = tf.keras.initializers.Constant(0.1)
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([24, 24, 3]),
            _conv2d(64, kernel_initializer=weights(1e-4)),
            tf.keras.layers.ReLU(dtype="float32"),
            MaxPooling(3),
            LocalResponseNormalization(),
            _conv2d(64, kernel_initializer=weights(1e-4), bias_initializer=bias),
            tf.keras.layers.ReLU(dtype="float32"),
            LocalResponseNormalization(),
            MaxPooling(3),
            tf.keras.layers.Flatten(data_format="channels_last"),
            tf.keras.layers.Dense(384, activation="relu", kernel_initializer=weights(0.04), bias_initializer=bias),
            tf.keras.layers.Dense(192, activation="relu", kernel_initializer=weights(0.04), bias_initializer=bias),
            tf.keras.layers.Dense(10, kernel_initializer=weights(1 / 192), dtype="float32"),
        ]
    )


def word_lstm() -> tf.keras.Model:
    """Large-scale word LSTM: 4,950,544 parameters. int32 `[batch, time]` to `[batch, time, 10,000]`.

    Words embedded in 192 dimensions, an LSTM layer of 256 units, and for every word the logits of the next, of 10,000.
    The count of parameters is met by an LSTM with peepholes whose output goes into the logits directly. The text
    speaks of an output embedding of 192 dimensions for each word, too: with a projection of the LSTM's output to 192
    (and no peepholes) there would be 4,358,928.

    The embeddings start in [-1, 1], like those of `char_lstm`. SGD with the paper's rate of 9 on Stack Exchange posts
    then has a loss of 5.1 after 300 steps of 8 examples; from Keras's [-0.05, 0.05] it has 10.1, more than by guessing.
    """
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([None], dtype=tf.int32),
            tf.keras.layers.Embedding(10_000, 192, embeddings_initializer=tf.keras.initializers.RandomUniform(-1, 1)),
            PeepholeLSTM(256),
            tf.keras.layers.Dense(10_000, dtype="float32"),
        ]
    )


def _conv2d(filters: int, **more: Any) -> tf.keras.layers.Conv2D:
    """A 5x5 convolution of `[batch, height, width, channels]`, as both CNNs have two."""
    return tf.keras.layers.Conv2D(filters, 5, padding="same", data_format="channels_last", **more)
