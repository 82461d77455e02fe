"""FedAvg by `fedjax.algorithms.fed_avg`.

python with_fedjax.py WORK.npz
"""

import sys

import fedjax
import jax
import jax.numpy as jnp
from fedjax.algorithms import fed_avg
from jax import lax
from work import Work, serve


def _mnist_2nn(weights, x):
    return _dense_layers(x.reshape(len(x), -1), weights)


def _mnist_cnn(weights, x):
    w_1, b_1, w_2, b_2, *dense = weights
    x = _max_pool(jax.nn.relu(_conv(x[..., None], w_1) + b_1), 2)
    x = _max_pool(jax.nn.relu(_conv(x, w_2) + b_2), 2)
    return _dense_layers(x.reshape(len(x), -1), dense)


def _cifar_cnn(weights, x):
    w_1, b_1, w_2, b_2, *dense = weights
    x = _normalize(_max_pool(jax.nn.relu(_conv(x, w_1) + b_1), 3))
    x = _max_pool(_normalize(jax.nn.relu(_conv(x, w_2) + b_2)), 3)
    return _dense_layers(x.reshape(len(x), -1), dense)


def _lstm(weights, x):
    embedding, *layers, w, b = weights
    x = embedding[x.T]
    for i in range(0, len(layers), 3):
        x = _lstm_layer(x, *layers[i : i + 3])
    return (x @ w + b).swapaxes(0, 1)


_MODELS = {
    "mnist_2nn": _mnist_2nn,
    "mnist_cnn": _mnist_cnn,
    "shakespeare_lstm": _lstm,
    "stackoverflow_lstm": _lstm,
    "cifar_cnn": _cifar_cnn,
}


def _dense_layers(x, weights):
    for w, b in zip(weights[:-2:2], weights[1:-2:2]):
        x = jax.nn.relu(x @ w + b)
    return x @ weights[-2] + weights[-1]


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _max_pool(x, size):
    if size == 2:  # With the gradient of `reduce_window` a step of the MNIST CNN takes 1.2 times as long.
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), "SAME")


def _normalize(x):
    """Local response normalization."""
    channels = jnp.arange(x.shape[-1])
    window = jnp.where(abs(channels - channels[:, None]) <= 4, 0.001 / 9, 0.0)
    root = lax.rsqrt(1 + (x * x) @ window)
    return x * root * jnp.sqrt(root)


def _lstm_layer(x, w, u, b):
    u_transposed = lax.stop_gradient(u).T

    def step(state, z):
        h, c = state
        i, f, g, o = jnp.split(z + _product(h, u, u_transposed), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], u.shape[0]))
    return lax.scan(step, (zeros, zeros), x @ w + b)[1]


@jax.custom_vjp
def _product(h, u, u_transposed):
    """Returns h @ u. JAX's own gradient transposes u in each time step: a round then takes 2.3 times as long."""
    return h @ u


_product.defvjp(
    lambda h, u, u_transposed: (h @ u, (h, u_transposed)),
    lambda saved, dz: (dz @ saved[1], saved[0].T @ dz, None),
)


class _Client(fedjax.ClientDataset):
    """A client whose batches come in the order of the work; FedJAX would shuffle, and fill up the last batch."""

    def __init__(self, work, k):
        x, y = work.clients[k]
        super().__init__({"x": x, "y": y})
        self._batches = [{"x": x, "y": y} for x, y in work.batches(k)]

    def shuffle_repeat_batch(self, hparams=None, **kwargs):
        return self._batches


def main() -> None:
    work = Work.load(sys.argv[1])
    model = _MODELS[work.task]

    def loss(weights, batch):
        x, y = batch["x"], batch["y"]
        log_probs = jax.nn.log_softmax(model(weights, x))
        if work.padding is None:
            return -jnp.take_along_axis(log_probs, y[:, None], axis=-1).mean()
        real = y != work.padding
        losses = -jnp.take_along_axis(log_probs, jnp.where(real, y, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(real, losses, 0).sum() / (work.unroll * len(x))

    algorithm = fed_avg.federated_averaging(
        lambda weights, batch, rng: jax.grad(loss)(weights, batch),
        client_optimizer=fedjax.optimizers.sgd(work.learning_rate),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(work.batch_size),
    )
    clients = [(k, _Client(work, k), jax.random.PRNGKey(k)) for k in range(len(work.clients))]
    state = algorithm.init([jnp.asarray(w) for w in work.weights])
    serve(lambda: jax.block_until_ready(algorithm.apply(state, clients)[0].params), state.params)


if __name__ == "__main__":
    main()
