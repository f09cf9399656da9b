"""Exactness on Spec-Bench's questions: whether every decoder generates the tokens of `autoregressive`.

    python -m benchmarks.exactness --model=stories260k --spec_bench=question.jsonl --output=exactness.json

Every decoder completes the first turn of every question, truncated to the context, greedily and with sampling. Its
tokens are compared with those of `autoregressive` under the same settings.
"""

import sys
from collections.abc import Sequence

from absl import flags
from rich.progress import track

from benchmarks import questions, report
from benchmarks.questions import Question
from msn_jax import cli
from msn_jax.decode import engine, models
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request

_SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "sampled, filtered": {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}
_BATCH_SIZE = 16


def generate(
    model: Model, decoder_name: str, prompts: Sequence[Question], settings: dict
) -> tuple[list[list[int]], int]:
    """The new tokens of every question, and the total number of forward passes."""
    decoder = Decoder(model, decoder_name, draft=model if decoder_name == "draft_model" else None)
    completions: dict[int, list[int]] = {}
    forward_passes = 0
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    batches = [by_length[start : start + _BATCH_SIZE] for start in range(0, len(by_length), _BATCH_SIZE)]
    for batch in track(batches, decoder_name, disable=not sys.stdout.isatty()):
        requests = [Request("", prompts[i].max_new_tokens, seed=7, sample=i, **settings) for i in batch]
        session = decoder.start([prompts[i].ids for i in batch], requests, _BATCH_SIZE)
        session.run()
        for index, (tokens, accept_lengths) in zip(batch, session.output_tokens(), strict=True):
            completions[index] = tokens
            forward_passes += len(accept_lengths)
    return [completions[index] for index in range(len(prompts))], forward_passes


def main() -> None:
    """Decodes, compares and writes the report."""
    args = flags.FLAGS
    model = models.load(args.model, "float32")
    spec_bench = questions.read_spec_bench(args.spec_bench, args.questions)
    prompts = questions.encode(model, spec_bench, args.max_new_tokens)
    rows = []
    for sampling, settings in _SAMPLING.items():
        reference, _ = generate(model, "autoregressive", prompts, settings)
        for decoder in engine.DECODERS[1:]:
            completions, forward_passes = generate(model, decoder, prompts, settings)
            exact = sum(tokens == expected for tokens, expected in zip(completions, reference, strict=True))
            row = {"sampling": sampling, "decoder": decoder, "questions": len(prompts), "exact": exact}
            new_tokens = sum(map(len, completions))
            row |= {"exact_share": exact / len(prompts), "mean_accepted_tokens": new_tokens / forward_passes}
            rows.append(row)
            print(row, flush=True)
    report.write({**report.environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A model; it is loaded in float32.", required=True)
    flags.DEFINE_string("spec_bench", None, "Spec-Bench's question.jsonl.", required=True)
    flags.DEFINE_integer("questions", 0, "Questions per group; 0 takes all.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 128, "Limit per question, in tokens.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file to write.", required=True)
    cli.run(main)
