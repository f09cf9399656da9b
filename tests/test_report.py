"""The page of `python -m msn_jax.report`, from run directories as the programs write them."""

import html.parser
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import refusals

from msn_jax import report
from msn_jax.reports import answers, page, plots, sources

ROOT = Path(__file__).parents[1]
ABOUT = {
    "hardware": "1 x cpu, 2 CPU cores, a processor",
    "load_average": 0.25,
    "versions": {"python": "3.11.2", "jax": "0.10.2"},
    "commit": "0123456789ab",
    "command": "python -m msn_jax.some --flag=x",
    "date": "2026-01-02",
}
HOSTILE = "</script><script>alert(1)</script><img src=http://x.example/y onerror=alert(2)>&amp; $x$ -->"


class Page(html.parser.HTMLParser):
    """What a browser would see of a page."""

    VOID = frozenset(("meta", "link", "input", "img", "br", "path", "use"))

    def __init__(self, content: bytes):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # (tag, name, value)
        self.tables: list[list[list[str]]] = []
        self.answers: list[list[str]] = []  # the texts of the passes
        self.texts: dict[str, list[str]] = {}  # by tag
        self._open: list[str] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert not self._open  # every element was closed

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "div" and ("class", "text") in attributes:
            self.answers.append([])
        elif tag == "i":
            self.answers[-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        elif self._open and self._open[-1] == "i":
            self.answers[-1][-1] += data

    def rows(self, *heading: str) -> list[list[str]]:
        """The rows of the first table whose first row begins with these words."""
        return next(table for table in self.tables if table[0][: len(heading)] == [*heading])[1:]


def write(directory: Path, content: dict, samples: list[dict] | None = None, name: str = "report.json") -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if samples is not None:
        lines = [json.dumps(sample) + "\n" for sample in ({"suite": content["suite"]}, *samples)]
        (directory / "samples.jsonl").write_text("".join(lines))
    return str(directory)


def rendered(tmp_path: Path, *paths: str) -> Page:
    size = report.write(paths, str(tmp_path / "page.html"))
    content = (tmp_path / "page.html").read_bytes()
    assert size == len(content) < 3_000_000
    return Page(content)


def spec_bench(directory: Path, model: str = "runs/one", text: str = "Ein Tag", speedup: float = 1.52) -> str:
    rows, samples = [], []
    for group in ("mt_bench", "qa", "all"):
        for decoder, value in (("autoregressive", 1.0), ("auto", speedup)):
            row = {"group": group, "decoder": decoder, "questions": 2}
            row |= {"speedup": value, "speedup_stderr": 0.04, "mean_accepted_tokens": 1.75}
            row["accepted_by_position"] = [] if decoder == "autoregressive" else [0.5, 0.25]
            rows.append(row | {"mean_accepted_tokens_stderr": None, "tokens_per_second": 123.4, "exact": 1.0})
            if group != "all":
                passes = [[*text], ["", text]] if decoder == "autoregressive" else [[text], [text[:3], "", text[3:]]]
                lengths = [1 if decoder == "autoregressive" else 3] * sum(map(len, passes))
                sample = {"question_id": 81, "group": group, "decoder": decoder, "turns": [text.strip()] * 2}
                samples.append({**sample, "passes": passes, "accept_lengths": lengths})
    content = {**ABOUT, "model": model, "dtype": "float32", "suite": "spec_bench", "questions": 4, "of": 480}
    return write(directory, {**content, "settings": {"seed": 0, "chat": None}, "rows": rows}, samples)


def gsm8k(directory: Path, model: str = "runs/one", share: float = 0.25) -> str:
    row = {"decoder": "auto", "questions": 4, "strict_match": share, "strict_match_stderr": 0.0125}
    row["mean_accepted_tokens"] = 1.25
    sample = {"question_id": 3, "group": "gsm8k", "decoder": "auto", "sample": 0, "text": "7", "tokens": [7]}
    content = {**ABOUT, "model": model, "dtype": "float32", "suite": "gsm8k", "questions": 4, "of": 1319}
    return write(directory, {**content, "settings": {}, "rows": [row]}, [{**sample, "forward_passes": 1}])


def ablation(directory: Path) -> str:
    rows, runs = [], []
    for kind, length, loss, tokens in (("none", 0, 1.601, 1.1), ("ahead", 4, 1.625, 1.66), ("uniform", 4, 1.64, 1.4)):
        setting = {"kind": kind, "length": length}
        for seed in (0, 1):
            runs.append(
                {"setting": setting, "seed": seed, "clean_loss": loss + seed / 10, "noise_accuracy": [0.5, 0.2]}
            )
        row = {**setting, "decoder": "jacobi", "tree": None, "seeds": 2, "clean_loss": loss, "clean_loss_stderr": 0.002}
        rows.append(row | {"mean_accepted_tokens": tokens, "mean_accepted_tokens_stderr": 0.03, "exact_share": 1.0})
    content = {"ablation": "paper", "factors": ["kind", "length"], "runs": runs, "rows": rows}
    return write(directory, {**ABOUT, **content})


def calibration(directory: Path, name: str = "tree.json") -> str:
    bench = [("width 4", 4, 210.5), ("autoregressive", 1, 140.0)]
    accuracy = [
        {"source": "jacobi", "rank": 0, "match_length": None, "accuracy": [0.3125, 0.1]},
        {"source": "retrieval", "rank": 0, "match_length": "8+", "accuracy": [0.75, None]},
    ]
    content = {
        **ABOUT,
        "decoder": "tr_jacobi",
        "model": "runs/one",
        "dtype": "float32",
        "prompts": 4,
        "chosen": "width 4",
        "benchmark": [{"tree": tree, "width": width, "tokens_per_second": rate} for tree, width, rate in bench],
        "widths": [{"width": width, "milliseconds": 5.0, "estimated_tokens_per_second": 150.0} for width in (1, 4)],
        "draft_accuracy": accuracy,
        "min_match": 2,
        "nodes": [{"parent": d - 1, "source": "jacobi", "rank": 0, "depth": d, "acceptance": 0.4 / d} for d in (1, 2)],
    }
    return write(directory, content, name=name)


def demo(directory: Path) -> str:
    rows = [
        {"model": model, "decoder": decoder, "mean_accepted_tokens": tokens, "speedup": tokens, "exact_share": 1.0}
        for model in ("sft", "msn")
        for decoder, tokens in (("autoregressive", 1.0), ("jacobi", 1.375))
    ]
    content = {
        **{
            "hardware": "1 x cpu",
            "versions": {"jax": "0.10.2", "commit": "fedcba987654"},
            "seconds": 509.6,
            "steps": 700,
        },
        "models": {name: {"clean_loss": 1.9876, "noise_accuracy": [0.25]} for name in ("sft", "msn")},
        "rows": rows,
        "answers": [
            {"model": "msn", "decoder": "jacobi", "prompt": "def f():\n", "passes": ["    ret", "urn", " 1\n"]}
        ],
    }
    return write(directory, content)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory) -> Page:
    directory = tmp_path_factory.mktemp("report")
    paths = [
        *(spec_bench(directory / "spec"), spec_bench(directory / "spec2", "runs/two", speedup=2.25)),
        *(gsm8k(directory / "gsm8k"), gsm8k(directory / "gsm8k2", "runs/two", 0.5)),
        *(ablation(directory / "ablate"), calibration(directory / "calibrate"), demo(directory / "demo")),
    ]
    return rendered(directory, *paths)


def test_every_kind_has_a_section_with_its_figures(all_kinds):
    titles = all_kinds.texts["h2"]
    assert titles[0] == "Speed beside quality"
    assert titles[1:4] == ["Spec-Bench, one", "Spec-Bench, two", "GSM8K, one"]
    assert titles[5:] == ["Ablation: paper", "Calibration of tr_jacobi, one", "Demo"]
    group_rows = all_kinds.rows("group", "decoder")
    assert group_rows[5] == ["all", "auto", "2", "1.52× ± 0.04", "1.75", "123.4", "100.0%"]
    factors = ["ahead", "4", "jacobi", "–", "2", "1.625 ± 0.002", "1.66 ± 0.03", "100.0%"]
    assert factors in all_kinds.rows("kind", "length", "decoder")
    assert ["jacobi", "0", "any", "31.2%", "10.0%"] in all_kinds.rows("source")
    assert all_kinds.rows("tree") == [["width 4", "4", "210.5"], ["autoregressive", "1", "140.0"]]
    assert ["msn", "jacobi", "1.38", "1.38×", "100.0%"] in all_kinds.rows("model", "decoder")
    assert all_kinds.rows("model", "clean loss") == [["sft", "1.988"], ["msn", "1.988"]]


def test_speed_stands_beside_quality(all_kinds):
    one, two = all_kinds.rows("model", "GSM8K strict match", "speedup", "mean accepted tokens")
    assert one == [
        "one",
        "25.0% ± 1.24 of 1,319",
        "1.52× ± 0.04auto, Spec-Bench, 4 of 480",
        "1.75auto, Spec-Bench, 4 of 480",
    ]
    assert two[:3] == ["two", "50.0% ± 1.24 of 1,319", "2.25× ± 0.04auto, Spec-Bench, 4 of 480"]


def test_a_model_with_an_adapter_has_a_row_of_its_own(tmp_path):
    paths = [gsm8k(tmp_path / name, share=share) for name, share in (("base", 0.25), ("adapted", 0.5), ("half", 0.75))]
    for path, fields in zip(paths[1:], ({"adapter": "a/b"}, {"dtype": "bfloat16"}), strict=True):
        file = Path(path, "report.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    rows = rendered(tmp_path, *paths).rows("model")
    assert [(row[0], row[1][:5]) for row in rows] == [
        ("one, float32", "25.0%"),
        ("one + adapter, float32", "50.0%"),
        ("one, bfloat16", "75.0%"),
    ]


def test_a_report_never_replaces_a_file_of_a_run(tmp_path):
    path = gsm8k(tmp_path / "run")
    for name in ("report.json", "samples.jsonl"):
        content = Path(path, name).read_bytes()
        assert "would replace the input" in refusals.refusal(report.write, [path], str(Path(path, name)))
        assert Path(path, name).read_bytes() == content


def test_without_spec_bench_tokens_stand_beside_quality(tmp_path):
    paths = [gsm8k(tmp_path / "one"), gsm8k(tmp_path / "two", "runs/two", 0.5)]
    one, two = rendered(tmp_path, *paths).rows("model", "GSM8K strict match", "mean accepted tokens")
    assert one == ["one", "25.0% ± 1.24 of 1,319", "1.25auto, GSM8K, 4 of 1,319"]
    assert two[:2] == ["two", "50.0% ± 1.24 of 1,319"]


def test_plots_have_their_labels_and_follow_the_theme(all_kinds):
    labels = all_kinds.texts["text"]
    for words in ("mt_bench", "speedup over autoregressive decoding", "tokens emitted by a forward pass", "depth"):
        assert words in labels
    assert {"clean loss, nats per token", "mean accepted tokens", "ahead, length 4", "retrieval, match 8+"} < set(
        labels
    )
    for words in (
        "Speedup by group",
        "Accepted lengths",
        "Acceptance by position",
        "Draft accuracy by depth and source",
    ):
        assert words in all_kinds.texts["h3"]
    assert "Mean accepted tokens against clean loss" in all_kinds.texts["h3"]
    assert "Acceptance by depth and source" in all_kinds.texts["h3"]
    styles = [value for _, name, value in all_kinds.attributes if name == "style"]
    assert any("var(--series-1)" in style for style in styles)
    assert not [style for style in styles if re.search(r"#[0-9a-f]{3}", style)]  # no colour of its own


def luminance(colour: str) -> float:
    """Relative luminance, by WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_both_themes():
    style = (Path(page.__file__).parent / "templates" / "page.css").read_text()
    themes = [
        dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r"\{[^{}]*--ink[^{}]*\}", style)
    ]
    light, dark, preferred = [theme for theme in themes if "--ink" in theme]
    assert dark == preferred and light.keys() == dark.keys()
    for theme in (light, dark):

        def contrast(one: str, other: str, theme=theme) -> float:
            high, low = sorted((luminance(theme[one]), luminance(theme[other])), reverse=True)
            return (high + 0.05) / (low + 0.05)

        for surface in ("--paper", "--panel", "--run-a", "--run-b"):
            assert contrast("--ink", surface) >= 4.5
        for text in ("--muted", "--accent", *(f"--series-{number}" for number in range(1, 7))):
            assert contrast(text, "--paper") >= 4.5
        for edge in ("--run-a-edge", "--run-b-edge"):
            assert contrast(edge, "--panel") >= 3


def test_how_it_was_measured(all_kinds):
    terms = dict(itertools.pairwise(all_kinds.texts["dt"]))
    assert {"command", "hardware", "versions", "commit", "date", "settings"} <= set(terms)
    values = all_kinds.texts["dd"]
    for value in (ABOUT["command"], ABOUT["hardware"], "python 3.11.2, jax 0.10.2", ABOUT["commit"], "fedcba987654"):
        assert value in values


def test_the_page_needs_no_network(all_kinds):
    urls = [value for _, name, value in all_kinds.attributes if name in ("src", "href", "xlink:href", "action")]
    assert urls and all(url.startswith(("#", "data:,")) for url in urls)
    ids = [value for _, name, value in all_kinds.attributes if name == "id"]
    assert {url[1:] for url in urls if url[0] == "#"} <= set(ids)
    assert "@import" not in all_kinds.texts["style"][0] and "url(" not in all_kinds.texts["style"][0]
    [policy] = [value for _, name, value in all_kinds.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'")


def test_answers_are_split_by_forward_pass(all_kinds):
    assert all_kinds.answers == [["Ein", "", " Tag"]] * 4 + [["    ret", "urn", " 1\n"]]


def test_the_parts_of_an_answer_join_to_its_text(tmp_path):
    text = "  日本\n\t🙂 <b>&amp;\u00a0</b> \r x "
    shown = rendered(tmp_path, spec_bench(tmp_path / "spec", text=text))
    assert shown.answers and all("".join(passes) == text for passes in shown.answers)


def test_hostile_texts_are_inert(tmp_path):
    path = Path(spec_bench(tmp_path / "spec", model=f"x/{HOSTILE}", text=HOSTILE), "report.json")
    content = json.loads(path.read_text())
    content["rows"][0]["group"] = content["rows"][1]["group"] = content["command"] = HOSTILE
    content["rows"][0][HOSTILE] = HOSTILE
    path.write_text(json.dumps(content))
    shown = rendered(tmp_path, str(path.parent), demo(tmp_path / "demo"))
    assert shown.tags.count("script") == 1 and "img" not in shown.tags
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    assert "alert" not in shown.texts["script"][0]
    assert any("".join(passes) == HOSTILE for passes in shown.answers)
    assert HOSTILE in shown.texts["dd"]


def test_texts_that_utf_8_cannot_encode_are_shown(tmp_path):
    shown = rendered(tmp_path, spec_bench(tmp_path / "spec", text="a\ud800bc", model="x/\udfff"))
    assert shown.answers == [["a\ufffdb", "", "c"]] * 2


def test_logs_of_older_versions_have_no_answers(tmp_path):
    shown = rendered(tmp_path, gsm8k(tmp_path / "gsm8k"))
    assert (shown.answers, shown.texts["h1"]) == ([], ["GSM8K, one"])
    assert "25.0% ± 1.2" in shown.rows("decoder")[0]


def test_an_incomplete_last_sample_is_left_out(tmp_path):
    path = spec_bench(tmp_path / "spec")
    with (tmp_path / "spec" / "samples.jsonl").open("a") as file:
        file.write('{"question_id": 9, "pass')
    assert len(sources.read(path).samples) == 4


def test_long_answers_are_cut_after_a_pass():
    answer = answers.Answer("auto", "qa", "question 1", ["abcd"] * 100, [1] * 100)
    cut = answers.shorten(answer, 120)
    assert (cut.passes, cut.lengths, cut.num_cut) == (["abcd"] * 10, [1] * 10, 90)
    assert answers.shorten(answer, 1200) == answer


def test_the_answers_are_typical_ones_of_the_fastest_decoder(tmp_path):
    chosen = answers.choose(sources.read(spec_bench(tmp_path / "spec")))
    assert [(answer.decoder, answer.group) for answer in chosen] == [("auto", "mt_bench"), ("auto", "qa")]
    assert all(answer.mean_accepted_tokens == 3 for answer in chosen)


def test_a_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    message = refusals.refusal(report.write, [gsm8k(tmp_path / "gsm8k")], str(tmp_path / "page.html"))
    assert "name fewer runs" in message
    assert not (tmp_path / "page.html").exists()


def test_the_front_has_the_points_that_no_other_beats():
    spots = [plots.Spot(name, x, y) for name, x, y in [("a", 1, 1), ("b", 2, 3), ("c", 2, 2), ("d", 3, 3), ("e", 4, 4)]]
    assert [spot.label for spot in plots.undominated(spots)] == ["a", "b", "e"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("rows"), "report.json: has no field 'rows'"),
        (lambda r: r.update(rows={}), "report.json: field 'rows' must be a list"),
        (lambda r: r["rows"].append(3), "report.json: field 'rows' item 7 must be an object"),
        (lambda r: r["rows"][0].update(speedup=[1]), "field 'rows' item 1 field 'speedup' must be a text or a number"),
        (lambda r: r.update(questions="4"), "report.json: field 'questions' must be an integer"),
        (lambda r: r.update(of=True), "report.json: field 'of' must be an integer"),
        (lambda r: r.update(versions=3), "report.json: field 'versions' must be an object"),
        (lambda r: r.pop("suite"), "report.json: is not a report of evaluate, ablate, calibrate or demo"),
    ],
)
def test_a_foreign_report_is_refused(tmp_path, change, words):
    path = Path(spec_bench(tmp_path / "spec"), "report.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert words in refusals.refusal(sources.read, str(path.parent))


@pytest.mark.parametrize("kind", [ablation, calibration, demo])
def test_a_report_without_one_of_its_fields_is_refused(tmp_path, kind):
    path = sources.read(kind(tmp_path)).path
    content = json.loads(path.read_text())
    for name in ("runs", "widths", "seconds"):
        if name in content:
            path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
            assert f"has no field '{name}'" in refusals.refusal(sources.read, str(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"passes": "ab"}', "samples.jsonl:2: field 'passes' must be a list"),
        ('{"passes": [["a"], "b"]}', "samples.jsonl:2: field 'passes' item 2 must be a list"),
        ('{"accept_lengths": [1.5]}', "samples.jsonl:2: field 'accept_lengths' item 1 must be an integer"),
        ("[1]", "samples.jsonl:2: must be a JSON object"),
        ("{", "samples.jsonl:2: line 1: broken JSON"),
    ],
)
def test_a_damaged_sample_is_refused(tmp_path, line, words):
    path = spec_bench(tmp_path / "spec")
    (tmp_path / "spec" / "samples.jsonl").write_text(f"{{}}\n{line}\n")
    assert words in refusals.refusal(sources.read, path)


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("nowhere", "page.html", "nowhere: does not exist: name an output directory of evaluate, ablate"),
        ("empty", "page.html", "empty: has no report.json or tree.json"),
        ("unfinished", "page.html", "unfinished: its evaluation is unfinished: run the same command again"),
        ("truncated", "page.html", "report.json: line 1: broken JSON"),
        ("gsm8k", "empty", "empty is a directory; name a file"),
        ("gsm8k", "nowhere/page.html", "nowhere is not a directory"),
    ],
)
def test_missing_and_truncated_files_are_refused(tmp_path, source, output, words):
    for name in ("empty", "unfinished", "truncated"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "samples.jsonl").write_text("{}\n")
    (tmp_path / "truncated" / "report.json").write_text('{"suite": "gsm8k", ')
    gsm8k(tmp_path / "gsm8k")
    assert words in refusals.refusal(report.write, [str(tmp_path / source)], str(tmp_path / output))


def test_the_program(tmp_path):
    gsm8k(tmp_path / "gsm8k")
    calibration(tmp_path, name="other.json")

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "msn_jax.report", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("--source=gsm8k", "--source=other.json", "--output=page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"wrote page.html: 2 runs, \d+ kB\n", done.stdout)
    assert Page((tmp_path / "page.html").read_bytes()).texts["h2"] == ["GSM8K, one", "Calibration of tr_jacobi, one"]
    refused = run("--source=nowhere")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: --source=nowhere: does not exist")
