"""Examples and parameters on a mesh: shared out, padded where they do not divide evenly, and learned all the same."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.harness.meshes import check_mesh, make_mesh, place_tasks
from experiments.harness.runs import Run
from experiments.harness.sequences import ResumableSequence, learn_resumably
from lifelong_jax import methods
from lifelong_jax._numerics import pad
from tests.problems import RECIPE, make_batch, make_params, make_tasks


@pytest.mark.parametrize("mesh", ["data=", "data=0", "data=-1", "data=2,model=2", "8", "data=1.5", " data=2"])
def test_a_mesh_is_an_axis_and_a_number(mesh):
    with pytest.raises(ValueError, match="mesh must be data= and the number of devices, such as data=8, not "):
        check_mesh(mesh)


@pytest.mark.parametrize("num_examples", [1, 7, 8])
def test_examples_that_do_not_divide_evenly_are_padded_with_weight_0(num_examples):
    mesh, batch = make_mesh("data=4"), make_batch(num_examples, num_classes=1)
    batch = batch._replace(weights=None if num_examples == 8 else batch.weights)
    small = make_batch(1, num_classes=1)
    task = make_tasks(1)[0]._replace(train=batch, test=small, validation=batch)
    placed = place_tasks(mesh, [task, task._replace(permutation=None)])
    train = placed[0].train
    assert len(train.labels) == -(-num_examples // 4) * 4
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(train)} == {P("data")}
    assert (train.weights is None) == (num_examples == 8)
    if train.weights is not None:
        np.testing.assert_array_equal(train.weights, np.arange(len(train.labels)) < num_examples)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[:num_examples], train), batch)
    assert placed[0].validation is train and placed[1].train is train  # each is placed once
    np.testing.assert_array_equal(placed[0].test.weights, [1, 0, 0, 0])


def pad_to_four(task):
    return task._replace(train=pad(task.train, 20), test=pad(task.test, 8))


@pytest.mark.parametrize("name", ["ewc", "joint"])
def test_a_mesh_changes_no_number_but_by_rounding(tmp_path, name):
    tasks = make_tasks(2, num_train=18, num_test=7)
    padded = [pad_to_four(task) for task in tasks]
    learned = {}
    for mesh, of_mesh in ((None, padded), ("data=4", tasks)):
        run = Run(tmp_path / str(mesh))
        run.folder.mkdir()
        sequence = ResumableSequence(run, method=name, seed=0, keep_tasks=True)
        options = (make_params(), of_mesh, jax.random.key(0), sequence, sequence.log_epoch)
        method = None if name == "joint" else methods.ewc()
        learned[mesh] = learn_resumably(method, RECIPE._replace(batch_size=8), 1.0, *options, mesh=make_mesh(mesh))
    assert learned["data=4"].params["w1"].devices() == set(jax.devices())
    chex.assert_trees_all_close(learned[None].params, jax.device_get(learned["data=4"].params), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned[None].accuracy_matrix, learned["data=4"].accuracy_matrix, atol=1e-6)
    assert (tmp_path / "data=4" / "sequences").exists() == (name == "ewc")
