"""Which tokens of a pair's two texts are scored: its answers', or, with faults switched on, the prompt's and padding.

Write w and l for the answers, x for their prompt, P, |w| and |l| for the tokens, and r for log π − log π_ref summed
over the tokens that are scored. What the two faults change:

`score_prompt` adds c = log π(x_2 … x_P | x_1) − log π_ref(x_2 … x_P | x_1) to r_w and to r_l. Both answers have the
same x before them, so in Δ = r_w − r_l it cancels, and so does its gradient. A loss of Δ alone (`sigmoid`, `hinge`,
summed `ipo`, `robust`, `exo_pair`, `aot`, `discopop`) is the right one but for rounding and the cost of scoring x. What
does change: r_w and r_l as they are reported; losses that look at each side (`nca_pair`, `bco_pair`, `apo_*`,
`sppo*`); averaged log-probs, where r_w is divided by P − 1 + |w| and r_l by P − 1 + |l|, so that c stays and both
shrink; modifiers that look at one side (`dpop_lambda`, `nll_weight`, `wpo_weight`, `xpo_alpha`). With dropout c is
another number in each text, and its noise stays in Δ.

`score_padding` adds the log-ratio of the padding behind the shorter answer to that answer's r. Nothing cancels it: a
pair is also told apart by what the policy says of padding.
"""

from __future__ import annotations

from typing import Any

from online_dpo.errors import ConfigError
from online_dpo.faults_spec import FaultsSpec
from online_dpo.packing import Item
from online_dpo.types import Pair


def scored_texts(pair: Pair, faults: FaultsSpec, padding: int) -> tuple[Item, Item]:
    """Of the chosen and of the rejected text: the tokens that are given, and behind them those that are scored.

    With no fault on, the prompt and the completion. With `score_prompt` all but the first token are scored, which
    nothing predicts. With `score_padding` the shorter completion ends with as many tokens `padding` as it lacks to the
    longer one. Padding is text like any other: what stands behind it sees it, as in a script that hands the model no
    attention mask; what stands before it never does.
    """
    x = tuple(pair.prompt.token_ids)
    w, rejected = tuple(pair.chosen.token_ids), tuple(pair.rejected.token_ids)
    if faults.score_padding:
        longest = max(len(w), len(rejected))
        w, rejected = (y + (padding,) * (longest - len(y)) for y in (w, rejected))
    if faults.score_prompt:
        return (x[:1], x[1:] + w), (x[:1], x[1:] + rejected)
    return (x, w), (x, rejected)


def padding_token(tokenizer: Any) -> int:
    """What `score_padding` fills up with: the tokenizer's padding token, else its end token.

    Raises `ConfigError` where it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("dpo.faults.score_padding: the model's tokenizer has neither a padding nor an end token")
