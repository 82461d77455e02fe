"""The context in which TFF computes where no other one is entered.

Imported by the modules that a program may use without a worker, for it to end without noise.
"""

import atexit

import tensorflow_federated as tff

TFFS_OWN = tff.framework.get_context_stack().current


@atexit.register
def _replace() -> None:
    """Frees it: left to the end of the interpreter, it prints an AttributeError."""
    factory = tff.framework.ResourceManagingExecutorFactory(lambda cardinalities: None)
    tff.framework.set_default_context(tff.framework.AsyncExecutionContext(factory))
