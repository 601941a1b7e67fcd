"""Streams against the same data in memory; what they hold in memory; what goes wrong on the way."""

import copy
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from lifelong_jax import (
    Batch,
    Consolidation,
    add_quadratic_penalty,
    init_consolidation,
    init_training,
    learn_task,
    methods,
    streaming,
)
from lifelong_jax.datasets import load_dataset, make_batch, open_dataset
from lifelong_jax.datasets.sources import ArraySource, ScaledSource, Subset
from lifelong_jax.losses import cross_entropy
from lifelong_jax.objectives import CLASSIFICATION
from lifelong_jax.streaming import learn_stream, mean_over_stream, stream_batches

NUM_EXAMPLES = 11
PIXELS = np.random.default_rng(0).integers(256, size=(NUM_EXAMPLES, 2, 2, 1), dtype=np.uint8)
LABELS = np.arange(NUM_EXAMPLES) % 3
SOURCE = ScaledSource(ArraySource(PIXELS, LABELS))


def apply_fn(params, x):
    return x.ravel() @ params


LOSS_FN = cross_entropy(apply_fn)
OPTIMIZER = optax.chain(add_quadratic_penalty(0.3), optax.sgd(0.2, momentum=0.9))
VALUES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
PARAMS = jnp.asarray(VALUES)
CONSOLIDATION = Consolidation(jnp.asarray(VALUES + 1), jnp.asarray(np.full_like(VALUES, 0.5)))
DIVERGING = optax.sgd(jnp.inf)


def start():
    return init_training(OPTIMIZER, PARAMS, jax.random.key(3))


def assert_close(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, expected)


def test_batches_have_one_shape_and_each_example_once():
    batches = list(stream_batches(SOURCE, 4))
    assert [batch.weights.tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    for batch in batches:
        assert (batch.inputs.shape, batch.inputs.dtype) == ((4, 2, 2, 1), jnp.float32)
        assert (batch.labels.shape, batch.labels.dtype) == ((4,), jnp.int32)
    inputs = np.concatenate([batch.inputs for batch in batches])[:NUM_EXAMPLES]
    np.testing.assert_allclose(inputs, PIXELS / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches])[:NUM_EXAMPLES], LABELS)


def test_the_key_says_the_order():
    numbered = ArraySource(PIXELS, np.arange(NUM_EXAMPLES))
    orders = [next(stream_batches(numbered, NUM_EXAMPLES, jax.random.key(seed))).labels.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(NUM_EXAMPLES))


@pytest.mark.parametrize(("num_examples", "batch_size"), [(11, 4), (1, 99)])
def test_training_on_a_stream_is_training_in_memory(num_examples, batch_size):
    source = Subset(SOURCE, range(num_examples))
    examples = make_batch(PIXELS[:num_examples], LABELS[:num_examples], 3)
    expected, expected_info = learn_task(
        LOSS_FN, OPTIMIZER, start(), CONSOLIDATION, examples, num_epochs=2, batch_size=batch_size
    )
    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, batch_size=batch_size)
    state, info = learn(start(), CONSOLIDATION, source, num_epochs=2)
    assert_close((state.params, state.opt_state, info), (expected.params, expected.opt_state, expected_info))
    assert state.key == expected.key
    one = start()
    halfway, _ = learn(one, CONSOLIDATION, source, num_epochs=1)
    again, _ = learn(halfway, CONSOLIDATION, source, num_epochs=1)
    assert_close(again.params, expected.params)
    assert_close(one.params, PARAMS)  # the caller's state was not freed


class WeightedSource:
    """The examples of another source, with weights."""

    def __init__(self, source, weights):
        self.source, self.weights = source, np.float32(weights)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]._replace(weights=self.weights[index])


def test_examples_of_weight_0_take_no_steps_as_in_memory():
    weights = np.float32([0, 0, 1, 0, 2, 0, 0, 1, 1, 0, 3])
    examples = make_batch(PIXELS, LABELS, 3)._replace(weights=weights)
    expected, info = learn_task(
        LOSS_FN, OPTIMIZER, start(), CONSOLIDATION, examples, num_epochs=2, batch_size=2, weights=weights
    )
    source = WeightedSource(SOURCE, weights)
    found = learn_stream(LOSS_FN, OPTIMIZER, start(), CONSOLIDATION, source, num_epochs=2, batch_size=2)
    assert_close((found[0].params, found[0].opt_state, found[1]), (expected.params, expected.opt_state, info))
    nothing = WeightedSource(SOURCE, 0 * weights)
    with pytest.raises(ValueError, match="no example of a weight above 0"):
        learn_stream(LOSS_FN, OPTIMIZER, start(), CONSOLIDATION, nothing, num_epochs=1, batch_size=2)
    with pytest.raises(ValueError, match="no example of a weight above 0"):
        mean_over_stream(lambda state, batch, key: jnp.mean(batch.inputs), None, nothing, batch_size=2)


def test_tasks_share_a_compilation_whatever_their_size():
    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, start(), num_epochs=1, batch_size=4)
    learn(CONSOLIDATION, SOURCE)
    before = streaming._learn_batch._cache_size()
    learn(jax.tree.map(lambda leaf: 2 * leaf, CONSOLIDATION), Subset(SOURCE, range(9)))
    assert streaming._learn_batch._cache_size() == before


def test_means_over_a_stream_are_those_in_memory():
    def measure(state, batch, key):
        correct = jnp.argmax(jax.vmap(apply_fn, (None, 0))(state.params, batch.inputs), axis=-1) == batch.labels
        accuracy = jnp.sum(jnp.where(correct, batch.weights, 0)) / jnp.sum(batch.weights)
        return (
            methods.ewc().importance_fn(apply_fn, CLASSIFICATION, state, batch, key),
            accuracy,
            jax.random.uniform(key),
        )

    key = jax.random.key(5)
    importance, accuracy, random = mean_over_stream(measure, start(), SOURCE, batch_size=4, key=key)
    expected = measure(start(), make_batch(PIXELS, LABELS, 3), key)
    assert_close((importance, accuracy), expected[:2])
    by_batch = [jax.random.uniform(jax.random.fold_in(key, number)) for number in range(3)]  # a key for each batch
    assert_close(random, (4 * by_batch[0] + 4 * by_batch[1] + 3 * by_batch[2]) / 11)


class Masked:
    """Examples with a class mask each, as a task of several heads has them."""

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        return SOURCE[index]._replace(class_mask=np.arange(3) <= LABELS[index])


def test_class_masks_pass_through():
    (batch,) = stream_batches(Masked(), NUM_EXAMPLES)
    np.testing.assert_array_equal(batch.class_mask, np.arange(3) <= LABELS[:, None])


def test_what_cannot_be_streamed(tmp_path, monkeypatch):
    none = init_consolidation(PARAMS)
    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, start(), none)
    with pytest.raises(ValueError, match="source is empty"):
        learn(Subset(SOURCE, []), num_epochs=1, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, not 0"):
        learn(SOURCE, num_epochs=1, batch_size=0)
    with pytest.raises(ValueError, match="num_epochs must be"):
        learn(SOURCE, num_epochs=0, batch_size=2)
    mixed = [SOURCE[0], SOURCE[1]._replace(inputs=np.zeros((3, 2, 1), np.uint8))]
    with pytest.raises(
        ValueError,
        match=r"example 1\.inputs has shape \(3, 2, 1\), but example 0\.inputs has \(2, 2, 1\)\. Open images",
    ):
        list(stream_batches(mixed, 2))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache")
    for split in ("train", "test"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*train/one/broken\.png"):
        list(stream_batches(open_dataset(f"folder:{tmp_path}").train, 2))


@pytest.mark.parametrize(("num_examples", "step"), [(11, 2), (4, 1)])  # by a loss, and by the last step's result
def test_divergence_is_noticed(num_examples, step):
    learn = functools.partial(learn_stream, LOSS_FN, DIVERGING, num_epochs=1, batch_size=4)
    state = init_training(DIVERGING, PARAMS, jax.random.key(0))
    with pytest.raises(FloatingPointError, match=rf"training diverged in epoch 1, step {step}: lower"):
        learn(state, init_consolidation(PARAMS), Subset(SOURCE, range(num_examples)))


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, start(), CONSOLIDATION, SOURCE, batch_size=4)
    learn(num_epochs=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    losses = np.asarray(learn(num_epochs=2)[1].loss)
    shown, errors = capsys.readouterr()
    assert shown == ""
    for epoch in range(2):
        assert re.search(rf"epoch {epoch + 1} of 2: 100%.* 3/3 .*loss {losses[epoch].mean():.3f}", errors)


# Training on more than the process may hold. The images are small files, decoded and enlarged as they are read.

NUM_IMAGES, IMAGE_SIZE, BATCH_SIZE = 1000, 128, 8
BYTES = NUM_IMAGES * IMAGE_SIZE**2 * 3 * 4
CHILD = """
import re, resource, sys, threading
import numpy as np
from test_streaming import BATCH_SIZE, BYTES, IMAGE_SIZE, learn_channel_means
from lifelong_jax import streaming
from lifelong_jax.datasets import open_dataset
from lifelong_jax.datasets.sources import Subset

threading.stack_size(2**19)  # the limit counts what is set aside for stacks
folder, result = sys.argv[1:]
source = open_dataset(f"folder:{folder}", image_size=IMAGE_SIZE).train
learn = learn_channel_means(streaming.learn_stream)
learn(Subset(source, range(3 * BATCH_SIZE)))  # compiles, and starts the threads
status = open("/proc/self/status").read()
held = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", status)[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + BYTES // 8, resource.RLIM_INFINITY))
try:
    np.ones(BYTES, np.uint8)
except MemoryError:
    np.save(result, learn(source))
assert streaming._learn_batch._cache_size() == 1
"""


def learn_channel_means(learn):
    """Returns a function that trains a tiny network on what `learn` takes: a source, or a batch."""
    loss_fn = cross_entropy(lambda params, x: x.mean((0, 1)) @ params)
    optimizer = optax.sgd(0.5, momentum=0.9)
    params = jnp.zeros((3, 2))
    none = init_consolidation(params)

    def run(examples):
        state = init_training(optimizer, params, jax.random.key(7))
        return learn(loss_fn, optimizer, state, none, examples, num_epochs=1, batch_size=BATCH_SIZE)[0].params

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process holds")
def test_a_stream_is_larger_than_what_the_process_may_hold(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        for split in ("train", "test")[: 2 if number < 2 else 1]:
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(path)
    here = pathlib.Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}", "MALLOC_ARENA_MAX": "2"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "params.npy")]
    child = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache")
    in_memory: Batch = load_dataset(f"folder:{tmp_path}", image_size=IMAGE_SIZE).train
    assert in_memory.inputs.nbytes == BYTES
    np.testing.assert_allclose(np.load(tmp_path / "params.npy"), learn_channel_means(learn_task)(in_memory), rtol=1e-4)


def test_a_stream_goes_on_from_any_state_that_a_callback_got():
    kept = []

    def keep(state):
        kept.append(copy.deepcopy(state))

    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, batch_size=4, num_epochs=2)
    whole, info = learn(start(), CONSOLIDATION, SOURCE, interval=2, callback=keep)
    assert [(state.epoch, state.step) for state in kept] == [(0, 2), (1, 0), (1, 2), (2, 0)]  # of 3 steps an epoch
    for state in kept:
        again, again_info = learn(state, CONSOLIDATION, SOURCE)
        jax.tree.map(np.testing.assert_array_equal, (again.params, again_info), (whole.params, info))
        assert again.key == whole.key
    _, longer_info = learn(kept[-1], CONSOLIDATION, SOURCE, num_epochs=3)
    assert longer_info.loss.shape == (3, 3)
    np.testing.assert_array_equal(longer_info.loss[:2], info.loss)
    with pytest.raises(ValueError, match="state is after 2 epochs of 3 batches, but there are 1 epochs of 3"):
        learn(kept[-1], CONSOLIDATION, SOURCE, num_epochs=1)
    with pytest.raises(ValueError, match="interval must be an integer of at least 1"):
        learn(start(), CONSOLIDATION, SOURCE, interval=0)


def test_a_source_that_fails_in_the_middle_loses_no_step_that_was_kept():
    kept = []

    class Failing(Subset):
        def __getitem__(self, index):
            if broken and index == bad:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    bad = int(jax.random.permutation(jax.random.split(start().key)[1], NUM_EXAMPLES)[-1])
    source, broken = Failing(SOURCE, range(NUM_EXAMPLES)), True
    learn = functools.partial(learn_stream, LOSS_FN, OPTIMIZER, batch_size=4, num_epochs=1)
    with pytest.raises(OSError, match="the disk is gone"):
        learn(start(), CONSOLIDATION, source, interval=1, callback=lambda state: kept.append(copy.deepcopy(state)))
    assert kept[-1].step >= 1
    broken = False
    state, _ = learn(kept[-1], CONSOLIDATION, source)
    whole, _ = learn(start(), CONSOLIDATION, SOURCE)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_tokens_and_trees_arrive_as_the_source_gives_them(dtype):
    tokens = np.random.default_rng(0).integers(0, 200, (7, 5)).astype(dtype)

    class Tokens:
        def __len__(self):
            return len(tokens)

        def __getitem__(self, index):
            return Batch({"tokens": tokens[index], "length": np.float32(index)}, np.int32(index % 3))

    batch = next(stream_batches(Tokens(), 4))
    assert batch.inputs["tokens"].dtype == dtype
    np.testing.assert_array_equal(batch.inputs["tokens"], tokens[:4])

    def network(params, x):
        return params[x["tokens"]].mean(0) + 0 * x["length"]

    params = jnp.asarray(np.random.default_rng(1).normal(size=(200, 3)), jnp.float32)
    optimizer, loss_fn = optax.sgd(0.1), cross_entropy(network)
    state, none = init_training(optimizer, params, jax.random.key(0)), init_consolidation(params)
    examples = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Tokens()[index] for index in range(7)))
    expected, _ = learn_task(loss_fn, optimizer, state, none, examples, num_epochs=2, batch_size=3)
    found, _ = learn_stream(loss_fn, optimizer, state, none, Tokens(), num_epochs=2, batch_size=3)
    assert_close(found.params, expected.params)
