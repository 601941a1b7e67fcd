"""Checks that a method, a recipe, parameters, a model state and tasks are valid, and fit, before computing."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks
from lifelong_jax._batch_axis import BATCH_AXIS
from lifelong_jax._meshes import check_places, sharding_of
from lifelong_jax.methods import Method
from lifelong_jax.objectives import Objective, counted_labels
from lifelong_jax.recipes import Recipe
from lifelong_jax.types import Batch, Example, ModelState, Params, Task, TrainFn


def check_tasks(
    method: Method | None, recipe: Recipe, params: Params, model_state: ModelState, tasks: Sequence[Task]
) -> None:
    """Raises an error that names the argument unless all arguments are valid, and fit each other."""
    if not isinstance(method, Method | None):
        raise TypeError(f"method is a {type(method).__name__}: pass one from methods, such as methods.ewc().")
    if method is not None:
        _checks.check_method(method)
    _check_recipe(recipe, model_state)
    _checks.check_params("params", params)
    if not isinstance(tasks, Sequence):
        raise TypeError(f"tasks is a {type(tasks).__name__}: pass a list of Task(train, test).")
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to learn.")
    for index, task in enumerate(tasks):
        _check_parts(f"tasks[{index}]", task)
    # Parameters that are on no mesh are placed on that of the tasks.
    on_meshes = jax.tree.map(lambda leaf: None if sharding_of(leaf) is None else leaf, (params, model_state))
    check_places(tasks=tasks, params=on_meshes[0], model_state=on_meshes[1])
    _checks.check_batch("tasks[0].train", tasks[0].train)
    x, (params, model_state) = _checks.first_example(tasks[0].train.inputs), _checks.shapes_of((params, model_state))
    with _checks.for_one_example("recipe.apply_fn", x):
        state = () if model_state is None else (model_state,)
        outputs = jax.eval_shape(recipe.apply_fn, params, *state, x)
    if recipe.train_fn is not None:
        _check_train_fn(recipe.train_fn, params, model_state, x, outputs)
    if recipe.patience is not None and any(task.validation is None for task in tasks):
        raise ValueError("recipe.patience needs validation examples: make each Task(..., validation=batch).")
    checked: dict[tuple[int, ...], Batch] = {}  # by the ids of its arrays, which stay valid while it holds the batch
    no_batches: dict[str, Any] = {"train": None, "test": None, "validation": None}  # they may differ in their sizes
    first = tasks[0]._replace(**no_batches)
    for index, task in enumerate(tasks):
        _checks.check_same_structure(f"tasks[{index}]", task._replace(**no_batches), "tasks[0]", first)
        _check_task(f"tasks[{index}]", task, recipe, outputs, x, checked)


def _check_recipe(recipe: Recipe, model_state: ModelState) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}: pass a Recipe(apply_fn, optimizer_fn, num_epochs, batch_size)."
        )
    if not isinstance(recipe.objective, Objective):
        raise TypeError("recipe.objective must be an Objective: call objectives.classification(), say.")
    _checks.check_choice("recipe.scenario", recipe.scenario, ("task", "domain", "class"))
    _checks.check_positive_integer("recipe.num_epochs", recipe.num_epochs)
    _checks.check_positive_integer("recipe.batch_size", recipe.batch_size)
    _checks.check_positive_integer("recipe.patience", recipe.patience, optional=True)
    if recipe.train_fn is None and model_state is not None:
        raise ValueError("model_state is for a recipe with a train_fn, which returns the next one: leave it None.")
    if recipe.train_fn is not None and model_state is None:
        raise ValueError("recipe has a train_fn, so pass the model_state to start from: () if there is none.")


def _check_parts(name: str, task: Task) -> None:
    parts = (task, task.train, task.test) if isinstance(task, Task) else (task,)
    if any(not isinstance(part, kind) for part, kind in zip(parts, (Task, Batch, Batch), strict=False)):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{name} must be a Task(train, test) of two Batch(inputs, labels), not: {kinds}.")
    for part, batch in parts_of(task).items():
        if not isinstance(batch, Batch):
            raise TypeError(f"{name}.{part} is a {type(batch).__name__}, but must be a Batch(inputs, labels).")


def parts_of(task: Task) -> dict[str, Batch]:
    """Returns the sets of examples that a task has, by name."""
    parts = {"train": task.train, "test": task.test, "validation": task.validation}
    return {name: part for name, part in parts.items() if part is not None}


def _check_train_fn(train_fn: TrainFn, params: Params, model_state: ModelState, x: Example, outputs: Any) -> None:
    def train_one(params: Params, model_state: ModelState, x: Example) -> Any:
        keys = jax.random.split(jax.random.key(0), 1)
        train = jax.vmap(train_fn, in_axes=(None, None, 0, 0), axis_name=BATCH_AXIS)
        returned = train(params, model_state, jax.tree.map(lambda leaf: leaf[None], x), keys)
        return jax.tree.map(lambda leaf: leaf[0], returned)

    with _checks.for_one_example("recipe.train_fn", x):
        trained = jax.eval_shape(train_one, params, model_state, x)
    if not (isinstance(trained, tuple) and len(trained) == 2):
        raise ValueError("recipe.train_fn must return (outputs, model_state).")
    _checks.check_same_structure("what recipe.train_fn returns", trained[0], "what recipe.apply_fn returns", outputs)
    _checks.check_same_structure("the model state that recipe.train_fn returns", trained[1], "model_state", model_state)


def _check_task(
    name: str, task: Task, recipe: Recipe, outputs: Any, x: Example, checked: dict[tuple[int, ...], Batch]
) -> None:
    if task.permutation is not None:
        _check_permutation(f"{name}.permutation", task.permutation, x)
    if (task.class_mask is None) != (recipe.scenario == "domain"):
        has, takes = ("no", "needs one") if task.class_mask is None else ("a", "takes none")
        raise ValueError(
            f"{name} has {has} class_mask, but scenario {recipe.scenario!r} {takes}: class masks are for 'task' and "
            f"'class'."
        )
    for part, batch in parts_of(task).items():
        if batch.class_mask is not None:
            raise ValueError(f"{name}.{part} has a class_mask: leave it None, and set the task's class_mask.")
        arrays = tuple(map(id, jax.tree.leaves(batch)))
        if arrays not in checked:  # permuted tasks share their examples
            _checks.check_batch(f"{name}.{part}", batch)
            recipe.objective.check_fn(f"{name}.{part}", batch, outputs)
            _checks.check_finite(f"{name}.{part}.inputs", batch.inputs, hint="Clean the data.")
            inputs = _checks.first_example(batch.inputs)
            _checks.check_same_inputs(f"an input of {name}.{part}", inputs, "one of tasks[0].train", x)
            checked[arrays] = batch
    if task.class_mask is not None:
        _check_class_mask(name, task, task.class_mask, recipe.objective, outputs)


def _check_class_mask(name: str, task: Task, class_mask: jax.Array, objective: Objective, outputs: Any) -> None:
    if objective.likelihood != "categorical":
        raise ValueError(f"{name} has a class_mask, which is for classification: leave it None.")
    if class_mask.shape != outputs.shape[-1:]:
        raise ValueError(
            f"{name}.class_mask has shape {class_mask.shape}, but apply_fn returns {outputs.shape[-1]} outputs."
        )
    if class_mask.dtype != bool:
        raise TypeError(f"{name}.class_mask has dtype {class_mask.dtype}, but must have bools.")
    if not _checks.is_concrete(class_mask):
        return
    for batch in parts_of(task).values():
        if not np.asarray(class_mask)[counted_labels(batch)].all():
            raise ValueError(f"{name} has labels that are not among the classes of its class_mask.")


def _check_permutation(name: str, permutation: jax.Array, x: Example) -> None:
    if not isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} is for inputs that are one array, not a {type(x).__name__}: leave it None.")
    num_features = math.prod(x.shape)
    if permutation.shape != (num_features,):
        raise ValueError(f"{name} has shape {permutation.shape}, but an input has {num_features} features.")
    if not jnp.issubdtype(permutation.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {permutation.dtype}, but must have integers.")
    if _checks.is_concrete(permutation) and not np.array_equal(np.sort(permutation), np.arange(num_features)):
        raise ValueError(f"{name} must hold each of 0 to {num_features - 1} once.")
