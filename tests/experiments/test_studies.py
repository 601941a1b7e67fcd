"""The studies end to end on the bundled digits, small; the numbers behind their claims are read back."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import fisher_curvature, importance, sensitivity, solution_space, unlabelled
from experiments.harness.settings import parse_settings
from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal
from lifelong_jax.datasets import Dataset
from lifelong_jax.methods import cross_entropy
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
    for plain, equal, weighted in worse.values():
        assert weighted < equal < plain
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["model"], row["seed"]) for row in rows] == [(model, seed) for model in worse for seed in (0, 1)]
    for model, outcome in summary["models"].items():
        above = np.array([row["above"]["equal rigidity"] for row in rows if row["model"] == model])
        chosen = above.max(axis=-1).mean(axis=0).argmin()
        assert outcome["chosen"]["equal rigidity"] == chosen
        np.testing.assert_allclose(outcome["above"]["equal rigidity"]["A"]["values"], above[:, chosen, 0])
        assert 0 < outcome["overlap"]["mean"] < 1
    assert str(folder) in capsys.readouterr().out


def test_fisher_curvature(tmp_path):
    _, summary = run(fisher_curvature, tmp_path, "--hidden-sizes 5 --epochs 0 3 30 --seeds 0 --activations relu")

    measured = {
        field: [epoch["mean"] for epoch in epochs] for field, epochs in summary["measured"]["relu"]["training"].items()
    }
    errors = measured["true_error"]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2 < measured["empirical_error"][2]
    assert max(measured["true_diagonal_error"]) < 1e-5  # a ReLU network is linear in each parameter alone
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
