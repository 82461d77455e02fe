"""ClientUpdate(k, w) of Algorithm 1, and the client's half of FedSGD, as plain TensorFlow functions."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.functional_model import KerasFunctionalModel
from tff_fedavg.integer import INT32_MAX, as_integer

# The trainable weights, or a gradient by them.
Weights = Sequence[tf.Tensor]
ModelWeights = tff.learning.models.ModelWeights
Batch = tuple[Any, ...]
BatchFn = Callable[[tf.Tensor, tf.Tensor], Batch]

# With it, the seed of a step gives another one for what the model draws than for the augmentation of its batch.
_OF_THE_MODEL = 1


def client_update(
    model: tff.learning.models.FunctionalModel,
    weights: ModelWeights,
    num_examples: tf.Tensor,
    batch_fn: BatchFn,
    *,
    epochs: int,
    batch_size: int | None,
    learning_rate: float | tf.Tensor | None,
    seed: tf.Tensor,
    optimizer: tff.learning.optimizers.Optimizer | None = None,
    proximal_strength: float = 0.0,
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
      weights: w, as the server sent it. Weights that are not trainable stay as they are.
      num_examples: int32 scalar n_k. With 0 the weights come back unchanged.
      batch_fn: Maps int32 indices `[batch]` into P_k, and a seed (int64 `[2]`) for random augmentation, to the batch
        `(x, y)` or `(x, y, sample_weight)`.
      epochs: E.
      batch_size: B; None is the paper's B = inf, all of P_k in one batch.
      learning_rate: eta. Of an optimizer it takes the place of its own rate; None leaves it that.
      seed: Integer `[2]`, such as from `minibatch_seed`; decides how P_k is split, and seeds the augmentation and the
        model's random layers.
      optimizer: Takes the place of SGD in the last line; it starts anew in each ClientUpdate.
      proximal_strength: mu of FedProx (Li et al. 2020): a loss of mu / 2 |w - w_t|^2 is added, w_t being the weights
        that the server sent.

    Returns:
      The new trainable weights, and the float32 scalar sum of l(w; b) over all examples that SGD saw (E n_k of them).
    """
    order = tf.random.experimental.stateless_shuffle(tf.range(num_examples), seed)
    batch_size = num_examples if batch_size is None else tf.minimum(batch_size, num_examples)
    batch_size = tf.maximum(batch_size, 1)
    batches_per_epoch = (num_examples + batch_size - 1) // batch_size
    if optimizer is None and proximal_strength:
        optimizer = tff.learning.optimizers.build_sgdm()

    optimizer_state = _optimizer_state(optimizer, weights, learning_rate)

    def next_batch(step, loss_sum, w, optimizer_state):
        start = step % batches_per_epoch * batch_size
        indices = order[start : start + batch_size]
        step_seed = tf.random.experimental.stateless_fold_in(seed, step)
        batch = batch_fn(indices, step_seed)
        current = ModelWeights(w, weights.non_trainable)
        if optimizer is None:
            w, loss = sgd_step(model, current, batch, learning_rate, step_seed)
        else:
            loss, gradient = loss_and_gradient(model, current, batch, step_seed)
            gradient = _dense(gradient, w)
            if proximal_strength:
                gradient = [g + proximal_strength * (v - v_t) for g, v, v_t in zip(gradient, w, weights.trainable)]
            optimizer_state, w = optimizer.next(optimizer_state, tuple(w), tuple(gradient))
        return step + 1, loss_sum + loss * tf.cast(tf.size(indices), tf.float32), list(w), optimizer_state

    _, loss_sum, w, _ = tf.while_loop(
        lambda step, *_: step < epochs * batches_per_epoch,
        next_batch,
        (0, tf.constant(0.0), list(weights.trainable), optimizer_state),
    )
    return w, loss_sum


def as_epochs_and_batch_size(
    epochs: int, batch_size: int | None, num_examples: Sequence[int]
) -> tuple[int, int | None]:
    """Returns E and B of `client_update`, checked for clients with so many examples.

    Raises:
      TypeError: If one is no integer.
      ValueError: If one is out of range, or a client would make more steps than are counted, in int32.
    """
    epochs = as_integer("epochs (E)", epochs)
    batch_size = None if batch_size is None else as_integer("batch_size (B; None is B = inf)", batch_size)
    most_examples = int(max(num_examples))
    steps = epochs * -(-most_examples // (batch_size or max(most_examples, 1)))
    if steps > INT32_MAX:
        raise ValueError(
            f"epochs (E) is {epochs}: a client with {most_examples} examples makes {steps:,} steps of them; at most "
            f"{INT32_MAX:,} can be counted"
        )
    return epochs, batch_size


def sgd_step(
    model: tff.learning.models.FunctionalModel,
    weights: ModelWeights,
    batch: Batch,
    learning_rate: float | tf.Tensor,
    seed: tf.Tensor,
) -> tuple[Weights, tf.Tensor]:
    """Returns the trainable weights w - eta grad l(w; b), and the float32 scalar loss l(w; b)."""
    # The gradient of eta l(w; b): one product with a scalar instead of one with the gradient of each weight.
    loss, update = loss_and_gradient(model, weights, batch, seed, scale=learning_rate)
    return [_subtract(w, u) for w, u in zip(weights.trainable, update)], loss


def minibatch_seed(seed: int, round_number: tf.Tensor, client_id: tf.Tensor) -> tf.Tensor:
    """Returns the int64 `[2]` seed with which a client splits its data in a round (int32 scalars)."""
    key = tf.constant([as_integer("seed", seed, -(2**63), 2**63 - 1), 0], tf.int64)
    for value in (round_number, client_id):
        key = tf.random.experimental.stateless_fold_in(key, tf.cast(value, tf.int64))
    return key


def client_gradient(
    model: tff.learning.models.FunctionalModel,
    weights: ModelWeights,
    num_examples: tf.Tensor,
    batch_fn: BatchFn,
    *,
    seed: tf.Tensor,
) -> tuple[Weights, tf.Tensor]:
    """Computes g_k = grad F_k(w), the gradient of the mean loss over all of P_k (FedSGD, Section 2).

    Args: As for `client_update`; the seed is for augmentation and random layers only.

    Returns:
      g_k (zeros if n_k = 0), and the float32 scalar sum of the loss over all examples.
    """

    def zero():
        return tf.constant(0.0), [tf.zeros_like(w) for w in weights.trainable]

    def full_batch():
        loss, gradient = loss_and_gradient(model, weights, batch_fn(tf.range(num_examples), seed), seed)
        return loss * tf.cast(num_examples, tf.float32), _dense(gradient, weights.trainable)

    loss_sum, gradient = tf.cond(num_examples > 0, full_batch, zero)
    return gradient, loss_sum


def loss_and_gradient(
    model: tff.learning.models.FunctionalModel,
    weights: ModelWeights,
    batch: Batch,
    seed: tf.Tensor,
    scale: float | tf.Tensor = 1.0,
) -> tuple[tf.Tensor, list[tf.Tensor | tf.IndexedSlices]]:
    """Returns l(w; b), and the gradient of scale * l(w; b) by the trainable weights."""
    weights = weights.trainable, weights.non_trainable
    if isinstance(model, KerasFunctionalModel):
        seed = tf.random.experimental.stateless_fold_in(seed, _OF_THE_MODEL)
        return model.loss_and_gradient(weights, batch, seed=seed, scale=scale)
    x, y, *sample_weight = batch
    with tf.GradientTape() as tape:
        tape.watch(weights[0])
        loss = model.loss(model.predict_on_batch(weights, x, training=True), y, *sample_weight)
        scaled_loss = scale * loss
    return loss, tape.gradient(scaled_loss, weights[0])


def _optimizer_state(optimizer, weights, learning_rate):
    if optimizer is None:
        return ()
    state = optimizer.initialize(tuple(tf.TensorSpec(w.shape, w.dtype) for w in weights.trainable))
    if learning_rate is not None:
        rate = tff.learning.optimizers.LEARNING_RATE_KEY
        if rate not in optimizer.get_hparams(state):
            raise ValueError(
                "learning_rate is given, but client_optimizer has none in its hyperparameters that it could replace: "
                "leave it out"
            )
        state = optimizer.set_hparams(state, {rate: learning_rate})
    return tf.nest.map_structure(tf.convert_to_tensor, state)


def _dense(gradient, weights):
    # The shape of an embedding's gradient is not known statically, and TFF asks for it.
    return [tf.ensure_shape(tf.convert_to_tensor(g), w.shape) for g, w in zip(gradient, weights)]


def _subtract(w, update):
    if isinstance(update, tf.IndexedSlices):  # Of an embedding only the rows that the batch looked up change.
        return tf.tensor_scatter_nd_sub(w, update.indices[:, tf.newaxis], update.values)
    return w - update
