"""finemem_jax: reinforcement learning of memory managers for language models, in JAX."""
