"""Python functions as people write them, in the graphs that TFF builds.

TFF traces a computation into a graph of TensorFlow 1. There Keras falls back to what it did then, and nothing that
exists outside of the graph can be used, be it a constant, a variable or a lookup table. So a function is traced by
itself, as Keras would do it, and its operations are copied into TFF's graph, where

- what a variable holds is an argument (the weights of a model), or the value that it had when the function was traced;
- captured constants and lookup tables are made anew;
- random numbers come from a seed that is an argument: the same seed gives the same numbers.

What cannot be had so, such as a variable that the function changes, is refused when the function is traced.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

# For each random operation one that draws from the same distribution by a seed, and the place of that in its inputs.
_STATELESS = {
    "RandomUniform": ("StatelessRandomUniform", 1),
    "RandomUniformInt": ("StatelessRandomUniformInt", 1),
    "RandomStandardNormal": ("StatelessRandomNormal", 1),
    "TruncatedNormal": ("StatelessTruncatedNormal", 1),
    "Multinomial": ("StatelessMultinomial", 2),
}
# Gives the state of a `tf.random.Generator`, int64 `[3]`. Keras's layers for augmentation use it.
_READ_GENERATOR = "RngReadAndSkip"
_SEEDED = (*_STATELESS, _READ_GENERATOR)
_CHANGES = ("Assign", "ResourceApply", "ResourceSparseApply", "ResourceScatter")
_CALLS_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
# A `VarHandleOp` of this name makes a variable of its own each time it is executed.
_ANONYMOUS = "cd2c89b7-88b7-44c8-ad83-06c2a9158347"

# Makes a tensor in the current graph, of the values of the variables and of the seeds.
_Replacement = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor]], tf.Tensor]


class ChangedVariableError(ValueError):
    """The function changes a variable: `variable`, None where it is not known which."""

    def __init__(self, name: str, variable: tf.Variable | None):
        super().__init__(f"{name} changes {'a variable' if variable is None else f'the variable {variable.name}'}")
        self.variable = variable


class TracedFunction:
    """A function that can be called in any graph, with all that it needs from outside of it."""

    def __init__(self, name: str, fn: Callable, specs: Sequence[Any], variables: Sequence[tf.Variable] = ()):
        """Traces a function, in eager mode.

        Args:
          name: What the function is called in errors.
          fn: Takes nested structures of tensors, and returns one.
          specs: The `tf.TensorSpec`s of its arguments.
          variables: The variables whose values are given with each call. All others keep the values that they have now.

        Raises:
          ChangedVariableError: If the function changes a variable.
          ValueError: If there is something else in it that cannot be copied into another graph.
        """
        _require_graphs()
        try:
            graph = tf.function(fn).get_concrete_function(*specs).graph
        except Exception as e:  # Of any kind: it is somebody else's code.
            raise ValueError(f"{name} fails: {first_error(e)}") from e
        graph_def = graph.as_graph_def()
        # A captured value is known by the name of the placeholder that stands for it in the graph.
        captured = {placeholder.op.name: external for external, placeholder in graph.captures}
        owners = {id(v.handle): v for v in (*graph.variables, *variables)}
        variable_of = {key: owners[id(value)] for key, value in captured.items() if id(value) in owners}
        _check(name, graph_def, variable_of)

        self._structure = graph.structured_outputs
        self._inputs = [t.op.name for t in graph.inputs if t.op.name not in captured]
        self._num_seeds = 0
        self._replacements: dict[str, _Replacement] = {}
        for key, external in captured.items():
            if key in variable_of:
                places = (i for i, v in enumerate(variables) if v is variable_of[key])
                place = next(places, None)
                value = _constant(variable_of[key].numpy()) if place is None else _item(place)
                self._replacements[_value_of(key)] = value
                self._replacements[key] = _variable_with(value)
            elif external.dtype != tf.resource:
                self._replacements[key] = _constant(external.numpy())
            elif lookups := [n for n in graph_def.node if n.op == "LookupTableFindV2" and n.input[0] == key]:
                self._replacements[key] = _table(external, lookups[0])
            elif not any(n.op == _READ_GENERATOR and n.input[0] == key for n in graph_def.node):
                raise ValueError(f"{name} uses {external.numpy()!r}, which exists in this program only")
        self._graph_def = self._rewrite(graph_def, variable_of)
        # A partial, which has no code: by that TensorFlow counts how often a function is traced, and warns.
        self._in_eager_mode = tf.function(functools.partial(self.__call__), autograph=False, reduce_retracing=True)

    @property
    def output_spec(self) -> Any:
        """The `tf.TensorSpec`s of what the function returns; None for None."""
        return tf.nest.map_structure(lambda t: t if t is None else tf.TensorSpec(t.shape, t.dtype), self._structure)

    @property
    def is_random(self) -> bool:
        """Whether there are random operations in it, which the same seed has draw the same."""
        return self._num_seeds > 0

    def __call__(self, *args: Any, variables: Sequence[tf.Tensor] = (), seed: tf.Tensor | None = None) -> Any:
        """Calls the function, in any graph or in eager mode.

        Args:
          *args: Structures of tensors as the specs.
          variables: The values of the variables.
          seed: Integer `[2]`, for its random operations; by default zeros.

        Returns:
          What the function returns.
        """
        if tf.executing_eagerly():
            _require_graphs()
            return self._in_eager_mode(*args, variables=variables, seed=seed)
        tensors = dict(zip(self._inputs, tf.nest.flatten(args, expand_composites=True), strict=True))
        if self.is_random:
            seed = tf.zeros([2], tf.int64) if seed is None else tf.cast(seed, tf.int64)
            seeds = tf.unstack(tf.random.experimental.stateless_split(seed, self._num_seeds))
        else:
            seeds = []
        outputs = tf.nest.flatten(self._structure, expand_composites=True)
        copied = {key for node in self._graph_def.node for key in map(_operation, node.input)}
        copied |= {t.op.name for t in outputs}
        tensors |= {key: make(variables, seeds) for key, make in self._replacements.items() if key in copied}
        # `tf.identity` brings a tensor of an outer graph into this one.
        results = tf.graph_util.import_graph_def(
            self._graph_def,
            input_map={key: tf.identity(tensor) for key, tensor in tensors.items() if key in copied},
            return_elements=[t.name for t in outputs],
            name="traced",
        )
        for result, output in zip(results, outputs):
            result.set_shape(output.shape)
        return tf.nest.pack_sequence_as(self._structure, results, expand_composites=True)

    def _new_seed(self) -> _Replacement:
        place = self._num_seeds
        self._num_seeds += 1
        return lambda variables, seeds: seeds[place]

    def _rewrite(self, graph_def: tf.compat.v1.GraphDef, variable_of: Mapping[str, tf.Variable]):
        """Returns the graph with replaceable values in place of variables that are read, and of random states."""
        rewritten = tf.compat.v1.GraphDef(versions=graph_def.versions, library=graph_def.library)
        without_effect = set()
        for node in graph_def.node:
            node.device = ""
            node.attr.pop("_class", None)  # Where it is placed, too.
            if node.op == "ReadVariableOp" and node.input[0] in variable_of:
                node.op = "Identity"
                node.input[0] = _value_of(node.input[0])
                node.attr["T"].CopyFrom(node.attr.pop("dtype"))
                without_effect.add(node.name)
            elif node.op == "ResourceGather" and node.input[0] in variable_of:
                # A variable would hold on to the weights of an embedding, which then are copied with each step.
                axis = f"{node.name}/axis"
                node.op = "GatherV2"
                node.input[:] = [_value_of(node.input[0]), node.input[1], axis, *node.input[2:]]
                node.attr["Tparams"].CopyFrom(node.attr.pop("dtype"))
                node.attr["Taxis"].type = tf.int32.as_datatype_enum
                del node.attr["validate_indices"]
                self._replacements[axis] = _constant(0)
                without_effect.add(node.name)
            elif node.op in _STATELESS:
                node.op, place = _STATELESS[node.op]
                seed = f"{node.name}/seed"
                node.input.insert(place, seed)
                self._replacements[seed] = self._new_seed()
                if "Tout" in node.attr:
                    node.attr["dtype"].CopyFrom(node.attr.pop("Tout"))
                node.attr["Tseed"].type = tf.int64.as_datatype_enum
                del node.attr["seed"], node.attr["seed2"]
                without_effect.add(node.name)
            elif node.op == _READ_GENERATOR:
                self._replacements[node.name] = _generator_state(self._new_seed())
                without_effect.add(node.name)
            if node.op not in ("Placeholder", _READ_GENERATOR):
                rewritten.node.append(node)
        for node in rewritten.node:  # None has to wait for these any more.
            kept = [key for key in node.input if not (key[0] == "^" and _operation(key) in without_effect)]
            node.input[:] = kept
        return rewritten


def _require_graphs() -> None:
    if tf.config.functions_run_eagerly():
        raise RuntimeError("tf.config.run_functions_eagerly(True) is on, with which TFF makes no graphs: switch it off")


def _check(name: str, graph_def: tf.compat.v1.GraphDef, variable_of: Mapping[str, tf.Variable]) -> None:
    """Raises an error for operations that cannot be copied."""
    inner = list(itertools.chain.from_iterable(f.node_def for f in graph_def.library.function))
    for node in (*graph_def.node, *inner):
        if node.op.startswith(_CHANGES):
            raise ChangedVariableError(name, variable_of.get(node.input[0]))
        if node.op.startswith("Debug"):
            raise ValueError(
                "tf.debugging.enable_check_numerics() or the like is on, which TFF's worker cannot: switch it off"
            )
        if node.op in _CALLS_PYTHON:
            raise ValueError(f"{name} calls Python (tf.py_function or tf.numpy_function), which TFF's worker cannot")
        # What draws at random has two seeds, but for the stateless operations, and one that has none. Keras's LSTM and
        # GRU have a form for GPUs beside them, which has seeds, too.
        has_seeds = "seed2" in node.attr and not node.op.startswith("Cudnn")
        if (has_seeds and node.op not in _STATELESS) or node.op == "NonDeterministicInts":
            raise ValueError(
                f"{name} draws random numbers with {node.op}, which has no seed here: take one of tf.random.stateless_*"
            )
    for node in inner:
        if node.op in _SEEDED:
            raise ValueError(
                f"{name} draws random numbers within a loop, a condition or a tf.function ({node.name}), where they "
                "cannot be seeded: draw them outside of it"
            )


def fits(specs: Any, others: Any) -> bool:
    """Whether two nested structures of specs are alike, and those at the same places compatible."""
    try:
        compatible = tf.nest.map_structure(lambda a, b: a.is_compatible_with(b), specs, others, check_types=False)
    except (TypeError, ValueError):  # Of another structure.
        return False
    return all(tf.nest.flatten(compatible))


def first_error(error: Exception) -> str:
    """Returns the line of an error's text that says what it is: AutoGraph and Keras put the code before it.

    Without the configuration of what could not be made of it, which Keras puts after it.
    """
    lines = [
        re.split(r",? (?:using config=|Full object config: )", line.strip())[0] for line in str(error).splitlines()
    ]
    lines = [
        line for line in lines if line and not re.search("Exception encountered when calling|in user code:$", line)
    ]
    named = [line for line in lines if re.match(r"[A-Za-z]+(Error|Exception): ", line)]
    return (named or [f"{type(error).__name__}: {line}" for line in lines] or [type(error).__name__])[0]


def _operation(tensor_name: str) -> str:
    return tensor_name.removeprefix("^").split(":")[0]


def _value_of(key: str) -> str:
    return f"{key}/value"


def _item(place: int) -> _Replacement:
    return lambda variables, seeds: variables[place]


def _constant(value: Any) -> _Replacement:
    return lambda variables, seeds: tf.constant(value)


def _variable_with(value: _Replacement) -> _Replacement:
    """The handle of a variable that holds a value, for operations that take no values (`ResourceGather`, a loop)."""

    def make(variables, seeds):
        tensor = tf.convert_to_tensor(value(variables, seeds))
        handle = tf.raw_ops.VarHandleOp(dtype=tensor.dtype, shape=tensor.shape, shared_name=_ANONYMOUS)
        with tf.control_dependencies([tf.raw_ops.AssignVariableOp(resource=handle, value=tensor)]):
            return tf.identity(handle)

    return make


def _generator_state(new_seed: _Replacement) -> _Replacement:
    return lambda variables, seeds: tf.random.stateless_uniform(
        [3], new_seed(variables, seeds), minval=None, maxval=None, dtype=tf.int64
    )


def _table(handle: tf.Tensor, lookup: tf.compat.v1.NodeDef) -> _Replacement:
    """A lookup table with what the captured one contains."""
    dtypes = {"Tkeys": lookup.attr["Tin"].type, "Tvalues": lookup.attr["Tout"].type}
    keys, values = (t.numpy() for t in tf.raw_ops.LookupTableExportV2(table_handle=handle, **dtypes))

    def make(variables, seeds):
        with tf.init_scope():  # Once, and not in each step of a loop.
            initializer = tf.lookup.KeyValueTensorInitializer(keys, values, dtypes["Tkeys"], dtypes["Tvalues"])
            # The default is an input of each lookup; this one is not used.
            default = tf.zeros([], dtypes["Tvalues"]) if dtypes["Tvalues"] != tf.string else ""
            return tf.lookup.StaticHashTable(initializer, default).resource_handle

    return make
