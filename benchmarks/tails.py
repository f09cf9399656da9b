"""Whether noise tails after tree nodes help: mean accepted tokens with and without them, at equal width.

    python -m benchmarks.tails --model=runs/demo/msn --prompts=prompts.jsonl --output=tails.json

For every width, the search grows one tree that may have noise tails and one that may not, from the same draft traces.
Both trees then decode the same prompts.
"""

from absl import flags

from benchmarks import report
from msn_jax import cli, request_files
from msn_jax.decode import engine, models, tree_benchmark, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.tree import NOISE, TokenTree


def mean_accepted_tokens(model: Model, requests: list[Request], tree: TokenTree) -> float:
    """New tokens per forward pass, measured over all requests together."""
    generations = engine.generate(model, requests, "tr_jacobi", tree=tree)
    new_tokens = sum(generation.new_tokens for generation in generations)
    return new_tokens / sum(generation.forward_passes for generation in generations)


def main() -> None:
    """Searches, measures and writes the report."""
    args = flags.FLAGS
    model = models.load(args.model)
    requests = list(request_files.read(args.prompts, Request("", args.max_new_tokens)).values())
    root = Decoder(model, "autoregressive", trees.build([]))
    completions = [
        tree_benchmark.complete(model, engine.encode(root, request, "prompt"), request) for request in requests
    ]
    widths = sorted(map(int, args.widths))
    traces = tree_search.collect_traces(model, completions, "tr_jacobi")
    first_tree = tree_search.search(traces, "tr_jacobi", 16)[16]
    traces = tree_search.refine_traces(model, completions, traces, first_tree)
    rows = [{"width": width} for width in widths]
    for name, tails in (("without", False), ("with", True)):
        best = tree_search.search(traces, "tr_jacobi", widths[-1], allow_noise=tails)
        for row in rows:
            tree = best[row["width"]]
            row[f"{name}, expected"] = tree_search.replay(tree, traces).mean_accepted_tokens
            row[f"{name}, measured"] = mean_accepted_tokens(model, requests, tree)
            row[f"{name}, noise nodes"] = tree.sources.count(NOISE)
            print(row, flush=True)
    report.write({**report.environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A model trained with noise.", required=True)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_integer("max_new_tokens", 128, "Limit per prompt, in tokens.", lower_bound=1)
    flags.DEFINE_list("widths", ["8", "16", "32", "64", "128"], "Tree widths.")
    flags.DEFINE_string("output", None, "JSON file to write.", required=True)
    cli.run(main)
