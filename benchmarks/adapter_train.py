"""Cost of a training step of a gated adapter: operations against theory, block tokens per second, memory.

    python -m benchmarks.adapter_train --config=configs/adapter.py:gated:HF_DIR --output=adapter_train.json
    python -m benchmarks.adapter_train --config=... --config.noise.length=4 --noxla_flops --repeats=3

The weights and rows are random, because the cost does not depend on them. Every row is one sample, all response.

`operations` are those of all products in the traced step, layer scans and chunks of the loss with their trip counts.
XLA's own count, `cost_analysis()['flops']`, counts the body of a loop once, so it is right only for a program without
loops: all layers unrolled, the loss in one chunk. That program takes minutes to compile and is not the one that trains,
so its count, `xla_operations`, is a check of ours. It includes what is not a product (norms, softmax, the optimizer).

`theory` is the sum of what no implementation can leave out (`theory` below). `operations_ratio` should be at most 1.15.
`matrix_share` is theory per second, relative to the fastest float32 product of the step's shapes in the same run; on a
machine with other work, `fastest_matrix_share`, from the fastest step, compares like with like.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax import Array
from jax.extend import core
from jax.interpreters import partial_eval
from ml_collections import config_flags

from benchmarks import report
from msn_jax import adapter as adapters
from msn_jax import cli, config, llama, optim, train
from msn_jax.cli import InputError
from msn_jax.config import AdapterConfig, Config
from msn_jax.noise import Batch
from msn_jax.train_steps import TrainState, is_gated, train_step

_PRODUCTS = 5  # timed products of each shape, for each timed step


def theory(cfg: Config) -> dict[str, float]:
    """Floating-point operations that a step needs, by term: 2 for each multiplication and addition of a product.

    Masked products do not count: a row's token attends to the row up to itself, and a block's token to half of the row
    in the mean. (A sliding window shorter than the row is not considered.) A teacher's logits count once per position
    of the row, even if several blocks predict it.
    """
    model, row, length = cfg.model, cfg.data.row_length, cfg.noise.length
    T, E = cfg.data.batch_size * row, cfg.data.batch_size * block_tokens(cfg)  # tokens of all rows, of all blocks
    adapted = model.n_layers - cfg.adapter.first_layer
    matrices = sum(math.prod(shape) for shape in adapters.shapes(model, AdapterConfig()).values())  # of one layer
    factors = cfg.adapter.rank * sum(map(sum, adapters.shapes(model, cfg.adapter).values()))  # of one layer
    heads = model.n_heads * model.head_dim
    first = E if "drafts" in config.noise_kinds(cfg.noise) else 0
    table = model.d_model * model.vocab_size
    return {
        # The frozen model over the row; 2 products in attention: with the keys, and with the values.
        "row_matrices": 2 * model.n_layers * matrices * T,
        "row_attention": 2 * 2 * model.n_layers * heads * T * (row + 1) / 2,
        # The blocks: forward in all layers; backward in the adapted ones, for the gradients of activations alone.
        "block_matrices": 2 * model.n_layers * matrices * E,
        "block_matrices_backward": 2 * adapted * matrices * E,
        # Each of the two factors: forward, gradient of its input, gradient of the factor.
        "adapter": 3 * 2 * adapted * factors * E,
        # The row's keys and values have no gradients, so 2 products backward; those of the block have, so 4.
        "block_to_row": (2 * model.n_layers + 2 * adapted) * 2 * heads * E * row / 2,
        "block_to_block": (2 * model.n_layers + 4 * adapted) * 2 * heads * E * (length + 1) / 2,
        # Logits of the targets; logits of the drafts and the gradients of their hidden states.
        "teacher_logits": 2 * table * min(T, E),
        "draft_logits": 2 * 2 * table * E,
        # Blocks of kind 'drafts' run once more before, forward only; the last token of a block predicts nothing.
        "redraft": 2 * first * (model.n_layers * matrices + adapted * factors + table * (length - 1) / length)
        + 2 * 2 * model.n_layers * heads * first * (row + length + 1) / 2,
    }


def block_tokens(cfg: Config) -> int:
    """The tokens of one row's noise blocks."""
    return min(cfg.noise.blocks, cfg.data.row_length) * cfg.noise.length


def operations(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of all products in a traced program whose results are used.

    Raises:
      ValueError: a `while_loop` contains products, and its trip count is unknown.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        inner = [operations(body) for body in core.jaxprs_in_params(equation.params)]
        if equation.primitive.name == "while" and any(inner):
            raise ValueError("a while_loop contains products")
        branches = equation.primitive.name == "cond"
        total += equation.params.get("length", 1) * (max(inner) if branches else sum(inner))
    return total


def _product(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inputs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(inputs[axis] for axis in contracted)


def step(cfg: Config) -> jax.stages.Wrapped:
    """The training step of `random_arguments`. Nothing is donated: every call uses the same state."""
    return jax.jit(functools.partial(train_step, cfg=cfg, optimizer=optim.optimizer(cfg.optim, cfg.train.steps)))


def random_arguments(cfg: Config) -> tuple[TrainState, Batch, dict]:
    """State, batch and frozen parameters."""
    shape = (cfg.data.batch_size, cfg.data.row_length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, cfg.model.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    batch = Batch(tokens, positions, jnp.ones(shape, jnp.int32), positions > 0)
    frozen = llama.init(jax.random.key(1), cfg.model)
    return nn.meta.unbox(_initial_state(cfg)), batch, nn.meta.unbox(frozen)


def _initial_state(cfg: Config) -> TrainState:
    return train.create_state(cfg, optim.optimizer(cfg.optim, cfg.train.steps))


def abstract_arguments(cfg: Config) -> tuple:
    """Shapes and dtypes of `random_arguments`."""
    return jax.eval_shape(functools.partial(random_arguments, cfg))


def xla_operations(cfg: Config) -> float:
    """XLA's count of the operations of the same step, compiled without loops."""
    whole = cfg.data.batch_size * block_tokens(cfg)
    loops = dataclasses.replace(cfg.train, unroll=cfg.model.n_layers, loss_chunk=whole)
    cfg = dataclasses.replace(cfg, train=loops)
    return step(cfg).lower(*abstract_arguments(cfg)).compile().cost_analysis()["flops"]


def memory(cfg: Config) -> dict[str, float]:
    """Bytes of the gradients and the optimizer's state of the adapter, and of the model if it were trained itself."""

    def bytes_of(cfg: Config) -> int:
        state = jax.eval_shape(functools.partial(_initial_state, cfg))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))

    adapter, model = bytes_of(cfg), bytes_of(dataclasses.replace(cfg, adapter=AdapterConfig()))
    return {"adapter_bytes": adapter, "model_bytes": model, "share_percent": 100 * adapter / model}


def matrix_products(cfg: Config) -> dict[str, tuple[float, Callable[[], Array]]]:
    """The products that dominate the step, in float32: their operations and a function that runs each."""
    tokens, model = cfg.data.batch_size * block_tokens(cfg), cfg.model
    D, F, V = model.d_model, model.d_mlp, model.vocab_size
    multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    products = {}
    for I, O in ((D, F), (F, D), (D, V)):
        inputs = jnp.ones((tokens, I), jnp.float32), jnp.ones((I, O), jnp.float32)
        products[f"[{tokens}, {I}] x [{I}, {O}]"] = 2.0 * tokens * I * O, functools.partial(multiply, *inputs)
    return products


def measure(cfg: Config, repeats: int, compiled: jax.stages.Compiled) -> dict:
    """Times the step and, between its calls, the products."""
    arguments = jax.jit(functools.partial(random_arguments, cfg))()
    products = matrix_products(cfg)
    _, metrics = compiled(*arguments)  # a warm-up
    tokens = float(metrics["block_tokens"])
    for _, run in products.values():
        run()
    steps, fastest = [], dict.fromkeys(products, 0.0)
    for _ in range(repeats):
        steps.append(_seconds(functools.partial(compiled, *arguments)))
        for name, (operations, run) in products.items():
            seconds = min(_seconds(run) for _ in range(_PRODUCTS))
            fastest[name] = max(fastest[name], operations / seconds)
    seconds, needed = statistics.median(steps), sum(theory(cfg).values())
    return {
        "median_step_seconds": seconds,
        "fastest_step_seconds": min(steps),
        "steps": repeats,
        "block_tokens_per_step": tokens,
        "block_tokens_per_second": tokens / seconds,
        "operations_per_second": needed / seconds,
        "matrix_operations_per_second": fastest,
        "matrix_share": needed / seconds / max(fastest.values()),
        "fastest_matrix_share": needed / min(steps) / max(fastest.values()),
    }


def _seconds(run: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """Counts, times and writes the report."""
    cfg = cli.read_config(Config, "configs/")
    config.check(cfg)
    if not is_gated(cfg):
        raise InputError("--config: must train a gated adapter on noise blocks, as configs/adapter.py:gated:HF_DIR")
    program = step(cfg).trace(*abstract_arguments(cfg))
    terms = theory(cfg)
    needed, counted = sum(terms.values()), operations(program.jaxpr.jaxpr)
    result = report.environment() | {
        "config": dataclasses.asdict(cfg),
        "theory": needed,
        "theory_terms": terms,
        "operations": counted,
        "operations_ratio": counted / needed,
        "gradients_and_optimizer": memory(cfg),
    }
    if flags.FLAGS.xla_flops:
        result["xla_operations"] = xla_operations(cfg)
        result["xla_operations_ratio"] = result["xla_operations"] / needed
    if flags.FLAGS.repeats:
        compiled = program.lower().compile()
        result["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        result |= measure(cfg, flags.FLAGS.repeats, compiled)
    report.write(result, flags.FLAGS.output)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "As for msn_jax.train; must train a gated adapter.")
    flags.DEFINE_integer("repeats", 5, "Timed steps; 0 only counts operations and bytes.", lower_bound=0)
    flags.DEFINE_bool("xla_flops", True, "Also compile the step without loops, for XLA's count of its operations.")
    flags.DEFINE_string("output", "", "File for the JSON report; empty: standard output.")
    cli.run(main)
