"""Fine-tunes a language model on text B, and compares what methods keep of text A, over their strengths.

By default, a small transformer is pretrained on A, Python's documentation, and fine-tuned on B, the source code of
Python's standard library. `--model` takes a published GPT-2 checkpoint instead, `--text-a` and `--text-b` take any
files and folders. The score is the loss per token on each text, in nats; a lower one is better.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from experiments.harness.fronts import FINETUNE, FROZEN, JOINT, Trial, best_of, draw_fronts, fronts_of, rise_at_half
from experiments.harness.pipelines import interval_of, steps_of_task
from experiments.harness.report import Estimate, estimate, format_estimate, report_tables
from experiments.harness.runs import Run, compute_once, open_run
from experiments.harness.settings import Numbers, RunSettings, Seeds, check_settings, parse_settings, refuse
from experiments.harness.texts import BYTES, Tokenizer, code, open_texts, prose, read_tokenizer
from experiments.harness.training import Learned, learn_resumably
from lifelong_jax import Batch, Consolidation, forms, init_training, methods
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.datasets import text_source
from lifelong_jax.datasets.sources import Source, Subset
from lifelong_jax.evaluation import score
from lifelong_jax.importance.adam import importance_from_adam
from lifelong_jax.losses import ExampleLoss, kl_divergence
from lifelong_jax.models import TransformerConfig, generate, transformer_functions
from lifelong_jax.models.gpt2 import load_gpt2
from lifelong_jax.objectives import classification, loss_per_label
from lifelong_jax.penalty import proximal_adam, proximal_quadratic_penalty
from lifelong_jax.types import ModelState, OutputFn, Params, TrainLossFn

OBJECTIVE = classification(score="loss")
MethodName = Literal["l2", "ewc", "ewc_bytes", "adam", "mas", "kfac", "kl", "joint"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strengths:
    """The strengths λ of each method; each one is a run."""

    l2: Numbers = (0.1, 1.0, 10.0)
    ewc: Numbers = (10.0, 100.0, 1000.0)
    ewc_bytes: Numbers = (100.0,)
    adam: Numbers = (10.0, 100.0, 1000.0)
    mas: Numbers = (1e-4, 1e-3, 1e-2)
    kfac: Numbers = (1e4, 1e5, 1e6)
    kl: Numbers = (0.3, 1.0, 3.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Fine-tune a language model on text B, and compare what methods keep of text A, over their strengths."""

    text_a: tuple[str, ...] = ()
    """What the model is pretrained on: files and folders. By default, Python's documentation."""

    text_b: tuple[str, ...] = ()
    """What it is fine-tuned on: files and folders. By default, source code of Python's standard library."""

    model: str | None = None
    """A GPT-2 checkpoint, model.safetensors, as Hugging Face stores it. By default, a small network is pretrained."""

    tokenizer: str | None = None
    """The checkpoint's tokenizer.json. Without a checkpoint, tokens are bytes."""

    length: int = 64
    """Tokens of an example."""

    num_layers: int = 2
    """Layers of the network that is pretrained."""

    width: int = 64
    """Its width; a head of attention has 16."""

    num_pretrain_epochs: int = 2
    """Passes over A's training examples."""

    pretrain_learning_rate: float = 4e-3
    """Adam's largest step size on A; it rises for a tenth of the steps, and then falls to 0 by a cosine."""

    num_examples: int = 1024
    """Training examples of B."""

    num_epochs: int = 1
    """Passes over B's training examples."""

    batch_size: int = 16
    """Examples per step."""

    learning_rate: float = 1e-3
    """Adam's step size on B."""

    num_importance: int = 512
    """Training examples of A that importances are computed on."""

    num_test: int = 128
    """Test examples of each text, and as many validation examples."""

    fisher: Literal["sampled", "empirical"] = "sampled"
    """For ewc and kfac, the labels of the Fisher information: at each position, a token sampled from the model
    (sampled), or the true one (empirical)."""

    methods: tuple[MethodName, ...] = ("l2", "ewc", "ewc_bytes", "adam", "kl", "joint")
    """The methods, beside the pretrained model (frozen) and Adam alone (finetune): penalties of equal importances (l2),
    of the Fisher diagonal (ewc), of the same in one byte each with a bfloat16 anchor (ewc_bytes), of Adam's second
    moment at the end of pretraining (adam), of output sensitivities (mas), of Kronecker factors (kfac); the divergence
    from the pretrained model's predictions on B as a term of the loss (kl); training on both texts (joint)."""

    strengths: Strengths = Strengths()

    seeds: Seeds = (0,)
    """Each seed sets the initial parameters, the order of the examples and the sampled labels."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        names = [field.name for field in dataclasses.fields(self) if field.type in (int, float)]
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative=dataclasses.asdict(self.strengths),
            distinct={"methods": self.methods, "seeds": self.seeds, **dataclasses.asdict(self.strengths)},
        )
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width must be a multiple of {HEAD_WIDTH}, the width of a head, not {self.width}.")
        if self.tokenizer is not None and self.model is None:
            raise ValueError("tokenizer: the network that is pretrained here reads bytes: leave out --tokenizer.")
        if self.model is not None and self.tokenizer is None:
            raise ValueError("model: pass the checkpoint's tokenizer.json too, as --tokenizer.")


HEAD_WIDTH = 16


class Network(NamedTuple):
    """A language model.

    Attributes:
      apply_fn: `apply_fn(params, tokens) -> logits`.
      init_fn: `init_fn(key) -> params`, before pretraining; None if there are pretrained parameters.
      params: the pretrained parameters; None if they are to be learned.
      tokenizer: how texts become tokens.
    """

    apply_fn: OutputFn
    init_fn: Callable[[jax.Array], Params] | None
    params: Params | None
    tokenizer: Tokenizer


class Text(NamedTuple):
    """A text's examples.

    Attributes:
      train: the training examples, a source.
      validation: a batch.
      test: a batch.
    """

    train: Source
    validation: Batch
    test: Batch


class Study(NamedTuple):
    """What all runs of one seed share.

    Attributes:
      config: the settings.
      run: the folder.
      apply_fn: the network.
      texts: A and B.
      name: the seed's.
      key: the seed's random key.
    """

    config: Config
    run: Run
    apply_fn: OutputFn
    texts: tuple[Text, Text]
    name: str
    key: jax.Array


class Measured(NamedTuple):
    """A model after fine-tuning, measured.

    Attributes:
      validation: `[2]`, the loss per token on A and on B, in nats.
      test: `[2]`, the same on test examples.
      seconds: of a step; NaN for the pretrained model.
      num_bytes: what is kept beside the parameters and Adam's state.
      continuations: `[2, num_tokens]`, sampled after the beginning of a test example of A and of B.
    """

    validation: np.ndarray
    test: np.ndarray
    seconds: float
    num_bytes: int
    continuations: np.ndarray


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    try:
        network = load_network(config)
        texts = load_texts(config, network.tokenizer)
    except (OSError, ValueError) as error:
        refuse(error)
    with open_run(config, "finetune", console, [text.test for text in texts]) as run:
        measured: dict[Trial, list[Measured]] = {}
        for seed in config.seeds:
            study = Study(config, run, network.apply_fn, texts, f"seed {seed}", jax.random.key(seed))
            for trial, of_trial in measure(study, network, console):
                measured.setdefault(trial, []).append(of_trial)
        report(config, measured, network.tokenizer, run, texts, console)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def load_network(config: Config) -> Network:
    """Makes the network that is pretrained here, or reads a checkpoint."""
    if config.model is None:
        heads = config.width // HEAD_WIDTH
        sizes = TransformerConfig(BYTES.vocab_size, config.length, config.num_layers, heads, config.width, tied=False)
        init_fn, apply_fn = transformer_functions(sizes)
        return Network(apply_fn, init_fn, None, BYTES)
    sizes, params = load_gpt2(config.model)
    tokenizer = read_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} tokens, but the model {sizes.vocab_size}.")
    if config.length > sizes.max_length:
        raise ValueError(f"length must be at most {sizes.max_length}, the model's, not {config.length}.")
    _, apply_fn = transformer_functions(sizes)
    return Network(apply_fn, None, params, tokenizer)


def load_texts(config: Config, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Opens both texts, and splits each into training, validation and test examples."""

    def load(name: str, paragraphs: Callable[[], list[str]]) -> Text:
        paths = getattr(config, name)
        if paths:
            return split(config, name, open_texts(paths, tokenizer, config.length))
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "text.txt")
            file.write_text("\n\n".join(dict.fromkeys(paragraphs())), encoding="utf-8")
            return split(config, name, text_source([file], tokenizer.encode, config.length))  # read at once

    return load("text_a", prose), load("text_b", code)


def split(config: Config, name: str, source: Source) -> Text:
    """Splits a text's examples, the same for all seeds."""
    if len(source) < 4 * config.num_test:
        raise ValueError(f"{name} has {len(source)} examples: there must be 4 times num_test, {4 * config.num_test}.")
    order = np.random.default_rng(0).permutation(len(source))
    n = config.num_test
    validation, test = (read(Subset(source, order[start : start + n])) for start in (0, n))
    return Text(Subset(source, order[2 * n :]), validation, test)


def read(source: Source) -> Batch:
    """Reads all examples of a source into memory."""
    examples = [source[index] for index in range(len(source))]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *examples)


def without_padding(batch: Batch) -> Batch:
    """Leaves out examples that are padded, as the factors of kfac need."""
    is_full = np.asarray(batch.label_weights).all(axis=1)
    if not is_full.any():
        raise ValueError("every example of A that importances are computed on is padded: lower length.")
    return jax.tree.map(lambda leaf: leaf[is_full], batch._replace(label_weights=None))


def some_of(source: Source, num_examples: int, key: jax.Array) -> np.ndarray:
    """Draws examples; all of them, if there are no more."""
    return np.asarray(jax.random.permutation(key, len(source)))[:num_examples]


@dataclasses.dataclass(frozen=True)
class Joined:
    """The examples of two sources.

    Attributes:
      first: a source.
      second: another one.
    """

    first: Source
    second: Source

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


def measure(study: Study, network: Network, console: rich.console.Console) -> Iterator[tuple[Trial, Measured]]:
    """Measures the pretrained model, then each method at each strength; what the run has is not computed again."""
    run, name = study.run, study.name
    pretrained = compute_once(run, f"{name} pretrained", functools.partial(pretrain, study, network))
    params = jax.tree.map(jnp.asarray, pretrained["params"])

    @functools.cache
    def importance(method: str) -> Params:
        return pretrained["second_moment"] if method == "adam" else importance_of(study, params, method)

    trials = trials_of(study.config)
    for number, trial in enumerate(trials, 1):
        function = functools.partial(measure_trial, study, params, importance, trial)
        of_trial = Measured(**compute_once(run, f"{name} {trial.name}", function))
        a, b = of_trial.test
        console.print(f"{name}, {number} of {len(trials)}: {trial.name}: A {a:.3f}, B {b:.3f}", highlight=False)
        run.log_once(score="loss", seed=int(name.split()[1]), method=trial.method, strength=trial.strength, loss=[a, b])
        yield trial, of_trial


def trials_of(config: Config) -> list[Trial]:
    """Lists what is measured: both ends of the fronts first. A checkpoint has no state of Adam."""
    trials = [FROZEN, FINETUNE]
    for method in config.methods:
        if method == "joint":
            trials.append(JOINT)
        elif not (method == "adam" and config.model):
            trials += [Trial(method, strength) for strength in getattr(config.strengths, method)]
    return trials


def pretrain(study: Study, network: Network) -> dict[str, Params]:
    """Learns text A, unless there are pretrained parameters; estimates importances from Adam's state."""
    if network.params is not None:
        return {"params": network.params}
    config, source = study.config, study.texts[0].train
    init_key, learn_key = jax.random.split(jax.random.fold_in(study.key, 0))
    num_steps = steps_of_task(len(source), config.num_pretrain_epochs, config.batch_size)
    rate = config.pretrain_learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 10, num_steps)
    learned = learn_resumably(
        study.run,
        f"{study.name} pretraining",
        ExampleLoss(OBJECTIVE, study.apply_fn),
        optax.adam(schedule),
        network.init_fn(init_key),
        Consolidation(None, None),
        source,
        learn_key,
        num_epochs=config.num_pretrain_epochs,
        batch_size=config.batch_size,
    )
    importance = importance_from_adam(learned.state.opt_state, batch_size=config.batch_size * config.length)
    return {"params": learned.state.params, "second_moment": importance}


def importance_of(study: Study, params: Params, method: str) -> Params:
    """Computes a method's importance on training examples of A."""
    if method == "l2":
        return jax.tree.map(jnp.ones_like, params)
    config, source = study.config, study.texts[0].train
    key = jax.random.fold_in(study.key, 1)
    batch = without_padding(read(Subset(source, some_of(source, config.num_importance, key))))
    importance_fn = {"mas": methods.mas(), "kfac": methods.kfac(config.fisher)}.get(
        method, methods.ewc(config.fisher)
    ).importance_fn
    state = init_training(optax.identity(), params, key)
    return jax.jit(importance_fn, static_argnums=(0, 1))(study.apply_fn, OBJECTIVE, state, batch, key)


def measure_trial(study: Study, params: Params, importance: Callable[[str], Params], trial: Trial) -> Measured:
    """Fine-tunes the pretrained parameters on B, and measures the result."""
    if trial.method == "frozen":
        return measured_of(study, params, math.nan, 0)
    consolidation = consolidation_of(params, importance, trial)
    learned = fine_tune(study, params, consolidation, trial)
    kept = params if trial.method == "kl" else consolidation
    return measured_of(study, learned.state.params, learned.seconds_per_step, forms.num_bytes(kept))


def consolidation_of(params: Params, importance: Callable[[str], Params], trial: Trial) -> Consolidation:
    """Makes what the penalty takes. The importance includes the strength, so that one compilation serves all."""
    if trial.method in ("finetune", "kl", "joint"):
        return Consolidation(None, None)
    weighted = forms.tree_map(lambda form: forms.scale(form, trial.strength), importance(trial.method))
    consolidation = Consolidation(params, weighted)
    return compress_consolidation(consolidation) if trial.method == "ewc_bytes" else consolidation


def fine_tune(study: Study, params: Params, consolidation: Consolidation, trial: Trial) -> Learned:
    """Learns text B, from the pretrained parameters."""
    config, (text_a, text_b) = study.config, study.texts
    b_key, a_key, learn_key = jax.random.split(jax.random.fold_in(study.key, 2), 3)
    source: Source = Subset(text_b.train, some_of(text_b.train, config.num_examples, b_key))
    if trial.method == "joint":
        source = Joined(source, Subset(text_a.train, some_of(text_a.train, config.num_examples, a_key)))
    num_steps = steps_of_task(len(source), config.num_epochs, config.batch_size)
    is_kl = trial.method == "kl"
    return learn_resumably(
        study.run,
        f"{study.name} {trial.name}",
        loss_with_divergence(study.apply_fn) if is_kl else ExampleLoss(OBJECTIVE, study.apply_fn),
        optimizer_of(trial.method, config.learning_rate, interval_of(num_steps)),
        params,
        consolidation,
        source,
        learn_key,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        model_state=(params, jnp.asarray(trial.strength)) if is_kl else None,
    )


def optimizer_of(method: str, learning_rate: float, interval: int) -> optax.GradientTransformation:
    """Makes Adam, with the penalty's proximal step; its strength is in the importance."""
    if method in ("finetune", "kl", "joint"):
        return _made(optax.adam, learning_rate)
    if method == "kfac":
        return _made(adam_and_proximal_step, learning_rate, interval)
    return _made(proximal_adam, learning_rate, 1.0)


@functools.cache  # one object, so that a step is compiled once
def _made(function: Callable[..., optax.GradientTransformation], *arguments: float) -> optax.GradientTransformation:
    return function(*arguments)


def adam_and_proximal_step(learning_rate: float, interval: int) -> optax.GradientTransformation:
    """Makes Adam and, after it, the proximal step that Kronecker factors have."""
    return optax.chain(optax.adam(learning_rate), proximal_quadratic_penalty(learning_rate, 1.0, interval))


@functools.cache
def loss_with_divergence(apply_fn: OutputFn) -> TrainLossFn:
    """Makes the loss plus λ times the divergence from the pretrained model, both of which are in the model state."""

    def loss_fn(
        params: Params, model_state: ModelState, example: Batch, key: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        pretrained, strength = model_state
        outputs = apply_fn(params, example.inputs)
        divergence = kl_divergence(outputs, apply_fn(pretrained, example.inputs), label_weights=example.label_weights)
        return loss_per_label(OBJECTIVE, outputs, example) + strength * divergence, model_state

    return loss_fn


def measured_of(study: Study, params: Params, seconds: float, num_bytes: int) -> Measured:
    """Measures a model on both texts, and lets it continue them."""
    length = study.config.length

    def losses(split: str) -> np.ndarray:
        batches = [getattr(text, split) for text in study.texts]
        return np.array([score(study.apply_fn, params, batch, None, None, OBJECTIVE) for batch in batches])

    prompts = [prompt_of(text, length) for text in study.texts]
    key = jax.random.fold_in(study.key, 3)
    continuations = [generate(study.apply_fn, params, prompt, length // 2, key) for prompt in prompts]
    return Measured(losses("validation"), losses("test"), seconds, num_bytes, np.stack(continuations))


def prompt_of(text: Text, length: int) -> jax.Array:
    """Returns the beginning of a test example."""
    return text.test.inputs[0, : length // 2]


def report(
    config: Config,
    measured: Mapping[Trial, list[Measured]],
    tokenizer: Tokenizer,
    run: Run,
    texts: tuple[Text, Text],
    console: rich.console.Console,
) -> None:
    """Prints the table and some continuations; writes `summary.json`, `table.md` and `finetune.png`."""
    validation, test = (
        {trial: np.array([getattr(seed, split) for seed in of_seeds]) for trial, of_seeds in measured.items()}
        for split in ("validation", "test")
    )
    fronts = fronts_of(measured)
    best = {method: best_of(front, validation) for method, front in fronts.items()}
    rise = {method: estimate(rise_at_half(front, test)) for method, front in fronts.items()}
    run.write_summary(
        {
            "rise_at_half": rise,
            "strength": {method: trial.strength for method, trial in best.items()},
            "loss": {trial.name: [estimate(column) for column in losses.T] for trial, losses in test.items()},
        }
    )
    shown = [trial for trial in measured if trial.strength is None or trial in best.values()]
    header = [
        "method",
        "λ",
        "A",
        "B",
        "perplexity of A",
        "of B",
        "A's rise at half of B's gain",
        "ms per step",
        "MiB kept",
    ]
    rows = [row_of(trial, measured[trial], test[trial], rise.get(trial.method)) for trial in shown]
    report_tables(
        {"Loss per token on A and B, in nats; λ was chosen on validation examples": [header, *rows]}, run, console
    )
    winner = min(rise, key=lambda method: rise[method].mean) if rise else "finetune"
    for index, text in enumerate(texts):
        prompt = tokenizer.decode(prompt_of(text, config.length))
        console.print(f"\n{'AB'[index]}: {prompt!r}", highlight=False, markup=False)
        for trial in (FROZEN, FINETUNE, *([best[winner]] if rise else [])):
            continued = tokenizer.decode(measured[trial][0].continuations[index])
            console.print(f"  {trial.name}: {continued!r}", highlight=False, markup=False)
    title = f"{winner} keeps most of A: +{rise[winner].mean:.3f} nats at half of B's gain" if rise else ""
    draw_fronts(test, title).savefig(run.folder / "finetune.png")


def row_of(trial: Trial, of_seeds: list[Measured], losses: np.ndarray, rise: Estimate | None) -> list[str]:
    """Makes a row of the table."""
    a, b = (estimate(column) for column in losses.T)
    seconds = np.median([seed.seconds for seed in of_seeds])
    return [
        trial.method,
        "" if trial.strength is None else f"{trial.strength:g}",
        format_estimate(a, digits=3),
        format_estimate(b, digits=3),
        *(f"{math.exp(loss.mean):.2f}" for loss in (a, b)),
        "" if rise is None else format_estimate(rise, digits=3),
        "" if math.isnan(seconds) else f"{1000 * seconds:.0f}",
        f"{of_seeds[0].num_bytes / 2**20:.2f}",
    ]


if __name__ == "__main__":
    main(parse_settings(Config, "finetune"))
