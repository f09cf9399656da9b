"""From a workdir to outputs: the API, the program, and the input that it refuses."""

import dataclasses
import json
import shutil

import commands
import jax
import numpy as np
import pytest
import tiny

import msn_jax
from msn_jax import convert, cpu
from msn_jax.cli import InputError
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import display, drafters, engine, loop, models, programs
from msn_jax.decode import tree as trees
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request, make_sampler
from msn_jax.decode.session import RequestState

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESSAGES = [{"role": "user", "content": "a"}]
PROMPTS = ["the cat", [{"role": "user", "content": "sat on"}], "a", "mat " * 6]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate") / "run"
    tiny.write_model(directory, max_length=64)
    return directory


@pytest.fixture(scope="module")
def exported(workdir):
    convert.convert(str(workdir), str(workdir.parent / "exported"))
    return workdir.parent / "exported"


@pytest.fixture(scope="module")
def model(workdir):
    return msn_jax.load(workdir)


@pytest.fixture(scope="module")
def reference(model):
    return msn_jax.generate(model, PROMPTS, "autoregressive", max_new_tokens=20)


@pytest.mark.parametrize("decoder", ["jacobi", "prompt_lookup", "tr_jacobi"])
def test_every_decoder_gives_the_same_outputs(model, reference, decoder):
    outputs = msn_jax.generate(model, PROMPTS, decoder, max_new_tokens=20)
    assert [output.tokens for output in outputs] == [output.tokens for output in reference]
    for index, output in enumerate(outputs):
        assert (output.index, output.prompt, output.decoder) == (index, PROMPTS[index], decoder)
        assert sum(output.accept_lengths) == output.new_tokens == len(output.tokens)
        assert len(output.accept_lengths) == output.forward_passes
        assert output.wall_time > 0


@pytest.mark.parametrize("source", ["workdir", "hugging_face"])
@pytest.mark.parametrize(("decoder", "batch_size", "cache_bytes"), [("tr_jacobi", 3, 1 << 40), ("auto", 1, 0)])
def test_programs_compiled_while_the_weights_are_read_are_used(
    workdir, exported, reference, source, decoder, batch_size, cache_bytes, monkeypatch
):
    monkeypatch.setattr(cpu, "_CACHE_BYTES", cache_bytes)
    requests = {str(i): Request(prompt, 20, sample=i) for i, prompt in enumerate(PROMPTS[:batch_size])}
    loop.prefill.clear_cache()
    loop.decode.clear_cache()

    def compile_first(outline):
        engine.compile_first(Decoder(outline, decoder), requests, batch_size)

    model = models.load(workdir if source == "workdir" else exported, while_reading=compile_first)
    assert ("rows_q_k_v" in model.params["layer_0"]["attention"]) == (cache_bytes == 0)
    engine.wait_for_compilation(model)
    with programs.recorded() as compilations:
        decoders = Decoder(model, decoder)
        session = decoders.start(
            [engine.encode(decoders, request, "") for request in requests.values()], list(requests.values()), batch_size
        )
        session.run(1)
    assert {"jit(prefill)", "jit(decode)"}.isdisjoint(compilations)
    outputs = msn_jax.generate(model, list(requests.values()), decoder, batch_size=batch_size)
    assert [output.tokens for output in outputs] == [output.tokens for output in reference[:batch_size]]


def test_batches_equal_single_prompts(model, reference):
    outputs = msn_jax.generate(model, PROMPTS, "tr_jacobi", max_new_tokens=20, batch_size=3)
    assert [output.tokens for output in outputs] == [output.tokens for output in reference]


def test_sampled_texts_depend_only_on_the_seed(model):
    def sample(decoder, seed, batch_size=1):
        outputs = msn_jax.generate(model, PROMPTS, decoder, 20, temperature=1.0, seed=seed, batch_size=batch_size)
        return [output.tokens for output in outputs]

    assert sample("autoregressive", 0) == sample("tr_jacobi", 0) == sample("jacobi", 0, batch_size=4)
    assert sample("tr_jacobi", 0) != sample("tr_jacobi", 1)


@pytest.mark.parametrize("seed", [0, 7, 3_000_000_000, 2**32 + 7, 2**63 - 1])
def test_all_bits_of_a_seed_count(seed):
    requests = [Request("", temperature=1.0, seed=seed, sample=number) for number in range(2)]
    keys = jax.random.key_data(make_sampler(requests).keys)
    with jax.enable_x64(True):
        expected = [jax.random.key_data(jax.random.fold_in(jax.random.key(seed), i)) for i in range(2)]
    np.testing.assert_array_equal(keys, expected)


@pytest.mark.parametrize("seed", [3_000_000_000, 2**63 - 1])
def test_large_seeds_work(model, seed):
    [output] = msn_jax.generate(model, ["the cat"], max_new_tokens=2, temperature=1.0, seed=seed)
    assert output.new_tokens >= 1


@pytest.mark.parametrize("decoder", ["autoregressive", "tr_jacobi"])
@pytest.mark.parametrize("remaining", [1, 4])
def test_an_output_ends_with_the_context(model, decoder, remaining):
    prompt = "\x01" * (model.cfg.max_length - remaining - 1)  # bytes that the vocabulary has no longer pieces for
    assert len(model.tokenizer.encode(prompt)) == len(prompt)  # and one BOS
    [output] = msn_jax.generate(tiny.endless(model), [prompt], decoder, max_new_tokens=100)
    assert (output.new_tokens, output.finish_reason) == (remaining, "length")
    with pytest.raises(InputError, match=r"prompts\[0\]: 64 tokens leave no space"):
        msn_jax.generate(model, [prompt + "\x01" * remaining], decoder)


def test_a_text_outgrows_its_bucket(model, monkeypatch):
    whole = msn_jax.generate(model, PROMPTS, "tr_jacobi", max_new_tokens=40)
    tiny.small_caches(monkeypatch, 8)
    assert [a.tokens for a in msn_jax.generate(model, PROMPTS, "tr_jacobi", 40)] == [a.tokens for a in whole]


def test_stop_token_is_counted_but_not_shown(model):
    tokens = [*model.tokenizer.encode("cat"), model.tokenizer.eos_id]
    row = RequestState(model, Request("the"))
    assert row.append(tokens, [1, len(tokens) - 1], done=True) == "cat"
    assert (row.text, row.finish_reason, row.tokens) == ("cat", "eos", tokens)


def test_colours_change_with_every_pass(model, reference):
    tokens = model.tokenizer.encode("three and four is seven")
    passes = [3, 1, len(tokens) - 4]
    words = "three and four is seven"
    output = dataclasses.replace(reference[0], text=words, tokens=tokens, accept_lengths=passes)
    text = display.coloured(model.tokenizer, output)
    assert text.plain == words
    runs = [text.plain[span.start : span.end] for span in text.spans]
    assert runs == [model.tokenizer.decode(part) for part in (tokens[:3], tokens[3:4], tokens[4:])]
    first, second, third = (span.style for span in text.spans)
    assert first == third != second


def test_a_character_is_shown_once_it_is_complete(model, reference):
    text = "a€b\r\ufffd"  # not in the vocabulary, so a token for each byte
    tokens = model.tokenizer.encode(text)
    output = dataclasses.replace(reference[0], text=text, tokens=tokens, accept_lengths=[1] * len(tokens))
    shown = display.coloured(model.tokenizer, output)
    runs = [shown.plain[span.start : span.end] for span in shown.spans]
    assert "".join(runs) == shown.plain == "a€b\ufffd"  # rich drops the \r
    assert "€" in runs


def test_the_parts_of_the_passes_join_to_the_text(model, reference):
    text = "a€b cat"
    tokens = model.tokenizer.encode(text)
    each = [1] * len(tokens)
    output = dataclasses.replace(reference[0], text=text, tokens=tokens, accept_lengths=each, finish_reason="length")
    parts = display.by_pass(model.tokenizer, output)
    assert len(parts) == len(tokens) and "".join(parts) == text
    assert parts[parts.index("€") - 2 :][:4] == ["", "", "€", "b"]  # three bytes
    ended = dataclasses.replace(
        output, tokens=[*tokens, model.tokenizer.eos_id], accept_lengths=[*each, 1], finish_reason="eos"
    )
    assert display.by_pass(model.tokenizer, ended) == [*parts, ""]
    stopped = dataclasses.replace(output, text="a€", finish_reason="stop")  # before "b c"
    assert display.by_pass(model.tokenizer, stopped) == [*parts[: parts.index("b")], *[""] * (len(parts) - 4)]
    broken = dataclasses.replace(output, text="a\ufffd", tokens=tokens[:2], accept_lengths=[1, 1])
    assert display.by_pass(model.tokenizer, broken) == ["a", "\ufffd"]  # it ends within a character
    nothing = dataclasses.replace(output, text="", tokens=[], accept_lengths=[])
    assert display.by_pass(model.tokenizer, nothing) == []


def test_what_is_shown_is_the_text_itself(model, reference, capsys):
    tokens = model.tokenizer.encode("x :warning: [bold]y")
    text, passes = "x :warning: [bold]y", [len(tokens)]
    output = dataclasses.replace(reference[0], prompt=":cat: [red]", text=text, tokens=tokens, accept_lengths=passes)
    display.show(model.tokenizer, output)
    assert capsys.readouterr().out == ":cat: [red]x :warning: [bold]y\n"


@pytest.mark.parametrize(
    ("stop", "expected"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (("a",), ("a",))]
)
def test_every_form_of_stop_strings(model, stop, expected):
    assert Request("x", stop=stop).stop == expected
    Request("x", stop=stop).check("")
    request = Request("the cat", 12, stop=expected)
    [generation] = msn_jax.generate(model, [request])
    assert msn_jax.generate(model, ["the cat"], max_new_tokens=12, stop=stop)[0].tokens == generation.tokens
    *_, chunk = engine.stream(model, "the cat", max_new_tokens=12, stop=stop)
    assert chunk.generation.tokens == generation.tokens


def test_the_program_writes_the_outputs_of_the_api(workdir, reference, tmp_path):
    lines = [{"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = [f"--model={workdir}", "--max_new_tokens=20"]
    results = commands.run(
        "msn_jax.generate",
        [
            [*common, "--prompts=prompts.jsonl", "--output=outputs.jsonl", "--batch_size=2"],
            [*common, "--prompt=the cat"],
        ],
        tmp_path,
    )
    assert [(code, error) for code, _, error in results] == [(0, ""), (0, "")]
    outputs = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert [output["tokens"] for output in outputs] == [output.tokens for output in reference]
    assert set(outputs[0]) == {
        *("index", "prompt", "text", "tokens", "new_tokens", "forward_passes", "accept_lengths", "wall_time"),
        *("passes_by_width", "decoder", "finish_reason"),
    }
    assert outputs[1]["messages"] == PROMPTS[1]
    assert results[1][1] == reference[0].text + "\n"


def test_the_program_accepts_every_setting(workdir, model, tmp_path):
    settings = {"max_new_tokens": 24, "temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 2**40}
    [whole] = msn_jax.generate(model, PROMPTS[:1], **settings)
    stop = whole.text[9:12]
    [stopped] = msn_jax.generate(model, PROMPTS[:1], **settings, stop=stop)
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"prompt": PROMPTS[0], **settings, "stop": [stop]}) + "\n" + json.dumps({"prompt": PROMPTS[0]})
    )
    flags = [f"--{name}={value}" for name, value in settings.items()]
    shutil.copytree(workdir, tmp_path / "draft")
    common = [f"--model={workdir}", f"--prompt={PROMPTS[0]}"]
    results = commands.run(
        "msn_jax.generate",
        [
            [*common, *flags],
            [*common, *flags, "--stop=never generated", f"--stop={stop}"],
            [*common, *flags, "--stream"],
            [*common, *flags, "--stream", f"--stop={stop}", "--decoder=draft_model", "--draft=draft"],
            [*common, *flags, "--data=4", "--tensor=2", "--batch_size=4", "--decoder=draft_model", "--draft=draft"],
            [f"--model={workdir}", "--prompts=own.jsonl", "--batch_size=2", *flags, "--top_k=1"],
        ],
        tmp_path,
    )
    assert [(code, error) for code, _, error in results] == [(0, "")] * 6
    printed = [output for _, output, _ in results]
    assert printed[:5] == [one.text + "\n" for one in (whole, stopped, whole, stopped, whole)]
    first, second = map(json.loads, printed[5].splitlines())
    assert (first["text"], first["finish_reason"], first["index"]) == (stopped.text, "stop", 0)
    [greedy] = msn_jax.generate(model, PROMPTS[:1], max_new_tokens=24)
    assert (second["tokens"], second["index"]) == (greedy.tokens, 1)


PROMPT_FILES = {
    "bad": '{"prompt": "a"}\n{"prompt": \n',
    "form": '{"text": "a"}\n',
    "role": '{"messages": [{"role": "wizard", "content": "a"}]}\n',
    "none": "\n",
    "half": '{"prompt": "a\\ud800"}\n',
    "stop": '{"prompt": "a", "stop": "\\ud800"}\n',
    "tools": '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}\n',
    "image": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
    "settings": '{"prompt": "a", "top_p": "high"}\n',
    "huge": '{"prompt": "a", "temperature": 1' + "0" * 400 + "}\n",
}


def test_invalid_flags_are_one_line_and_exit_code_2(workdir, tmp_path):
    model = f"--model={workdir}"
    cases = [
        ([model], "--prompt"),
        ([model, "--prompt=a", "--prompts=bad.jsonl"], "--prompt"),
        ([model, "--prompt="], "--prompt: is empty"),
        (["--model=", "--prompt=a"], "--model: is empty"),
        ([model, "--prompt=a", "--tree="], "--tree: is empty"),
        ([model, "--prompt=a", "--stream", "--batch_size=0"], "batch_size=0: must be from 1 to"),
        ([model, "--prompt=a", f"--batch_size={10**11}"], "batch_size=100000000000: must be"),
        ([model, "--prompt=" + "cat " * 100], "context of 64"),
        ([model, "--prompt=a", "--decoder=oracle"], "--decoder=oracle"),
        ([model, "--prompt=a", "--seed=-1"], "seed=-1"),
        ([model, "--prompt=a", "--max_new_tokens=0"], "max_new_tokens=0"),
        ([model, "--prompt=a", "--temperature=-1"], "--temperature=-1"),
        ([model, "--prompt=a", "--top_k=-1"], "--top_k=-1"),
        ([model, "--prompt=a", "--top_p=0"], "--top_p=0"),
        ([model, "--prompt=a", "--min_p=1.5"], "--min_p=1.5"),
        ([model, "--prompt=a", "--stop="], "--stop="),
        ([model, "--prompt=a", "--stream", "--output=outputs.jsonl"], "--stream"),
        ([model, "--prompt=a", "--data=3"], "data=3"),
        ([model, "--prompt=a", "--data=4", "--tensor=2", "--stream"], "batch_size=1"),
        ([model, "--prompt=a\udcff"], "--prompt: the text has a lone surrogate"),
        ([model, "--prompt=a", "--stop=a\udcff"], "--stop="),
        (["--prompt=a"], "--model"),
    ]
    commands.assert_refused("msn_jax.generate", cases, tmp_path)


def test_invalid_prompt_files_are_one_line_and_exit_code_2(workdir, tmp_path):
    for name, content in PROMPT_FILES.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    model = f"--model={workdir}"
    cases = [
        ([model, "--prompts=settings.jsonl"], "settings.jsonl:1: top_p='high'"),
        ([model, "--prompts=huge.jsonl"], "huge.jsonl:1: temperature="),
        ([model, "--prompts=missing.jsonl"], "missing.jsonl"),
        ([model, "--prompts=none.jsonl"], "none.jsonl: has no prompts"),
        ([model, "--prompts=bad.jsonl"], "bad.jsonl:2: not JSON"),
        ([model, "--prompts=form.jsonl"], "form.jsonl:1: must be"),
        ([model, "--prompts=role.jsonl"], "role.jsonl:1: message 1: unknown role 'wizard'"),
        ([model, "--prompts=half.jsonl"], "half.jsonl:1: the text has a lone surrogate"),
        ([model, "--prompts=stop.jsonl"], "stop.jsonl:1: stop="),
        ([model, "--prompts=tools.jsonl"], "tools.jsonl:1: tools: this tokenizer has no chat template"),
        ([model, "--prompts=image.jsonl"], "image.jsonl:1: message 1 (user): content part 1 is of type 'image'"),
    ]
    commands.assert_refused("msn_jax.generate", cases, tmp_path)


def test_other_invalid_files_are_one_line_and_exit_code_2_and_stay(workdir, tmp_path):
    (tmp_path / "role.jsonl").write_text(PROMPT_FILES["role"])
    (tmp_path / "tree.json").write_text("{}")
    (tmp_path / "twice.jsonl").write_text('{"prompt": "a"}\n' * 2)
    (tmp_path / "given.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "partly.jsonl.partial").write_text('{"provenance": {}}\n')
    trees.save(trees.chain(trees.RETRIEVAL, 2), tmp_path / "retrieval.json")
    (tmp_path / "outputs.jsonl").write_text("precious")
    shutil.copytree(workdir, tmp_path / "other")
    tokenizers.train(["some other text " * 9, "and more of it"], 290, tmp_path / "other" / "tokenizer.model")
    model = f"--model={workdir}"
    cases = [
        ([model, "--prompt=a", "--decoder=jacobi", "--tree=retrieval.json"], "tree: has retrieval nodes"),
        (
            ["--model=none", "--prompt=a", "--output=no/outputs.jsonl"],
            "--output=no/outputs.jsonl: no is not a directory",
        ),
        (["--model=none", "--prompt=a", f"--output={tmp_path}"], "is a directory"),
        ([model, "--prompt=a", f"--draft={workdir}"], "does not use a draft model"),
        ([model, "--prompts=given.jsonl", "--output=given.jsonl"], "would replace the input given.jsonl"),
        ([model, "--prompts=twice.jsonl", "--output=partly.jsonl"], "partly.jsonl.partial: left by an interrupted run"),
        ([model, "--prompt=a", "--tree=tree.json"], "tree.json: not a tree file"),
        ([model, "--prompts=role.jsonl", "--output=outputs.jsonl"], "role.jsonl:1"),
        ([f"--model={tmp_path}", "--prompt=a"], "not a training workdir"),
        (["--model=other", "--prompt=a"], "vocabulary of 290"),
    ]
    commands.assert_refused("msn_jax.generate", cases, tmp_path)
    assert (tmp_path / "outputs.jsonl").read_text() == "precious"
    assert (tmp_path / "partly.jsonl.partial").read_text() == '{"provenance": {}}\n'


def test_the_api_refuses_invalid_input(model):
    with pytest.raises(InputError, match=r"prompts\[1\]: empty prompt"):
        engine.generate_iter(Decoder(model, "jacobi"), ["a", ""], Request(""), 1, ["prompts[0]", "prompts[1]"])
    with pytest.raises(InputError, match="give a list of prompts"):
        msn_jax.generate(model, "cat sat")
    with pytest.raises(InputError, match=r"prompts\[0\]: the text has a lone surrogate"):
        msn_jax.generate(model, ["a\ud800"])
    with pytest.raises(InputError, match=r"prompts\[0\]: is of type dict"):
        msn_jax.generate(model, [{"role": "user", "content": "a"}])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = msn_jax.nothing


@pytest.mark.parametrize(
    "setting",
    [
        *({"seed": value} for value in (-1, 2**63, 1.0, True)),
        *({"temperature": value} for value in (-0.1, float("nan"), float("inf"), 10**400, 1e39, "1", None)),
        *({"top_p": value} for value in (0, 1.01, float("nan"))),
        *({"min_p": value} for value in (-0.1, 1.01, float("nan"))),
        *({"top_k": value} for value in (-1, 2**31, 1.5)),
        *({"max_new_tokens": value} for value in (0, 2**31, 2.0)),
        *({"stop": value} for value in ("", ["a", ""], [1], "\ud800", ["a", "b\udfff"])),
        *({"parse_special_tokens": value} for value in (1, "yes", None)),
    ],
    ids=str,
)
def test_impossible_settings(model, setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        msn_jax.generate(model, ["a"], **setting)


@pytest.mark.parametrize(
    ("decoder", "tree", "reason"),
    [
        ("autoregressive", trees.chain(trees.JACOBI, 1), "jacobi nodes"),
        ("autoregressive", trees.chain(trees.NOISE, 1), "noise nodes"),
        ("jacobi", trees.tr_jacobi_tree([(0,)], [1]), "retrieval nodes"),
        ("prompt_lookup", trees.tr_jacobi_tree([(0,)], [1]), "jacobi nodes"),
        ("tr_jacobi", trees.build([(0, trees.JACOBI, 320)]), "the vocabulary has 320 tokens"),
    ],
)
def test_a_tree_must_fit_its_decoder_and_model(model, decoder, tree, reason):
    with pytest.raises(InputError, match=reason):
        msn_jax.generate(model, ["a"], decoder, tree=tree)


@pytest.mark.parametrize("decoder", drafters.DEFAULT_TREES)
def test_a_decoder_takes_its_own_tree(model, reference, decoder):
    [output] = msn_jax.generate(model, PROMPTS[:1], decoder, 20, tree=drafters.DEFAULT_TREES[decoder])
    assert output.tokens == reference[0].tokens
