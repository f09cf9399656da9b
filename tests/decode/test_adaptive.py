"""The width policy: its rule on known statistics, its statistics on known passes, and its bounds in simulation."""

import dataclasses
import functools
import itertools
import operator
from concurrent.futures import Future
from types import SimpleNamespace

import adaptive_simulation as simulation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_simulation import TREE, WIDTHS

import msn_jax
from msn_jax.decode import adaptive, drafters, engine, programs, scheduler
from msn_jax.decode import tree as trees
from msn_jax.decode.models import Experience, Model
from msn_jax.decode.request import Request
from msn_jax.decode.scheduler import Run, Scheduler, TimingRounds
from msn_jax.decode.tree import JACOBI, RETRIEVAL, RETRIEVAL_OR_JACOBI

ONE = jnp.ones(1, bool)
PROMPTS = ["the cat sat on the mat, the cat sat on", "a b a b a b a", "one two three", "the cat"]


def policy(*seconds: float, **values) -> adaptive.WidthPolicy:
    return adaptive.create(TREE, np.array(seconds, np.float32)).replace(budget=np.float32(0), **values)


def chosen(state: adaptive.WidthPolicy, match_length: int) -> int:
    return int(adaptive.choose(state, TREE, WIDTHS, jnp.array([match_length]), ONE)[0])


def test_more_nodes_run_where_longer_matches_pay_for_them():
    assert [chosen(policy(1, 1.8, 2.6), match) for match in (0, 3, 16)] == [0, 1, 2]
    assert [chosen(policy(1, 1, 1), match) for match in (2, 16)] == [2, 2]  # drafts cost nothing
    assert [chosen(policy(1, 3.2, 3.6), match) for match in (0, 3, 16)] == [0, 0, 2]
    assert [chosen(policy(1, 9, 9), match) for match in (0, 3, 16)] == [0, 0, 0]


def test_a_higher_rate_makes_time_more_valuable():
    assert chosen(policy(1, 2, 2), 3) == 2
    assert chosen(policy(1, 2, 2, tokens=np.float32(24)), 3) == 0


def test_without_credit_the_root_runs_alone_unless_the_drafts_are_good():
    assert [chosen(policy(1, 2, 2, credit=np.float32(credit)), 4) for credit in (0.5, 0.0)] == [2, 0]
    assert [chosen(policy(1, 2, 2, credit=np.float32(credit)), 16) for credit in (0.0, -0.3, -0.4)] == [2, 2, 0]


def test_a_forced_width_runs():
    for index in range(3):
        assert chosen(policy(1, 9, 9, forced=np.int32(index)), 0) == index


def test_finished_rows_do_not_count():
    lengths, state = jnp.array([16, 0]), policy(1, 3.5, 3.5)
    both, first, second = (
        int(adaptive.choose(state, TREE, WIDTHS, lengths, jnp.array(active))[0])
        for active in ([True, True], [True, False], [False, True])
    )
    assert (both, first, second) == (0, 2, 0)


def updated(state, emitted, retrieved=(), match_length=0, predictions=(), chosen=0, explores=False):
    def pad(tokens, length):
        return jnp.array([[*tokens, *[-1] * (length - len(tokens))]], jnp.int32)

    depth = TREE.max_depth
    return adaptive.update(
        state,
        jnp.int32(chosen),
        jnp.array(explores),
        pad(emitted, depth + 1),
        jnp.array([len(emitted)], jnp.int32),
        pad(retrieved, depth),
        jnp.array([match_length], jnp.int32),
        pad(predictions, depth),
    )


def test_every_pass_scores_the_retrieved_continuation_up_to_its_first_wrong_token():
    before = policy(1, 2, 3)

    def changes(*args) -> dict:
        after = np.asarray(updated(before, *args).retrieval)
        keep = np.where(after[1] == before.retrieval[1], 1, 0.995)
        correct, scored = np.round(after - before.retrieval * keep, 3)
        return {m: (float(correct[m]), float(scored[m])) for m in np.flatnonzero(scored)}

    assert changes([5], [5, 6, 7], 2) == {2: (1, 1)}  # the root alone: one token is known
    assert changes([4], [5, 6, 7], 2) == {2: (0, 1)}
    assert changes([5, 6, 9], [5, 6, 7, 8], 3) == {3: (1, 1), 4: (1, 1), 5: (0, 1)}
    assert changes([5, 6], [5, 6, 7, 8], 15) == {15: (1, 1), 16: (1, 1)}
    assert changes([5]) == {}


def test_forced_passes_cost_no_credit():
    state = policy(1, 2, 3)
    assert float(updated(state, [5], chosen=2).credit) < float(state.credit)
    forced = updated(state.replace(forced=np.int32(2), burst=np.int32(2)), [5], chosen=2)
    assert (float(forced.credit), int(forced.burst)) == (float(state.credit), 2)


def test_predictions_are_scored_where_there_are_any():
    before = policy(1, 2, 3)
    assert np.array_equal(updated(before, [5, 6]).jacobi, before.jacobi)
    after = updated(before, [5, 6, 7], predictions=[5, 9, 7])
    assert (after.jacobi[1] > before.jacobi[1]).tolist() == [True, True, False, False, False, False, False]
    assert (after.jacobi[0] > before.jacobi[0]).tolist() == [True, False, False, False, False, False, False]


def test_exploration_ends_after_a_burst_and_waits_for_its_budget():
    state = adaptive.create(TREE, np.array([1, 2, 3], np.float32)).replace(jacobi=np.full((2, 7), [[0.0], [1.0]]))
    state, widths = jax.tree.map(jnp.asarray, state), []
    for number in range(150):
        if number == 50:  # instead of waiting for a thousand passes
            state = state.replace(budget=jnp.float32(1.9), credit=jnp.float32(3.5))
        index, explores = adaptive.choose(state, TREE, WIDTHS, jnp.array([0]), ONE)
        state = updated(state, [5], chosen=index, explores=explores)
        widths.append(int(index))
    assert widths[:4] == [1, 1, 1, 0]
    bursts = np.flatnonzero(np.diff([0, *widths]) > 0)
    assert len(bursts) == 2
    assert 90 < bursts[1] < 110  # 0.1 units are 0.2% of 50
    assert set(widths) == {0, 1}


@pytest.mark.parametrize("drifts", [False, True])
def test_in_simulation_the_policy_is_never_far_behind_and_mostly_ahead(drifts):
    """1,000 random machines and texts of 256 tokens, each starting without experience."""

    def time(world, fixed=None):
        state = adaptive.create(TREE, np.ones(3, np.float32)).replace(relative_time=world.relative_time)
        return simulation.emission_time(world, state, 256, fixed)[0]

    worlds = jax.vmap(lambda key: simulation.world(key, 256, drifts))(jax.random.split(jax.random.key(1), 1000))
    fixed = np.stack([jax.vmap(lambda world, width=width: time(world, width))(worlds) for width in range(3)])
    ours, best = np.asarray(jax.vmap(time)(worlds)), fixed.min(axis=0)
    assert fixed[0].tolist() == [256] * 1000
    assert (ours / fixed[0]).max() < 1.03  # the root alone
    assert ours.sum() / best.sum() < 1.0  # the best fixed width in hindsight
    assert np.percentile(ours / best, 95) < 1.03
    assert np.mean(np.argmin(fixed, axis=0) == 0) < 0.6  # in many worlds another width is best


# --- in the loop


class Fixed(Scheduler):
    """The given runs, again and again."""

    def __init__(self, runs: list[Run]):
        super().__init__(WIDTHS)
        self.rounds._newest.append([1, 1, 1])
        self.runs = itertools.cycle(runs)

    def next(self, is_adaptive_ready) -> Run:
        return next(self.runs)

    def record(self, run: Run, passes: int, tokens: int, seconds: float) -> None:
        pass


def scheduled(model: Model, runs: list[Run], batch_size: int) -> Model:
    """The model, decoding with `auto` in the given runs. The policy believes that all widths take the same time."""
    state = adaptive.create(TREE, np.ones(3, np.float32))
    experience = {(drafters.get("auto"), batch_size): Experience(state, Fixed(runs))}
    return dataclasses.replace(model, experience=experience)


SCHEDULES = {
    "root": [Run(100, width_index=0)],
    "few nodes": [Run(100, width_index=1)],
    "all nodes": [Run(100, width_index=2)],
    "adaptive": [Run(100)],
    "forced": [Run(3, forced=index) for index in range(3)],
    "mixed": [Run(2, width_index=1), Run(3), Run(1, width_index=0), Run(4, forced=2), Run(2, width_index=2), Run(1)],
}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_output_does_not_depend_on_the_schedule(settings, name, batch_size):
    model = tiny.model()
    expected = msn_jax.generate(model, PROMPTS, "autoregressive", 40, batch_size=batch_size, **settings)
    model = scheduled(model, SCHEDULES[name], batch_size)
    ours = msn_jax.generate(model, PROMPTS, "auto", 40, batch_size=batch_size, **settings)
    assert [one.tokens for one in ours] == [one.tokens for one in expected]
    for one in ours:
        assert sum(one.passes_by_width.values()) == one.forward_passes
        widths = {"root": {1}, "few nodes": {4}, "all nodes": {8}}.get(name, {1, 4, 8})
        assert set(one.passes_by_width) <= widths


@pytest.mark.parametrize(
    "tree",
    [
        trees.build([]),
        trees.chain(RETRIEVAL, 5),
        trees.chain(JACOBI, 5),
        tiny.with_noise_tails(trees.tr_jacobi_tree([(0, 0), (1,), (2,)], [3, 2]), [1, 5], 2),
    ],
    ids=["root", "retrieval", "jacobi", "branches"],
)
def test_any_tree_may_be_adaptive(tree):
    model = tiny.model()
    expected = msn_jax.generate(model, PROMPTS[:2], "autoregressive", 30, batch_size=2)
    ours = msn_jax.generate(model, PROMPTS[:2], "auto", 30, batch_size=2, tree=tree)
    assert [one.tokens for one in ours] == [one.tokens for one in expected]


def test_experience_is_kept_from_one_session_to_the_next(monkeypatch):
    monkeypatch.setattr(scheduler, "_LONG_PASS", np.inf)
    monkeypatch.setattr(scheduler, "_TIMING_SECONDS", 0.0)
    model = dataclasses.replace(tiny.endless(tiny.model()), experience={})
    msn_jax.generate(model, PROMPTS[:1], max_new_tokens=60)
    [experience] = model.experience.values()
    assert not experience.scheduler.has_long_passes
    runs = experience.scheduler._timed_runs
    assert runs > 0
    msn_jax.generate(model, PROMPTS[1:2], max_new_tokens=60)
    assert [experience] == list(model.experience.values())
    assert experience.scheduler._timed_runs > runs


class InForeground:
    """An executor that runs a task when it is submitted."""

    def submit(self, task):
        future = Future()
        future.set_result(task())
        return future


def test_a_program_compiled_in_the_background_is_not_compiled_again(monkeypatch):
    monkeypatch.setattr(scheduler, "_LONG_PASS", 0.0)
    monkeypatch.setattr(scheduler, "_TIMING_SECONDS", 0.0)
    tasks = []
    monkeypatch.setattr(programs, "_EXECUTOR", SimpleNamespace(submit=lambda task: tasks.append(task) or Future()))
    model = dataclasses.replace(tiny.endless(tiny.model()), experience={})
    [first] = msn_jax.generate(model, PROMPTS[:1], max_new_tokens=40)
    assert set(first.passes_by_width) == {1}  # the program was never ready
    [task] = tasks
    task()
    [experience] = model.experience.values()
    [future] = experience.programs._background.values()
    future.set_result(None)
    with programs.recorded() as compilations:
        [second] = msn_jax.generate(model, PROMPTS[:1], max_new_tokens=40)
    assert second.tokens == first.tokens
    assert set(second.passes_by_width) == {1, 4, 8}
    assert not compilations


def test_long_passes_are_timed_and_then_adaptive(monkeypatch):
    monkeypatch.setattr(scheduler, "_LONG_PASS", 0.0)
    monkeypatch.setattr(scheduler, "_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(programs, "_EXECUTOR", InForeground())
    model = dataclasses.replace(tiny.endless(tiny.model()), experience={})
    [first] = msn_jax.generate(model, PROMPTS[:1], max_new_tokens=200)
    [experience] = model.experience.values()
    measured = experience.scheduler.rounds.relative_time()
    assert measured[0] == 1
    assert (np.diff(measured) >= 0).all()
    assert {1, 4, 8} == set(first.passes_by_width)
    msn_jax.generate(model, PROMPTS[1:2], max_new_tokens=60)
    assert experience.policy.time > 8
    assert len(experience.scheduler.rounds._newest) >= 1


def test_times_measured_in_a_cancelled_stream_are_kept(monkeypatch):
    monkeypatch.setattr(scheduler, "_LONG_PASS", 0.0)
    monkeypatch.setattr(scheduler, "_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(programs, "_EXECUTOR", InForeground())
    model = dataclasses.replace(tiny.endless(tiny.model()), experience={})
    stream = msn_jax.stream(model, PROMPTS[0], max_new_tokens=200)
    for _ in range(16):
        next(stream)
    stream.close()
    [experience] = model.experience.values()
    measured = experience.scheduler.rounds.relative_time()
    assert len(experience.scheduler.rounds._newest) == 1
    session = engine.Decoder(model, "auto").start([[1, 2]], [Request("", 9)], 1)
    session._attach_policy()
    np.testing.assert_array_equal(session.state.policy.relative_time, measured)


# --- the scheduler


def simulate(
    pass_seconds, tokens_per_pass, runs: int, compiled_after: int = 0
) -> tuple[Scheduler, list[tuple[Run, float]]]:
    """Runs of a machine with these times and tokens per pass of each width."""
    schedule, done = Scheduler(WIDTHS), []
    for number in range(runs):
        run = schedule.next(functools.partial(operator.ge, number, compiled_after))
        index = (
            0 if run.width_index is None and run.forced == adaptive.UNFORCED else max(run.width_index or 0, run.forced)
        )
        tokens = tokens_per_pass(number)[index] * run.passes
        seconds = pass_seconds[index] * run.passes
        done.append((run, seconds / tokens))
        schedule.record(run, run.passes, tokens, seconds)
    return schedule, done


def test_the_root_alone_is_timed_first():
    _, done = simulate([0.05, 0.1, 0.2], lambda number: (1, 1, 1), 2)
    assert [(run.width_index, run.passes) for run, _ in done] == [(0, 1), (0, 1)]


def test_long_passes_leave_the_choice_to_the_policy():
    schedule, done = simulate([0.05, 0.1, 0.08], lambda number: (1, 1, 1), 18)
    assert [(run.forced, run.passes) for run, _ in done[2:]] == [
        *((0, 1), (1, 1), (2, 1), (-1, 64)),
        *((0, 1), (1, 1), (2, 1), (-1, 192)),
        *((0, 1), (1, 1), (2, 1), (-1, 512)),
        *((0, 1), (1, 1), (2, 1), (-1, 512)),
    ]
    np.testing.assert_allclose(schedule.rounds.relative_time(), [1, 2, 2], rtol=1e-6)


def test_the_root_alone_decodes_until_the_adaptive_program_is_compiled():
    _, done = simulate([0.05, 0.1, 0.08], lambda number: (1, 1, 1), 12, compiled_after=4)
    assert [(run.width_index, run.passes) for run, _ in done[2:4]] == [(0, 2), (0, 2)]
    assert [(run.width_index, run.forced) for run, _ in done[4:8]] == [(None, 0), (None, 1), (None, 2), (None, -1)]


def test_the_median_of_the_newest_rounds_counts():
    rounds = TimingRounds(WIDTHS)
    assert rounds.relative_time().tolist() == pytest.approx([1, 1.45, 2.05])  # not measured
    measured = []
    for load in (1, 2, 1, 5, 1, 1, 1):  # the machine is busier in some rounds; in one, something else runs meanwhile
        for seconds in (0.1, 0.2, 0.9 if load == 5 else 0.3):
            rounds.record_timed(load * seconds)
        measured.append(rounds.relative_time())
    np.testing.assert_allclose(measured, [[1, 2, 3]] * 7, rtol=1e-6)
    rounds.warm_up()
    for seconds in (9, 3, 7):
        assert rounds.passes_left() == 0
        rounds.record_timed(seconds)
    np.testing.assert_allclose(rounds.relative_time(), [1, 2, 3], rtol=1e-6)
    rounds.record_timed(9)
    rounds.restart()
    assert rounds.next_width() == 0
    for _ in range(3):  # another machine
        for seconds in (0.1, 0.4, 0.5):
            rounds.record_timed(seconds)
    np.testing.assert_allclose(rounds.relative_time(), [1, 4, 5], rtol=1e-6)


@pytest.mark.parametrize(("few", "best"), [(1.2, 0), (3.0, 1)])
def test_short_passes_alternate_between_fixed_widths_and_prefer_the_faster_one(few, best):
    _, done = simulate([0.0001, 0.0002, 0.0004], lambda number: (1, few, few), 100)
    widths = [run.width_index for run, _ in done[2:]]
    assert set(widths) == {0, 1}
    assert widths.count(1 - best) <= 10
    assert {run.passes for run, _ in done[2:] if run.width_index == best} <= {60, 200}
    assert {run.passes for run, _ in done[2:] if run.width_index != best} == {60}


def test_the_faster_width_is_found_again_when_the_text_changes():
    _, done = simulate([0.0001, 0.0002, 0.0004], lambda number: (1, 1, 1) if number < 50 else (1, 4, 4), 150)
    widths = [run.width_index for run, _ in done]
    assert sum(widths[40:50]) <= 1
    assert sum(widths[-40:]) >= 34


def test_short_runs_at_the_end_of_an_output_do_not_outweigh_long_ones():
    schedule, runs_of_few_nodes = Scheduler(WIDTHS), 0
    for _ in range(60):
        run = schedule.next(lambda: True)
        runs_of_few_nodes += run.width_index
        is_short = run.width_index == 1 and runs_of_few_nodes % 2 == 0
        passes, overhead = (1, 0.0003) if is_short else (run.passes, 0.0)
        schedule.record(run, passes, (1, 1.3)[run.width_index] * passes, 0.0001 * passes + overhead)
    assert runs_of_few_nodes > 40


def test_predictions_of_noise_tails_need_a_pass_over_all_nodes():
    tree = drafters.ADAPTED_TREES["auto"]
    widths = adaptive.widths(tree)
    assert widths == (1, 8, 14) and tree.tail_length == 2
    state = adaptive.create(tree, np.array([1.0, 1.5, 1.6], np.float32))
    assert state.jacobi[0].tolist() == pytest.approx([0.4, 0.4, 0, 0, 0, 0, 0])  # tails predict two tokens
    no_match = jnp.array([0])
    index, explores = adaptive.choose(state, tree, widths, no_match, ONE)
    assert (int(index), bool(explores)) == (2, True)
    good = state.replace(jacobi=np.stack([9 * np.ones(7), 10 * np.ones(7)]).astype(np.float32))
    expected = adaptive.expected_accepted(good, tree, widths, no_match)[0]
    assert expected[0] == 0 and expected[1] == expected[2] > 1.7  # noise is no draft
    plain = trees.chain(RETRIEVAL_OR_JACOBI, 7, 2)
    assert plain.tail_length == 0
    assert trees.add_tails(plain, 3, behind=[0]).tail_length == 3
    assert trees.add_tails(plain, 3, behind=[7]).tail_length == 0  # predictions after other nodes are not of tails


def test_widths_are_those_of_smaller_trees():
    assert adaptive.widths(trees.build([])) == ()
    assert adaptive.widths(trees.chain(RETRIEVAL, 2)) == (1, 3)
    assert adaptive.widths(trees.chain(RETRIEVAL, 9)) == (1, 4, 10)
    assert drafters.get("auto").widths == WIDTHS
