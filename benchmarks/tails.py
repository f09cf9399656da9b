"""Whether noise tails behind tree nodes pay: tokens a pass with and without them, at equal width.

    python -m benchmarks.tails --model=runs/demo/msn --prompts=prompts.jsonl --output=tails.json

For every width the search grows one tree that may have tails and one that may not, from the same records; both then
answer the same prompts.
"""

from absl import flags

from benchmarks import report
from msn_jax import cli, request_files
from msn_jax.decode import engine, tree_benchmark, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.request import Request
from msn_jax.decode.session import Model
from msn_jax.decode.tree import NOISE, TokenTree


def mean_accepted_tokens(model: Model, prompts: list[Request], tree: TokenTree) -> float:
    """Measured, over all prompts together."""
    answers = engine.generate(model, prompts, "tr_jacobi", tree=tree)
    return sum(answer.new_tokens for answer in answers) / sum(answer.forward_passes for answer in answers)


def main() -> None:
    """Searches, measures and writes the report."""
    args = flags.FLAGS
    model = engine.load(args.model)
    prompts = list(request_files.read(args.prompts, Request("", args.max_new_tokens)).values())
    encoded = [engine.encode(engine.Decoder(model, "autoregressive"), prompt, "prompt") for prompt in prompts]
    root = engine.Decoder(model, "autoregressive", trees.build([])).drafter
    texts = [(ids, tree_benchmark.timed_completion(model, root, ids, args.max_new_tokens)[0]) for ids in encoded]
    widths = sorted(map(int, args.widths))
    known = tree_search.collect_traces(model, texts, "tr_jacobi")
    known = tree_search.refine_traces(model, texts, known, tree_search.search(known, "tr_jacobi", 16)[16])
    rows = [{"width": width} for width in widths]
    for name, tails in (("without", False), ("with", True)):
        found = tree_search.search(known, "tr_jacobi", widths[-1], tails=tails)
        for row in rows:
            tree = found[row["width"]]
            row[f"{name}, expected"] = tree_search.replay(tree, known).mean_accepted_tokens
            row[f"{name}, measured"] = mean_accepted_tokens(model, prompts, tree)
            row[f"{name}, noise nodes"] = tree.sources.count(NOISE)
            print(row, flush=True)
    report.write({**report.environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A model that was tuned with noise.", required=True)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_integer("max_new_tokens", 128, "Of each answer.", lower_bound=1)
    flags.DEFINE_list("widths", ["8", "16", "32", "64", "128"], "Of the trees.")
    flags.DEFINE_string("output", None, "A JSON file.", required=True)
    cli.run(main)
