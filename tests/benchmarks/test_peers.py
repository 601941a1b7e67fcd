"""The comparison with other libraries, without them: one of our ways in a process of its own; table and chart."""

import numpy as np

from benchmarks import peers


def test_our_own_way_learns_from_the_arrays(tmp_path):
    arrays = peers.make_arrays("random", 240, validation=False)
    assert arrays["train_inputs"].shape == (240, 784)
    assert len({tuple(order) for order in arrays["permutations"].tolist()}) == 5
    held_out = peers.make_arrays("random", 240, validation=True)
    assert len(held_out["train_labels"]) + len(held_out["test_labels"]) == 240
    np.savez(tmp_path / "arrays.npz", **arrays)
    measured = peers.run_in_process("empirical", tmp_path / "arrays.npz", 1.0, share=0.1)
    assert 0 <= measured["accuracy"] <= 1
    assert all(measured[part] > 0 for part in peers.PARTS)
    assert measured["total"] == sum(measured[part] for part in peers.PARTS)
    assert 50 < measured["memory"] < 20_000


def test_the_table_and_the_chart(tmp_path, capsys, monkeypatch):
    def measure(way, arrays, strength, share):
        seconds = dict.fromkeys(peers.PARTS, 1.0 if way == "exact" else 3.0)
        return {**seconds, "total": sum(seconds.values()), "accuracy": 0.9512, "memory": 512.0}

    monkeypatch.setattr(peers, "run_in_process", measure)
    given = ["--data", "random", "--examples", "60", "--turns", "2", "--ways", "exact", "torch-func"]
    peers.main([*given, "--chart", str(tmp_path / "peers.png")])
    _, _, ours, theirs = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line)
    assert [cell.strip() for cell in ours] == [
        "lifelong_jax, `ewc()`",
        "exact Fisher",
        *["1.0 (1.0 to 1.0)"] * 4,
        "4.0 (4.0 to 4.0)",
        "1.00 (1.00 to 1.00)",
        "512 (512 to 512)",
        "95.1",
    ]
    assert theirs[1].strip() == "Fisher at the true labels, of 10%"
    assert theirs[7].strip() == "3.00 (3.00 to 3.00)"
    assert (tmp_path / "peers.png").exists()
