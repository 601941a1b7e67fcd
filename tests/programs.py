"""What the compiler makes of importances, of gradients and of steps, which tests read."""

import re

import jax
import jax.numpy as jnp
import pytest

from lifelong_jax.importance import estimators


def program_of(run, *data):
    """Compiles what a call of an importance outside of jit runs."""
    inner, compiled = estimators._mean_over_examples, []

    def compile_and_run(*arguments):
        compiled.append(inner.lower(*arguments).compile())
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "_mean_over_examples", compile_and_run)
        run(*data)
    return compiled[0]


def gradient_of(loss_fn, params, examples):
    """Compiles the gradient of a mean loss, sharded as the parameters are."""
    mean_loss = lambda params, examples: jnp.mean(jax.vmap(loss_fn, (None, 0))(params, examples))  # noqa: E731
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(jax.grad(mean_loss), out_shardings=shardings).lower(params, examples).compile()


def collectives(program):
    """The collectives in the text of a compiled program, by name, with the shapes of what they send."""
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return [(name, shapes) for shapes, name in re.findall(pattern, program)]


def names_of_collectives(compiled):
    """The names of the collectives of a compiled program, sorted."""
    return sorted(name for name, _ in collectives(compiled.as_text()))
