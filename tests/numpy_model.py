"""The network of the `model` fixture in NumPy: the truth that the TensorFlow code is held to."""

import numpy as np


def loss_and_gradient(weights, x, y):
    """Returns the mean cross entropy and its gradient, by hand, in float64."""
    w1, b1, w2, b2 = (w.astype(np.float64) for w in weights)
    hidden = np.maximum(x @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(y))
    loss = -log_probabilities[rows, y].mean()
    d_logits = np.exp(log_probabilities)
    d_logits[rows, y] -= 1
    d_logits /= len(y)
    d_hidden = d_logits @ w2.T * (hidden > 0)
    return loss, [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits, d_logits.sum(0)]


def client_update(weights, x, y, order, *, epochs, batch_size, learning_rate):
    """ClientUpdate of Algorithm 1 on the examples in `order`: one split, then E passes over its batches."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for _ in range(epochs):
        for batch in batches:
            _, gradient = loss_and_gradient(weights, x[batch], y[batch])
            weights = [w - learning_rate * g for w, g in zip(weights, gradient)]
    return weights


def max_difference(a, b):
    """Returns the largest difference of arrays of the same shapes; NaN if there is one in any of them."""
    differences = []
    for x, y in zip(a, b, strict=True):
        assert np.shape(x) == np.shape(y)
        differences.append(np.abs(np.asarray(x) - np.asarray(y)).max())
    return np.max(differences)
