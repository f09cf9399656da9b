"""How well a gated adapter drafts: mean accepted tokens by group of prompts, with and without the adapter.

    python -m benchmarks.adapter --model=HF_DIR --adapter=DIR --spec_bench=question.jsonl --output=adapter.json
    python -m benchmarks.adapter ... --prompts=gsm8k.jsonl --prompts=human_eval.jsonl    # further groups

Every output is compared with that of `autoregressive` without the adapter. Acceptance does not depend on the machine.
The share of repeated 4-grams says how much of the text retrieval alone can draft.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import questions, report
from msn_jax import cli, request_files
from msn_jax.cli import InputError
from msn_jax.decode import engine, models
from msn_jax.decode import tree as trees
from msn_jax.decode.engine import Generation
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.tree import TokenTree
from msn_jax.evals.statistics import repeated_4_grams

_SETTINGS = (  # name, decoder, whether it has the adapter, tree (None: the decoder's default)
    ("jacobi", "jacobi", False, None),
    ("prompt_lookup", "prompt_lookup", False, None),
    ("tr_jacobi", "tr_jacobi", False, None),
    ("jacobi, adapter", "jacobi", True, None),
    ("tr_jacobi, adapter", "tr_jacobi", True, None),
)


def measure(
    model: Model,
    reference: Sequence[Generation],
    groups: Sequence[str],
    requests: Sequence[Request],
    decoder: str,
    batch_size: int,
    tree: TokenTree | None,
) -> dict:
    """Mean accepted tokens of each group and of all prompts, and the number of outputs equal to the reference's."""
    generations = engine.generate(model, requests, decoder, batch_size=batch_size, tree=tree)
    row = {}
    for group in [*dict.fromkeys(groups), "all"]:
        chosen = [one for one, name in zip(generations, groups, strict=True) if group in (name, "all")]
        row[group] = sum(one.new_tokens for one in chosen) / sum(one.forward_passes for one in chosen)
    row["exact"] = sum(one.tokens == other.tokens for one, other in zip(generations, reference, strict=True))
    return row


def main() -> None:
    """Decodes, compares and writes the report."""
    args = flags.FLAGS
    settings = Request("", args.max_new_tokens, args.temperature)
    groups, requests = [], []
    if args.spec_bench is not None:
        for group, prompt in questions.read_spec_bench(args.spec_bench, args.questions):
            groups.append(group)
            requests.append(engine.as_request([{"role": "user", "content": prompt}], settings, len(requests)))
    for path in args.prompts:
        more = list(request_files.read(path, settings).values())[: args.questions or None]
        groups += [Path(path).stem] * len(more)
        requests += more
    if not requests:
        raise InputError("give --spec_bench=question.jsonl or --prompts=FILE.jsonl")
    own_trees = [(f"tr_jacobi, adapter, {path}", "tr_jacobi", True, trees.load(path)) for path in args.tree]
    base, adapted = models.load(args.model, args.dtype), models.load(args.model, args.dtype, adapter=args.adapter)
    reference = engine.generate(base, requests, "autoregressive", batch_size=args.batch_size)
    rows = {}
    for name, decoder, has_adapter, tree in (*_SETTINGS, *own_trees):
        model = adapted if has_adapter else base
        rows[name] = measure(model, reference, groups, requests, decoder, args.batch_size, tree)
        print(name, {group: round(value, 2) for group, value in rows[name].items()}, flush=True)
    repeated = [repeated_4_grams(one.tokens) for one in reference]
    result = {"prompts": len(requests), "repeated_4_grams": sum(repeated) / len(repeated), "settings": rows}
    report.write({**report.environment(), **result}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The model without the adapter.", required=True)
    flags.DEFINE_string("adapter", None, "The gated adapter's directory.", required=True)
    flags.DEFINE_multi_string("tree", [], "A token tree for tr_jacobi with the adapter; may be repeated.")
    flags.DEFINE_string("dtype", "float32", "Of parameters and computation.")
    flags.DEFINE_string("spec_bench", None, "Spec-Bench's question.jsonl.")
    flags.DEFINE_multi_string("prompts", [], "A JSONL file of prompts, a group of its own; may be repeated.")
    flags.DEFINE_integer("questions", 0, "Prompts of each group; 0: all.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 128, "Limit per prompt, in tokens.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 8, "Prompts decoded together.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file to write.", required=True)
    cli.run(main)
