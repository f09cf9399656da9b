"""Decoding pass by pass: what every node held, what the model predicted, what was accepted, what is drafted next.

    passes = microscope.trace(msn_jax.load("runs/demo/msn"), "def mean(values):", "tr_jacobi", max_new_tokens=32)

For explanations and for debugging of trees. The session is a real one. Before each of its forward passes, `trace` fills
the same tree and runs it, with the functions of the loop itself; so a traced pass takes two forward passes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode import drafters, engine, loop, verify
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import NO_DRAFT, Drafter, Proposal
from msn_jax.decode.engine import Decoder
from msn_jax.decode.loop import DecodeState, NodeOutput
from msn_jax.decode.models import Model
from msn_jax.decode.request import Prompt, Request
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, ROOT, SOURCES, TokenTree
from msn_jax.decode.verify import Verified

COLOURS = {ROOT: "#d9d9d9", JACOBI: "#a6c8e8", RETRIEVAL: "#fbc98e", NOISE: "#e6e0dc"}  # of a node's source


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass over a tree of W nodes and depth P. All tokens are ids."""

    tree: TokenTree
    tokens: list[int]  # [W], the newest token of the sequence at the root, drafts at the other nodes
    sources: list[int]  # [W], where each of them came from: ROOT, JACOBI, RETRIEVAL or NOISE
    predictions: list[int]  # [W], the model's own token after each node
    match_length: int  # tokens of the suffix that retrieval matched; 0 without retrieval
    accepted: list[int]  # nodes from the root to the last accepted one
    emitted: list[int]  # new tokens: predictions after the accepted nodes, cut at a stop token and at the limit
    next_drafts: list[int | None]  # [P], the best draft for each position after the newest token; None: no prediction
    next_nodes: list[int | None]  # [P], the node after which the model predicted it

    def named_sources(self) -> list[str]:
        """[W], the names of `sources`."""
        return [SOURCES[source] for source in self.sources]


def trace(
    model: Model,
    prompt: Prompt | Request,
    decoder: str = "tr_jacobi",
    tree: TokenTree | None = None,
    max_new_tokens: int = 64,
) -> list[Pass]:
    """Decodes one output and describes every forward pass; the emitted tokens are those of `engine.generate`.

    Args:
      model: the model, with a gated adapter or without.
      prompt: as for `engine.stream`.
      decoder: any but 'auto', which runs different trees, and 'draft_model', which drafts with another model.
      tree: overrides the decoder's tree.
      max_new_tokens: limit of the output, in tokens; a `Request` has its own. Stop strings do not end a trace.

    Raises:
      InputError: another decoder, or an impossible request.
    """
    if decoder in ("auto", "draft_model"):
        raise InputError(f"decoder {decoder!r}: cannot be traced; choose one of {', '.join(drafters.DEFAULT_TREES)}")
    request = engine.as_request(prompt, Request("", max_new_tokens), 0)
    model_decoder = Decoder(model, decoder, tree)
    session = model_decoder.start([engine.encode(model_decoder, request, "prompt")], [request], batch_size=1)
    passes = []
    while not session.done:
        drafter, before = model_decoder.drafter, int(session.state.lengths[0])
        looked = jax.device_get(_look(model.params, model.cfg, drafter, session.state, model_decoder.drafter_params))
        session.run(1)  # overwrites the state
        emitted = np.asarray(session.state.tokens)[0, before : int(session.state.lengths[0])].tolist()
        passes.append(_describe(drafter.tree, *looked, emitted, session.state))
    return passes


@functools.partial(jax.jit, static_argnames=("cfg", "drafter"))
def _look(
    params: dict, cfg: LlamaConfig, drafter: Drafter, state: DecodeState, drafter_params: dict | None
) -> tuple[Proposal, NodeOutput, Verified]:
    """The first half of `loop.step`: the filled tree, its forward pass and what is accepted."""
    proposal, _ = drafter.propose(drafter, drafter_params, state)
    output = loop.run_nodes(params, cfg, drafter, state, proposal.tokens, drafter_params, drafter.tree.width)
    return (
        proposal,
        output.replace(kv=(), top=None),
        verify.verify(drafter.tree, output.tokens, output.target_tokens),
    )


def _describe(
    tree: TokenTree,
    proposal: Proposal,
    output: NodeOutput,
    verified: Verified,
    emitted: list[int],
    state: DecodeState,
) -> Pass:
    last = int(verified.last_accepted[0])
    depth = int(tree.depth[last])
    drafts = np.asarray(state.draft.predictions)[0]  # [P, K]
    best = drafts[:, 0].tolist() if drafts.shape[1] else [NO_DRAFT] * tree.max_depth
    return Pass(
        tree=tree,
        tokens=proposal.tokens[0].tolist(),
        sources=proposal.sources[0].tolist(),
        predictions=output.target_tokens[0].tolist(),
        match_length=int(proposal.match_lengths[0]),
        accepted=verified.path[0, : depth + 1].tolist(),
        emitted=emitted,
        next_drafts=[None if token == NO_DRAFT else token for token in best],
        next_nodes=[None if node < 0 else node for node in tree.continuations[last].tolist()],
    )


def acceptance(passes: Sequence[Pass]) -> dict[tuple[str, int], tuple[int, int]]:
    """(source, depth) -> (accepted, all) nodes below the root, over all passes, by where their tokens came from."""
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for one in passes:
        for node, source in enumerate(one.named_sources()):
            key = (source, int(one.tree.depth[node]))
            accepted, total = counts.get(key, (0, 0))
            counts[key] = (accepted + (node in one.accepted), total + 1)
    return {key: count for key, count in sorted(counts.items()) if key[1] > 0}


def draw(axis: object, one: Pass, spell: Callable[[int], str]) -> None:
    """Draws the tree of a pass: a box per node with its token, and below it the model's prediction.

    Args:
      axis: a Matplotlib axis.
      one: the pass.
      spell: the text of a token id.
    """
    x, y = one.tree.depth.astype(float), -trees.columns(one.tree)
    for node in range(one.tree.width):
        is_accepted, parent = node in one.accepted, one.tree.parents[node]
        if node:
            style = {"color": "#2a7d3f", "lw": 2.5} if is_accepted else {"color": "#b0b0b0", "lw": 1}
            axis.plot([x[parent], x[node]], [y[parent], y[node]], zorder=1, **style)
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": COLOURS[one.sources[node]],
            "edgecolor": "#2a7d3f" if is_accepted else "#888888",
            "linewidth": 2.5 if is_accepted else 0.8,
        }
        place = {"ha": "center", "va": "center", "family": "monospace"}
        axis.text(x[node], y[node], repr(spell(one.tokens[node])), bbox=box, color="#202020", fontsize=9, **place)
        text = f"→ {spell(one.predictions[node])!r}"
        below = {"xytext": (0, -20), "textcoords": "offset points", "color": "#505050", "fontsize": 8}
        axis.annotate(text, (x[node], y[node]), **below, **place)
    axis.set_xlim(x.min() - 0.5, x.max() + 0.5)
    axis.set_ylim(y.min() - 0.7, y.max() + 0.4)
    axis.axis("off")
