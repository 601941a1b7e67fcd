"""Accuracies: exact, by weight, in parts, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Batch, Task, evaluate, evaluation


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, int])
def test_accuracies_are_exact_whatever_the_dtype_of_the_weights(dtype):
    num_examples, num_wrong = 70_000, 7
    labels = (jnp.arange(num_examples) < num_wrong).astype(int)
    test = Batch(jnp.ones((num_examples, 1)), labels, jnp.ones(num_examples, dtype))
    (accuracy,) = evaluate(lambda params, x: x * jnp.array([1.0, 0.0]), jnp.zeros(()), [Task(test, test)])
    np.testing.assert_allclose(accuracy, 1 - num_wrong / num_examples, rtol=1e-6)


@pytest.mark.parametrize("outputs", [lambda x: x[None], lambda x: x.sum(), lambda x: (x, x)])
def test_evaluate_refuses_what_are_not_one_examples_logits(outputs):
    test = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), jnp.ones(4))
    with pytest.raises(ValueError, match=r"must return \[num_classes\]"):
        evaluate(lambda params, x: outputs(params * x), jnp.array(1.0), [Task(test, test)])


def test_evaluate_refuses_a_test_set_without_weight():
    test = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"tasks\[1\]\.test\.weights must be finite, not negative and not all 0"):
        evaluate(
            lambda params, x: x,
            jnp.array(1.0),
            [Task(test._replace(weights=jnp.ones(4)), test._replace(weights=jnp.ones(4))), Task(test, test)],
        )


def test_evaluate_counts_by_weight():
    inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    test = Batch(inputs, jnp.array([0, 0, 0]), jnp.array([1.0, 1.0, 0.0]))
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, test)]) == [0.5]
    # By the permutation the features change places.
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, test, jnp.array([1, 0]))]) == [0.5]
    only_first = test._replace(weights=jnp.array([1.0, 0.0, 0.0]))
    swapped = Task(test, only_first, jnp.array([1, 0]))
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, only_first), swapped]) == [1.0, 0.0]


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 9])  # of 9 examples: parts of 1, 2, 3, 5, 9
def test_large_test_sets_are_evaluated_in_parts(monkeypatch, at_once):
    rng = np.random.default_rng(0)
    inputs, weights = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), jnp.array([1.0, 0, 2, 3, 1, 1, 4, 2, 0])
    labels = jnp.argmax(inputs[:, :3], axis=1).at[1:4].set(0)
    task = Task(*[Batch(inputs, labels, weights)] * 2, jnp.array([3, 0, 1, 2]))
    whole = evaluate(lambda params, x: params * x[1:], jnp.array(1.0), [task])  # of another function than `in_parts`
    monkeypatch.setattr(evaluation, "_MAX_EXAMPLES", at_once)
    in_parts = evaluate(lambda params, x: params * x[1:], jnp.array(1.0), [task])
    correct = np.argmax(inputs[:, :3], axis=1) == np.asarray(labels)
    assert in_parts == whole == [pytest.approx(np.average(correct, weights=weights))]
    assert 0 < whole[0] < 1


def test_all_right_is_1_in_bfloat16_too():
    inputs = jnp.ones((1035, 2))  # two parts, of 518
    test = Batch(inputs, jnp.zeros(1035, int), jnp.ones(1035, jnp.bfloat16))
    assert evaluate(lambda params, x: params * x, jnp.array([1.0, 0.0]), [Task(test, test)]) == [1.0]


def test_an_empty_test_set_is_refused():
    empty = Batch(jnp.ones((0, 2)), jnp.zeros(0, int), jnp.ones(0))
    with pytest.raises(ValueError, match="test is empty"):
        evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(empty, empty)])


def test_inactive_outputs_do_not_count_whatever_they_are():
    outputs = jnp.array([[jnp.nan, 2.0, 1.0], [0.0, -jnp.inf, -3.0], [jnp.inf, 1.0, 2.0], [0.0, jnp.nan, 1.0]])
    test = Batch(outputs, jnp.array([1, 2, 2, 2]), jnp.ones(4))
    task = Task(test, test, class_mask=jnp.array([False, True, True]))
    assert evaluate(lambda params, x: x, jnp.array(0.0), [task], "task") == [0.75]  # the last has an active NaN


@pytest.mark.usefixtures("optimized")
def test_large_activations_are_evaluated_a_few_at_a_time():
    def network(params, x):
        return (jnp.tanh(jnp.outer(x, x) * params) @ x)[:2]

    test = Batch(jax.ShapeDtypeStruct((1024, 1000), float), *[jax.ShapeDtypeStruct((1024,), t) for t in (int, float)])
    score = jax.jit(functools.partial(evaluation.score, network, permutation=None, class_mask=None))
    compiled = score.lower(jax.ShapeDtypeStruct((), float), test).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30  # all at once would take 4 times as much
