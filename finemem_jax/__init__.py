"""finemem_jax: reinforcement learning of memory managers for language models, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finemem_jax.serving.agent import MemoryAgent as MemoryAgent


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: who wants a module of ours need not wait for what an agent takes.
    if name == "MemoryAgent":
        from finemem_jax.serving.agent import MemoryAgent

        return MemoryAgent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
