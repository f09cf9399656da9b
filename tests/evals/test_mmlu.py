"""MMLU: prompts, log-likelihoods against a plain forward pass, and an evaluation that is interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import runs
import tiny

from msn_jax import llama, masks
from msn_jax.evals import log_likelihoods, mmlu

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
CHOICES = [" A", " B", " C", " D"]


@pytest.fixture
def data(tmp_path):
    for split, count in (("dev", 6), ("test", 5)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject in ("the_cat", "a_dog"):
            lines = [f'" {subject} {split} {i}, ""sat""",on,the,mat,{i},{i % 4}\n' for i in range(count)]
            (tmp_path / "data" / split / f"{subject}_{split}.csv").write_text(HEADER + "".join(lines))
    return str(tmp_path / "data")


def test_a_prompt_has_the_first_five_questions_of_dev(data):
    question = mmlu.read(data)[7]
    assert (question.id, question.group, question.reference) == ("the_cat/2", "the_cat", {"answer": "2"})
    title, *asked = question.prompt.split("\n\n")
    assert title == "The following are multiple choice questions (with answers) about the cat."
    assert len(asked) == 6
    assert asked[1] == 'the_cat dev 1, "sat"\nA. on\nB. the\nC. mat\nD. 1\nAnswer: B'
    assert asked[5] == 'the_cat test 2, "sat"\nA. on\nB. the\nC. mat\nD. 2\nAnswer:'


def plain(model, context, continuation):
    """The log-likelihood from one forward pass over the whole text, without cache or padding."""
    start = [*model.tokenizer.start_ids, *model.tokenizer.encode(context)]
    ids = [*model.tokenizer.start_ids, *model.tokenizer.encode(context + continuation)]
    count = len(ids) - len(start)
    ids = ids[-model.cfg.max_length - 1 :]
    tokens = jnp.asarray([ids[:-1]])
    positions = jnp.arange(len(ids) - 1)[None]
    hidden = llama.forward(model.params, model.cfg, tokens, positions, masks.causal(len(ids) - 1)).hidden
    log_probs = jax.nn.log_softmax(llama.unembed(model.params, model.cfg, hidden))[0, -count:]
    return float(sum(log_probs[i, ids[len(ids) - count + i]] for i in range(count)))


@pytest.mark.parametrize("continuations", [CHOICES, [" the cat sat on", "t", "\x01\x02", " seven"]])
@pytest.mark.parametrize("max_length", [512, 64])  # the second one cuts the contexts
def test_log_likelihoods_equal_those_of_a_plain_forward_pass(continuations, max_length):
    model = tiny.model(max_length)
    shots = "the cat sat on the mat, and a dog sat on the cat: " * 4
    contexts = [shots + text for text in ("three and", "four is seven, five and", "six is", "mat", "")] + [
        "a dog sat on the mat"
    ]
    scores = dict(log_likelihoods.score(model, contexts, continuations, batch_size=4))
    assert sorted(scores) == list(range(len(contexts)))
    for number, context in enumerate(contexts):
        expected = [plain(model, context, continuation) for continuation in continuations]
        np.testing.assert_allclose(scores[number], expected, atol=2e-5)


def test_the_shared_tokens_run_once(monkeypatch):
    filled = []
    prefix_cache = log_likelihoods._prefix_cache
    monkeypatch.setattr(
        log_likelihoods, "_prefix_cache", lambda model, ids: filled.append(len(ids)) or prefix_cache(model, ids)
    )
    model = tiny.model(512)
    shots = "the cat sat on the mat: " * 8
    list(log_likelihoods.score(model, [f"{shots}{text} A" for text in "\x01\x02\x03"], CHOICES, batch_size=2))
    assert filled == [len(model.tokenizer.start_ids) + len(model.tokenizer.encode(shots))]


def test_an_interrupted_evaluation_continues(data, tmp_path, monkeypatch):
    model = tiny.model(512)
    whole = runs.run("mmlu", data, model, tmp_path / "whole", batch_size=2)
    output = tmp_path / "killed"
    runs.killed_after(6, monkeypatch, runs.run, "mmlu", data, model, output, batch_size=2)
    assert runs.run("mmlu", data, model, output, batch_size=3) == whole
    samples = {sample["question_id"]: sample for sample in runs.samples(output)}
    assert len(samples) == 10
    for sample in samples.values():
        best = int(np.argmax(sample["log_likelihoods"]))
        assert sample["prediction"] == "ABCD"[best]
        assert sample["correct"] == (best == int(sample["question_id"].split("/")[1]) % 4)
    accuracy = [np.mean([s["correct"] for s in samples.values() if s["group"] in group]) for group in _GROUPS]
    assert [(row["subject"], row["questions"], row["accuracy"]) for row in whole] == [
        ("a_dog", 5, accuracy[0]),
        ("the_cat", 5, accuracy[1]),
        ("all", 10, accuracy[2]),
    ]


_GROUPS = (["a_dog"], ["the_cat"], ["a_dog", "the_cat"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "a_dog_test.csv:1: has no such header: expected MMLU's CSV with the header question,choice0"),
        ("q,a,b,c,d,0\n", "a_dog_test.csv:1: has no such header"),
        (HEADER, "a_dog_test.csv: has no questions"),
        (HEADER + "q,a,b,c,d\n", "a_dog_test.csv:2: has 5 columns"),
        (HEADER + "q,a,b,c,d,4\n", "a_dog_test.csv:2: the answer is '4', not 0, 1, 2 or 3"),
        (HEADER + 'q,"a,b,c,d,1\n', "a_dog_test.csv:2: not CSV"),
    ],
)
def test_a_bad_file_is_refused(data, tmp_path, content, words):
    (tmp_path / "data" / "test" / "a_dog_test.csv").write_text(content)
    assert words in refusals.refusal(mmlu.read, data)


def test_a_missing_or_short_file_is_refused(data, tmp_path):
    dev = tmp_path / "data" / "dev" / "a_dog_dev.csv"
    dev.write_text(HEADER + "q,a,b,c,d,1\n")
    assert "a_dog_dev.csv: has 1 questions, fewer than the 5 shots" in refusals.refusal(mmlu.read, data)
    dev.unlink()
    assert "a_dog_dev.csv: cannot be read (No such file or directory)" in refusals.refusal(mmlu.read, data)
    assert "has no test/SUBJECT_test.csv" in refusals.refusal(mmlu.read, str(tmp_path))
