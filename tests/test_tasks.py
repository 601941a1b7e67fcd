"""Sequences of tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Batch, joint_examples, permuted_tasks, present


def make_batch(num_examples, shape=(2, 3)):
    size = num_examples * np.prod(shape)
    return Batch(
        jnp.arange(float(size)).reshape(num_examples, *shape), jnp.arange(num_examples) % 2, jnp.ones(num_examples)
    )


def test_permuted_tasks_share_their_arrays_and_differ_in_their_permutations():
    train, test = make_batch(5), make_batch(4)
    tasks = permuted_tasks(train, test, 3, jax.random.key(0))
    assert len(tasks) == 3
    for task in tasks:
        assert task.train is train
        assert task.test is test
        assert sorted(task.permutation.tolist()) == list(range(6))
    assert len({tuple(task.permutation.tolist()) for task in tasks}) == 3


def test_a_longer_sequence_begins_with_the_shorter_one():
    batch = make_batch(5)
    short, long = (permuted_tasks(batch, batch, num, jax.random.key(7)) for num in (2, 4))
    for first, second in zip(short, long, strict=False):
        np.testing.assert_array_equal(first.permutation, second.permutation)


def test_present_moves_the_features():
    x = jnp.array([[10, 11, 12], [13, 14, 15]])
    np.testing.assert_array_equal(present(x, jnp.array([5, 0, 4, 1, 3, 2])), [[15, 10, 14], [11, 13, 12]])
    assert present(x, None) is x


def test_joint_examples_shows_each_task_its_own_way():
    train = make_batch(5)
    tasks = permuted_tasks(train, train, 3, jax.random.key(0))
    joint = joint_examples(tasks, "domain")
    assert joint.inputs.shape == (15, 2, 3)
    for index, task in enumerate(tasks):
        np.testing.assert_array_equal(joint.inputs[5 * index + 2], present(train.inputs[2], task.permutation))
        np.testing.assert_array_equal(joint.labels[5 * index : 5 * index + 5], train.labels)


def test_bad_input():
    with pytest.raises(ValueError, match="num_tasks must be an integer of at least 1"):
        permuted_tasks(make_batch(5), make_batch(4), 0, jax.random.key(0))
    with pytest.raises(ValueError, match="test inputs have shape"):
        permuted_tasks(make_batch(5), make_batch(4, (3, 3)), 2, jax.random.key(0))
