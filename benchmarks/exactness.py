"""Whether every decoder gives the text of `autoregressive`, on Spec-Bench's questions.

    python -m benchmarks.exactness --model=stories260k --spec_bench=question.jsonl --output=exactness.json

Every question (its first turn, cut to the context) is answered by every decoder, greedily and with samples, and
compared token for token with what `autoregressive` says.
"""

import sys
from collections.abc import Sequence

from absl import flags
from rich.progress import track

from benchmarks import questions, report
from benchmarks.questions import Question
from msn_jax import cli
from msn_jax.decode import engine
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request
from msn_jax.decode.session import Model

_SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "sampled, filtered": {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}
_BATCH_SIZE = 16


def texts(model: Model, decoder: str, asked: Sequence[Question], settings: dict) -> tuple[list[list[int]], int]:
    """New tokens for every question, and all forward passes."""
    decoder = Decoder(model, decoder, draft=model if decoder == "draft_model" else None)
    found: dict[int, list[int]] = {}
    passes = 0
    order = sorted(range(len(asked)), key=lambda number: len(asked[number].ids))
    batches = [order[start : start + _BATCH_SIZE] for start in range(0, len(order), _BATCH_SIZE)]
    for batch in track(batches, decoder, disable=not sys.stdout.isatty()):
        requests = [Request("", asked[i].max_new_tokens, seed=7, sample=i, **settings) for i in batch]
        session = decoder.start([asked[i].ids for i in batch], requests, _BATCH_SIZE)
        session.run()
        for number, (tokens, accept_lengths) in zip(batch, session.new_tokens(), strict=True):
            found[number] = tokens
            passes += len(accept_lengths)
    return [found[number] for number in range(len(asked))], passes


def main() -> None:
    """Answers, compares and writes the report."""
    args = flags.FLAGS
    model = engine.load(args.model, "float32")
    asked = questions.encode(model, questions.read_spec_bench(args.spec_bench, args.questions), args.max_new_tokens)
    rows = []
    for name, settings in _SETTINGS.items():
        expected, _ = texts(model, "autoregressive", asked, settings)
        for decoder in engine.DECODERS[1:]:
            got, passes = texts(model, decoder, asked, settings)
            same = sum(ours == theirs for ours, theirs in zip(got, expected, strict=True))
            row = {"texts": name, "decoder": decoder, "questions": len(asked), "exact": same}
            row |= {"exact_share": same / len(asked), "mean_accepted_tokens": sum(map(len, got)) / passes}
            rows.append(row)
            print(row, flush=True)
    report.write({**report.environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A model, read in float32.", required=True)
    flags.DEFINE_string("spec_bench", None, "Spec-Bench's question.jsonl.", required=True)
    flags.DEFINE_integer("questions", 0, "Of each group; 0 takes all.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 128, "Of each answer.", lower_bound=1)
    flags.DEFINE_string("output", None, "A JSON file.", required=True)
    cli.run(main)
