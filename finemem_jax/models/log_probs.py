"""Log-probabilities and entropies of given tokens, without ever holding all logits. Knows nothing of losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from finemem_jax.models.attention import Array


def token_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    temperature: Float[Array, ""],
    block: int = 256,
) -> tuple[Float[jax.Array, " N"], Float[jax.Array, " N"]]:
    """log softmax(head · hidden / temperature)[target] and the entropy of that distribution, in nats.

    Works on `block` tokens at a time and recomputes their logits in the backward pass: float32 logits of 3,000
    tokens over SmolLM2's vocabulary would take 600 MB, one block takes 50 MB.
    """
    n = hidden.shape[0]
    padding = -n % block
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))

    @jax.checkpoint
    def one(args):
        states, ids = args
        logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32) / temperature
        normalised = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(normalised, ids[:, None], axis=1)[:, 0]
        return chosen, -(jnp.exp(normalised) * normalised).sum(-1)

    log_probs, entropy = jax.lax.map(one, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
    return log_probs.reshape(-1)[:n], entropy.reshape(-1)[:n]
