"""The studies end to end on the bundled digits, small; the numbers behind their claims are read back."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import fisher_curvature, importance, sensitivity, solution_space, unlabelled
from experiments.harness.settings import parse_settings
from lifelong_jax import Batch, empirical_fisher_diagonal, fisher_diagonal, forms
from lifelong_jax.datasets import Dataset
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import init_network

pytestmark = pytest.mark.usefixtures("standard_promotion")


PART = {solution_space: "learn", fisher_curvature: "measure_seed"}
"""The function that computes a part of a study, if it is not `measure`."""


def start(study, output_dir, arguments):
    """Runs a study."""
    name = study.__name__.split(".")[-1]
    study.main(parse_settings(study.Config, name, [*arguments.split(), "--output-dir", str(output_dir)]))


def results(folder):
    return [(folder / name).read_text() for name in ("summary.json", "table.md", "metrics.jsonl")]


def run(study, output_dir, arguments):
    """Runs a study, and resumes it with nothing left to compute. Returns its folder and its summary."""
    start(study, output_dir, arguments)
    name = study.__name__.split(".")[-1]
    (folder,) = (output_dir / name).iterdir()
    with Image.open(folder / f"{name}.png") as image:
        assert image.width == 1290
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10
    assert (folder / "table.md").read_text().startswith("| ")
    assert json.loads((folder / "config.json").read_text())["output_dir"] == str(output_dir)
    assert len(json.loads((folder / "record.json").read_text())["data"]) == 1
    before = results(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, PART.get(study, "measure"), lambda *arguments: pytest.fail("computed again"))
        patch.setattr(study, "draw", lambda *arguments: None)
        start(study, output_dir, "--resume")
    assert results(folder) == before
    return folder, json.loads((folder / "summary.json").read_text())


def test_solution_space(tmp_path, capsys):
    small = "--hidden-sizes 16 --seeds 0 1 --grid-size 9 --stiffness 0.1 0.3 1 10"
    folder, summary = run(solution_space, tmp_path, small)
    worse = {
        model: [outcome["above"][name]["worse"]["mean"] for name in solution_space.PENALTIES]
        for model, outcome in summary["models"].items()
    }
    for plain, equal, *weighted in worse.values():
        assert max(weighted) < equal < plain
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["model"], row["seed"]) for row in rows] == [(model, seed) for model in worse for seed in (0, 1)]
    for model, outcome in summary["models"].items():
        above = np.array([row["above"]["equal rigidity"] for row in rows if row["model"] == model])
        chosen = above.max(axis=-1).mean(axis=0).argmin()
        assert outcome["chosen"]["equal rigidity"] == chosen
        np.testing.assert_allclose(outcome["above"]["equal rigidity"]["A"]["values"], above[:, chosen, 0])
        for of_plane in outcome["overlap"].values():
            assert 0 < of_plane["Fisher diagonal"]["mean"] < 1
    of_plane = summary["models"]["two parameters"]["overlap"]["Kronecker factors"]
    assert of_plane["Kronecker factors"]["mean"] > 0.8 > of_plane["Fisher diagonal"]["mean"]  # it has the slant
    assert str(folder) in capsys.readouterr().out


def test_solution_space_has_the_whole_fisher_of_two_parameters():
    case = solution_space.two_parameters(1.0)
    task = case.make_tasks(jax.random.key(0))[0]
    inputs = np.asarray(task.inputs, np.float64)
    fisher = inputs.T @ inputs / len(inputs)
    targets = np.where(task.labels == 1, 1, -1)
    solution = np.linalg.lstsq(inputs, targets)[0].astype(np.float32)
    importances = solution_space.importances_of(case, solution, task)
    assert list(importances) == list(solution_space.PENALTIES)
    traces = [solution_space.trace(importance) for importance in importances.values()]
    np.testing.assert_allclose(traces, [0, *[np.trace(fisher)] * 3], rtol=1e-5)
    np.testing.assert_allclose(importances["Fisher diagonal"], np.diag(fisher), rtol=1e-4)

    lowest = float(solution_space.mean_loss(case, solution, task))
    result = solution_space.Learned((task,), solution, importances, {}, np.array([lowest, 0.0]), {})
    plane = solution_space.plane_of(case, result, {}, "")
    np.testing.assert_allclose(solution_space.penalty_on_plane(plane, importances["Kronecker factors"]), fisher, 1e-4)
    overlaps = [
        solution_space.overlap(solution_space.Config(), case, plane, result, name) for name in solution_space.ELLIPSES
    ]
    assert overlaps[1] > 0.99 > 0.9 > overlaps[0]  # at the minimum, the penalty with the whole Fisher is the loss


def test_solution_space_compares_penalties_of_one_total_stiffness(monkeypatch):
    totals = []

    def train(config, case, params, consolidation, strength, task, key):
        diagonal = jax.tree.map(forms.diagonal, consolidation.importance, is_leaf=forms.is_form)
        totals.append(strength * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(diagonal)))
        return jax.tree.map(lambda leaf: leaf[None], params)

    monkeypatch.setattr(solution_space, "train", train)
    case = solution_space.network((4,), 0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    solution_space.learn(solution_space.Config(stiffness=(1.0, 3.0)), case, case.make_tasks(keys[0]), keys, True)
    unit = totals[2]
    np.testing.assert_allclose(totals, [0, 0, *[unit, 3 * unit] * 3], rtol=1e-5)


def test_fisher_curvature(tmp_path):
    _, summary = run(fisher_curvature, tmp_path, "--hidden-sizes 5 --epochs 0 3 30 --seeds 0 --activations relu")

    measured = {
        field: [epoch["mean"] for epoch in epochs] for field, epochs in summary["measured"]["relu"]["training"].items()
    }
    errors = measured["true_error"]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2 < measured["empirical_error"][2]
    assert max(measured["true_diagonal_error"]) < 1e-5  # a ReLU network is linear in each parameter alone
    diagonal, kronecker, leaves, layers = (np.array(measured[f"error_of_{name}"]) for name in fisher_curvature.KEPT)
    assert (diagonal < 1).all() and (kronecker < diagonal).all() and (leaves <= kronecker).all()
    assert (layers < leaves).all() and (layers > 0).all()
    assert (np.array(measured["along_step_diagonal"]) < measured["along_step_kronecker"]).all()
    assert summary["examples"]["within_bound"] == 1


def test_fisher_curvature_by_the_library():
    model = fisher_curvature.MLP((5,), 10, "tanh")
    batch = fisher_curvature.load_small_digits()["training"]
    params = init_network(fisher_curvature.MLP((5,), 10), jax.random.key(0), batch.inputs[0])
    found = fisher_curvature.matrices(model, params, batch)
    expected = {
        "true": fisher_diagonal(model.apply, params, batch.inputs),
        "empirical": empirical_fisher_diagonal(cross_entropy(model.apply), params, batch),
    }
    for name, tree in expected.items():
        diagonal = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        np.testing.assert_allclose(np.diag(found[name]), diagonal, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(found[f"{name}_trace"].mean(), diagonal.sum(), rtol=1e-4)
    assert fisher_curvature.relative_error(np.diag(found["true"]), np.diag(found["hessian"])) > 0.01  # not for tanh


def test_what_is_kept_of_the_fisher():
    model = fisher_curvature.MLP((3,), 4, "tanh")
    inputs = np.random.default_rng(0).uniform(size=(5, 2, 2)).astype(np.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.1, init_network(model, jax.random.key(0), inputs[0]))
    batch = Batch(inputs, np.array([0, 1, 2, 3, 0]), np.ones(5, np.float32))
    layers = [jax.tree.map(np.asarray, params["params"][name]) for name in ("Dense_0", "Dense_1")]
    (row_0, row_1), (column_0, column_1) = ([np.zeros((n, n)) for n in sizes] for sizes in ((4, 3), (3, 4)))
    true = np.zeros((31, 31))
    for x in inputs.reshape(5, 4):
        hidden = np.tanh(x @ layers[0]["kernel"] + layers[0]["bias"])
        row_0 += np.outer(x, x) / 5
        row_1 += np.outer(hidden, hidden) / 5
        exponentials = np.exp(hidden @ layers[1]["kernel"] + layers[1]["bias"])
        probabilities = exponentials / exponentials.sum()
        for label, probability in enumerate(probabilities):
            at_1 = np.eye(4)[label] - probabilities
            at_0 = layers[1]["kernel"] @ at_1 * (1 - hidden**2)
            column_0 += probability * np.outer(at_0, at_0) / 5
            column_1 += probability * np.outer(at_1, at_1) / 5
            gradient = np.concatenate([at_0, np.outer(x, at_0).ravel(), at_1, np.outer(hidden, at_1).ravel()])
            true += probability * np.outer(gradient, gradient) / 5
    found = fisher_curvature.matrices(model, params, batch)
    np.testing.assert_allclose(found["true"], true, rtol=1e-4, atol=1e-7)
    expected = np.zeros_like(true)
    ends = np.cumsum([0, 3, 12, 4, 12])
    factors = (column_0, np.kron(row_0, column_0), column_1, np.kron(row_1, column_1))
    for (start, end), block in zip(itertools.pairwise(ends), factors, strict=True):
        expected[start:end, start:end] = block
    np.testing.assert_allclose(found["kronecker"], expected, rtol=1e-4, atol=1e-7)

    kept = fisher_curvature.kept_of(true, expected, params)
    assert list(kept) == list(fisher_curvature.KEPT)
    np.testing.assert_array_equal(kept["diagonal"], np.diag(np.diag(true)))
    for name, bounds in (("leaves", ends), ("layers", ends[::2])):
        blocks = np.zeros_like(true)
        for start, end in itertools.pairwise(bounds):
            blocks[start:end, start:end] = true[start:end, start:end]
        np.testing.assert_array_equal(kept[name], blocks)


def test_sensitivity(tmp_path):
    small = "--hidden-sizes 16 --num-epochs 20 --num-groups 5 --num-draws 4 --seeds 0 1"
    _, summary = run(sensitivity, tmp_path, small)
    power = {name: numbers["slope"]["mean"] for name, numbers in summary["linear"].items()}
    assert abs(power["tanh"] - 2) < 0.1
    assert 1.3 < power["relu"] < 1.8  # the kinks: an error of ‖δ‖ on a share ‖δ‖ of the examples, root mean square
    for name in ("MAS", "EWC"):
        ranked = summary["ranked"][name]
        assert ranked["rank_correlation"]["mean"] > 0.9
        assert ranked["output_change"][-1]["mean"] > 5 * ranked["output_change"][0]["mean"]
        assert ranked["accuracy_lost"][-1]["mean"] > ranked["accuracy_lost"][0]["mean"] + 0.02
    change = [group["mean"] for group in summary["ranked"]["random"]["output_change"]]
    assert max(change) < 2 * min(change)


def test_sensitivity_perturbs_the_relu_network_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(sensitivity, "ACTIVATIONS", ("relu", "tanh"))
    monkeypatch.setattr(sensitivity, "train", lambda config, activation, batch, key: activation)
    monkeypatch.setattr(sensitivity, "linearity", lambda config, activation, params, batch, key: activation == params)
    monkeypatch.setattr(sensitivity, "importances", lambda config, params, batch, key: {"MAS": params})
    monkeypatch.setattr(sensitivity, "perturb_by_rank", lambda config, params, omega, *_: params == omega == "relu")
    measured = sensitivity.measure(sensitivity.Config(), Dataset(None, None, 10), jax.random.key(0))
    assert measured == {"relu": 1, "tanh": 1, "MAS": 1}


def test_importance(tmp_path):
    small = "--hidden-sizes 16 --num-epochs 8 --squares 0 4 8 --seeds 0 1"
    _, summary = run(importance, tmp_path, small)
    same, some, all_permuted = ([layer["mean"] for layer in square] for square in summary["overlap"])
    np.testing.assert_allclose(same, 1, rtol=1e-5)
    assert all_permuted[0] < some[0] < 1
    assert all_permuted[0] < all_permuted[1]
    relation = {name: value["mean"] for name, value in summary["relation"].items()}
    assert relation["MAS with its square root"] > relation["MAS with the Fisher"] > 0
    assert relation["Fisher by pixel with mean square ink"] > 0.8


def test_odd_squares_are_invalid():
    with pytest.raises(ValueError, match="squares must be even, ascending and from 0 to 8"):
        importance.Config(squares=(3,))


def test_unlabelled(tmp_path):
    small = "--hidden-sizes 16 --num-epochs 10 --num-unlabelled 1 100 --seeds 0 1"
    _, summary = run(unlabelled, tmp_path, small)
    kept = {name: summary[name]["mean"] for name in ("before", "finetuned", "training", "held_out")}
    assert kept["finetuned"] < kept["held_out"] - 0.05
    assert abs(kept["held_out"] - kept["training"]) < 0.03
    assert summary["correlation"]["mean"] > 0.98 > summary["few_correlation"][0]["mean"]
    assert summary["few"][1]["mean"] > summary["few"][0]["mean"]
    assert np.shape(summary["by_class"]) == (10, 10)


@pytest.mark.parametrize("counts", [(10, 3), (1, 719)])
def test_invalid_numbers_of_unlabelled_examples(counts):
    with pytest.raises(ValueError, match="num_unlabelled must be ascending and at most 718"):
        unlabelled.Config(num_unlabelled=counts)


def test_a_study_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    small = "--hidden-sizes 16 --num-epochs 1 --num-unlabelled 1 --seeds 0 1 2"
    start(unlabelled, tmp_path, small)
    measure, computed = unlabelled.measure, []

    def interrupt(config, dataset, key):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(key)
        return measure(config, dataset, key)

    monkeypatch.setattr(unlabelled, "measure", interrupt)
    with pytest.raises(SystemExit):
        start(unlabelled, tmp_path, small)
    first, second = sorted((tmp_path / "unlabelled").iterdir())
    computed.append(None)  # and this time it is not interrupted
    start(unlabelled, tmp_path, "--resume")
    assert len(computed) == 4
    assert results(second) == results(first)
    rows = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    (second / "metrics.jsonl").write_text("".join(rows[:-1]) + rows[-1][:9])  # killed between the part and its row
    start(unlabelled, tmp_path, "--resume")
    assert len(computed) == 4
    assert results(second) == results(first)


def test_own_class_advantage():
    assert unlabelled.own_class_advantage(np.eye(3)) == 1
    assert unlabelled.own_class_advantage(np.ones((3, 3))) == 0
