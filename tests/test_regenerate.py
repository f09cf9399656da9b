"""`python -m msn_jax.regenerate`: training data with the model's own responses."""

import json

import commands
import jax
import pytest
import tiny_config

import msn_jax
from msn_jax import train
from msn_jax.cli import InputError
from msn_jax.data import record_files
from msn_jax.regenerate import prompt_of, to_record

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("regenerate")
    tiny_config.write_data(directory / "train.jsonl")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        assert train.train(tiny_config.config_in(directory), directory / "model")
    return directory


def test_responses_are_those_of_the_model_in_the_order_of_the_data(directory):
    lines = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    (directory / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--model=model", "--data=some.jsonl", "--max_new_tokens=20", "--batch_size=4"]
    results = commands.run(
        "msn_jax.regenerate",
        [
            [*flags, "--keep_truncated", "--output=all.jsonl"],
            [*flags, "--output=ended.jsonl"],
            [*flags, "--prompts=some.jsonl", "--output=x.jsonl"],
            [*flags, "--output=some.jsonl"],
        ],
        directory,
    )
    assert [code for code, _, _ in results] == [0, 0, 2, 2]
    assert "give either --data=FILE" in results[2][2]
    assert "would replace the input some.jsonl" in results[3][2]
    prompts = [json.loads(line)["prompt"] for line in lines]
    expected = msn_jax.generate(msn_jax.load(directory / "model"), prompts, max_new_tokens=20)
    for name, kept in (("all", expected), ("ended", [one for one in expected if one.finish_reason == "eos"])):
        records, _ = record_files.read(directory / f"{name}.jsonl")
        assert [(record["prompt"], record["response"]) for record in records] == [
            (one.prompt, one.text) for one in kept if one.text
        ]
    assert len(expected) > 0


def test_the_prompt_ends_before_the_first_response_to_learn():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    assert prompt_of({"messages": turns}) == turns[:2]
    turns[2]["train"] = False
    assert prompt_of({"messages": turns}) == turns[:4]
    with pytest.raises(InputError, match="chats:3: has only 'text', without a prompt"):
        prompt_of({"text": "a", "location": "chats:3"})


def test_a_chat_keeps_its_tools():
    generation = {"messages": [{"role": "user", "content": "hi"}], "text": "hello", "finish_reason": "eos"}
    assert json.loads(to_record(generation, [{"name": "f"}], False)) == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "tools": [{"name": "f"}],
    }
    assert to_record(generation | {"finish_reason": "length"}, None, False) is None
    assert to_record(generation | {"text": ""}, None, True) is None
