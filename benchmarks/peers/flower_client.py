"""The `ClientApp` of `with_flower.py`. In a module of its own, so that Flower's actors keep what they have loaded."""

import functools

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch_models import Trainer
from work import Work


@functools.cache
def _load(path):
    work = Work.load(path)
    return work, Trainer(work)


def build_app(path: str) -> ClientApp:
    """Returns the clients of the work in a file."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work, trainer = _load(path)
        client = context.node_config["partition-id"]
        trainer.train(client, map(torch.from_numpy, message.content["arrays"].to_numpy_ndarrays()))
        arrays = ArrayRecord([w.detach().numpy() for w in trainer.weights])
        metrics = MetricRecord({"num-examples": len(work.clients[client][0])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app
