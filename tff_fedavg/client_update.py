"""ClientUpdate(k, w) of Algorithm 1, and the client's half of FedSGD, as plain TensorFlow functions."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
import tensorflow_federated as tff

Weights = Sequence[tf.Tensor]
Batch = tuple[tf.Tensor, tf.Tensor]
BatchFn = Callable[[tf.Tensor, tf.Tensor], Batch]


def client_update(
    model: tff.learning.models.FunctionalModel,
    weights: Weights,
    num_examples: tf.Tensor,
    batch_fn: BatchFn,
    *,
    epochs: int,
    batch_size: int | None,
    learning_rate: float | tf.Tensor,
    seed: tf.Tensor,
) -> tuple[Weights, tf.Tensor]:
    """Runs E epochs of minibatch SGD on one client.

        B <- (split P_k into batches of size B)
        for each local epoch i from 1 to E:
            for batch b in B:
                w <- w - eta * grad l(w; b)

    As in the paper the split is made once, outside the loop over the epochs. Its last batch is smaller when B does not
    divide n_k, and is used like the others.

    Args:
      model: The model; supplies the loss l(w; b), the mean over the examples of a batch.
      weights: w, the trainable weights that the server sent.
      num_examples: int32 scalar n_k. With 0 the weights come back unchanged.
      batch_fn: Maps int32 indices `[batch]` into P_k, and a seed (int64 `[2]`) for random augmentation, to the batch
        `(x, y)`.
      epochs: E.
      batch_size: B; None is the paper's B = inf, all of P_k in one batch.
      learning_rate: eta.
      seed: Integer `[2]`, such as from `minibatch_seed`; decides how P_k is split, and seeds the augmentation.

    Returns:
      The new weights, and the float32 scalar sum of l(w; b) over all examples that SGD saw (E n_k of them).
    """
    order = tf.random.experimental.stateless_shuffle(tf.range(num_examples), seed)
    batch_size = tf.maximum(num_examples if batch_size is None else batch_size, 1)
    batches_per_epoch = (num_examples + batch_size - 1) // batch_size

    def next_batch(step, loss_sum, weights):
        start = step % batches_per_epoch * batch_size
        batch = order[start : start + batch_size]
        step_seed = tf.random.experimental.stateless_fold_in(seed, step)
        weights, loss = sgd_step(model, weights, batch_fn(batch, step_seed), learning_rate)
        return step + 1, loss_sum + loss * tf.cast(tf.size(batch), tf.float32), weights

    _, loss_sum, weights = tf.while_loop(
        lambda step, *_: step < epochs * batches_per_epoch, next_batch, (0, tf.constant(0.0), list(weights))
    )
    return weights, loss_sum


def sgd_step(
    model: tff.learning.models.FunctionalModel, weights: Weights, batch: Batch, learning_rate: float | tf.Tensor
) -> tuple[Weights, tf.Tensor]:
    """Returns the weights w - eta grad l(w; b), and the float32 scalar loss l(w; b)."""
    # The gradient of eta l(w; b): one product with a scalar instead of one with the gradient of each weight.
    loss, update = _loss_and_gradient(model, weights, batch, scale=learning_rate)
    return [_subtract(w, u) for w, u in zip(weights, update)], loss


def minibatch_seed(seed: int, round_number: tf.Tensor, client_id: tf.Tensor) -> tf.Tensor:
    """Returns the int64 `[2]` seed with which a client splits its data in a round (int32 scalars)."""
    key = tf.constant([seed, 0], tf.int64)
    for value in (round_number, client_id):
        key = tf.random.experimental.stateless_fold_in(key, tf.cast(value, tf.int64))
    return key


def client_gradient(
    model: tff.learning.models.FunctionalModel,
    weights: Weights,
    num_examples: tf.Tensor,
    batch_fn: BatchFn,
    *,
    seed: tf.Tensor,
) -> tuple[Weights, tf.Tensor]:
    """Computes g_k = grad F_k(w), the gradient of the mean loss over all of P_k (FedSGD, Section 2).

    Args: As for `client_update`; the seed is for augmentation only.

    Returns:
      g_k (zeros if n_k = 0), and the float32 scalar sum of the loss over all examples.
    """

    def zero():
        return tf.constant(0.0), [tf.zeros_like(w) for w in weights]

    def full_batch():
        loss, gradient = _loss_and_gradient(model, weights, batch_fn(tf.range(num_examples), seed))
        # The shape of an embedding's gradient is not known statically, and TFF asks for it.
        dense = [tf.ensure_shape(tf.convert_to_tensor(g), w.shape) for g, w in zip(gradient, weights)]
        return loss * tf.cast(num_examples, tf.float32), dense

    loss_sum, gradient = tf.cond(num_examples > 0, full_batch, zero)
    return gradient, loss_sum


def _loss_and_gradient(model, weights, batch, scale=1.0):
    """Returns l(w; b), and the gradient of scale * l(w; b)."""
    x, y = batch
    with _inlined_functions(), tf.GradientTape() as tape:
        tape.watch(weights)
        loss = model.loss(model.predict_on_batch((weights, ()), x, training=True), y)
        scaled_loss = scale * loss
    return loss, tape.gradient(scaled_loss, weights)


@contextlib.contextmanager
def _inlined_functions() -> Iterator[None]:
    """Traces each `tf.function` into the graph in which it is called, and not as a function of its own.

    The gradient of a function is a second function, and the values that they share are out of the reach of TensorFlow's
    rewriting of the graph: a step takes 1.05 to 1.1 times as long.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _subtract(w, update):
    if isinstance(update, tf.IndexedSlices):  # Of an embedding only the rows that the batch looked up change.
        return tf.tensor_scatter_nd_sub(w, update.indices[:, tf.newaxis], update.values)
    return w - update
