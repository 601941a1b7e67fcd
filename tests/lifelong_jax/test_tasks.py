"""Sequences of tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import Batch, Task, dataset_tasks, pad_tasks, permuted_tasks, rotated_tasks, split_tasks
from lifelong_jax.datasets import open_dataset
from lifelong_jax.scenarios import joint_examples
from lifelong_jax.tasks import permute_features, place_batch
from tests import problems
from tests.problems import as_batch


def make_batch(num_examples, shape=(2, 3)):
    inputs = np.arange(float(num_examples * np.prod(shape))).reshape(num_examples, *shape)
    return as_batch(inputs, np.arange(num_examples) % 2, np.ones(num_examples))


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


def test_permute_features_moves_the_features():
    x = jnp.array([[10, 11, 12], [13, 14, 15]])
    np.testing.assert_array_equal(permute_features(x, jnp.array([5, 0, 4, 1, 3, 2])), [[15, 10, 14], [11, 13, 12]])
    assert permute_features(x, None) is x


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool, jnp.bfloat16])
def test_permute_features_is_the_same_for_many_examples_in_any_place(dtype):
    xs = np.arange(48).reshape(4, 3, 4).astype(dtype)
    permutation = np.random.default_rng(0).permutation(12)
    expected = xs.reshape(4, 12)[:, permutation].reshape(xs.shape)
    permute_all = jax.vmap(permute_features, in_axes=(0, None))
    mesh = jax.make_mesh((2,), ("data",))
    sharded = jax.device_put(xs, jax.sharding.NamedSharding(mesh, jax.P("data")))
    for inputs in (xs, sharded):
        np.testing.assert_array_equal(permute_all(inputs, permutation), expected)
        np.testing.assert_array_equal(jax.jit(permute_all)(inputs, permutation), expected)
    np.testing.assert_array_equal(jax.jit(lambda: permute_features(xs[0], permutation))(), expected[0])


def test_permute_features_refuses_a_permutation_of_other_features():
    with pytest.raises(TypeError, match="reshape"):
        permute_features(jnp.zeros(3), jnp.array([0]))


def test_joint_examples_shows_each_task_its_own_way():
    train = make_batch(5)
    tasks = permuted_tasks(train, train, 3, jax.random.key(0))
    joint = joint_examples(tasks, "domain")
    assert joint.inputs.shape == (15, 2, 3)
    for index, task in enumerate(tasks):
        np.testing.assert_array_equal(joint.inputs[5 * index + 2], permute_features(train.inputs[2], task.permutation))
        np.testing.assert_array_equal(joint.labels[5 * index : 5 * index + 5], train.labels)


def test_joint_examples_takes_tasks_of_any_sizes_with_and_without_weights():
    small, large = make_batch(3), make_batch(5)
    bare = Batch(large.inputs, large.labels)
    joint = joint_examples([Task(small._replace(weights=2 * small.weights), small), Task(bare, small)], "domain")
    np.testing.assert_array_equal(joint.weights, [2, 2, 2, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(joint.inputs, np.concatenate([small.inputs, large.inputs]))
    assert joint_examples([Task(bare, small)] * 2, "domain").weights is None


def test_rotated_tasks_turn_counter_clockwise():
    train, test = make_batch(5, (3, 3, 2)), make_batch(4, (3, 3, 2))
    tasks = rotated_tasks(train, test, [0, 90, -180, 45])
    for task, turns in zip(tasks, (0, 1, 2), strict=False):
        np.testing.assert_allclose(task.train.inputs, np.rot90(train.inputs, turns, axes=(1, 2)), atol=1e-4)
        np.testing.assert_allclose(task.test.inputs, np.rot90(test.inputs, turns, axes=(1, 2)), atol=1e-4)
        np.testing.assert_array_equal(task.train.labels, train.labels)
    # A corner comes from outside of the image; the middle stays.
    np.testing.assert_allclose(tasks[3].train.inputs[:, 1, 1], train.inputs[:, 1, 1], atol=1e-4)
    assert (tasks[3].train.inputs[:, 0, 0] != train.inputs[:, 0, 0]).any()


def test_rotated_tasks_keep_the_dtype():
    images = make_batch(2, (2, 2, 1))
    for dtype in (jnp.float16, jnp.bfloat16):
        narrow = images._replace(inputs=images.inputs.astype(dtype))
        turned = rotated_tasks(narrow, narrow, [90])[0].train.inputs
        assert turned.dtype == dtype
        np.testing.assert_allclose(turned.astype(jnp.float32), np.rot90(images.inputs, 1, axes=(1, 2)), atol=1e-5)


def test_split_tasks_take_any_groups_and_hold_no_padding():
    train = as_batch(np.arange(9.0)[:, None], np.array([0, 1, 2, 3, 3, 1, 0, 2, 2]), np.ones(9))
    tasks = split_tasks(train, train, [[3, 1], [2, 0]], num_classes=5)
    for part in (0, 1):
        np.testing.assert_array_equal(tasks[0][part].inputs[:, 0], [1, 3, 4, 5])
        np.testing.assert_array_equal(tasks[0][part].labels, [1, 3, 3, 1])
        np.testing.assert_array_equal(tasks[0][part].weights, [1, 1, 1, 1])
        np.testing.assert_array_equal(tasks[1][part].labels, [0, 2, 0, 2, 2])
    np.testing.assert_array_equal(tasks[0].class_mask, [False, True, False, True, False])

    shared = split_tasks(train, train, [[3, 1], [2, 0]], num_classes=5, shared_outputs=True)
    np.testing.assert_array_equal(shared[0].train.labels, [1, 0, 0, 1])
    np.testing.assert_array_equal(shared[1].train.labels, [1, 0, 1, 0, 0])
    assert shared[0].class_mask is None


def test_padding_of_split_tasks_is_among_the_classes_of_the_task():
    train = as_batch(np.arange(9.0)[:, None], np.array([0, 1, 2, 3, 3, 1, 0, 2, 2]), np.ones(9))
    for task in pad_tasks(split_tasks(train, train, [[3, 1], [2, 0]], num_classes=5)):
        assert task.train.inputs.shape == (5, 1)
        assert task.class_mask[task.train.labels].all()


def test_tasks_of_very_different_sizes_take_the_memory_of_the_data():
    labels = np.repeat(np.arange(10), [6000, *[6] * 9])
    batch = Batch(np.zeros((len(labels), 100), np.float32), labels)
    split = split_tasks(batch, batch, [[label] for label in range(10)], num_classes=10)
    parts = [Batch(batch.inputs[labels == label], 0 * labels[labels == label]) for label in range(10)]
    for tasks in (split, dataset_tasks([(part, part, 2) for part in parts])):
        assert sum(task.train.inputs.nbytes for task in tasks) == batch.inputs.nbytes


def test_dataset_tasks_give_each_data_set_outputs_of_its_own():
    small, large = make_batch(3), make_batch(5)
    tasks = dataset_tasks([(small, large, 2), (large, small, 4)])
    np.testing.assert_array_equal(tasks[0].train.labels, small.labels)
    np.testing.assert_array_equal(tasks[1].train.labels, large.labels + 2)
    np.testing.assert_array_equal(tasks[1].test.labels, small.labels + 2)
    np.testing.assert_array_equal(
        np.stack([task.class_mask for task in tasks]), [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]
    )


def test_dataset_tasks_may_share_their_outputs():
    small, large = make_batch(3), make_batch(5)
    tasks = dataset_tasks([(small, large, 2), (large, small, 2)], shared_outputs=True)
    for task, batch in zip(tasks, (small, large), strict=True):
        np.testing.assert_array_equal(task.train.labels, batch.labels)
        np.testing.assert_array_equal(task.train.inputs, batch.inputs)
        assert task.class_mask is None
    with pytest.raises(ValueError, match="datasets have 2, 3 classes: to share their outputs, all must have the same"):
        dataset_tasks([(small, large, 2), (large, small, 3)], shared_outputs=True)


def test_bad_input():
    with pytest.raises(ValueError, match="num_tasks must be an integer of at least 1"):
        permuted_tasks(make_batch(5), make_batch(4), 0, jax.random.key(0))
    with pytest.raises(ValueError, match="test inputs have shape"):
        permuted_tasks(make_batch(5), make_batch(4, (3, 3)), 2, jax.random.key(0))
    with pytest.raises(ValueError, match="angles is empty"):
        rotated_tasks(make_batch(5, (3, 3, 1)), make_batch(5, (3, 3, 1)), [])
    with pytest.raises(ValueError, match=r"test.inputs has shape \(5, 2, 3\), but must be images"):
        rotated_tasks(make_batch(5, (3, 3, 1)), make_batch(5), [0.0])
    images = make_batch(5, (3, 3, 1))
    for angle in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"angles\[1\] has entries that are NaN or infinite"):
            rotated_tasks(images, images, [0.0, angle])
    with pytest.raises(TypeError, match=r"test.inputs has dtype uint8, but .*scale_bytes"):
        rotated_tasks(images, images._replace(inputs=images.inputs.astype(jnp.uint8)), [0.0])
    for groups in ([[0, 1], [1]], [[0, 2]], [[0], []], []):
        with pytest.raises(ValueError, match="class_groups must hold classes from 0 to 1"):
            split_tasks(make_batch(5), make_batch(5), groups, num_classes=2)
    with pytest.raises(ValueError, match=r"test has no examples of the classes \[1\]"):
        split_tasks(make_batch(5), make_batch(1), [[0, 1]], num_classes=2)
    batch = make_batch(5)
    unweighted = batch._replace(weights=(batch.labels == 0).astype(jnp.float32))
    with pytest.raises(ValueError, match=r"train has no examples of the classes \[1\]"):
        split_tasks(unweighted, batch, [[0, 1]], num_classes=2)
    with pytest.raises(ValueError, match="datasets is empty"):
        dataset_tasks([])
    with pytest.raises(ValueError, match="tasks is empty: there is nothing to pad"):
        pad_tasks([])
    with pytest.raises(ValueError, match="inputs must have the same shape per example"):
        dataset_tasks([(make_batch(5), make_batch(5, (3, 3)), 2)])


def test_a_data_set_that_was_not_loaded():
    opened, batch = open_dataset("digits"), make_batch(5)
    for make_tasks in (
        lambda: dataset_tasks([(batch, batch, 2), opened]),
        lambda: split_tasks(batch, opened.test, [[0]], num_classes=2),
        lambda: permuted_tasks(opened.train, batch, 2, jax.random.key(0)),
        lambda: rotated_tasks(opened.train, opened.test, [0.0]),
    ):
        with pytest.raises(TypeError, match=r"(train|test) is a ScaledSource, .* load_dataset"):
            make_tasks()


@pytest.mark.parametrize("make", ["split", "datasets"])
def test_padding_repeats_real_examples(make):
    # A network that normalises its input has no finite gradient where all inputs are 0.
    large, small = make_batch(5), make_batch(3)
    if make == "split":
        batch = as_batch(np.arange(1.0, 13.0).reshape(4, 3), np.array([0, 1, 1, 1]), np.ones(4))
        tasks = pad_tasks(split_tasks(batch, batch, [[0], [1]], num_classes=2))
    else:
        tasks = pad_tasks(dataset_tasks([(large, large, 2), (small, small, 2)]))
    for part in (part for task in tasks for part in (task.train, task.test)):
        rows = np.column_stack([np.asarray(part.inputs).reshape(len(part.labels), -1), part.labels]).tolist()
        num_real = int((part.weights > 0).sum())
        assert all(row in rows[:num_real] for row in rows[num_real:])
    assert any((task.train.weights == 0).any() for task in tasks)


def test_tasks_are_padded_to_the_size_of_the_largest_one():
    large, small = make_batch(5), make_batch(3)
    tasks = pad_tasks(
        [Task(small, large), Task(large._replace(weights=None), small._replace(weights=2 * small.weights))]
    )
    np.testing.assert_array_equal(tasks[0].train.weights, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(tasks[1].train.weights, np.ones(5))
    np.testing.assert_array_equal(tasks[1].test.weights, [2, 2, 2, 0, 0])
    np.testing.assert_array_equal(tasks[0].train.inputs[:3], small.inputs)
    np.testing.assert_array_equal(tasks[0].train.labels, [0, 1, 0, 0, 1])  # the first ones again
    assert tasks[0].test is large  # is not copied


def test_weights_may_be_left_out():
    batch = make_batch(5, (2, 2, 1))
    bare = Batch(batch.inputs, batch.labels)
    for make_tasks in (
        lambda batch: split_tasks(batch, batch, [[0], [1]], num_classes=2),
        lambda batch: dataset_tasks([(batch, batch, 2)]),
    ):
        for task, expected in zip(make_tasks(bare), make_tasks(batch), strict=True):
            assert task.train.weights is None
            np.testing.assert_array_equal(task.train.labels, expected.train.labels)
            np.testing.assert_array_equal(pad_tasks([task])[0].train.weights, expected.train.weights)
    assert rotated_tasks(bare, bare, [90])[0].train.weights is None


def test_inputs_of_several_arrays():
    batch = make_batch(5)
    pair = batch._replace(inputs=(batch.inputs, batch.labels))
    np.testing.assert_array_equal(split_tasks(pair, pair, [[0], [1]], 2)[1].train.inputs[1], [1, 1])
    assert dataset_tasks([(pair, pair, 2)])[0].train.inputs[0].shape == (5, 2, 3)
    with pytest.raises(TypeError, match=r"train\.inputs is a tuple, but must be one array"):
        permuted_tasks(pair, pair, 2, jax.random.key(0))
    with pytest.raises(ValueError, match=r"train\.inputs has shape \(\(5, 2, 3\), \(5,\)\), but must be images"):
        rotated_tasks(pair, pair, [90])
    with pytest.raises(ValueError, match=r"the same shape per example, but have \(\(2, 3\), \(\)\), \(2, 3\)"):
        dataset_tasks([(batch, pair, 2)])


def test_labels_of_another_shape():
    batch = make_batch(5)
    column = batch._replace(labels=batch.labels[:, None])
    for make_tasks in (
        lambda: split_tasks(batch, column, [[0], [1]], num_classes=2),
        lambda: dataset_tasks([(batch, column, 2)]),
    ):
        with pytest.raises(ValueError, match=r"test\.labels has shape \(5, 1\), but must be \[num_examples\]"):
            make_tasks()


@pytest.mark.parametrize("num_examples", [3, 8, 10])
def test_a_batch_on_a_mesh_is_padded_with_weight_0_to_equal_parts(num_examples):
    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    batch = problems.make_batch(num_examples)
    placed = place_batch(batch, sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(placed))
    assert len(placed.labels) == -(-num_examples // 4) * 4
    kept = jax.tree.map(lambda leaf: np.asarray(leaf)[:num_examples], placed)
    chex.assert_trees_all_equal(kept, jax.device_get(batch))
    assert not np.asarray(placed.weights)[num_examples:].any()
    with pytest.raises(ValueError, match="sharding must say how the examples' axis is sharded"):
        place_batch(batch, NamedSharding(sharding.mesh, PartitionSpec(None, "data")))
