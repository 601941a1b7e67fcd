"""The sources' importances against formulas written out by hand, and the script end to end on small data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from PIL import Image

from experiments import protocols, published, published_importances, reproduce
from experiments.harness import sequences
from experiments.harness.runs import open_run
from experiments.harness.settings import RunSettings
from lifelong_jax import Batch, Recipe, Task, init_training, methods, permuted_tasks
from lifelong_jax.datasets import load_dataset
from lifelong_jax.objectives import CLASSIFICATION
from lifelong_jax.sweep import SweepAccuracies, learn_sweep
from tests.experiments.files import read_table

NUM_EXAMPLES, NUM_REAL = 13, 11
MASK = jnp.array([True, True, False])
KEY = jax.random.key(3)
CONSOLE = rich.console.Console(quiet=True)


def apply_fn(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@pytest.fixture(scope="module")
def state():
    keys = jax.random.split(jax.random.key(0))
    params = {"first": jax.random.normal(keys[0], (4, 5)), "second": jax.random.normal(keys[1], (5, 3))}
    return init_training(optax.sgd(0.1), params, jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(2))
    inputs = jax.random.normal(keys[0], (NUM_EXAMPLES, 4))
    labels = jax.random.randint(keys[1], (NUM_EXAMPLES,), 0, 2)
    weights = (jnp.arange(NUM_EXAMPLES) < NUM_REAL).astype(jnp.float32)
    return Batch(inputs, labels, weights, jnp.broadcast_to(MASK, (NUM_EXAMPLES, 3)))


def loss_at(label):
    def loss_fn(params, x):
        return -jax.nn.log_softmax(apply_fn(params, x)[:2])[label]  # the active outputs alone

    return loss_fn


def shuffled(batch_size):
    """The batches that a pass makes of the real examples, shuffled with `KEY`."""
    order = np.array([n for n in np.asarray(jax.random.permutation(KEY, NUM_EXAMPLES)) if n < NUM_REAL])
    return [order[start : start + batch_size] for start in range(0, NUM_REAL, batch_size)]


def mean_over(batches, of_batch):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(batches), *[of_batch(chosen) for chosen in batches])


def assert_close(ours, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ours, expected)


def test_fisher_at_prediction(state, batch):
    def squared(n):
        label = int(jnp.argmax(apply_fn(state.params, batch.inputs[n])[:2]))
        return jax.tree.map(jnp.square, jax.grad(loss_at(label))(state.params, batch.inputs[n]))

    expected = mean_over(range(NUM_REAL), squared)
    assert_close(published_importances.fisher_at_prediction(apply_fn, CLASSIFICATION, state, batch, KEY), expected)


def test_fisher_of_few_examples_is_exact_on_them(state, batch):
    exact = methods.ewc("exact").importance_fn(apply_fn, CLASSIFICATION, state, batch, KEY)
    assert_close(
        published_importances.fisher_of_500(apply_fn, CLASSIFICATION, state, batch, KEY), exact
    )  # of fewer than 500
    many = jax.tree.map(lambda x: jnp.tile(x, (100,) + (1,) * (x.ndim - 1)), batch)
    drawn = published_importances.fisher_of_500(apply_fn, CLASSIFICATION, state, many, KEY)
    assert_close(jax.tree.map(jnp.shape, drawn), jax.tree.map(jnp.shape, exact))
    ratio = sum(map(jnp.sum, jax.tree.leaves(drawn))) / sum(map(jnp.sum, jax.tree.leaves(exact)))
    assert 0.7 < ratio < 1.4
    assert ratio != 1


def test_squared_gradients_of_batches(state, batch, monkeypatch):
    def squared(chosen):
        def loss_fn(params):
            losses = [loss_at(int(batch.labels[n]))(params, batch.inputs[n]) for n in chosen]
            return sum(losses) / len(losses)

        return jax.tree.map(jnp.square, jax.grad(loss_fn)(state.params))

    mean_over_batches = published_importances.mean_over_batches
    monkeypatch.setattr(
        published_importances,
        "mean_over_batches",
        lambda *arguments, batch_size: mean_over_batches(*arguments, batch_size=4),
    )
    expected = mean_over(shuffled(4), squared)
    assert_close(published_importances.squared_batch_gradient(apply_fn, CLASSIFICATION, state, batch, KEY), expected)


@pytest.mark.parametrize("over_outputs", [published_importances.mean_of_active, published_importances.sum_of_all])
def test_mas_of_batches(state, batch, over_outputs):
    def absolute(chosen):
        def loss_fn(params):
            squares = [jnp.square(apply_fn(params, batch.inputs[n])[:2]) for n in chosen]
            reduce = jnp.mean if over_outputs is published_importances.mean_of_active else jnp.sum
            return sum(map(reduce, squares)) / len(squares)

        return jax.tree.map(jnp.abs, jax.grad(loss_fn)(state.params))

    ours = published_importances.mas_of_batches(4, over_outputs)(apply_fn, CLASSIFICATION, state, batch, KEY)
    assert_close(ours, mean_over(shuffled(4), absolute))


def test_scaled_mas(state, batch):
    leaves = jax.tree.leaves(published_importances.scaled_mas(apply_fn, CLASSIFICATION, state, batch, KEY))
    assert min(leaf.min() for leaf in leaves) == 0
    assert max(leaf.max() for leaf in leaves) == 1


def test_synaptic_intelligence_without_the_maximum(batch):
    method = published.ROWS[2].entries[2].method
    state = init_training(method.wrap_optimizer(optax.sgd(0.1)), jnp.array([1.0, 1.0]), KEY)
    state = state._replace(
        params=jnp.array([3.0, 1.5]), opt_state=state.opt_state._replace(path=jnp.array([-2.0, 7.0]))
    )
    importance = method.importance_fn(apply_fn, CLASSIFICATION, state, batch, KEY)
    np.testing.assert_allclose(importance, [-2.0 / (4 + 0.1), 7.0 / (0.25 + 0.1)], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_the_optimisers_state_is_kept():
    adam = optax.adam(0.1)
    params = jnp.ones(2)
    _, last = adam.update(params, adam.init(params), params)
    for method in (protocols.FINETUNE, published.ROWS[2].entries[2].method):
        optimizer = adam if method.wrap_optimizer is None else method.wrap_optimizer(adam)
        fresh, ended = optimizer.init(params), optimizer.init(params)
        if hasattr(ended, "inner_state"):
            ended = ended._replace(inner_state=last, path=jnp.ones(2))
            carried = method.carry(fresh, ended)
            assert (carried.path == 0).all()
            carried = carried.inner_state
        else:
            carried = method.carry(fresh, last)
        assert carried is last


@pytest.mark.usefixtures("standard_promotion")
def test_a_method_that_carries_something_over_does_so_beside_the_optimisers_state():
    (entry,) = (entry for entry in published.ROWS[11].entries if entry.name == "rwalk")
    optimizer, params = entry.method.wrap_optimizer(optax.adam(0.1)), jnp.ones(2)
    fresh = optimizer.init(params)
    ended = fresh._replace(score=jnp.full(2, 3.0), inner_state=optax.adam(0.1).update(params, fresh.inner_state)[1])
    carried = entry.method.carry(fresh, ended)
    assert carried.inner_state is ended.inner_state
    np.testing.assert_array_equal(carried.score, methods.rwalk().carry(fresh, ended).score)
    assert (carried.score > 0).all()


def test_initialisations_have_the_sources_scales():
    params = protocols.uniform_init((100,), KEY, jnp.zeros((10, 10, 1)))["params"]
    for layer, fan_in in (("Dense_0", 100), ("Dense_1", 100)):
        for leaf in params[layer].values():
            assert abs(leaf).max() <= 1 / np.sqrt(fan_in)
        np.testing.assert_allclose(params[layer]["kernel"].std(), 1 / np.sqrt(3 * fan_in), rtol=0.05)
    params = protocols.truncated_init((100,), KEY, jnp.zeros(100))["params"]["Dense_0"]
    assert abs(params["kernel"]).max() <= 0.2
    np.testing.assert_allclose(params["kernel"].std(), 0.088, rtol=0.02)  # of a normal cut off at two deviations
    assert (params["bias"] == np.float32(0.1)).all()

    params = protocols.glorot_init((100,), KEY, jnp.zeros(300))["params"]["Dense_0"]
    assert abs(params["kernel"]).max() <= np.sqrt(6 / 400)
    np.testing.assert_allclose(params["kernel"].std(), np.sqrt(2 / 400), rtol=0.02)
    assert not params["bias"].any()


def test_images_are_padded_and_normalised():
    images = jnp.ones((1, 28, 28, 1))
    assert protocols.pad(images).shape == (1, 32, 32, 1)
    assert protocols.pad(images).sum() == 28 * 28
    np.testing.assert_allclose(
        protocols.pad_and_normalize(images)[0, [0, 16], [0, 16], 0], [-0.1 / 0.2752, 0.9 / 0.2752]
    )


@pytest.mark.usefixtures("standard_promotion")
def test_joint_training_on_the_tasks_so_far_keeps_the_optimisers_state(monkeypatch):
    train = Batch(jax.random.normal(KEY, (6, 4)), jnp.arange(6) % 3, jnp.ones(6))
    tasks = permuted_tasks(train, train, 2, KEY)
    recipe = Recipe(lambda w, x: x @ w, lambda strength: optax.adam(0.1), num_epochs=9, batch_size=99)
    params, learned = jnp.zeros((4, 3)), []
    monkeypatch.setattr(reproduce, "evaluate", lambda apply_fn, params, tasks, scenario: learned.append(params) or 0.0)
    reproduce.learn_so_far(recipe, params, tasks, KEY, max_steps=2)

    def loss_fn(w, seen):
        labels = jnp.tile(train.labels, len(seen))
        logits = jnp.concatenate([train.inputs[:, task.permutation] for task in seen]) @ w
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    opt_state = optax.adam(0.1).init(params)
    for seen in (tasks[:1], tasks[:1], tasks, tasks):  # two steps on the first task, then two on both
        updates, opt_state = optax.adam(0.1).update(jax.grad(loss_fn)(params, seen), opt_state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(learned[0], params, rtol=1e-5)


def pretend(method, recipe, runs, **options):
    """Takes the place of `learn_sweep`: the best strength is 100."""
    assert recipe.scenario in ("task", "domain")
    accuracies = [0.9 - 0.1 * (run.strength != 100) + 0.01 * jax.random.uniform(run.key) for run in runs]
    num_tasks = len(runs[0].tasks)
    matrices = np.array(accuracies)[:, None, None] * np.ones((num_tasks, num_tasks))
    return SweepAccuracies(matrices, matrices[:, 0])


@pytest.mark.parametrize("learn", [pretend, pytest.param(learn_sweep, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("standard_promotion")
def test_rows_are_run_and_written_down(tmp_path, monkeypatch, capsys, learn):
    digits = load_dataset("digits")
    monkeypatch.setattr(reproduce, "load_or_exit", lambda name, data_dir: digits)
    monkeypatch.setattr(sequences, "learn_sweep", learn)
    small = {"transform": lambda images: images, "hidden_sizes": (8,), "num_epochs": 1, "max_steps": None}
    if learn is pretend:  # which looks at neither
        tasks = [Task(digits.train, digits.test)] * 3
        small |= {"make_tasks": lambda dataset, key: tasks, "init_params": lambda hidden_sizes, key, x: jnp.zeros(1)}
    of_two = published.ROWS[3]._replace(
        entries=(
            published.ROWS[3].entries[3]._replace(strengths=(1.0, 100.0), num_choosing_seeds=2),
            published.ROWS[3].entries[-1],
        ),
        num_seeds=3,
        **small,
    )
    unpublished = published.ROWS[5]._replace(entries=published.ROWS[5].entries[2:], batch_size=100, **small)
    monkeypatch.setattr(reproduce, "ROWS", {3: of_two, 5: unpublished})
    settings = {"output_dir": str(tmp_path / "results"), "docs": str(tmp_path / "docs"), "seeds": (0, 1)}
    reproduce.main(reproduce.Config(rows=(3,), **{**settings, "seeds": ()}))
    reproduce.main(reproduce.Config(rows=(5,), **settings))
    reproduce.main(reproduce.Config(rows=(5,), **{**settings, "docs": None, "seeds": (0,)}))  # no deviation of one
    results = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert list(results) == ["3", "5"]  # the second run left the first one's row
    empirical, none = results["3"]
    assert empirical["strength"] == 100.0 or learn is learn_sweep
    assert {strength: len(accuracies) for strength, accuracies in empirical["validation"].items()} == {"1": 2, "100": 2}
    assert none["validation"] == {}
    assert [len(result["accuracies"]) for result in results["3"]] == [3, 3]
    assert len(results["5"][0]["accuracies"]) == 2  # as many as were asked for
    assert all(20 < accuracy <= 100 for result in results["3"] for accuracy in result["accuracies"])
    text = read_table(tmp_path / "docs" / "results.md")
    assert "| empirical | 99.12 ± 0.12 | " in text
    assert "| MAS, scaled and summed | – | " in text
    assert "nan" not in text
    (alone,) = (tmp_path / "results" / "reproduce").glob("*/results.md")
    assert "nan" not in alone.read_text()
    assert "results_row_3.png" in text
    assert (tmp_path / "docs" / "results.png").exists()
    assert (tmp_path / "docs" / "results_row_3.png").exists()
    assert "Row 5" in capsys.readouterr().out


def test_the_table_says_how_far_apart_accuracies_are():
    results = [{"name": "MAS", "strength": 2.0, "accuracies": [99.0, 99.4]}]
    _, row = reproduce.table_of(published.ROWS[1], results)
    assert row[1:4] == ["99.22 ± 0.21", "99.20 ± 0.28", "2"]
    deviations, errors = -0.02 / np.sqrt((0.21**2 + 0.08) / 2), -0.02 / np.sqrt(0.21**2 / 10 + 0.08 / 2)
    assert row[4:6] == [f"{deviations:+.1f}", f"{errors:+.1f}"]
    results = [{"name": "EWC", "strength": 500.0, "accuracies": [94.0, 94.0, 94.3]}]  # ± is the standard error
    _, row = reproduce.table_of(published.ROWS[4], results)
    deviations = -0.21 / np.sqrt((20 * 0.11**2 + 3 * 0.1**2) / 2)  # of single runs: the source has 20, we 3
    errors = -0.21 / np.hypot(0.11, 0.1)
    assert row[2:6] == ["94.10 ± 0.10", "3", f"{deviations:+.1f}", f"{errors:+.1f}"]
    results = [{"name": "MAS", "strength": 2.0, "accuracies": [21.0, 22.0]}]
    _, row = reproduce.table_of(published.ROWS[6], results)
    assert (row[1], row[4], row[5]) == ("19 to 20.5", "outside", "–")
    results = [{"name": "none", "strength": 0.0, "accuracies": [None, 50.0]}]
    assert reproduce.table_of(published.ROWS[5], results)[1][2] == "diverged"


def test_a_row_of_many_tasks_has_curves(tmp_path):
    matrices = np.tril(np.ones((2, 12, 12))) * np.array([0.5, 0.7])[:, None, None]
    matrices[:, -1] = 0.3
    assert reproduce.after_each_task(matrices) == [60.0] * 11 + [30.0]
    assert reproduce.after_each_task(matrices[:, :5, :5]) == []
    assert reproduce.after_each_task(np.where(matrices == 0.3, np.nan, matrices)) == []
    results = [{"name": "EWC", "strength": 1.0, "accuracies": [30.0, 30.0], "validation": {}}]
    reproduce.write_docs(tmp_path, 9, results)
    assert not list(tmp_path.glob("*_tasks.png"))
    reproduce.write_docs(tmp_path, 9, [results[0] | {"after_each_task": [60.0] * 11 + [30.0]}])
    assert "(results_row_9_tasks.png)" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results_row_9_tasks.png").exists()
    for row in (10, 1):
        reproduce.write_docs(tmp_path, row, [])
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["1", "9", "10"]
    assert "the source made one run." in (tmp_path / "results.md").read_text()


def test_a_single_published_run_has_no_deviation():
    results = [{"name": "c = 0.1", "strength": 0.2, "accuracies": [96.5]}]
    _, row = reproduce.table_of(published.ROWS[7], results)
    assert row[1:6] == ["96.94", "96.50", "1", "–", "–"]


@pytest.mark.usefixtures("standard_promotion")
def test_the_penalty_has_the_mean_of_the_importances():
    method = published.ROWS[8].entries[0].method
    optimizer = method.wrap_optimizer(protocols.with_penalty(optax.sgd)(1.0, 2.0, None))
    params, zeros = jnp.array([3.0]), jnp.zeros(1)
    fresh = optimizer.init(params)
    state = method.carry(fresh, method.carry(fresh, fresh))  # two tasks have been learned
    updates, _ = optimizer.update(zeros, state, params, anchor=zeros, importance=jnp.array([4.0 + 8.0]))
    np.testing.assert_allclose(updates, -2.0 * 6.0 * params)
    updates, _ = optimizer.update(zeros, fresh, params, anchor=zeros, importance=zeros)  # the first task has none
    assert updates == 0


def test_strengths_are_chosen_in_fewer_steps(monkeypatch, tmp_path):
    digits, steps = load_dataset("digits"), []

    def learn(method, recipe, runs, *, max_steps, **options):
        steps.append(max_steps)
        assert (recipe.train_fn is None) == (runs[0].model_state is None)
        return SweepAccuracies(np.ones((1, 1, 1)), np.ones((1, 1)))

    monkeypatch.setattr(sequences, "learn_sweep", learn)
    protocol = published.ROWS[11]._replace(
        entries=published.ROWS[11].entries[1:2],
        hidden_sizes=(3,),
        make_tasks=lambda dataset, key: [Task(dataset.train, dataset.test)],
        num_seeds=1,
    )
    for dropout in (0.0, 0.5):
        with open_run(RunSettings(output_dir=str(tmp_path)), "reproduce", CONSOLE, []) as run:
            reproduce.run_row(11, protocol._replace(dropout=dropout), digits, (), run, CONSOLE)
    num_strengths = len(protocol.entries[0].strengths)
    assert steps == 2 * ([1000] * num_strengths + [5000])


@pytest.mark.usefixtures("standard_promotion")
def test_a_schedule_ends_with_the_task_and_the_proximal_step_follows_it():
    recipe = reproduce.make_recipe(published.ROWS[9], 0.03, 1, 1280)  # 5 epochs of 10 steps
    optimizer, params = recipe.optimizer_fn(1e30), jnp.ones(2)
    state = optimizer.init(params)
    known = {"anchor": jnp.zeros(2), "importance": jnp.ones(2)}
    for step in range(50):
        updates, state = optimizer.update(jnp.zeros(2), state, params, **known)
        assert (updates == -1).all(), step  # pulled all the way
    updates, _ = optimizer.update(jnp.zeros(2), state, params, **known)
    assert (updates == 0).all()  # the step size is 0 now


def test_unknown_rows_are_invalid():
    with pytest.raises(ValueError, match="rows must be among 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, not"):
        reproduce.Config(rows=(1, 99))


def test_a_picture_has_no_empty_half(tmp_path):
    results = [{"name": "MAS", "accuracies": [99.0, 99.4]}, {"name": "Adam alone", "accuracies": [90.0, 93.4]}]
    for rows in ({"1": results}, {"1": results, "2": []}):
        reproduce.plot_rows(rows, tmp_path / "results.png")
        with Image.open(tmp_path / "results.png") as image:
            pixels = np.asarray(image.convert("L"))
        middle = pixels[pixels.shape[0] // 4 : -pixels.shape[0] // 4]
        columns = np.flatnonzero((middle < 128).any(axis=0))
        assert columns.max() > 0.95 * pixels.shape[1]
