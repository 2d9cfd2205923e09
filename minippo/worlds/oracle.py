"""The oracle: a world so small that every response is known, so that everything can be exact.

At most 6 tokens and responses of at most 4: a few hundred answers, all listed. What PPO estimates
from samples is a finite sum here, in float64: the objective, both KL divergences, the best policy
pi*, the values, the advantages and the policy gradient. So the rest of the package can be graded.

Axes: S states (a state is a response that has not ended yet), V tokens, Y whole responses, R the
longest response. A policy is read as `logprobs_all` (S, V): its next-token log-probabilities in
every state. That is all there is to know about it, whatever network is behind it.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from minippo.batching import left_pad
from minippo.engine.passes import token_logits
from minippo.logprobs import response_window
from minippo.masking import position_ids

MAX_WORDS, MAX_LENGTH = 6, 4


class World:
    """One prompt, and all responses to it.

    It can be handed to `train_ppo` in three places: as `tokenizer` (EOS and padding), through
    `score_fn` as the reward, and through `prompts` as the data.

    words: names of the V tokens; the first is EOS, which also pads and is the whole prompt
    length: R; a response ends with EOS or is cut after R tokens
    score: (words of a response, EOS included) -> its reward; asked once for each response
    Raises ValueError if the world is too large to be listed.
    """

    eos_token_id = pad_token_id = 0  # one token: masks come from lengths, so this must be safe
    query = [0]

    def __init__(self, words, length: int, score):
        if not (2 <= len(words) <= MAX_WORDS and 1 <= length <= MAX_LENGTH):
            limits = f"2 to {MAX_WORDS} words and a length of 1 to {MAX_LENGTH}"
            raise ValueError(f"{len(words)} words, length {length}: the oracle takes {limits}")
        self.words, self.length = tuple(words), length
        self.states: list[tuple] = [()]  # S, shorter ones first: a child comes after its parent
        self.responses: list[tuple] = []  # Y
        for state in self.states:  # grows while it is read
            for token in range(len(words)):
                longer = (*state, token)
                ended = token == self.eos_token_id or len(longer) == length
                (self.responses if ended else self.states).append(longer)
        numbers = {prefix: n for n, prefix in enumerate(self.states + self.responses)}
        # The tree's nodes: the states, then the responses, which lead nowhere but to themselves.
        self.child = torch.tensor(  # (S + Y, V)
            [[numbers.get((*p, v), n) for v in range(len(words))] for p, n in numbers.items()]
        )
        scores = [float(score(self.text(y))) for y in self.responses]
        self.scores = torch.tensor(scores, dtype=torch.float64)  # (Y,)
        padded = [[*y, *[self.pad_token_id] * (length - len(y))] for y in self.responses]
        self.response = torch.tensor(padded)  # (Y, R)
        self.mask = torch.arange(length) < torch.tensor([[len(y)] for y in self.responses])
        self.tokens = torch.cat([torch.zeros(len(padded), 1).long(), self.response], 1)  # (Y, 1+R)
        self.attention_mask = torch.cat([torch.ones(len(padded), 1).bool(), self.mask], 1)
        nodes = self.walk(self.tokens, position_ids(self.attention_mask))
        self.before = nodes[:, :-1].clamp(max=len(self.states) - 1)  # (Y, R) state before a token

    def text(self, prefix) -> tuple[str, ...]:
        """The words of a state or response."""
        return tuple(self.words[token] for token in prefix)

    def prompts(self, count: int) -> list[list[int]]:
        """The one prompt, `count` times."""
        return [self.query] * count

    def walk(self, tokens: Tensor, positions: Tensor, start: Tensor | None = None) -> Tensor:
        """Nodes (B, T) reached after each token; padding and prompt (position 0) stay at the root.

        tokens, positions: (B, T); positions are position ids
        start: (B,) nodes to begin at, the root if None
        """
        node = torch.zeros_like(tokens[:, 0]) if start is None else start
        nodes = []
        for token, position in zip(tokens.T, positions.T, strict=True):
            node = torch.where(position > 0, self.child[node, token], node)
            nodes.append(node)
        return torch.stack(nodes, 1)

    def score_fn(self, tokens: Tensor, attention_mask: Tensor, query_length: int) -> Tensor:
        """The reward (B,) of each row, by looking it up.

        Raises ValueError if a row has not ended, or has more tokens than the world knows.
        """
        if bool((attention_mask[:, query_length:].sum(1) > self.length).any()):
            message = f"a response has more than the {self.length} tokens of this world"
            raise ValueError(f"{message}; set max_response_tokens={self.length}")
        node = self.walk(tokens, position_ids(attention_mask))[:, -1] - len(self.states)
        if bool((node < 0).any()):
            raise ValueError(f"a response of fewer than {self.length} tokens has not ended in EOS")
        return self.scores[node]

    # --- a policy, exactly --------------------------------------------------------------------

    def logprobs_all(self, policy, temperature: float = 1.0) -> Tensor:
        """What a model says in every state: (S, V) in float64, with gradient.

        Raises ValueError if a token has probability 0: its logarithm would spoil every sum.
        """
        tokens, mask = left_pad([[*self.query, *s] for s in self.states], self.pad_token_id)
        logits = token_logits(policy, tokens, mask, kept=1)[:, -1].double()
        logprobs_all = torch.log_softmax(logits / temperature, -1)
        if not bool(logprobs_all.isfinite().all()):
            raise ValueError("the policy gives some token probability 0 or NaN")
        return logprobs_all

    def token_logprobs(self, logprobs_all: Tensor) -> Tensor:
        """(S, V) -> (Y, R), log-probability of each token of each response, 0 where masked."""
        return logprobs_all[self.before, self.response].masked_fill(~self.mask, 0)

    def response_logprobs(self, logprobs_all: Tensor) -> Tensor:
        """(S, V) -> (Y,), log pi(y) of each whole response."""
        return self.token_logprobs(logprobs_all).sum(1)

    def reach(self, logprobs_all: Tensor) -> Tensor:
        """(S, V) -> (S,), the probability that a response passes through each state."""
        reached = torch.zeros(len(self.child), dtype=torch.float64)
        reached[0] = 1
        for s in range(len(self.states)):
            reached[self.child[s]] = reached[s] * logprobs_all[s].detach().exp()
        return reached[: len(self.states)]

    def kl(self, logprobs_all: Tensor, other_logprobs_all: Tensor) -> Tensor:
        """KL(policy, other) = sum_y pi(y) (log pi(y) - log other(y)), in nats per response."""
        one, other = map(self.response_logprobs, (logprobs_all, other_logprobs_all))
        return (one.exp() * (one - other)).sum()

    def objective(self, logprobs_all: Tensor, ref_logprobs_all: Tensor, kl_coef: float) -> Tensor:
        """J = E_y [r(y) - beta log(pi(y) / pi_ref(y))], what PPO with the KL in the reward raises.

        It equals beta log Z - beta KL(pi, pi*), so pi* is its only maximum.
        """
        logprobs, ref_logprobs = map(self.response_logprobs, (logprobs_all, ref_logprobs_all))
        return (logprobs.exp() * (self.scores - kl_coef * (logprobs - ref_logprobs))).sum()

    def gradient(self, policy, ref_logprobs_all: Tensor, kl_coef: float) -> list[Tensor]:
        """The exact policy gradient: dJ / d(each parameter), by autograd through the sum over y."""
        objective = self.objective(self.logprobs_all(policy), ref_logprobs_all, kl_coef)
        return list(torch.autograd.grad(objective, list(policy.parameters())))

    def values(self, logprobs_all: Tensor, ref_logprobs_all: Tensor, kl_coef: float):
        """V (S,), Q (S, V) and A = Q - V (S, V) of a policy, the KL counted in the reward.

        Q(s, a) = -beta log(pi(a|s) / pi_ref(a|s)) + (r(y) if a ends the response, else V(s, a))
        V(s) = sum_a pi(a|s) Q(s, a)

        V(s) is what `Rollout.values` estimates, A what GAE does. With kl_coef = 0 there is no KL.
        """
        penalty = kl_coef * (logprobs_all - ref_logprobs_all).detach()
        probabilities, q = logprobs_all.detach().exp(), torch.zeros_like(penalty)
        value = torch.cat([torch.zeros(len(self.states)).double(), self.scores])  # of every node
        for s in reversed(range(len(self.states))):
            q[s] = value[self.child[s]] - penalty[s]
            value[s] = (probabilities[s] * q[s]).sum()
        values = value[: len(self.states)]
        return values, q, q - values[:, None]

    # --- the policies that training should end at ---------------------------------------------

    def optimum(self, ref_logprobs_all: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
        """pi* as (S, V), and log Z: where PPO ends with the KL in the reward (`kl`).

        pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,   Z = sum_y pi_ref(y) exp(r(y) / beta)

        Its next-token probabilities are shares of mass: what of pi* passes through (s, a), over
        what passes through s.
        Source: the Gibbs variational principle; Korbacki et al. 2022, arXiv:2205.11275; DPO,
            arXiv:2305.18290 eq. 4.
        """
        weights = self.response_logprobs(ref_logprobs_all.detach()) + self.scores / kl_coef
        mass = torch.cat([torch.zeros(len(self.states)).double(), weights])  # log mass of each node
        for s in reversed(range(len(self.states))):
            mass[s] = mass[self.child[s]].logsumexp(0)
        return mass[self.child[: len(self.states)]] - mass[: len(self.states), None], mass[0]

    def kl_loss_optimum(self, ref_logprobs_all: Tensor, kl_loss_coef: float) -> Tensor:
        """The fixed point (S, V) of PPO with the KL in the loss (`full`): it is not pi*.

        The gradient of such a loss is, with T the number of tokens in the batch,
            1/T sum over tokens of [-A(s, a) d log pi(a|s) + c2 d KL(pi(.|s), pi_ref(.|s))],
        where A knows no KL (kl_coef = 0) and the states are data: nothing tells a token about the
        KL that it will cost later. In expectation over a large batch, state s enters with the
        weight reach(s) / E[tokens per response], the same for both terms. So the weight, the token
        mean with it, drops out wherever reach(s) > 0, and each state solves a problem of its own:
            max over p of  sum_a p(a) Q(s, a) - c2 KL(p, pi_ref(.|s)),
            p(a|s) = pi_ref(a|s) exp(Q(s, a) / c2) / Z(s),   V(s) = sum_a p(a|s) Q(s, a),
        with Q(s, a) = r(y) if a ends the response, else V(s, a). Backward, from the last token.
        pi* has the same recursion with V(s) = c2 log Z(s), which is sum_a p Q minus the KL to come.
        For R = 1 nothing comes later and the two agree. In a small batch, 1/T depends on the tokens
        sampled and shifts the fixed point by O(1 / batch size). Parameters shared between states
        that cannot serve them all bring the weights back.
        """
        optimum = torch.zeros_like(ref_logprobs_all)
        value = torch.cat([torch.zeros(len(self.states)).double(), self.scores])
        for s in reversed(range(len(self.states))):
            q = value[self.child[s]]
            optimum[s] = torch.log_softmax(ref_logprobs_all[s].detach() + q / kl_loss_coef, 0)
            value[s] = (optimum[s].exp() * q).sum()
        return optimum

    # --- for a person -------------------------------------------------------------------------

    def table(self, logprobs_all: Tensor, ref_logprobs_all: Tensor, kl_coef: float) -> str:
        """Every state in a line, to be printed: how often it is reached, V, and for each next token
        the probabilities of reference, policy and pi* in percent, with the advantage.
        """
        best, _ = self.optimum(ref_logprobs_all, kl_coef)
        values, _, advantages = self.values(logprobs_all, ref_logprobs_all, kl_coef)
        reach = self.reach(logprobs_all)
        shares = torch.stack([ref_logprobs_all, logprobs_all, best], -1).detach().exp() * 100
        names = [" ".join(self.text(state)) or "(start)" for state in self.states]
        width = max(map(len, names))
        head = f"{'':{width}}  reach      V"
        lines = [head + "".join(f" | {word:20}" for word in self.words)]
        lines.append(" " * len(head) + " | ref  pi pi*     A   " * len(self.words))
        for s, name in enumerate(names):
            line = f"{name:{width}} {reach[s]:6.3f} {values[s]:+6.2f}"
            for share, advantage in zip(shares[s].tolist(), advantages[s].tolist(), strict=True):
                line += " |" + "".join(f"{x:4.0f}" for x in share) + f" {advantage:+6.2f}  "
            lines.append(line)
        return "\n".join(line.rstrip() for line in lines)


# --- models of such a world ---------------------------------------------------------------------


class _Places:
    """The KV cache of a table: the node that each row has reached."""

    def __init__(self, nodes: Tensor):
        self.nodes = nodes

    def batch_select_indices(self, indices: Tensor) -> None:
        self.nodes = self.nodes[indices]


class TabularPolicy(nn.Module):
    """A policy with its own logits in every state, called like a Hugging Face causal model.

    logits: (S, V) to start from, e.g. the log-probabilities of the reference
    """

    def __init__(self, world: World, logits: Tensor):
        super().__init__()
        self.world = world
        self.logits = nn.Parameter(logits.detach().to(torch.get_default_dtype(), copy=True))
        self.head = nn.Identity()  # where other models have their vocabulary projection

    def get_output_embeddings(self):
        """What all logits go through."""
        return self.head

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=False,
        logits_to_keep=0,
    ):  # fmt: skip
        """input_ids, position_ids: (B, T) -> logits (B, T, V), of the last positions if so asked.

        After the end of a response all logits are 0; nobody reads them.
        """
        start = cache.nodes if cache is not None else None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        nodes = self.world.walk(input_ids, position_ids, start)
        ended = torch.zeros_like(self.logits[:1])
        table = torch.cat([self.logits, ended])[nodes.clamp(max=len(self.logits))]
        logits = self.head(table[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits, cache=_Places(nodes[:, -1]))


class TabularValue(nn.Module):
    """A critic with a number for every state, 0 at first; called like `ValueModel`."""

    def __init__(self, world: World):
        super().__init__()
        self.world, self.values = world, nn.Parameter(torch.zeros(len(world.states)))

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """tokens, attention_mask: (B, T) -> (B, T), the value after each token."""
        everywhere = torch.ones_like(tokens) if attention_mask is None else attention_mask
        nodes = self.world.walk(tokens, position_ids(everywhere))
        ended = self.values.new_zeros(1)
        return torch.cat([self.values, ended])[nodes.clamp(max=len(self.values))]

    def read(self, hidden: Tensor) -> Tensor:
        """No head: the table holds values already."""
        return hidden

    def forward(self, tokens: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
        """tokens, attention_mask: (B, T) -> values (B, R) before each response token."""
        return response_window(self.hidden(tokens, attention_mask), response_length)


# --- a world to read ----------------------------------------------------------------------------


def feelings_score(words: tuple[str, ...]) -> float:
    """How kind an answer is: good +1, bad -1; "very" doubles what follows, "not" turns it by half.

    A "very" or "not" that nothing follows costs a half, an answer that does not end costs 3.
    """
    total, factor = 0.0, 1.0
    for word in words:
        factor *= {"very": 2.0, "not": -0.5}.get(word, 1.0)
        if word in ("good", "bad"):
            total += factor if word == "good" else -factor
            factor = 1.0
    dangling = [word for word in words if word != "."][-1:] in (["very"], ["not"])
    return total - 0.5 * dangling - 3.0 * (words[-1] != ".")


def feelings_world(length: int = 3) -> tuple[World, Tensor]:
    """A world of five words and its reference (S, V), which talks without aim."""
    world = World((".", "good", "bad", "not", "very"), length, feelings_score)
    first, later = (0.1, 0.2, 0.3, 0.2, 0.2), (0.4, 0.1, 0.2, 0.1, 0.2)
    rows = [later if state else first for state in world.states]
    return world, torch.tensor(rows, dtype=torch.float64).log()
