"""The models and the local training of the peers that use PyTorch."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from work import Work


class _MnistCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 64, 5, padding=2)
        self.dense1, self.dense2 = nn.Linear(7 * 7 * 64, 512), nn.Linear(512, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.dense2(F.relu(self.dense1(_flatten(x))))


class _CifarCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
        self.dense1, self.dense2, self.dense3 = nn.Linear(6 * 6 * 64, 384), nn.Linear(384, 192), nn.Linear(192, 10)
        channels = torch.arange(64)
        self._window = torch.where((channels - channels[:, None]).abs() <= 4, 0.001 / 9, 0.0)

    def forward(self, x):
        # With `ceil_mode` the last windows reach over the edge, as those of SAME padding do.
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, ceil_mode=True)
        x = self._normalize(x)
        x = self._normalize(F.relu(self.conv2(x)))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return self.dense3(F.relu(self.dense2(F.relu(self.dense1(_flatten(x))))))

    def _normalize(self, x):
        # F.local_response_norm(x, 9, alpha=0.001), with which a step takes 1.6 times as long.
        x = x.permute(0, 2, 3, 1)
        root = torch.rsqrt(1 + (x * x) @ self._window)
        return (x * root * root.sqrt()).permute(0, 3, 1, 2)


def _flatten(x):
    return x.permute(0, 2, 3, 1).flatten(1)  # In Keras's order.


class _LSTM(nn.Module):
    def __init__(self, symbols, dimensions, layers):
        super().__init__()
        self.embedding = nn.Embedding(symbols, dimensions)
        self.lstm = nn.LSTM(dimensions, 256, layers)
        self.dense = nn.Linear(256, symbols)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias_hh"):  # Keras has one bias only.
                nn.init.zeros_(parameter.requires_grad_(False))

    def forward(self, x):
        return self.dense(self.lstm(self.embedding(x))[0])


_MODELS = {
    "mnist_2nn": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    ),
    "mnist_cnn": _MnistCNN,
    "shakespeare_lstm": lambda: _LSTM(258, 8, 2),
    "stackoverflow_lstm": lambda: _LSTM(10_000, 192, 1),
    "cifar_cnn": _CifarCNN,
}


class Trainer:
    """Trains on one client after the other.

    Attributes:
      weights: The trainable weights of the model, in Keras's order.
      initial_weights: Their values at the start of the round.
    """

    def __init__(self, work: Work):
        torch.set_num_threads(1)
        self._work = work
        self._model = _MODELS[work.task]().to(memory_format=torch.channels_last)
        layers = [layer for layer in self._model.modules() for p in layer.parameters(recurse=False) if p.requires_grad]
        self.weights = [p for p in self._model.parameters() if p.requires_grad]
        self.initial_weights = [_from_keras(layer, w) for layer, w in zip(layers, work.weights)]
        self._batches = [[self._tensors(*b) for b in work.batches(k)] for k in range(len(work.clients))]

    def train(self, client: int, start: Iterable[torch.Tensor]) -> None:
        """Sets `weights` to what a client makes of those with which it starts."""
        with torch.no_grad():
            for w, value in zip(self.weights, start):
                w.copy_(value)
        for x, y in self._batches[client]:
            gradient = torch.autograd.grad(self._loss(x, y), self.weights)
            with torch.no_grad():
                for w, g in zip(self.weights, gradient):
                    w.sub_(g, alpha=self._work.learning_rate)

    def _loss(self, x, y):
        logits = self._model(x)
        if self._work.padding is None:
            return F.cross_entropy(logits, y)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=self._work.padding, reduction="sum")
        return losses / (self._work.unroll * y.shape[1])

    def _tensors(self, x, y):
        x, y = torch.from_numpy(x), torch.from_numpy(y).long()
        if self._work.padding is not None:
            return x.T.contiguous(), y.T.contiguous()  # Time first.
        if self._work.task == "mnist_cnn":
            x = x[..., None]
        return (x.permute(0, 3, 1, 2) if x.dim() == 4 else x), y  # Already in the order of `channels_last`.


def _from_keras(layer: nn.Module, weight: np.ndarray) -> torch.Tensor:
    weight = torch.from_numpy(weight)
    if isinstance(layer, nn.Conv2d) and weight.dim() == 4:
        return weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    return weight if isinstance(layer, nn.Embedding) or weight.dim() == 1 else weight.T.contiguous()
