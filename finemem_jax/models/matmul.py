"""Products of hidden states with weights, whose gradients transpose as little as they can. Knows nothing of layers.

Sizes: T tokens, in any number of leading axes; I channels in, O channels out.
"""

import jax
from jaxtyping import Float

from finemem_jax.models.logical_axes import Array


@jax.custom_vjp
def project(states: Float[Array, "*T I"], weight: Float[Array, "I O"]) -> Float[Array, "*T O"]:
    """states @ weight. Only reverse-mode derivatives are defined.

        d states = d out · weightᵀ        d weight = statesᵀ · d out

    On a CPU one operand of the weight's gradient is copied transposed, and whatever is element-wise before it is
    computed again in that slow order: JAX's own rule always has that happen to `d out`, which behind a gate is the
    widest array of a layer. Here it is whichever has fewer channels; a layer of SmolLM2 takes a quarter less time.
    A TPU's compiled update needs the same memory and sends the same bytes either way.
    """
    return states @ weight


def _forward(states, weight):
    # Kept is only what the wanted slopes need: with adapters, weights are frozen.
    kept = states.value if weight.perturbed else None, weight.value if states.perturbed else None
    return states.value @ weight.value, kept


def _backward(kept, slope):
    states, weight = kept
    return None if weight is None else slope @ weight.T, None if states is None else _weight_slope(states, slope)


def _weight_slope(states, slope):
    tokens = tuple(range(states.ndim - 1))

    def over_tokens(a, b):
        return jax.lax.dot_general(a, b, ((tokens, tokens), ((), ())))

    narrow = states.shape[-1] <= slope.shape[-1]
    return over_tokens(states, slope) if narrow else over_tokens(slope, states).T


project.defvjp(_forward, _backward, symbolic_zeros=True)
