"""The layers of the paper's models that Keras lacks, in forms that are fast on a CPU."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class _Float32Layer(tf.keras.layers.Layer):
    """A layer that computes in float32 under a mixed policy of Keras, too: in bfloat16 it cannot, or is slower."""

    def __init__(self, *, dtype: str = "float32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class PeepholeLSTM(_Float32Layer):
    """An LSTM with diagonal peephole connections (Gers et al. 2002; Sak et al. 2014), from zero initial states.

        i_t = sigmoid(W_i x_t + U_i h_{t-1} + p_i * c_{t-1} + b_i)
        f_t = sigmoid(W_f x_t + U_f h_{t-1} + p_f * c_{t-1} + b_f)
        g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
        c_t = f_t * c_{t-1} + i_t * g_t
        o_t = sigmoid(W_o x_t + U_o h_{t-1} + p_o * c_t + b_o)
        h_t = o_t * tanh(c_t)

    Maps float32 `[batch, time, features]`, time at least 1, to all h_t, `[batch, time, units]`. No output depends on
    later inputs, so lines that are padded at their end need no mask here.

    The weights are those of Keras's former `PeepholeLSTMCell`, in its order and with its initial values: kernel W
    `[features, 4 units]`, recurrent kernel U `[units, 4 units]`, bias b `[4 units]`, all with the gates in the order
    i, f, g, o, and the peepholes p_i, p_f, p_o `[units]`.
    """

    def __init__(self, units: int, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape: tf.TensorShape):
        units = self.units

        def forget_bias_one(shape, dtype=None):
            del shape
            return tf.concat([tf.zeros([units], dtype), tf.ones([units], dtype), tf.zeros([2 * units], dtype)], 0)

        self.kernel = self.add_weight("kernel", [input_shape[-1], 4 * units], initializer="glorot_uniform")
        self.recurrent_kernel = self.add_weight("recurrent_kernel", [units, 4 * units], initializer="orthogonal")
        self.bias = self.add_weight("bias", [4 * units], initializer=forget_bias_one)
        self.peepholes = [
            self.add_weight(f"{gate}_gate_peephole_weights", [units], initializer="glorot_uniform")
            for gate in ("input", "forget", "output")
        ]
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        x = tf.transpose(inputs, [1, 0, 2])
        return tf.transpose(_lstm(x, self.kernel, self.recurrent_kernel, self.bias, *self.peepholes), [1, 0, 2])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@tf.custom_gradient
def _lstm(
    x: tf.Tensor, w: tf.Tensor, u: tf.Tensor, b: tf.Tensor, p_i: tf.Tensor, p_f: tf.Tensor, p_o: tf.Tensor
) -> tuple[tf.Tensor, Callable]:
    """Computes h_t for all t, time first: `[time, batch, features]` to `[time, batch, units]`.

    TensorFlow's own gradient of `BlockLSTM` adds to every weight's gradient in each time step, by a product of its own.
    Here the gradient of a weight is one product after the loop, and the loop looks at slices, which copies nothing.
    """
    features, units = w.shape[0], u.shape[0]
    time, batch, _ = tf.unstack(tf.shape(x))
    zeros = tf.zeros([batch, units])
    i, c, f, o, g, tanh_c, h = tf.raw_ops.BlockLSTM(
        seq_len_max=tf.cast(time, tf.int64),
        x=x,
        cs_prev=zeros,
        h_prev=zeros,
        w=_in_order_of_block_lstm(tf.concat([w, u], axis=0)),
        wci=p_i,
        wcf=p_f,
        wco=p_o,
        b=_in_order_of_block_lstm(b),
        forget_bias=0.0,
        use_peephole=True,
        cell_clip=-1.0,
    )

    def gradient(dh):
        c_previous = tf.concat([zeros[tf.newaxis], c[:-1]], axis=0)
        # The derivatives of c_t by z_i, z_f and z_g, and of h_t by z_o, for all steps at once.
        c_by_i = g * i * (1 - i)
        c_by_f = c_previous * f * (1 - f)
        c_by_g = i * (1 - g * g)
        h_by_o = tanh_c * o * (1 - o)
        by_z = tf.concat([c_by_i, c_by_f, c_by_g, h_by_o], axis=-1)
        h_by_c = o * (1 - tanh_c * tanh_c) + h_by_o * p_o
        c_by_c = f + c_by_i * p_i + c_by_f * p_f  # c_t by c_{t-1}
        u_transposed = tf.transpose(u)

        def step_back(t, dc, dh_recurrent, all_dz):
            dh_t = dh[t] + dh_recurrent
            dc += dh_t * h_by_c[t]
            dz = tf.concat([dc, dc, dc, dh_t], axis=1) * by_z[t]
            return t - 1, dc * c_by_c[t], dz @ u_transposed, all_dz.write(t, dz)

        all_dz = tf.TensorArray(tf.float32, time, element_shape=[None, 4 * units])
        *_, all_dz = tf.while_loop(lambda t, *_: t >= 0, step_back, (time - 1, zeros, zeros, all_dz))
        dz = all_dz.stack()
        dz_i, dz_f, _, dz_o = tf.split(dz, 4, axis=-1)
        dz_flat = tf.reshape(dz, [time * batch, 4 * units])
        dx = tf.reshape(tf.matmul(dz_flat, w, transpose_b=True), tf.shape(x))
        dw = tf.matmul(tf.reshape(x, [time * batch, features]), dz_flat, transpose_a=True)
        # h_0 and c_0 are zero: with them the first step adds nothing.
        du = tf.matmul(tf.reshape(h[:-1], [-1, units]), tf.reshape(dz[1:], [-1, 4 * units]), transpose_a=True)
        dp_i = tf.reduce_sum(dz_i[1:] * c[:-1], axis=[0, 1])
        dp_f = tf.reduce_sum(dz_f[1:] * c[:-1], axis=[0, 1])
        dp_o = tf.reduce_sum(dz_o * c, axis=[0, 1])
        return dx, dw, du, tf.reduce_sum(dz, axis=[0, 1]), dp_i, dp_f, dp_o

    return h, gradient


def _in_order_of_block_lstm(by_gate: tf.Tensor) -> tf.Tensor:
    """Puts what belongs to the gates, in the last dimension, in the order i, g, f, o."""
    i, f, g, o = tf.split(by_gate, 4, axis=-1)
    return tf.concat([i, g, f, o], axis=-1)


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class MaxPooling(_Float32Layer):
    """Max pooling with stride 2 over windows of 2x2 or 3x3, as `tf.keras.layers.MaxPooling2D(..., padding="same")`.

    Maps float32 `[batch, height, width, channels]`, height and width even, to `[batch, height / 2, width / 2,
    channels]`. Of equal values the first in a window gets the gradient, as there. TensorFlow's own gradient of max
    pooling looks for the largest values one by one: with it a step of the CIFAR CNN takes 1.1 times as long.
    """

    def __init__(self, pool_size: int, **kwargs):
        super().__init__(**kwargs)
        if pool_size not in (2, 3):
            raise ValueError(f"pool_size is {pool_size}; it must be 2 or 3")
        self.pool_size = pool_size

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        _, height, width, channels = inputs.shape
        if height % 2 or width % 2:
            raise ValueError(f"the input of MaxPooling is {height} x {width}; height and width must be even")
        overlap = self.pool_size == 3
        rows = _max_pool(tf.reshape(inputs, [-1, width, channels]), overlap)
        columns = _max_pool(tf.reshape(rows, [-1, height, width // 2 * channels]), overlap)
        return tf.reshape(columns, [-1, height // 2, width // 2, channels])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pool_size": self.pool_size}


def _max_pool(x: tf.Tensor, overlap: bool) -> tf.Tensor:
    """Maxima of the pairs on axis 1, with `overlap` and of the value after a pair: `[n, 2k, c]` to `[n, k, c]`."""
    _, length, channels = x.shape

    @tf.custom_gradient
    def pool(x):
        even, odd = tf.unstack(tf.reshape(x, [-1, length // 2, 2, channels]), axis=2)
        of_pair = tf.maximum(even, odd)
        if overlap:  # After the last pair comes nothing.
            after = tf.concat([even[:, 1:], of_pair[:, -1:]], axis=1)

        def gradient(dy):
            if overlap:
                d_after = tf.where(after > of_pair, dy, 0.0)
                dy -= d_after
            d_even = tf.where(even >= odd, dy, 0.0)
            d_odd = dy - d_even
            if overlap:
                d_even += tf.pad(d_after[:, :-1], [[0, 0], [1, 0], [0, 0]])
            return tf.reshape(tf.stack([d_even, d_odd], axis=2), [-1, length, channels])

        return tf.maximum(of_pair, after) if overlap else of_pair, gradient

    return pool(x)


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class LocalResponseNormalization(_Float32Layer):
    """Local response normalization (Krizhevsky et al. 2012) with the numbers of TensorFlow's CIFAR-10 tutorial.

        y_c = x_c / (1 + 0.001 / 9 * sum of x_d^2 over the channels d from c - 4 to c + 4)^(3/4)

    Maps float32 `[..., channels]` to the same shape. It is `tf.nn.local_response_normalization(x, 4, 1, 0.001 / 9,
    0.75)` in operations whose gradient is cheap: with that one a step of the CIFAR CNN takes 1.3 times as long.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        channels = tf.range(inputs.shape[-1])
        in_window = tf.abs(channels - channels[:, tf.newaxis]) <= 4
        sums = tf.tensordot(inputs * inputs, tf.where(in_window, 0.001 / 9, 0.0), 1)
        root = tf.math.rsqrt(1 + sums)
        return inputs * root * tf.sqrt(root)  # Two roots are much cheaper than a power.
